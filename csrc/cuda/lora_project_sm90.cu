// z = x lora_A^T for the low-rank term, deterministic, sm_90.
//
//     z[m, j] = sum_k x[m, k] lora_A[j, k]
//     z_out[m, j] = RN(z[m, j]),  z_scaled[m, j] = RN(scaling * lora_scaling[j] * z[m, j])
//
// x [M, K], lora_A [r, K], z_out [M, r], z_scaled [M, r rounded up to 16, zeros behind r]: one
// 16-bit dtype, row-major, x and lora_A 16-byte aligned, K % 64 == 0, r <= 64. Sums in fp32 in an
// order fixed by the shapes. A cluster owns 16 tokens; its warps take runs of 64 elements of K in
// turn, the CTA and then the cluster add up.
//
// Bound by reading x, and below a few MiB of it by latency, which is what the cluster is for:
// 4.0 us at M 256, K 4096, 5.5 at 1024 x 4096, 11.4 at 1024 x 14336 (H100, 2026-11, r 16).
// Callers have checked shapes, dtypes and alignment.

#include "lora_project.h"

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

// A warp's share of z for 16 tokens. A lane takes 2 x 8 consecutive elements of each row of a run:
// the product meets them in another order than memory has them, the same on both sides.
template <typename T, int kColumns>
__device__ __forceinline__ void accumulate(
    float (&d)[kColumns / 8][4],
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
    const T* x_low = x + static_cast<int64_t>(min(token0 + row, M - 1)) * K + offset;
    const T* x_high = x + static_cast<int64_t>(min(token0 + row + 8, M - 1)) * K + offset;
    const T* a_row[kColumns / 8];
#pragma unroll
    for (int t = 0; t < kColumns / 8; t++)
        a_row[t] = lora_A + static_cast<int64_t>(min(t * 8 + row, r - 1)) * K + offset;
    constexpr int kRunsInFlight = kColumns == 16 ? 4 : 2;
#pragma unroll kRunsInFlight
    for (int k = first_run * kRun; k < K; k += stride * kRun) {
#pragma unroll
        for (int half = k; half < k + kRun; half += kRun / 2) {
            const uint4 low = __ldg(reinterpret_cast<const uint4*>(x_low + half));
            const uint4 high = __ldg(reinterpret_cast<const uint4*>(x_high + half));
#pragma unroll
            for (int t = 0; t < kColumns / 8; t++) {
                const uint4 a = __ldg(reinterpret_cast<const uint4*>(a_row[t] + half));
                mma_16x8x16(d[t], {low.x, high.x, low.y, high.y}, a.x, a.y, T{});
                mma_16x8x16(d[t], {low.z, high.z, low.w, high.w}, a.z, a.w, T{});
            }
        }
    }
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
    T* z_scaled   // [M, kColumns]
) {
    __shared__ float partial[kWarps][kTokens][kColumns + 1];
    __shared__ float sums[kTokens * kColumns];
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int ranks = gridDim.x, rank = blockIdx.x;  // the cluster spans x
    const int token0 = blockIdx.y * kTokens;
    wait_for_previous_kernel();
    let_next_kernel_start();

    float d[kColumns / 8][4] = {};
    accumulate<T, kColumns>(d, x, lora_A, M, K, r, token0, rank * kWarps + warp, ranks * kWarps);
#pragma unroll
    for (int t = 0; t < kColumns / 8; t++) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            partial[warp][lane / 4 + i / 2 * 8][t * 8 + lane % 4 * 2 + i % 2] = d[t][i];
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
        const int j = i % kColumns;
        if (m >= M)
            continue;
        // A row of lora_A behind the last one was read as a copy of it.
        const float s = j < r ? column_scale(lora_scaling, scaling, j) : 0.0f;
        z_scaled[m * kColumns + j] = from_float<T>(j < r ? __fmul_rn(z, s) : 0.0f);
        if (z_out != nullptr && j < r)
            z_out[m * r + j] = from_float<T>(z);
    }
    cluster_sync_unaligned();  // nobody leaves while its sums are being read
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
    T* z_scaled  // [M, columns]
) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t m = i / columns;
    const int j = static_cast<int>(i % columns);
    if (m >= M)
        return;
    float z = 0;
    if (j < r)
        z = __fmul_rn(to_float(z_in[m * r + j]), column_scale(lora_scaling, scaling, j));
    z_scaled[i] = from_float<T>(z);
}

// ---- launch -------------------------------------------------------------------------------------

template <typename T, int kColumns>
cudaError_t launch_project(const LoraMatmulArgs& a, T* z_scaled, cudaStream_t stream) {
    const auto tiles = static_cast<int>(ceil_div(a.M, kTokens));
    const auto runs = static_cast<int>(a.w.K / kRun);
    int ranks = 1;
    while (ranks < kMaxRanks && tiles * ranks * 2 <= kWantedCtas && runs >= ranks * 2 * kWarps)
        ranks *= 2;
    LaunchConfig config(dim3(ranks, tiles), kThreads, 0, stream);
    config.cluster(ranks);
    return cudaLaunchKernelEx(
        config.get(), project_kernel<T, kColumns>, static_cast<const T*>(a.x),
        static_cast<const T*>(a.lora_A), a.lora_scaling, a.scaling, static_cast<int>(a.M),
        static_cast<int>(a.w.K), a.r, static_cast<T*>(a.z_out), z_scaled);
}

template <typename T>
cudaError_t launch(const LoraMatmulArgs& a, void* z_scaled, cudaStream_t stream) {
    T* z = static_cast<T*>(z_scaled);
    const int columns = padded_rank(a.r);
    if (a.z_in != nullptr) {
        const auto grid = static_cast<unsigned>(ceil_div(a.M * columns, kThreads));
        const LaunchConfig config(grid, kThreads, 0, stream);
        return cudaLaunchKernelEx(
            config.get(), scale_kernel<T>, static_cast<const T*>(a.z_in), a.lora_scaling, a.scaling,
            a.M, a.r, columns, z);
    }
    switch (columns) {
    case 16:
        return launch_project<T, 16>(a, z, stream);
    case 32:
        return launch_project<T, 32>(a, z, stream);
    case 48:
        return launch_project<T, 48>(a, z, stream);
    case 64:
        return launch_project<T, 64>(a, z, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_lora_project(const LoraMatmulArgs& args, void* z_scaled, cudaStream_t stream) {
    return args.dtype == Dtype::kBFloat16 ? launch<__nv_bfloat16>(args, z_scaled, stream)
                                          : launch<__half>(args, z_scaled, stream);
}

}  // namespace lowbit::cuda
