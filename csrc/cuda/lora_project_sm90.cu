// z = x lora_A^T for the low-rank term, deterministic, sm_90.
//
//     z[m, j] = sum_k x[m, k] lora_A[j, k]
//     z_out[m, j] = RN(z[m, j]),  z_scaled[m, j] = RN(scaling * lora_scaling[j] * z[m, j])
//
// x [M, K], lora_A [r, K], z_out [M, r], z_scaled [M, r rounded up to 16, zeros behind r]: one
// 16-bit dtype, row-major, x and lora_A 16-byte aligned, K % 64 == 0, r <= 64. Sums in fp32 in an
// order fixed by the shapes. Warps take runs of 64 elements of K in turn. On the whole card a
// cluster owns 16 or 64 tokens: the CTA and then the cluster add up. On spare SMs a CTA owns 32 or
// 64 tokens at a time, and clusters of four only keep its SMs together.
//
// Bound by reading x, and below a few MiB of it by latency, which is what the cluster is for:
// 4.0 us at M 256, K 4096, 5.5 at 1024 x 4096, 11.4 at 1024 x 14336 (H100, 2026-11, r 16). Spare
// SMs take longer, but at the same time as the product that follows, which wants z at its end.
// Above 16 columns bound by the latency of loads and of mma.sync behind them: 10 us for 32 tokens
// on an SM, 64 columns, K 4096 (H200, 2026-11). Callers have checked shapes, dtypes and alignment.

#include "lora_project.h"

#include <algorithm>

#include "common.cuh"
#include "launch_config.h"
#include "ptx_sm90.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kRun = 64;
constexpr int kMaxRanks = 8;  // the portable cluster size
constexpr int kSms = 132;

// s_j of the formula.
__device__ __forceinline__ float column_scale(const float* lora_scaling, float scaling, int j) {
    return lora_scaling == nullptr ? scaling : __fmul_rn(scaling, __ldg(lora_scaling + j));
}

// A warp's share of z for 16 kTiles tokens. A lane takes 2 x 8 consecutive elements of each row of
// a run: the product meets them in another order than memory has them, the same on both sides.
template <typename T, int kColumns, int kTiles>
__device__ __forceinline__ void accumulate(
    float (&d)[kTiles][kColumns / 8][4],
    const T* x,
    const T* lora_A,
    int M,
    int K,
    int r,
    int token0,
    int first_run,
    int stride) {
    const int lane = threadIdx.x % kWarpSize;
    const int row = lane / 4, offset = lane % 4 * 8;
    const T* x_base = x + static_cast<int64_t>(token0) * K + offset;
    const T* a_base = lora_A + offset;
    int x_row[2 * kTiles], a_row[kColumns / 8];
#pragma unroll
    for (int i = 0; i < 2 * kTiles; i++)
        x_row[i] = min(row + 8 * i, M - 1 - token0) * K;
#pragma unroll
    for (int t = 0; t < kColumns / 8; t++)
        a_row[t] = min(t * 8 + row, r - 1) * K;
    // Both halves in flight would not fit 255 registers with the largest tile.
    constexpr int kHalvesInFlight = kTiles * kColumns > 192 ? 1 : 2;
    constexpr int kRunsInFlight = kTiles > 1 ? 1 : kColumns == 16 ? 4 : 2;
#pragma unroll kRunsInFlight
    for (int k = first_run * kRun; k < K; k += stride * kRun) {
#pragma unroll kHalvesInFlight
        for (int h = 0; h < 2; h++) {
            const int half = k + h * (kRun / 2);
            uint4 v[2 * kTiles];
#pragma unroll
            for (int i = 0; i < 2 * kTiles; i++)
                v[i] = __ldg(reinterpret_cast<const uint4*>(x_base + x_row[i] + half));
            uint4 a[kColumns / 8];
#pragma unroll
            for (int t = 0; t < kColumns / 8; t++)
                a[t] = __ldg(reinterpret_cast<const uint4*>(a_base + a_row[t] + half));
#pragma unroll
            for (int t = 0; t < kColumns / 8; t++) {
#pragma unroll
                for (int i = 0; i < kTiles; i++) {
                    const uint4 low = v[2 * i], high = v[2 * i + 1];
                    mma_16x8x16(d[i][t], {low.x, high.x, low.y, high.y}, a[t].x, a[t].y, T{});
                    mma_16x8x16(d[i][t], {low.z, high.z, low.w, high.w}, a[t].z, a[t].w, T{});
                }
            }
        }
    }
}

// What a projection writes for column j of token m. A row of lora_A behind the last one was read as
// a copy of it.
template <typename T, int kColumns>
__device__ __forceinline__ void store_z(
    float z,
    int64_t m,
    int j,
    int r,
    const float* lora_scaling,
    float scaling,
    T* z_out,
    T* z_scaled) {
    const float s = j < r ? column_scale(lora_scaling, scaling, j) : 0.0f;
    z_scaled[m * kColumns + j] = from_float<T>(j < r ? __fmul_rn(z, s) : 0.0f);
    if (z_out != nullptr && j < r)
        z_out[m * r + j] = from_float<T>(z);
}

// By all threads of the grid's first CTA.
__device__ __forceinline__ void clear_flags(uint32_t* flags, int count) {
    if (blockIdx.x > 0 || blockIdx.y > 0)
        return;
    for (int i = threadIdx.x; i < count; i += blockDim.x)
        flags[i] = 0;
}

// Dynamic shared memory of the projections: [warps][tokens][kColumns + 1] f32.
constexpr int partial_bytes(int warps, int tokens, int columns) {
    return warps * tokens * (columns + 1) * 4;
}

// A warp's sums, [tokens][kColumns + 1].
template <int kColumns, int kTiles>
__device__ __forceinline__ void
store_partial(float* partial, const float (&d)[kTiles][kColumns / 8][4]) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++) {
#pragma unroll
        for (int t = 0; t < kColumns / 8; t++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = tile * 16 + lane / 4 + i / 2 * 8;
                const int column = t * 8 + lane % 4 * 2 + i % 2;
                partial[row * (kColumns + 1) + column] = d[tile][t][i];
            }
        }
    }
}

// Sum i of [kTokens][kColumns] over the warps of a CTA.
template <int kColumns, int kTokens, int kPartials>
__device__ __forceinline__ float sum_of_warps(const float* partial, int i) {
    const float* first = partial + i / kColumns * (kColumns + 1) + i % kColumns;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kPartials; w++)
        sum += first[w * kTokens * (kColumns + 1)];
    return sum;
}

template <typename T, int kColumns, int kTiles>
__global__ void __launch_bounds__(kThreads) project_kernel(
    const T* x,                 // [M, K]
    const T* lora_A,            // [r, K]
    const float* lora_scaling,  // [r] or null
    const float scaling,
    const int M,
    const int K,
    const int r,  // kColumns - 15 .. kColumns
    T* z_out,     // [M, r] or null
    T* z_scaled,  // [M, kColumns]
    uint32_t* flags,
    const int flag_count) {
    constexpr int kTokens = 16 * kTiles;
    extern __shared__ float partial[];
    __shared__ float sums[kTokens * kColumns];
    const int warp = threadIdx.x / kWarpSize;
    const int ranks = gridDim.x, rank = blockIdx.x;  // the cluster spans x
    const int token0 = blockIdx.y * kTokens;
    wait_for_previous_kernel();
    let_next_kernel_start();
    clear_flags(flags, flag_count);

    float d[kTiles][kColumns / 8][4] = {};
    accumulate<T, kColumns, kTiles>(
        d, x, lora_A, M, K, r, token0, rank * kWarps + warp, ranks * kWarps);
    store_partial<kColumns, kTiles>(partial + warp * kTokens * (kColumns + 1), d);
    __syncthreads();
    for (int i = threadIdx.x; i < kTokens * kColumns; i += kThreads)
        sums[i] = sum_of_warps<kColumns, kTokens, kWarps>(partial, i);
    cluster_sync_unaligned();
    for (int i = threadIdx.x * ranks + rank; i < kTokens * kColumns; i += kThreads * ranks) {
        float z = 0;
        for (int from = 0; from < ranks; from++)
            z += load_remote(in_cta(shared_address(sums + i), from));
        const int64_t m = token0 + i / kColumns;
        if (m < M)
            store_z<T, kColumns>(z, m, i % kColumns, r, lora_scaling, scaling, z_out, z_scaled);
    }
    cluster_sync_unaligned();  // nobody leaves while its sums are being read
}

// On spare SMs: as many registers and loads in flight as a whole SM has. Many tokens at a time, as
// each time reads all of lora_A: above 16 columns 32, whose sums leave registers for twice the
// loads in flight (rank 64, K = 4096: 10 us, 64 tokens 25; H200, 2026-11).
constexpr int kBesideCluster = 4;

template <int kColumns>
constexpr int kBesideThreads = kColumns == 16 ? 512 : 256;

template <typename T, int kColumns, int kTiles>
__global__ void __launch_bounds__(kBesideThreads<kColumns>, 1) project_beside_kernel(
    const T* x,                 // [M, K]
    const T* lora_A,            // [r, K]
    const float* lora_scaling,  // [r] or null
    const float scaling,
    const int M,
    const int K,
    const int r,  // kColumns - 15 .. kColumns
    T* z_out,     // [M, r] or null
    T* z_scaled,  // [M, kColumns]
    uint32_t* flags,
    const int flag_count) {
    constexpr int kGroup = 16 * kTiles;
    constexpr int kBesideWarps = kBesideThreads<kColumns> / kWarpSize;
    extern __shared__ float partial[];
    const int warp = threadIdx.x / kWarpSize;
    wait_for_previous_kernel();
    let_next_kernel_start();
    clear_flags(flags, flag_count);
    for (int token0 = blockIdx.x * kGroup; token0 < M; token0 += gridDim.x * kGroup) {
        float d[kTiles][kColumns / 8][4] = {};
        accumulate<T, kColumns, kTiles>(d, x, lora_A, M, K, r, token0, warp, kBesideWarps);
        store_partial<kColumns, kTiles>(partial + warp * kGroup * (kColumns + 1), d);
        __syncthreads();
        for (int i = threadIdx.x; i < kGroup * kColumns; i += kBesideThreads<kColumns>) {
            const float z = sum_of_warps<kColumns, kGroup, kBesideWarps>(partial, i);
            const int m = token0 + i / kColumns;
            if (m < M)
                store_z<T, kColumns>(z, m, i % kColumns, r, lora_scaling, scaling, z_out, z_scaled);
        }
        __syncthreads();
    }
}

// z computed elsewhere: scaled and padded only.
template <typename T>
__global__ void __launch_bounds__(kThreads) scale_kernel(
    const T* z_in,              // [M, r]
    const float* lora_scaling,  // [r] or null
    const float scaling,
    const int64_t M,
    const int r,
    const int columns,
    T* z_scaled,  // [M, columns]
    uint32_t* flags,
    const int flag_count) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    clear_flags(flags, flag_count);
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= M * columns)
        return;
    const int64_t m = i / columns;
    const int j = static_cast<int>(i % columns);
    float z = 0;
    if (j < r)
        z = __fmul_rn(to_float(z_in[m * r + j]), column_scale(lora_scaling, scaling, j));
    z_scaled[i] = from_float<T>(z);
}

// ---- launch -------------------------------------------------------------------------------------

template <typename T, int kColumns, int kTiles>
cudaError_t
launch_on_whole_card(const LoraMatmulArgs& a, const Projection& p, cudaStream_t stream) {
    const auto M = static_cast<int>(a.M), K = static_cast<int>(a.w.K);
    constexpr auto kernel = project_kernel<T, kColumns, kTiles>;
    constexpr int kBytes = partial_bytes(kWarps, 16 * kTiles, kColumns);
    constexpr int kWantedCtas = kTiles > 1 ? kSms : 2 * kSms;
    const cudaError_t error = allow_shared_memory<kernel>(kBytes);
    if (error != cudaSuccess)
        return error;
    const auto groups = static_cast<int>(ceil_div(M, 16 * kTiles));
    const int runs = K / kRun;
    int ranks = 1;
    while (ranks < kMaxRanks && groups * ranks * 2 <= kWantedCtas && runs >= ranks * 2 * kWarps)
        ranks *= 2;
    LaunchConfig config(dim3(ranks, groups), kThreads, kBytes, stream);
    config.cluster(ranks);
    return cudaLaunchKernelEx(
        config.get(), kernel, static_cast<const T*>(a.x), static_cast<const T*>(a.lora_A),
        a.lora_scaling, a.scaling, M, K, a.r, static_cast<T*>(a.z_out), static_cast<T*>(p.z_scaled),
        p.flags, p.flag_count);
}

template <typename T, int kColumns, int kTiles>
cudaError_t launch_on_spare_sms(const LoraMatmulArgs& a, const Projection& p, cudaStream_t stream) {
    const auto M = static_cast<int>(a.M), K = static_cast<int>(a.w.K);
    constexpr auto kernel = project_beside_kernel<T, kColumns, kTiles>;
    constexpr int kBesideWarps = kBesideThreads<kColumns> / kWarpSize;
    constexpr int kBytes = partial_bytes(kBesideWarps, 16 * kTiles, kColumns);
    const cudaError_t error = allow_shared_memory<kernel>(kBytes);
    if (error != cudaSuccess)
        return error;
    const auto groups = static_cast<int>(ceil_div(M, 16 * kTiles));
    const int clusters =
        std::min(p.spare_sms / kBesideCluster, (groups + kBesideCluster - 1) / kBesideCluster);
    LaunchConfig config(kBesideCluster * clusters, kBesideThreads<kColumns>, kBytes, stream);
    config.cluster(kBesideCluster);
    return cudaLaunchKernelEx(
        config.get(), kernel, static_cast<const T*>(a.x), static_cast<const T*>(a.lora_A),
        a.lora_scaling, a.scaling, M, K, a.r, static_cast<T*>(a.z_out), static_cast<T*>(p.z_scaled),
        p.flags, p.flag_count);
}

template <typename T, int kColumns>
cudaError_t launch_project(const LoraMatmulArgs& a, const Projection& p, cudaStream_t stream) {
    constexpr int kSpareTiles = kColumns > 16 ? 2 : 4;  // spare_sm_tokens
    if (p.spare_sms > 0)
        return launch_on_spare_sms<T, kColumns, kSpareTiles>(a, p, stream);
    if constexpr (kColumns > 16) {
        if (projection_tokens(a.M, a.r) == 64)
            return launch_on_whole_card<T, kColumns, 4>(a, p, stream);
    }
    return launch_on_whole_card<T, kColumns, 1>(a, p, stream);
}

template <typename T>
cudaError_t launch(const LoraMatmulArgs& a, const Projection& p, cudaStream_t stream) {
    const int columns = padded_rank(a.r);
    if (a.lora_A == nullptr) {
        const auto grid =
            static_cast<unsigned>(std::max<int64_t>(ceil_div(a.M * columns, kThreads), 1));
        const LaunchConfig config(grid, kThreads, 0, stream);
        return cudaLaunchKernelEx(
            config.get(), scale_kernel<T>, static_cast<const T*>(a.z_in), a.lora_scaling, a.scaling,
            a.M, a.r, columns, static_cast<T*>(p.z_scaled), p.flags, p.flag_count);
    }
    switch (columns) {
    case 16:
        return launch_project<T, 16>(a, p, stream);
    case 32:
        return launch_project<T, 32>(a, p, stream);
    case 48:
        return launch_project<T, 48>(a, p, stream);
    case 64:
        return launch_project<T, 64>(a, p, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t
launch_lora_project(const LoraMatmulArgs& args, const Projection& projection, cudaStream_t stream) {
    return args.dtype == Dtype::kBFloat16 ? launch<__nv_bfloat16>(args, projection, stream)
                                          : launch<__half>(args, projection, stream);
}

}  // namespace lowbit::cuda
