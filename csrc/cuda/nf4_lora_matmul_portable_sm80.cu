// A few tokens through a 4-bit linear layer with a low-rank update, in two launches, for every card
// from compute capability 8.0 on.
//
//     y[m, n] = sum_k x[m, k] W[n, k] + sum_j T(s_j z[m, j]) lora_B[n, j] + bias[n]
//
// Operands: see nf4_lora_matmul.h and weight.h (flat, K % 64 == 0, N % 16 == 0, r <= 64). T = bf16
// or fp16. Codebook values are rounded to T and multiplied on the tensor cores into fp32; absmax is
// applied in fp32 to the sum over a block of 64 codes or, with more than 16 tokens, to the codebook
// values in T (one more rounding, 2.9e-3 instead of 2.0e-3 of relative error in bf16). y is rounded
// once. Sums have a fixed order: the result depends on the number of SMs, not on timing.
//
// Two launches. project_tokens_kernel makes partial sums of z and clears flags;
// nf4_lora_matmul_portable_kernel has one CTA per SM, with an equal share of the weight: see
// nf4_lora_matmul_shares.cuh. W is the first operand of mma.sync, 16 rows by 16 columns, so that 8
// tokens are enough to fill an instruction. A warp reads its codes straight from memory, 64 bytes
// of 32 rows at a time and the next ones while it works on these: nobody shares them. x is shared
// by the warps of a tile and comes by cp.async. Any order of k within a block is as good as
// another: a lane multiplies codes in the order in which they lie in its 8 bytes, with 16
// neighbouring elements of x.
//
// Bound by weight bytes (0.516 N K with nested scales) as long as an SM decodes as fast as they
// come. Per 1024 codes the pipe to shared memory and L1 is busy for 16 clocks with lookups, about
// 12 with codes and scales and half as many as there are tokens with x. Callers have checked sizes,
// dtypes and devices; serves_* says what is left.

#include "nf4_lora_matmul_portable.h"

#include <algorithm>

#include "launch_config.h"
#include "nf4_lora_matmul_portable_finish.cuh"
#include "nf4_lora_matmul_portable_project.cuh"
#include "nf4_lora_matmul_portable_tile.cuh"

namespace lowbit::cuda {
namespace {

// What all warps look up: pair table, nested codebook, z. Loads come before stores, so that they
// are in flight together.
template <typename T, typename Tile>
__device__ __forceinline__ void
fill_tables(const Problem& p, uint32_t smem, ScaleStream (&scales)[kRowTiles]) {
    PairTable<T, kThreads> table;
    table.load(p.w.codebook);
    if (p.w.absmax == nullptr) {
        const float offset = __ldg(p.w.nested_offset);
        for (ScaleStream& stream : scales)
            stream.offset = offset;
        if (threadIdx.x < 256)
            store_shared(
                smem + Tile::kNestedCodebook + threadIdx.x * 4,
                __ldg(p.w.nested_codebook + threadIdx.x));
    }
    table.store(smem);
    if (p.r > 0 && token_tiles<Tile>(p) == 1)
        gather_z<T, Tile>(p, smem, 0, blockIdx.x == 0, kThreads);
}

// One block of K, `b` of a step, for the rows of a warp. lines: of x, for token g of this lane's
// quad.
template <typename T, typename Tile>
__device__ __forceinline__ void multiply(
    float (&sums)[Tile::kSums],
    const Blocks (&codes)[kRowTiles][2],
    const ScaleStream (&scales)[kRowTiles],
    const uint8_t* table,
    uint32_t lines,
    int block,
    int b,
    bool has_token) {
    const int t = threadIdx.x % 4, odd = threadIdx.x / 4 % 2;
    float of_block[Tile::kSums] = {};
    float2 scale[kRowTiles];
#pragma unroll
    for (int j = 0; j < kRowTiles; j++)
        scale[j] = scales[j].pair(block + b);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint4 x[Tile::kColumns];
#pragma unroll
        for (int n = 0; n < Tile::kColumns; n++) {
            const uint32_t line = lines + (b * Tile::kTokens + 8 * n) * kTableStride;
            x[n] = make_uint4(0, 0, 0, 0);
            if (Tile::kColumns > 1 || has_token)
                x[n] = load_shared(line + ((2 * t + half) ^ odd) * 16);
        }
#pragma unroll
        for (int j = 0; j < kRowTiles; j++) {
            const uint2 low = codes[j][0].of[b], high = codes[j][1].of[b];
            uint32_t a[2][4];
            look_up(a, table, half == 0 ? low.x : low.y, half == 0 ? high.x : high.y);
            if constexpr (Tile::kScaleWeight) {
#pragma unroll
                for (int e = 0; e < 8; e++)
                    a[e / 4][e % 4] =
                        scale_pair(a[e / 4][e % 4], e % 2 == 0 ? scale[j].x : scale[j].y, T{});
            }
            float* const to = Tile::kScaleWeight ? sums : of_block;
#pragma unroll
            for (int n = 0; n < Tile::kColumns; n++) {
                float (&d)[4] = quad(to, j * Tile::kColumns + n);
                mma_16x8x16(d, a[0], x[n].x, x[n].y, T{});
                mma_16x8x16(d, a[1], x[n].z, x[n].w, T{});
            }
        }
    }
    if constexpr (!Tile::kScaleWeight) {
#pragma unroll
        for (int i = 0; i < Tile::kSums; i++) {
            const float2 s = scale[i / Tile::kTileSums];
            sums[i] = fmaf(of_block[i], i % 4 < 2 ? s.x : s.y, sums[i]);
        }
    }
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(kThreads, 1)
    nf4_lora_matmul_portable_kernel(const __grid_constant__ Problem p) {
    extern __shared__ __align__(1024) uint8_t smem_bytes[];
    const uint32_t smem = shared_address(smem_bytes);
    const int lane = threadIdx.x % kWarpSize, g = lane / 4;
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0);
    const int row_group = warp % Tile::kRowGroups, group = warp / Tile::kRowGroups;
    const Piece piece = piece_of(p.shares, blockIdx.x);
    const auto row_tile = [&](int tile) {
        return Tile::kOneTokenTile ? tile : divide(tile, p.by_token_tiles);
    };
    const auto first_row = [&](int tile) {
        return row_tile(tile) * Tile::kRows + row_group * kWarpRows;
    };
    const auto first_token = [&](int tile) {
        return (tile - row_tile(tile) * token_tiles<Tile>(p)) * Tile::kTokens;
    };
    // In the segment that ends with unit `end`.
    const auto run_to = [&](int end) {
        const Segment s(piece.begin, end, p.shares);
        return Run{first_row(s.tile), first_token(s.tile), s.first * Tile::kUnit, s.count};
    };
    const auto block_at = [&](const Run& run, int unit) {
        return run.block0 + (group * run.count + unit) * kStepBlocks;
    };

    ScaleStream scales[kRowTiles] = {
        {p.w, smem + Tile::kScales + warp * Tile::kWarpScales, smem + Tile::kNestedCodebook},
        {p.w, smem + Tile::kScales + warp * Tile::kWarpScales + kScaleBytes,
         smem + Tile::kNestedCodebook}};
    const auto fetch_scales = [&](int row0, int chunk) {
#pragma unroll
        for (int j = 0; j < kRowTiles; j++)
            scales[j].fetch(row0 + 16 * j, chunk);
    };
    Run run = run_to(piece.end);
    copy_tokens<T, Tile>(p, run, 0, smem, 0);
    commit_async();
    Codes codes;
    codes.load(p, run.row0, block_at(run, 0));
    fetch_scales(run.row0, block_at(run, 0) / kChunkBlocks);
    fill_tables<T, Tile>(p, smem, scales);

    int buffer = 0;
    for (int end = piece.end; end > piece.begin;) {
        const Segment s(piece.begin, end, p.shares);
        end -= s.count;
        if (p.r > 0 && s.finishes && group == 0 && run.row0 + lane < p.w.N)
            prefetch_l2(
                static_cast<const T*>(p.lora_B) + static_cast<int64_t>(run.row0 + lane) * p.r);
        float sums[Tile::kSums] = {};
        for (int unit = 0; unit < s.count; unit++) {
            const int block = block_at(run, unit);
            const bool last = unit + 1 == s.count, more = !last || end > piece.begin;
            const int next_unit = last ? 0 : unit + 1;
            // The following chunk of scales, or the next segment's first.
            int chunk = block / kChunkBlocks + 1, chunk_row0 = run.row0;
            const bool begins = unit == 0 || block % kChunkBlocks == 0;
            bool fetches = begins && chunk * kChunkBlocks < block_at(run, s.count);
            const bool looks_ahead = begins && !fetches;
            if (end > piece.begin && (last || looks_ahead)) {
                const Run next = run_to(end);
                if (looks_ahead)
                    chunk = block_at(next, 0) / kChunkBlocks, chunk_row0 = next.row0;
                fetches |= looks_ahead;
                if (last)
                    run = next;
            }
            wait_async<0>();
            __syncthreads();  // x has come for all, and nobody reads the other buffer
            if (more)
                copy_tokens<T, Tile>(p, run, next_unit, smem, buffer ^ 1);
            commit_async();
            if (begins) {
#pragma unroll
                for (int j = 0; j < kRowTiles; j++)
                    scales[j].publish();
            }
            if (fetches)
                fetch_scales(chunk_row0, chunk);
            Blocks halves[kRowTiles][2];
#pragma unroll
            for (int j = 0; j < 2 * kRowTiles; j++)
                halves[j / 2][j % 2] = exchange_halves(codes.rows[j / 2][j % 2]);
            const int line = group * kStepBlocks * Tile::kTokens + g;
            const uint32_t lines = smem + token_line<Tile>(buffer, line);
#pragma unroll
            for (int b = 0; b < kStepBlocks; b++) {
                // Not before some of the codes' registers are free.
                if (b == kStepBlocks - 1 && more)
                    codes.load(p, run.row0, block_at(run, next_unit));
                multiply<T, Tile>(sums, halves, scales, smem_bytes, lines, block, b, g < p.M);
            }
            buffer ^= 1;
        }

        if constexpr (Tile::kGroups > 1)
            add_groups<Tile>(sums, group, scales[0].smem);
        if (group > 0)
            continue;
        if (!s.finishes) {
            store_partial<Tile>(sums, p, blockIdx.x);
            continue;
        }
        const int row0 = first_row(s.tile), token0 = first_token(s.tile);
        const int tile_begin = s.tile * p.shares.units;
        if (p.r > 0) {
            if (token_tiles<Tile>(p) > 1) {
                named_barrier(kFinishBarrier, Tile::kFinishers);
                gather_z<T, Tile>(p, smem, token0, row0 < Tile::kRows, Tile::kFinishers);
                named_barrier(kFinishBarrier, Tile::kFinishers);
            }
            add_low_rank<T, Tile>(sums, p, row0, smem);
        }
        if (end > tile_begin)
            add_partials<Tile>(sums, p, blockIdx.x, tile_begin);
#pragma unroll
        for (int j = 0; j < kRowTiles; j++)
            store_y<T>(
                reinterpret_cast<const float (&)[Tile::kTileSums]>(sums[j * Tile::kTileSums]), p,
                row0 + 16 * j, token0);
    }
}

// ---- host ---------------------------------------------------------------------------------------

constexpr int64_t kMostTokens = 256;

struct Plan {
    int tokens;  // of a tile
    int groups;
    int token_tiles;
    int units;
    int tiles;
    int slices;
    int ctas;
};

Plan make_plan(const LoraMatmulArgs& a) {
    Plan plan{};
    plan.tokens = a.M <= 8 ? 8 : a.M <= 16 ? 16 : 32;
    plan.groups = plan.tokens == 32 ? 2 : 4;
    const int64_t blocks = a.w.K / kBlock;
    const int rows = kWarpRows * (kWarps / plan.groups);
    plan.token_tiles = static_cast<int>(ceil_div(a.M, plan.tokens));
    plan.units = static_cast<int>(ceil_div(blocks, kStepBlocks * plan.groups));
    plan.tiles = static_cast<int>(ceil_div(a.w.N, rows)) * plan.token_tiles;
    plan.slices = static_cast<int>(std::min<int64_t>(ceil_div(blocks, kProjectWarps), kMaxSlices));
    plan.ctas = std::min(sm_count(), plan.units * plan.tiles);
    return plan;
}

struct Workspace {
    size_t partial_z, flags, partials, bytes;
};

Workspace layout_workspace(const LoraMatmulArgs& a, const Plan& plan) {
    constexpr size_t kAlignment = 256;
    const auto round_up = [](size_t bytes) {
        return (bytes + kAlignment - 1) / kAlignment * kAlignment;
    };
    Workspace s{};
    const size_t rows = kWarpRows * (kWarps / plan.groups);
    const size_t z = a.lora_A == nullptr ? 0 : static_cast<size_t>(padded_rank(a.r));
    s.flags = round_up(sizeof(float) * plan.slices * plan.token_tiles * plan.tokens * z);
    s.partials = s.flags + round_up(plan.ctas * sizeof(uint32_t));
    s.bytes = s.partials + sizeof(float) * plan.ctas * rows * plan.tokens;
    return s;
}

template <typename T, int kTokens, int kGroups>
cudaError_t launch_matmul(const Problem& problem, int ctas, cudaStream_t stream) {
    using Shape = Tile<kTokens, kGroups>;
    constexpr auto kKernel = nf4_lora_matmul_portable_kernel<T, Shape>;
    const cudaError_t error = allow_shared_memory<kKernel>(Shape::kBytes);
    if (error != cudaSuccess)
        return error;
    return launch_in_order(kKernel, ctas, kThreads, Shape::kBytes, stream, problem);
}

template <typename T>
cudaError_t launch(const LoraMatmulArgs& a, cudaStream_t stream) {
    const Plan plan = make_plan(a);
    const Workspace space = layout_workspace(a, plan);
    uint8_t* const workspace = static_cast<uint8_t*>(a.workspace);
    Projection projection{};
    projection.x = a.x;
    projection.lora_A = a.lora_A;
    projection.partial_z = reinterpret_cast<float*>(workspace + space.partial_z);
    projection.flags = reinterpret_cast<uint32_t*>(workspace + space.flags);
    projection.flag_count = plan.ctas;
    projection.K = a.w.K;
    projection.M = static_cast<int>(a.M);
    projection.r = a.r;
    projection.slices = plan.slices;
    const cudaError_t error =
        launch_projection<T>(projection, plan.token_tiles * plan.tokens, stream);
    if (error != cudaSuccess)
        return error;

    Problem problem{};
    problem.w = a.w;
    problem.x = a.x;
    problem.lora_B = a.lora_B;
    problem.bias = a.bias;
    problem.partial_z = projection.partial_z;
    problem.z_in = a.z_in;
    problem.z_out = a.z_out;
    problem.lora_scaling = a.lora_scaling;
    problem.scaling = a.scaling;
    problem.z_slices = plan.slices;
    problem.partials = reinterpret_cast<float*>(workspace + space.partials);
    problem.flags = projection.flags;
    problem.mark = 1;
    problem.y = a.y;
    problem.M = static_cast<int>(a.M);
    problem.r = a.r;
    problem.by_rank = make_divisor(std::max(16, padded_rank(a.r)));
    problem.blocks = static_cast<int>(a.w.K / kBlock);
    problem.row_bytes = static_cast<int>(a.w.K / 2);
    problem.token_tiles = plan.token_tiles;
    problem.by_token_tiles = make_divisor(plan.token_tiles);
    problem.shares = make_shares(plan.units, plan.tiles, plan.ctas);
    switch (plan.tokens) {
    case 8:
        return launch_matmul<T, 8, 4>(problem, plan.ctas, stream);
    case 16:
        return launch_matmul<T, 16, 4>(problem, plan.ctas, stream);
    case 32:
        return launch_matmul<T, 32, 2>(problem, plan.ctas, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace

bool serves_nf4_lora_matmul_portable(const LoraMatmulArgs& a) {
    const WeightView& w = a.w;
    return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8 && is_aligned(w.qweight) &&
           is_aligned(w.absmax) && is_aligned(w.absmax_8bit, 4) && a.M >= 1 && a.M <= kMostTokens &&
           a.dtype != Dtype::kFloat32 && w.flat && w.K % kBlock == 0 && w.N % 16 == 0 && w.N > 0 &&
           w.K > 0 && w.blocksize_log2 >= 6 && a.r >= 0 && a.r <= kMaxRank &&
           w.N / 64 * w.K < (int64_t{1} << 31);
}

size_t nf4_lora_matmul_portable_workspace_bytes(const LoraMatmulArgs& a) {
    return layout_workspace(a, make_plan(a)).bytes;
}

cudaError_t launch_nf4_lora_matmul_portable(const LoraMatmulArgs& a, cudaStream_t stream) {
    return a.dtype == Dtype::kBFloat16 ? launch<__nv_bfloat16>(a, stream)
                                       : launch<__half>(a, stream);
}

}  // namespace lowbit::cuda
