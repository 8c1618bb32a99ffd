// z = x lora_A^T for the low-rank term, deterministic, sm_90.
//
//     z[m, j] = sum_k x[m, k] lora_A[j, k]
//     z_out[m, j] = RN(z[m, j]),  z_scaled[m, j] = RN(scaling * lora_scaling[j] * z[m, j])
//
// x [M, K], lora_A [r, K], z_out [M, r], z_scaled [M, r rounded up to 16, zeros behind r]: one
// 16-bit dtype, row-major, x and lora_A 16-byte aligned, K % 64 == 0, r <= 64. Sums in fp32 in an
// order fixed by the shapes. Warps take runs of 64 elements of K in turn. On the whole card a
// cluster owns 16 tokens: the CTA and then the cluster add up. On spare SMs a CTA owns 16 to 64
// tokens at a time, and clusters of four only keep its SMs together.
//
// Bound by reading x, and below a few MiB of it by latency, which is what the cluster is for:
// 4.0 us at M 256, K 4096, 5.5 at 1024 x 4096, 11.4 at 1024 x 14336 (H100, 2026-11, r 16). Spare
// SMs take longer, but at the same time as the product that follows, which wants z at its end.
// Callers have checked shapes, dtypes and alignment.

#include "lora_project.h"

#include <algorithm>

#include "common.cuh"
#include "launch_config.h"
#include "ptx_sm90.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kTokens = 16;
constexpr int kRun = 64;
constexpr int kMaxRanks = 8;  // the portable cluster size
constexpr int kWantedCtas = 2 * 132;

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
    constexpr int kRunsInFlight = kTiles > 1 ? 1 : kColumns == 16 ? 4 : 2;
#pragma unroll kRunsInFlight
    for (int k = first_run * kRun; k < K; k += stride * kRun) {
#pragma unroll
        for (int half = k; half < k + kRun; half += kRun / 2) {
            uint4 v[2 * kTiles];
#pragma unroll
            for (int i = 0; i < 2 * kTiles; i++)
                v[i] = __ldg(reinterpret_cast<const uint4*>(x_base + x_row[i] + half));
#pragma unroll
            for (int t = 0; t < kColumns / 8; t++) {
                const uint4 a = __ldg(reinterpret_cast<const uint4*>(a_base + a_row[t] + half));
#pragma unroll
                for (int i = 0; i < kTiles; i++) {
                    const uint4 low = v[2 * i], high = v[2 * i + 1];
                    mma_16x8x16(d[i][t], {low.x, high.x, low.y, high.y}, a.x, a.y, T{});
                    mma_16x8x16(d[i][t], {low.z, high.z, low.w, high.w}, a.z, a.w, T{});
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

template <typename T, int kColumns>
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
    __shared__ float partial[kWarps][kTokens][kColumns + 1];
    __shared__ float sums[kTokens * kColumns];
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int ranks = gridDim.x, rank = blockIdx.x;  // the cluster spans x
    const int token0 = blockIdx.y * kTokens;
    wait_for_previous_kernel();
    let_next_kernel_start();
    clear_flags(flags, flag_count);

    float d[1][kColumns / 8][4] = {};
    accumulate<T, kColumns, 1>(d, x, lora_A, M, K, r, token0, rank * kWarps + warp, ranks * kWarps);
#pragma unroll
    for (int t = 0; t < kColumns / 8; t++) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            partial[warp][lane / 4 + i / 2 * 8][t * 8 + lane % 4 * 2 + i % 2] = d[0][t][i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kTokens * kColumns; i += kThreads) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < kWarps; w++)
            sum += partial[w][i / kColumns][i % kColumns];
        sums[i] = sum;
    }
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

// On spare SMs: as many registers and loads in flight as a whole SM has. Shared memory: [warps][16
// kTiles tokens][kColumns + 1] f32, 69 632 bytes at most.
constexpr int kBesideThreads = 512;
constexpr int kBesideWarps = kBesideThreads / kWarpSize;
constexpr int kBesideCluster = 4;

template <int kColumns>
constexpr int kBesideTiles = kColumns == 16   ? 4
                             : kColumns == 32 ? 2
                                              : 1;

template <int kColumns>
constexpr int kBesideBytes = kBesideWarps * 16 * kBesideTiles<kColumns> * (kColumns + 1) * 4;

template <typename T, int kColumns>
__global__ void __launch_bounds__(kBesideThreads, 1) project_beside_kernel(
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
    constexpr int kTiles = kBesideTiles<kColumns>, kGroup = 16 * kTiles;
    extern __shared__ float partial_of_warp[];
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    wait_for_previous_kernel();
    let_next_kernel_start();
    clear_flags(flags, flag_count);
    for (int token0 = blockIdx.x * kGroup; token0 < M; token0 += gridDim.x * kGroup) {
        float d[kTiles][kColumns / 8][4] = {};
        accumulate<T, kColumns, kTiles>(d, x, lora_A, M, K, r, token0, warp, kBesideWarps);
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++) {
#pragma unroll
            for (int t = 0; t < kColumns / 8; t++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int row = tile * 16 + lane / 4 + i / 2 * 8;
                    const int column = t * 8 + lane % 4 * 2 + i % 2;
                    partial_of_warp[(warp * kGroup + row) * (kColumns + 1) + column] =
                        d[tile][t][i];
                }
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < kGroup * kColumns; i += kBesideThreads) {
            const int row = i / kColumns, column = i % kColumns;
            float z = 0;
#pragma unroll
            for (int w = 0; w < kBesideWarps; w++)
                z += partial_of_warp[(w * kGroup + row) * (kColumns + 1) + column];
            if (token0 + row < M)
                store_z<T, kColumns>(
                    z, token0 + row, column, r, lora_scaling, scaling, z_out, z_scaled);
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

template <typename T, int kColumns>
cudaError_t launch_project(const LoraMatmulArgs& a, const Projection& p, cudaStream_t stream) {
    const auto M = static_cast<int>(a.M), K = static_cast<int>(a.w.K);
    const T* x = static_cast<const T*>(a.x);
    const T* lora_A = static_cast<const T*>(a.lora_A);
    T* z_out = static_cast<T*>(a.z_out);
    T* z_scaled = static_cast<T*>(p.z_scaled);
    if (p.spare_sms > 0) {
        constexpr auto kernel = project_beside_kernel<T, kColumns>;
        constexpr int kBytes = kBesideBytes<kColumns>;
        const cudaError_t error = allow_shared_memory<kernel>(kBytes);
        if (error != cudaSuccess)
            return error;
        const auto groups = static_cast<int>(ceil_div(M, 16 * kBesideTiles<kColumns>));
        const int clusters =
            std::min(p.spare_sms / kBesideCluster, (groups + kBesideCluster - 1) / kBesideCluster);
        LaunchConfig config(kBesideCluster * clusters, kBesideThreads, kBytes, stream);
        config.cluster(kBesideCluster);
        return cudaLaunchKernelEx(
            config.get(), kernel, x, lora_A, a.lora_scaling, a.scaling, M, K, a.r, z_out, z_scaled,
            p.flags, p.flag_count);
    }
    const auto tiles = static_cast<int>(ceil_div(M, kTokens));
    const int runs = K / kRun;
    int ranks = 1;
    while (ranks < kMaxRanks && tiles * ranks * 2 <= kWantedCtas && runs >= ranks * 2 * kWarps)
        ranks *= 2;
    LaunchConfig config(dim3(ranks, tiles), kThreads, 0, stream);
    config.cluster(ranks);
    return cudaLaunchKernelEx(
        config.get(), project_kernel<T, kColumns>, x, lora_A, a.lora_scaling, a.scaling, M, K, a.r,
        z_out, z_scaled, p.flags, p.flag_count);
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
