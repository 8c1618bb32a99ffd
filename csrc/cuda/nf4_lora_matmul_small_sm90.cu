// A few tokens through a 4-bit linear layer with a low-rank update, in one launch.
//
//     y[m, n] = sum_k x[m, k] W[n, k] + sum_j T(s_j z[m, j]) lora_B[n, j] + bias[n],  M = 2..64
//
// Operands: see nf4_lora_matmul.h and weight.h (flat, K % 64 == 0, N % 16 == 0, r <= 64). T = bf16
// or fp16. Codebook values are rounded to T and multiplied on the tensor cores into fp32; absmax is
// applied in fp32 to the sum over a block of 64 codes or, with more than 32 tokens, to the codebook
// values in T (one more rounding, 2.9e-3 instead of 2.0e-3 of relative error in bf16). y is rounded
// once. Sums have a fixed order: the result depends on the number of SMs, not on timing.
//
// At most one CTA per SM, each with an equal share of the weight: the tiles of 64, 128 or 256 rows,
// cut along K into units, form one sequence, and a CTA takes a contiguous piece of it. make_plan
// chooses tile height and CTAs; four that compute z are more, of which a full device has the last
// wait for an SM.
//
//     CTA    |---- 0 ----|---- 1 ----|---- 2 ----|
//     tile   |---- 0 ----+-|-- 1 ------+---|--- 2
//
// It walks its piece from the end. So what it contributes to a tile that a later CTA finishes comes
// first, and has long been in the workspace when that CTA, coming to the tile last, adds it. TMA
// brings codes and x, padded with zero tokens to 8, 16, 32 or 64, as they are. With an adapter four
// more CTAs in front compute z and nothing else (nf4_lora_matmul_small_z.cuh), a slice of K each;
// the others add it to their first finished tile at the earliest, and by then it is there.
//
// Who waits for whom: a CTA that finishes a tile for z, and for CTAs before it that have begun the
// tile. Those that compute z wait for nobody, but for the last of them, which waits for the others
// where it adds z up for all; and nobody waits before storing sums for another. So CTAs wait for
// lower numbers only, which the device starts first, and for what these do before they wait for
// anything but these: no CTA needs another that has not started, however few SMs there are and
// whatever else runs on them.
//
// A word in the workspace for each such hand-over says that it has happened. There is no launch in
// front to clear it, and memory may hold anything; so it says so by holding the launch's mark
// (next_mark). Data is stored before the mark is released, and loaded after it was acquired; with
// up to 16 tokens each two sums of a tile and their own mark are one access of 16 bytes. Each word
// has one thread that waits for it, which sets it back: when a launch ends no word holds its mark,
// and the runs of a captured graph, which all have the same one, find what the first one found.
// (Two runs at once of what was captured once share y, too: CUDA and torch rule that out.) Nothing
// touches the workspace before griddepcontrol.wait, that is, while the kernel before, perhaps of
// another such call in the same memory, may still be at it.
//
// Bound by weight bytes (0.516 N K with nested scales) as long as an SM decodes as fast as they
// come, 22 codes per clock and SM. Per 4096 codes its shared memory is busy for 64 clocks with
// lookups, about 56 with staging codes and scales, and kTokens with the products' reads of x: at 64
// tokens that is the limit. Callers have checked sizes, dtypes and devices; serves_* says what is
// left.

#include "nf4_lora_matmul_small.h"

#include <algorithm>

#include "bulk_sm90.cuh"
#include "launch_config.h"
#include "marks.h"
#include "nf4_lora_matmul_small_decode.cuh"
#include "nf4_lora_matmul_small_finish.cuh"
#include "nf4_lora_matmul_small_plan.h"
#include "nf4_lora_matmul_small_tile.cuh"
#include "nf4_lora_matmul_small_z.cuh"
#include "tensor_map.h"
#include "wgmma_sm90.cuh"

namespace lowbit::cuda {
namespace {

// One thread: codes and tokens of all stages, in the order the consumers want them.
template <typename Tile>
__device__ __forceinline__ void
copy_stages(const Problem& p, const Maps& maps, int cta, uint32_t smem) {
    const uint32_t full = smem + Tile::kBarriers, empty = full + 8 * Tile::kStages;
    const Piece piece = piece_of(p.shares, cta);
    const auto block_of = [](const Segment& s, int group, int i) {
        return s.first * Tile::kUnit + (group * s.count + i) * kUnitBlocks;
    };
    prefetch_map(maps.x);
    {
        const Segment s(piece.begin, piece.end, p.shares);
        const int count = min(s.count, kPrefetchStages);
        for (int i = 0; i < count; i++) {
            for (int group = 0; group < Tile::kGroups; group++)
                prefetch_tile_l2(
                    maps.codes, block_of(s, group, i) * (kBlock / 8), s.tile * Tile::kRows);
        }
    }
    wait_for_previous_kernel();
    int stage = 0, phase = 0;
    for (int end = piece.end; end > piece.begin;) {
        const Segment s(piece.begin, end, p.shares);
        for (int i = 0; i < s.count; i++) {
            barrier_wait(empty + 8 * stage, phase ^ 1);
            barrier_arrive_expect(full + 8 * stage, Tile::kStageBytes);
            const uint32_t codes = smem + Tile::kStage0 + stage * Tile::kStageBytes;
            for (int group = 0; group < Tile::kGroups; group++) {
                const int block = block_of(s, group, i);
                load_tile_once(
                    codes + group * Tile::kBoxBytes, maps.codes, block * (kBlock / 8),
                    s.tile * Tile::kRows, full + 8 * stage);
                load_tile(
                    codes + Tile::kWeightBytes + group * Tile::kTokenBytes, maps.x, 0, 0, block,
                    full + 8 * stage);
            }
            if (++stage == Tile::kStages)
                stage = 0, phase ^= 1;
        }
        end -= s.count;
    }
}

// What all consumers look up: pair table, nested codebook. Loads come before stores, so that
// they are in flight together.
template <typename T, typename Tile>
__device__ __forceinline__ void fill_tables(const Problem& p, uint32_t smem, ScaleStream& scales) {
    PairTable<T, kConsumers> table;
    table.load(p.w.codebook);
    float nested_value = 0.0f;
    if (p.w.absmax == nullptr) {
        scales.offset = __ldg(p.w.nested_offset);
        nested_value = __ldg(p.w.nested_codebook + threadIdx.x % 256);
    }
    table.store(smem);
    if (threadIdx.x < 256)
        store_shared(smem + Tile::kNestedCodebook + threadIdx.x * 4, nested_value);
    named_barrier(kTablesBarrier, kConsumers);
}

// Rows of lora_B that belong to a warp's, and their bias.
template <typename T>
__device__ __forceinline__ void prefetch_ending(const Problem& p, int row0) {
    const int lane = opaque(threadIdx.x % kWarpSize), row = row0 + lane / 2;
    if (row >= p.w.N)
        return;
    if (p.r > 0)
        prefetch_l2(
            static_cast<const T*>(p.lora_B) + static_cast<int64_t>(row) * p.r +
            lane % 2 * (p.r / 2));
    if (p.bias != nullptr && lane == 0)
        prefetch_l2(static_cast<const T*>(p.bias) + row);
}

// Four warpgroups, each with 64 rows of the tile and a share of K: codes to operands, products,
// sums.
template <typename T, typename Tile>
__device__ __forceinline__ void consume(const Problem& p, int cta, uint32_t smem) {
    const uint32_t full = smem + Tile::kBarriers, empty = full + 8 * Tile::kStages;
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0);
    const int row_group = warp / 4 % Tile::kRowGroups, group = warp / 4 / Tile::kRowGroups;
    const int warp_row = row_group * 64 + warp % 4 * 16;  // of the tile
    const Piece piece = piece_of(p.shares, cta);

    // Codes lie as [rows][64 bytes] under the 64-byte swizzle: 16-byte chunk c of row n at c ^ (n /
    // 2 % 4). Within a box row_of(g) + 2 and the second block flip one bit each.
    const int row = warp_row + row_of(g);
    const uint32_t codes = group * Tile::kBoxBytes + row * 64 + row / 2 % 4 * 16;
    const uint32_t lane_bits = (smem & 0xffff0000u) | (lane * 4), select = 0x7604u | t << 4;
    const uint32_t tokens = Tile::kWeightBytes + group * Tile::kTokenBytes;

    ScaleStream scales(
        p.w, smem + Tile::kScales + warp * kScaleBytes, smem + Tile::kNestedCodebook);
    const auto first_block = [&](const Segment& s) {
        return s.first * Tile::kUnit + group * s.count * kUnitBlocks;
    };
    {
        const Segment s(piece.begin, piece.end, p.shares);
        const int row0 = s.tile * Tile::kRows + warp_row, chunk = first_block(s) / kChunkBlocks;
        scales.prefetch(row0, chunk);
        wait_for_previous_kernel();
        scales.fetch(row0, chunk);
    }
    fill_tables<T, Tile>(p, smem, scales);

    int stage = 0, phase = 0;
    for (int end = piece.end; end > piece.begin;) {
        const Segment s(piece.begin, end, p.shares);
        end -= s.count;
        const int row0 = s.tile * Tile::kRows + warp_row;
        const int block0 = first_block(s), block_end = block0 + s.count * kUnitBlocks;
        if (s.finishes && group == 0)
            prefetch_ending<T>(p, row0);
        float sums[Tile::kSums] = {}, of_block[Tile::kSums] = {};
        float2 pending = {0.0f, 0.0f};  // scales of the product under way
        uint32_t a[2][16];
        int previous = 0;
        for (int i = 0; i < s.count; i++) {
            const int block = block0 + i * kUnitBlocks;
            if (i == 0 || block % kChunkBlocks == 0) {
                scales.publish();
                const int next = block / kChunkBlocks + 1;
                if (next * kChunkBlocks < block_end) {
                    scales.fetch(row0, next);
                } else if (end > piece.begin) {
                    const Segment following(piece.begin, opaque(end), p.shares);
                    scales.fetch(
                        following.tile * Tile::kRows + warp_row,
                        first_block(following) / kChunkBlocks);
                }
            }
            const uint32_t base = smem + Tile::kStage0 + stage * Tile::kStageBytes;
            barrier_wait(full + 8 * stage, phase);
#pragma unroll
            for (int j = 0; j < kUnitBlocks; j++) {
                const uint32_t at = base + (codes ^ (32 * j));
                decode_block(a[j], at, lane_bits, select);
                const float2 scale = scales.pair(block + j);
                if constexpr (Tile::kScaleWeight) {
                    const uint32_t low = pack_pair(scale.x, scale.x, T{});
                    const uint32_t high = pack_pair(scale.y, scale.y, T{});
#pragma unroll
                    for (int e = 0; e < 16; e++)
                        a[j][e] = multiply_pair(a[j][e], e % 2 == 0 ? low : high, T{});
                }
                wgmma_wait<0>();
                if (!Tile::kScaleWeight)
                    add_scaled(sums, of_block, pending);
                if (j == 0 && i > 0 && lane == 0)
                    barrier_arrive(empty + 8 * previous);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const uint64_t x = own_operand_descriptor(
                        base + tokens + j * Tile::kTokens * kTokenRow + k * 32);
                    if constexpr (Tile::kScaleWeight)
                        wgmma(sums, a[j] + 4 * k, x, true, T{});
                    else
                        wgmma(of_block, a[j] + 4 * k, x, k > 0, T{});
                }
                wgmma_commit();
                pending = scale;
            }
            previous = stage;
            if (++stage == Tile::kStages)
                stage = 0, phase ^= 1;
        }
        // With few tokens there is room for lora_B and the bias while sums come together.
        Factor factor;
        T bias[2];
        if (Tile::kMarkSums && p.r > 0 && s.finishes && group == 0)
            load_factor<T>(factor, p, row0);
        if (Tile::kMarkSums && p.bias != nullptr && s.finishes && group == 0)
            load_bias(bias, p, min(row0, static_cast<int>(p.w.N) - 16), g);
        wgmma_wait<0>();
        if (!Tile::kScaleWeight)
            add_scaled(sums, of_block, pending);
        if (lane == 0)
            barrier_arrive(empty + 8 * previous);

        if constexpr (Tile::kGroups > 1)
            add_groups<Tile>(sums, group, row_group, smem);
        if (group > 0)
            continue;
        if (!s.finishes)
            hand_over<Tile>(sums, p, cta);
        else
            finish_tile<T, Tile>(sums, factor, bias, p, s, piece, cta, row0, smem);
    }
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(kThreads, 1)
    nf4_lora_matmul_small_kernel(const Problem p, const __grid_constant__ Maps maps) {
    extern __shared__ __align__(1024) uint8_t smem_bytes[];
    const uint32_t smem = shared_address(smem_bytes);
    if ((smem & 0xffffu) != kSharedStart)
        __trap();
    let_next_kernel_start();
    if (blockIdx.x < p.projectors) {
        if (threadIdx.x < kConsumers)
            project<T, Tile>(p, maps, smem);
        return;
    }
    const int cta = blockIdx.x - p.projectors;
    if (threadIdx.x == 0) {
        const uint32_t full = smem + Tile::kBarriers;
        for (int i = 0; i < Tile::kStages; i++) {
            barrier_init(full + 8 * i, 1);
            barrier_init(full + 8 * (Tile::kStages + i), kConsumerWarps);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x >= kConsumers) {
        shrink_registers<kCopyRegisters>();
        // Not elect_lane(): 1.7 to 2 % more cycles (H200, 2026-11).
        if (threadIdx.x == kConsumers)
            copy_stages<Tile>(p, maps, cta, smem);
        else if (threadIdx.x >= kConsumers + kWarpSize && p.r > 0)
            gather_z<T, Tile>(p, cta, smem);
    } else {
        grow_registers<kConsumerRegisters>();
        consume<T, Tile>(p, cta, smem);
    }
}

// ---- host ---------------------------------------------------------------------------------------

template <typename T, int kTokens, int kRowGroups>
cudaError_t launch_kernel(const LoraMatmulArgs& a, Problem& problem, cudaStream_t stream) {
    using Shape = Tile<kTokens, kRowGroups>;
    constexpr auto kKernel = nf4_lora_matmul_small_kernel<T, Shape>;
    const CUtensorMapDataType type = tensor_map_type(a.dtype);
    const WeightView& w = a.w;
    Maps maps{};
    cudaError_t error = make_tensor_map(
        maps.codes, CU_TENSOR_MAP_DATA_TYPE_UINT32, w.qweight, w.N, w.K / 8,
        {Shape::kRows, kUnitBlocks * kBlock / 8}, CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
    if (error == cudaSuccess)
        error = make_block_map(maps.x, type, a.x, a.M, w.K, kTokens, kUnitBlocks);
    if (problem.projectors > 0) {
        problem.project_stages = project_stages<Shape>(a.r);
        if (error == cudaSuccess)
            error = make_block_map(
                maps.lora_A, type, a.lora_A, a.r, w.K, padded_rank(a.r), kUnitBlocks);
    }
    if (error == cudaSuccess)
        error = allow_shared_memory<kKernel>(Shape::kBytes);
    if (error != cudaSuccess)
        return error;
    const LaunchConfig config(problem.projectors + problem.ctas, kThreads, Shape::kBytes, stream);
    return cudaLaunchKernelEx(config.get(), kKernel, problem, maps);
}

template <typename T>
cudaError_t launch(const LoraMatmulArgs& a, const Plan& plan, cudaStream_t stream) {
    const Workspace space = layout_workspace(a, plan);
    uint8_t* const workspace = static_cast<uint8_t*>(a.workspace);
    Problem problem{};
    problem.w = a.w;
    problem.lora_B = a.lora_B;
    problem.bias = a.bias;
    problem.projectors = projectors_of(a);
    problem.partial_z = reinterpret_cast<float*>(workspace);
    problem.z_in = a.z_in;
    problem.z_out = a.z_out;
    problem.lora_scaling = a.lora_scaling;
    problem.scaling = a.scaling;
    problem.partials = reinterpret_cast<float*>(workspace + space.partials);
    problem.flags = reinterpret_cast<uint64_t*>(workspace + space.flags);
    problem.z_flags = reinterpret_cast<uint64_t*>(workspace + space.z_flags);
    problem.mark = next_mark();
    problem.y = a.y;
    problem.M = static_cast<int>(a.M);
    problem.r = a.r;
    problem.by_rank = make_divisor(std::max(16, padded_rank(a.r)));
    problem.ctas = plan.ctas;
    problem.shares = make_shares(units_of(a, plan), tiles_of(a, plan), plan.ctas);
    switch (plan.tokens * 10 + plan.row_groups) {
#define LOWBIT_CASE(TOKENS, GROUPS)                                                                \
    case TOKENS * 10 + GROUPS:                                                                     \
        return launch_kernel<T, TOKENS, GROUPS>(a, problem, stream);
        LOWBIT_CASE(8, 1)
        LOWBIT_CASE(8, 2)
        LOWBIT_CASE(8, 4)
        LOWBIT_CASE(16, 1)
        LOWBIT_CASE(16, 2)
        LOWBIT_CASE(16, 4)
        LOWBIT_CASE(32, 2)
        LOWBIT_CASE(32, 4)
        LOWBIT_CASE(64, 2)
        LOWBIT_CASE(64, 4)
#undef LOWBIT_CASE
    }
    return cudaErrorInvalidValue;
}

}  // namespace

bool serves_nf4_lora_matmul_small(const LoraMatmulArgs& a) {
    const WeightView& w = a.w;
    return device_is_sm90() && is_aligned(a.x) && is_aligned(a.lora_A) && is_aligned(w.qweight) &&
           is_aligned(w.absmax) && is_aligned(w.absmax_8bit, 4) && a.M >= 1 && a.M <= 64 &&
           a.dtype != Dtype::kFloat32 && w.flat && w.K % kBlock == 0 && w.N % 16 == 0 && w.N > 0 &&
           w.K > 0 && w.blocksize_log2 >= 6 && a.r >= 0 && a.r <= kMaxRank &&
           w.N / 64 * w.K < (int64_t{1} << 31);
}

size_t nf4_lora_matmul_small_workspace_bytes(const LoraMatmulArgs& a) {
    return layout_workspace(a, make_plan(a, sm_count())).bytes;
}

cudaError_t launch_nf4_lora_matmul_small(const LoraMatmulArgs& a, cudaStream_t stream) {
    const Plan plan = make_plan(a, sm_count());
    return a.dtype == Dtype::kBFloat16 ? launch<__nv_bfloat16>(a, plan, stream)
                                       : launch<__half>(a, plan, stream);
}

}  // namespace lowbit::cuda
