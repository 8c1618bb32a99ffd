// NF4 dequantize + matmul for a few tokens, with the LoRA branch as one more step along K.
//
//     y[m, n] = sum_k x[m, k] codebook[q[n, k]] absmax[n, k / blocksize]
//             + sum_j T(s_j z[m, j]) lora_B[n, j] + bias[n],   z = x lora_A^T,  M = 2..64
//
// Operands: see nf4_lora_matmul.h and weight.h (flat, K % 64 == 0, N % 16 == 0, r <= 64). T = bf16
// or fp16. Codebook values are rounded to T and multiplied on the tensor cores into fp32; absmax is
// applied in fp32 to the sum over a block of 64 codes or, with more than 32 tokens, to the codebook
// values in T (one more rounding, 2.9e-3 instead of 2.0e-3 of relative error in bf16). y is rounded
// once. Sums have a fixed order: the result depends on the number of SMs, not on timing.
//
// Two launches. pack_tokens_kernel brings x into the order the products read it in, padded with
// zero tokens to 8, 16, 32 or 64, and computes z. matmul_kernel has at most one CTA per SM, and
// each an equal share of the weight: the tiles of 64, 128 or 256 rows, cut along K into units, form
// one sequence, and a CTA takes a contiguous piece of it. make_plan chooses tile height and CTAs.
//
//     CTA    |---- 0 ----|---- 1 ----|---- 2 ----|
//     tile   |---- 0 ----+-|-- 1 ------+---|--- 2
//
// It walks its piece from the end. So what it contributes to a tile that a later CTA finishes comes
// first, and has long been in the workspace when that CTA, coming to the tile last, adds it.
//
// Bound by weight bytes (0.516 N K with nested scales) as long as an SM decodes as fast as they
// come, 22 codes per clock and SM. Per 4096 codes its shared memory is busy for 64 clocks with
// lookups, about 40 with staging codes and scales, and kTokens with the products' reads of x: at 64
// tokens that is the limit. Callers have checked sizes, dtypes and devices; serves_* says what is
// left.

#include "nf4_lora_matmul_small.h"

#include "nf4_lora_matmul_small.cuh"
#include "nf4_lora_matmul_small_decode.cuh"
#include "nf4_lora_matmul_small_finish.cuh"
#include "nf4_lora_matmul_small_pack.cuh"
#include "nf4_lora_matmul_small_tile.cuh"

namespace lowbit::cuda {
namespace {

// One thread: codes and tokens of all stages, in the order the consumers want them.
template <typename Tile>
__device__ __forceinline__ void
copy_stages(const Problem& p, const CUtensorMap& map, uint32_t smem) {
    const uint32_t full = smem + Tile::kBarriers, empty = full + 8 * Tile::kStages;
    const Piece piece = piece_of(blockIdx.x, p.total_units);
    const auto block_of = [](const Segment& s, int group, int i) {
        return s.first * Tile::kUnit + (group * s.count + i) * kUnitBlocks;
    };
    {
        const Segment s(piece.begin, piece.end, p.units);
        const int count = min(s.count, kPrefetchStages);
        for (int i = 0; i < count; i++) {
            for (int group = 0; group < Tile::kGroups; group++)
                prefetch_tile_l2(map, block_of(s, group, i) * (kBlock / 8), s.tile * Tile::kRows);
        }
    }
    wait_for_previous_kernel();
    int stage = 0, phase = 0;
    for (int end = piece.end; end > piece.begin;) {
        const Segment s(piece.begin, end, p.units);
        for (int i = 0; i < s.count; i++) {
            barrier_wait(empty + 8 * stage, phase ^ 1);
            barrier_arrive_expect(full + 8 * stage, Tile::kStageBytes);
            const uint32_t codes = smem + Tile::kStage0 + stage * Tile::kStageBytes;
            for (int group = 0; group < Tile::kGroups; group++) {
                const int block = block_of(s, group, i);
                load_tile(
                    codes + group * Tile::kBoxBytes, map, block * (kBlock / 8),
                    s.tile * Tile::kRows, full + 8 * stage);
                load_bulk(
                    codes + Tile::kWeightBytes + group * Tile::kTokenBytes,
                    p.packed_x + static_cast<int64_t>(block) * Tile::kTokens * kPackRow,
                    Tile::kTokenBytes, full + 8 * stage);
            }
            if (++stage == Tile::kStages)
                stage = 0, phase ^= 1;
        }
        end -= s.count;
    }
}

constexpr int kTablesBarrier = 5;

// What all consumers look up: pair table, nested codebook, z. Loads come before stores, so that
// they are in flight together.
template <typename T, typename Tile>
__device__ __forceinline__ void fill_tables(const Problem& p, uint32_t smem, ScaleStream& scales) {
    PairTable<T> table;
    table.load(p.w.codebook);
    float nested_value = 0.0f;
    if (p.w.absmax == nullptr) {
        scales.offset = __ldg(p.w.nested_offset);
        nested_value = __ldg(p.w.nested_codebook + threadIdx.x % 256);
    }
    if (p.r > 0)
        gather_z<T, Tile>(p, smem);
    table.store(smem);
    if (threadIdx.x < 256)
        store_shared(smem + Tile::kNestedCodebook + threadIdx.x * 4, nested_value);
    named_barrier(kTablesBarrier, kConsumers);
}

// Four warpgroups, each with 64 rows of the tile and a share of K: codes to operands, products,
// sums.
template <typename T, typename Tile>
__device__ __forceinline__ void consume(const Problem& p, uint32_t smem) {
    const uint32_t full = smem + Tile::kBarriers, empty = full + 8 * Tile::kStages;
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0);
    const int row_group = warp / 4 % Tile::kRowGroups, group = warp / 4 / Tile::kRowGroups;
    const int warp_row = row_group * 64 + warp % 4 * 16;  // of the tile
    const Piece piece = piece_of(blockIdx.x, p.total_units);

    // Codes lie as [rows][64 bytes] under the 64-byte swizzle: 16-byte chunk c of row n at c ^ (n /
    // 2 % 4). Within a box row_of(g) + 2 and the second block flip one bit each.
    const int row = warp_row + row_of(g);
    const uint32_t codes =
        group * Tile::kBoxBytes + row * 64 + ((t / 2 ^ (row / 2 % 4)) * 16) + t % 2 * 8;
    const uint32_t lane_bits = (smem & 0xffff0000u) | (lane * 4);
    const uint32_t tokens = Tile::kWeightBytes + group * Tile::kTokenBytes;

    ScaleStream scales(
        p.w, smem + Tile::kScales + warp * kScaleBytes, smem + Tile::kNestedCodebook);
    const auto first_block = [&](const Segment& s) {
        return s.first * Tile::kUnit + group * s.count * kUnitBlocks;
    };
    {
        const Segment s(piece.begin, piece.end, p.units);
        const int row0 = s.tile * Tile::kRows + warp_row, chunk = first_block(s) / kChunkBlocks;
        scales.prefetch(row0, chunk);
        wait_for_previous_kernel();
        scales.fetch(row0, chunk);
    }
    fill_tables<T, Tile>(p, smem, scales);

    int stage = 0, phase = 0;
    for (int end = piece.end; end > piece.begin;) {
        const Segment s(piece.begin, end, p.units);
        end -= s.count;
        const int row0 = s.tile * Tile::kRows + warp_row;
        const int block0 = first_block(s), block_end = block0 + s.count * kUnitBlocks;
        if (p.r > 0 && s.finishes && group == 0 && row0 + lane / 2 < p.w.N)
            prefetch_l2(
                static_cast<const T*>(p.lora_B) + static_cast<int64_t>(row0 + lane / 2) * p.r +
                (lane % 2) * (p.r / 2));
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
                    const Segment following(piece.begin, end, p.units);
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
                decode_block(
                    a[j], load_shared_pair(at), load_shared_pair((at ^ 16) + 128), lane_bits);
                const float2 scale = scales.pair(block + j);
                if constexpr (Tile::kScaleWeight) {
                    const uint32_t low = pack_pair(scale.x, scale.x, T{});
                    const uint32_t high = pack_pair(scale.y, scale.y, T{});
#pragma unroll
                    for (int e = 0; e < 16; e++)
                        a[j][e] = multiply_pair(a[j][e], e % 2 == 0 ? low : high, T{});
                }
                wgmma_wait();
                if (!Tile::kScaleWeight)
                    add_scaled(sums, of_block, pending);
                if (j == 0 && i > 0 && lane == 0)
                    barrier_arrive(empty + 8 * previous);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const uint64_t x =
                        descriptor(base + tokens + j * Tile::kTokens * kPackRow + k * 32);
                    if constexpr (Tile::kScaleWeight)
                        Wgmma<T, Tile::kTokens>::run(sums, a[j] + 4 * k, x, 1);
                    else
                        Wgmma<T, Tile::kTokens>::run(of_block, a[j] + 4 * k, x, k > 0);
                }
                wgmma_commit();
                pending = scale;
            }
            previous = stage;
            if (++stage == Tile::kStages)
                stage = 0, phase ^= 1;
        }
        wgmma_wait();
        if (!Tile::kScaleWeight)
            add_scaled(sums, of_block, pending);
        if (lane == 0)
            barrier_arrive(empty + 8 * previous);

        if constexpr (Tile::kGroups > 1)
            add_groups<Tile>(sums, group, row_group, smem);
        if (group > 0)
            continue;
        if (!s.finishes) {
            store_partial<Tile>(sums, p);
            continue;
        }
        if (p.r > 0)
            add_low_rank<T, Tile>(sums, p, row0, smem + Tile::kZ);
        if (!s.whole)
            add_partials<Tile>(sums, p, s.tile * p.units);
        store_y<T, Tile>(sums, p, row0);
    }
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(kThreads, 1)
    matmul_kernel(const Problem p, const __grid_constant__ CUtensorMap map) {
    extern __shared__ __align__(1024) uint8_t smem_bytes[];
    const uint32_t smem = shared_address(smem_bytes);
    if ((smem & 0xffffu) != kSharedStart)
        __trap();
    let_next_kernel_start();
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
        if (threadIdx.x == kConsumers)
            copy_stages<Tile>(p, map, smem);
    } else {
        grow_registers<kConsumerRegisters>();
        consume<T, Tile>(p, smem);
    }
}

// ---- host ---------------------------------------------------------------------------------------

struct Plan {
    int tokens;      // padded
    int row_groups;  // see Tile
    int ctas;
};

int padded_tokens(int64_t M) {
    return M <= 8 ? 8 : M <= 16 ? 16 : M <= 32 ? 32 : 64;
}

int units_of(const LoraMatmulArgs& a, const Plan& plan) {
    return static_cast<int>(ceil_div(a.w.K / kBlock, kUnitBlocks * (4 / plan.row_groups)));
}

int tiles_of(const LoraMatmulArgs& a, const Plan& plan) {
    return static_cast<int>(ceil_div(a.w.N, 64 * plan.row_groups));
}

// Microseconds the product will take, fitted to layers of 0.4 to 235 million weights (H100,
// 2026-11-24). A unit is 16 KB of codes in every plan.
double estimate(const LoraMatmulArgs& a, const Plan& plan) {
    constexpr double kUnitMemory = 0.00615;  // times the number of CTAs that share the bandwidth
    constexpr double kSegment = 1.0;         // a CTA's change to another tile
    constexpr double kExchange = 0.6;        // CTAs of a tile wait for each other; times row groups
    constexpr double kPartial = 0.4;         // each one's sums, latency
    constexpr double kPartialPerKb = 0.0125;  // and transfer
    const double decode = plan.tokens <= 32 ? 0.75 : plan.row_groups == 4 ? 1.05 : 1.15;
    const double memory = kUnitMemory * plan.ctas;
    const int units = units_of(a, plan), tiles = tiles_of(a, plan);
    const auto per_cta = static_cast<double>(ceil_div(int64_t{units} * tiles, plan.ctas));
    double time = per_cta * (decode > memory ? decode : memory);
    if (plan.ctas % tiles != 0)
        time += kSegment * static_cast<double>(ceil_div(tiles, plan.ctas));
    if (plan.ctas != tiles) {
        const int partials = plan.ctas <= tiles ? 1 : (plan.ctas - 1) / tiles;
        const double kilobytes = plan.row_groups * plan.tokens / 4;
        time += kExchange * plan.row_groups + partials * (kPartial + kPartialPerKb * kilobytes);
    }
    return time;
}

Plan make_plan(const LoraMatmulArgs& a, int sms) {
    Plan best{};
    double best_time = 0.0;
    const auto consider = [&](const Plan& plan) {
        const double time = estimate(a, plan);
        if (best.ctas == 0 || time < best_time)
            best = plan, best_time = time;
    };
    for (const int row_groups : {1, 2, 4}) {
        Plan plan{padded_tokens(a.M), row_groups, 0};
        if (row_groups == 1 && plan.tokens > 16)  // sums of four K groups do not fit
            continue;
        const int tiles = tiles_of(a, plan), units = units_of(a, plan);
        // Equal shares of each tile, or of everything.
        for (int share = 1; share <= units && tiles * share <= sms; share++) {
            plan.ctas = tiles * share;
            consider(plan);
        }
        plan.ctas = int64_t{tiles} * units < sms ? tiles * units : sms;
        consider(plan);
    }
    return best;
}

// Of K, one cluster of pack_tokens_kernel each. Whole units end with a slice at the latest: its 64
// blocks are a multiple of any unit.
int slices_of(const LoraMatmulArgs& a) {
    return static_cast<int>(ceil_div(a.w.K / kBlock, kSliceBlocks));
}

size_t round_up(size_t bytes) {
    return (bytes + 1023) / 1024 * 1024;
}

struct Workspace {
    size_t packed_x, partial_z, flags, partials, bytes;
};

Workspace layout_workspace(const LoraMatmulArgs& a, const Plan& plan) {
    Workspace s{};
    const size_t blocks =
        static_cast<size_t>(units_of(a, plan)) * kUnitBlocks * (4 / plan.row_groups);
    s.packed_x = 0;
    s.partial_z = round_up(blocks * plan.tokens * kPackRow);
    s.flags = s.partial_z + round_up(sizeof(float) * slices_of(a) * plan.tokens * kMaxRank);
    s.partials = s.flags + round_up(plan.ctas * sizeof(uint32_t));
    s.bytes = s.partials + sizeof(float) * plan.ctas * plan.row_groups * 64 * plan.tokens;
    return s;
}

int sm_count() {
    int device = 0, sms = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    return sms;
}

// Codes as [N][K / 8] words, in boxes of [rows][64 bytes].
cudaError_t encode_map(CUtensorMap* map, const WeightView& w, int rows) {
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found{};
        cudaGetDriverEntryPointByVersion(
            "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    if (encode == nullptr)
        return cudaErrorNotSupported;
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(w.K / 8), static_cast<cuuint64_t>(w.N)};
    const cuuint64_t stride = w.K / 2;
    const cuuint32_t box[2] = {kUnitBlocks * kBlock / 8, static_cast<cuuint32_t>(rows)};
    const cuuint32_t steps[2] = {1, 1};
    const CUresult result = encode(
        map, CU_TENSOR_MAP_DATA_TYPE_UINT32, 2, const_cast<uint8_t*>(w.qweight), sizes, &stride,
        box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_64B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

struct Launch {
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute attributes[2]{};

    Launch(dim3 grid, int threads, size_t shared, int cluster, cudaStream_t stream) {
        attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[0].val.programmaticStreamSerializationAllowed = 1;
        attributes[1].id = cudaLaunchAttributeClusterDimension;
        attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
        config.gridDim = grid;
        config.blockDim = dim3(threads);
        config.dynamicSmemBytes = shared;
        config.stream = stream;
        config.attrs = attributes;
        config.numAttrs = cluster > 1 ? 2 : 1;
    }
};

template <typename T, int kTokens, int kRowGroups>
cudaError_t launch_matmul(const Problem& problem, int ctas, cudaStream_t stream) {
    using Shape = Tile<kTokens, kRowGroups>;
    const auto kernel = matmul_kernel<T, Shape>;
    CUtensorMap map;
    cudaError_t error = encode_map(&map, problem.w, Shape::kRows);
    if (error == cudaSuccess)
        error = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kBytes);
    if (error != cudaSuccess)
        return error;
    const Launch launch(dim3(ctas), kThreads, Shape::kBytes, 1, stream);
    return cudaLaunchKernelEx(&launch.config, kernel, problem, map);
}

template <typename T>
cudaError_t launch(const LoraMatmulArgs& a, const Plan& plan, cudaStream_t stream) {
    const Workspace space = layout_workspace(a, plan);
    uint8_t* const workspace = static_cast<uint8_t*>(a.workspace);
    const int units = units_of(a, plan);

    cudaError_t error = cudaSuccess;
    PackProblem pack{};
    pack.a = a;
    pack.packed_x = workspace + space.packed_x;
    pack.partial_z = reinterpret_cast<float*>(workspace + space.partial_z);
    pack.flags = reinterpret_cast<uint32_t*>(workspace + space.flags);
    pack.flag_count = plan.ctas;
    pack.tokens = plan.tokens;
    pack.blocks = static_cast<int>(a.w.K / kBlock);
    pack.packed_blocks = units * kUnitBlocks * (4 / plan.row_groups);
    const int rank_tiles = a.lora_A == nullptr ? 0 : (a.r + 15) / 16;
    const size_t z_bytes = sizeof(float) * (kPackWarps + 1) * 16 * rank_tiles * kPackTokens;
    const Launch packing(
        dim3(kPackCluster * slices_of(a), plan.tokens / kPackTokens), kPackThreads, z_bytes,
        kPackCluster, stream);
    error = cudaLaunchKernelEx(&packing.config, pack_tokens_kernel<T>, pack);
    if (error != cudaSuccess)
        return error;

    Problem problem{};
    problem.w = a.w;
    problem.lora_B = a.lora_B;
    problem.bias = a.bias;
    problem.packed_x = pack.packed_x;
    problem.partial_z = pack.partial_z;
    problem.z_in = a.z_in;
    problem.z_out = a.z_out;
    problem.lora_scaling = a.lora_scaling;
    problem.scaling = a.scaling;
    problem.z_slices = slices_of(a);
    problem.partials = reinterpret_cast<float*>(workspace + space.partials);
    problem.flags = pack.flags;
    problem.y = a.y;
    problem.M = static_cast<int>(a.M);
    problem.r = a.r;
    problem.units = units;
    problem.total_units = units * tiles_of(a, plan);
    switch (plan.tokens * 10 + plan.row_groups) {
#define LOWBIT_CASE(TOKENS, GROUPS)                                                                \
    case TOKENS * 10 + GROUPS:                                                                     \
        return launch_matmul<T, TOKENS, GROUPS>(problem, plan.ctas, stream);
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
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    const auto aligned = [](const void* p, uintptr_t bytes) {
        return reinterpret_cast<uintptr_t>(p) % bytes == 0;
    };
    return major == 9 && minor == 0 && aligned(a.w.qweight, 16) && aligned(a.w.absmax, 16) &&
           aligned(a.w.absmax_8bit, 4) && a.M >= 1 && a.M <= 64 && a.dtype != Dtype::kFloat32 &&
           a.w.flat && a.w.K % kBlock == 0 && a.w.N % 16 == 0 && a.w.N > 0 && a.w.K > 0 &&
           a.w.blocksize_log2 >= 6 && a.r >= 0 && a.r <= kMaxRank &&
           a.w.N / 64 * a.w.K < (int64_t{1} << 31);
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
