// z = x lora_A^T for the low-rank term, deterministic, sm_90.
//
//     z[m, j] = sum_k x[m, k] lora_A[j, k]
//     z_out[m, j] = RN(z[m, j]),  z_scaled[m, j] = RN(scaling * lora_scaling[j] * z[m, j])
//
// x [M, K], lora_A [r, K], z_out [M, r], z_scaled [M, r rounded up to 16, zeros behind r]: one
// 16-bit dtype, row-major, x and lora_A 16-byte aligned, K % 64 == 0, r <= 64. Sums in fp32 in an
// order fixed by the shapes.
//
// A CTA takes 64 to 256 tokens at a time and all of K or, where there are CTAs enough, a half, a
// quarter or an eighth; those that divide K are neighbours in a cluster. A producer thread brings
// steps of 64 along K into a ring by TMA; each warpgroup multiplies its 64 tokens of a step with
// the 16 or 64 columns that r fits in (rows behind lora_A's last one arrive as zeros). Then each
// CTA adds up its share of the sums. On the whole card clusters have eight CTAs, where it can hold
// such; on spare SMs four, at the same time as the product that follows, which wants z at its end.
//
// Bound by what an SM takes in: per 256 tokens and 1024 of K 640 KB at rank 64, 544 KB at 16, at 95
// and 115 bytes in a nanosecond. On four SMs beside a product 12.4 us for 256 tokens, 33 for 1024
// (K 4096, rank 64); alone on all of them 7 to 8 (H200, 2026-11).
// Callers have checked shapes, dtypes and alignment.

#include "lora_project.h"

#include "bulk_sm90.cuh"
#include "common.cuh"
#include "device.h"
#include "divisor.h"
#include "launch_config.h"
#include "tensor_map.h"
#include "wgmma_sm90.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kWarpgroup = 128;
constexpr int kBoxTokens = 64;  // of a warpgroup
constexpr int kMostThreads = 4 * kWarpgroup + kWarpSize;
constexpr int kStepK = 64;
constexpr int kLineBytes = 128;  // a swizzled line: 64 elements
constexpr int kScaleThreads = 256;

// Shared memory in this order: stages (x, then lora_A), sums, two barriers per stage. A stage has
// as many tokens as a group. 230 592 bytes at most.
template <int kColumns>
struct Layout {
    static constexpr int kABytes = kColumns * kLineBytes;
    static constexpr int kMostStages = 12;
    static constexpr int kRing = (kColumns == 16 ? 204 : 160) * 1024;
    static constexpr int kSums = kRing;  // [tokens][kColumns] f32
    static constexpr int kFull = kSums + 4 * kBoxTokens * kColumns * 4;
    static constexpr int kEmpty = kFull + kMostStages * 8;
    static constexpr int kAlignment = 1024;
    static constexpr int kSmemBytes = kEmpty + kMostStages * 8 + kAlignment;
    static_assert(kSmemBytes <= 227 * 1024);
};

struct Params {
    CUtensorMap x, lora_A;
    const float* lora_scaling;  // [r] or null
    float scaling;
    int M;
    int steps;   // K / 64
    int r;       // at most kColumns
    int tokens;  // of a group, a multiple of 64
    // Of K, each of a CTA; those of a group are neighbours in a cluster. Like the cluster's size a
    // power of two.
    int parts_log2;
    int cluster_log2;
    int stages;
    void* z_out;     // [M, r] or null
    void* z_scaled;  // [M, z_columns]
    int z_columns;   // r rounded up to 16
    uint32_t* flags;
    int flag_count;
};

// s_j of the formula.
__device__ __forceinline__ float column_scale(const float* lora_scaling, float scaling, int j) {
    return lora_scaling == nullptr ? scaling : __fmul_rn(scaling, __ldg(lora_scaling + j));
}

// By all threads of the grid's first CTA.
__device__ __forceinline__ void clear_flags(uint32_t* flags, int count) {
    if (blockIdx.x > 0)
        return;
    for (int i = threadIdx.x; i < count; i += blockDim.x)
        flags[i] = 0;
}

// Steps of K that this CTA takes.
struct Steps {
    int first, end;
};

// By one thread, behind the consumers by a ring's length.
template <int kColumns>
__device__ __forceinline__ void
load(const Params& p, Steps steps, int token0, uint32_t smem, Ring& ring) {
    using L = Layout<kColumns>;
    const int x_bytes = p.tokens * kLineBytes, bytes = x_bytes + L::kABytes;
    for (int step = steps.first; step < steps.end; step++, ring.advance(p.stages)) {
        const uint32_t stage = smem + ring.slot * bytes, full = smem + L::kFull + ring.slot * 8;
        barrier_wait(smem + L::kEmpty + ring.slot * 8, ring.parity ^ 1);
        barrier_arrive_expect(full, bytes);
        load_tile(stage, p.x, step * kStepK, token0, full);
        load_tile(stage + x_bytes, p.lora_A, step * kStepK, 0, full);
    }
}

// Where a sum lies. The swizzle spreads the four rows of half a warp over all banks.
template <int kColumns>
__device__ __forceinline__ uint32_t sum_offset(int row, int column) {
    return (row * kColumns + (column ^ (row * 8 & (kColumns - 1)))) * 4;
}

template <int kColumns>
__device__ __forceinline__ void store_sums(uint8_t* sums, const float (&d)[kColumns / 2]) {
    const int lane = threadIdx.x % kWarpSize;
    const int row0 = threadIdx.x / kWarpSize * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < kColumns / 2; i += 2) {
        const int row = row0 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2;
        float* at = reinterpret_cast<float*>(sums + sum_offset<kColumns>(row, column));
        *reinterpret_cast<float2*>(at) = make_float2(d[i], d[i + 1]);
    }
}

// A warpgroup's 64 tokens.
template <typename T, int kColumns>
__device__ __forceinline__ void
multiply(const Params& p, Steps steps, uint32_t smem, uint8_t* sums, Ring& ring) {
    using L = Layout<kColumns>;
    const uint32_t own_tokens = threadIdx.x / kWarpgroup * kBoxTokens * kLineBytes;
    const uint32_t x_bytes = p.tokens * kLineBytes;
    float d[kColumns / 2] = {};
#pragma unroll 1
    for (int step = steps.first; step < steps.end; step++, ring.advance(p.stages)) {
        const uint32_t stage = smem + ring.slot * (x_bytes + L::kABytes);
        const uint64_t x = operand_descriptor(stage + own_tokens);
        const uint64_t a = operand_descriptor(stage + x_bytes);
        barrier_wait(smem + L::kFull + ring.slot * 8, ring.parity);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kStepK / 16; i++)
            wgmma(d, x + 2 * i, a + 2 * i, true, T{});
        wgmma_commit();
        wgmma_wait<0>();
        if (threadIdx.x % kWarpSize == 0)
            barrier_arrive(smem + L::kEmpty + ring.slot * 8);
    }
    store_sums<kColumns>(sums, d);
}

// Four columns of z from `column` on, of token m.
template <typename T>
__device__ __forceinline__ void
store_z(const Params& p, const float (&z)[4], int64_t m, int column) {
    float scaled[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int j = column + i;
        scaled[i] = j < p.r ? __fmul_rn(z[i], column_scale(p.lora_scaling, p.scaling, j)) : 0.0f;
        if (p.z_out != nullptr && j < p.r)
            static_cast<T*>(p.z_out)[m * p.r + j] = from_float<T>(z[i]);
    }
    if (column < p.z_columns) {
        T* out = static_cast<T*>(p.z_scaled) + m * p.z_columns + column;
        *reinterpret_cast<uint2*>(out) =
            make_uint2(pack_pair(scaled[0], scaled[1], T{}), pack_pair(scaled[2], scaled[3], T{}));
    }
}

// Share number `part` of a group's sums, from the CTAs that divide K, in its order.
template <typename T, int kColumns>
__device__ __forceinline__ void add_up(const Params& p, int part, int token0, uint32_t smem_sums) {
    const int parts = 1 << p.parts_log2;
    const int share = p.tokens * kColumns / 4 >> p.parts_log2;  // in fours
    const int first_cta = cluster_rank() - part;
    for (int i = part * share + threadIdx.x; i < (part + 1) * share; i += blockDim.x) {
        const int row = i / (kColumns / 4), column = i % (kColumns / 4) * 4;
        const uint32_t at = smem_sums + sum_offset<kColumns>(row, column);
        float z[4] = {};
#pragma unroll 4
        for (int from = 0; from < parts; from++) {
            const float4 v = load_remote(in_cta(at, first_cta + from));
            z[0] += v.x, z[1] += v.y, z[2] += v.z, z[3] += v.w;
        }
        if (token0 + row < p.M)
            store_z<T>(p, z, token0 + row, column);
    }
}

template <typename T, int kColumns>
__global__ void __launch_bounds__(kMostThreads, 1)
    project_kernel(const __grid_constant__ Params p) {
    using L = Layout<kColumns>;
    extern __shared__ uint8_t smem_raw[];
    const uint32_t raw = shared_address(smem_raw);
    const uint32_t smem = (raw + L::kAlignment - 1) / L::kAlignment * L::kAlignment;
    const int consumers = p.tokens / kBoxTokens * kWarpgroup;
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.stages; i++) {
            barrier_init(smem + L::kFull + i * 8, 1);
            barrier_init(smem + L::kEmpty + i * 8, consumers / kWarpSize);
        }
        barrier_init_fence();
    }
    wait_for_previous_kernel();
    let_next_kernel_start();
    __syncthreads();
    clear_flags(p.flags, p.flag_count);

    const int group = cluster_rank() >> p.parts_log2;
    const int part = cluster_rank() - (group << p.parts_log2);
    const int cluster_tokens = p.tokens << (p.cluster_log2 - p.parts_log2);
    const int offset = group * p.tokens;
    const Steps steps{p.steps * part >> p.parts_log2, p.steps * (part + 1) >> p.parts_log2};
    Ring ring;
    for (int first = (blockIdx.x >> p.cluster_log2) * cluster_tokens; first < p.M;
         first += (gridDim.x >> p.cluster_log2) * cluster_tokens) {
        if (threadIdx.x < consumers)
            multiply<T, kColumns>(p, steps, smem, smem_raw + (smem - raw) + L::kSums, ring);
        else if (elect_lane())
            load<kColumns>(p, steps, first + offset, smem, ring);
        __syncwarp();
        cluster_sync_unaligned();  // by all threads: it waits for each that has not left
        add_up<T, kColumns>(p, part, first + offset, smem + L::kSums);
        cluster_sync_unaligned();  // nobody stores the next sums or leaves while these are read
    }
}

// z computed elsewhere: scaled and padded only.
template <typename T>
__global__ void __launch_bounds__(kScaleThreads) scale_kernel(
    const T* z_in,              // [M, r]
    const float* lora_scaling,  // [r] or null
    const float scaling,
    const int count,  // M columns
    const int r,
    const int columns,
    const Divisor by_columns,
    T* z_scaled,  // [M, columns]
    uint32_t* flags,
    const int flag_count) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    clear_flags(flags, flag_count);
    const int i = blockIdx.x * kScaleThreads + threadIdx.x;
    if (i >= count)
        return;
    const int m = divide(i, by_columns), j = i - m * columns;
    float z = 0;
    if (j < r)
        z = __fmul_rn(to_float(z_in[m * r + j]), column_scale(lora_scaling, scaling, j));
    z_scaled[i] = from_float<T>(z);
}

// ---- launch -------------------------------------------------------------------------------------

template <typename T, int kColumns>
cudaError_t launch_project(const LoraMatmulArgs& a, const Projection& p, cudaStream_t stream) {
    using L = Layout<kColumns>;
    const ClusterRoom room =
        p.spare_sms > 0 ? projection_room_beside(p.spare_sms) : projection_room();
    const ProjectionTiling tiling = tile_projection(a.M, room);
    Params params{};
    const CUtensorMapDataType type = tensor_map_type(a.dtype);
    cudaError_t error = make_tensor_map(params.x, type, a.x, a.M, a.w.K, {tiling.tokens, kStepK});
    if (error == cudaSuccess)
        error = make_tensor_map(params.lora_A, type, a.lora_A, a.r, a.w.K, {kColumns, kStepK});
    constexpr auto kernel = project_kernel<T, kColumns>;
    if (error == cudaSuccess)
        error = allow_shared_memory<kernel>(L::kSmemBytes);
    if (error != cudaSuccess)
        return error;
    params.lora_scaling = a.lora_scaling;
    params.scaling = a.scaling;
    params.M = static_cast<int>(a.M);
    params.steps = static_cast<int>(a.w.K / kStepK);
    params.r = a.r;
    params.tokens = tiling.tokens;
    // Both are powers of two: see room_for_clusters and tile_projection.
    params.parts_log2 = log2_of(tiling.parts);
    params.cluster_log2 = log2_of(room.cluster);
    params.stages = std::min(L::kMostStages, L::kRing / (tiling.tokens * kLineBytes + L::kABytes));
    params.z_out = a.z_out;
    params.z_scaled = p.z_scaled;
    params.z_columns = padded_rank(a.r);
    params.flags = p.flags;
    params.flag_count = p.flag_count;
    const int threads = tiling.tokens / kBoxTokens * kWarpgroup + kWarpSize;
    LaunchConfig config(tiling.clusters * room.cluster, threads, L::kSmemBytes, stream);
    config.cluster(room.cluster);
    return cudaLaunchKernelEx(config.get(), kernel, params);
}

template <typename T>
cudaError_t launch(const LoraMatmulArgs& a, const Projection& p, cudaStream_t stream) {
    const int columns = padded_rank(a.r);
    if (a.lora_A == nullptr) {
        const auto count = static_cast<int>(a.M * columns);
        const auto grid =
            static_cast<unsigned>(std::max<int64_t>(ceil_div(count, kScaleThreads), 1));
        const LaunchConfig config(grid, kScaleThreads, 0, stream);
        return cudaLaunchKernelEx(
            config.get(), scale_kernel<T>, static_cast<const T*>(a.z_in), a.lora_scaling, a.scaling,
            count, a.r, columns, make_divisor(std::max(columns, 1)), static_cast<T*>(p.z_scaled),
            p.flags, p.flag_count);
    }
    return columns == 16 ? launch_project<T, 16>(a, p, stream)
                         : launch_project<T, 64>(a, p, stream);
}

}  // namespace

ClusterRoom projection_room() {
    static Answers answers;
    const auto kernel = reinterpret_cast<const void*>(project_kernel<__nv_bfloat16, 64>);
    return room_for_clusters(answers, kernel, 8, kMostThreads, Layout<64>::kSmemBytes);
}

cudaError_t
launch_lora_project(const LoraMatmulArgs& args, const Projection& projection, cudaStream_t stream) {
    return args.dtype == Dtype::kBFloat16 ? launch<__nv_bfloat16>(args, projection, stream)
                                          : launch<__half>(args, projection, stream);
}

}  // namespace lowbit::cuda
