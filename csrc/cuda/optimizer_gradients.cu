// The norm of all gradients and their scaling, over any number of tensors of mixed types.
//
//     norm = sqrt(sum g^2)          g = g * min(1, max_norm / (norm + 1e-6))
//
// Gradients fp32, bf16 or fp16, contiguous, in place. Squares are summed in fp64: no finite
// gradient overflows, so that a sum that is not finite means a NaN or an Inf. A CTA sums a chunk of
// 4096 elements, one more CTA sums the chunks; the order is fixed, so results repeat bit for bit.
// Bound by bytes. Checked by callers: rows are right.

#include "launch_config.h"
#include "optimizer.h"
#include "optimizer_elements.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

// Sum over the CTA in a fixed order, in thread 0.
__device__ __forceinline__ double cta_sum(double value) {
    __shared__ double sums[kWarps];
    value = warp_sum(value);
    if (threadIdx.x % kWarpSize == 0)
        sums[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    double total = 0.0;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kWarps; i++)
            total += sums[i];
    }
    return total;
}

// fn(data, left, lane) for every block of 256 elements of chunk blockIdx.x that this warp has.
template <typename F>
__device__ __forceinline__ void
for_each_block(const GradientRow* rows, int64_t tensors, const F& fn) {
    const int64_t chunk = blockIdx.x;
    const GradientRow row = rows[row_of_chunk(rows, tensors, chunk)];
    const int64_t begin = (chunk - row.first_chunk) * kStepChunk;
    const int lane = threadIdx.x % kWarpSize;
    for (int unit = threadIdx.x / kWarpSize; unit < kStepChunk / kStateBlock; unit += kWarps) {
        const int64_t first = begin + unit * kStateBlock;
        const int left = elements_left(row.count, first);
        if (left <= 0)
            break;
        switch (static_cast<Dtype>(row.dtype)) {
        case Dtype::kFloat32:
            fn(static_cast<float*>(row.data) + first, left, lane);
            break;
        case Dtype::kBFloat16:
            fn(static_cast<__nv_bfloat16*>(row.data) + first, left, lane);
            break;
        case Dtype::kFloat16:
            fn(static_cast<__half*>(row.data) + first, left, lane);
            break;
        }
    }
}

__global__ void __launch_bounds__(kThreads)
    gradient_squares_kernel(const GradientRow* rows, int64_t tensors, double* partial_sums) {
    double sum = 0.0;
    for_each_block(rows, tensors, [&sum](const auto* data, int left, int lane) {
        float x[kPerLane];
        load_elements(data, left, lane, x);
#pragma unroll
        for (int i = 0; i < kPerLane; i++)
            sum += static_cast<double>(x[i]) * x[i];
    });
    sum = cta_sum(sum);
    if (threadIdx.x == 0)
        partial_sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) gradient_norm_kernel(
    const double* partial_sums, int64_t chunks, float* norm, float* found_inf) {
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < chunks; i += kThreads)
        sum += partial_sums[i];
    sum = cta_sum(sum);
    if (threadIdx.x == 0) {
        *norm = static_cast<float>(sqrt(sum));
        *found_inf = isfinite(sum) ? 0.0f : 1.0f;
    }
}

__global__ void __launch_bounds__(kThreads) clip_gradients_kernel(
    const GradientRow* rows, int64_t tensors, const float* norm, float max_norm) {
    const float factor = __fdiv_rn(max_norm, __fadd_rn(*norm, 1e-6f));
    if (factor >= 1.0f)  // a NaN goes on into the gradients, as in torch
        return;
    for_each_block(rows, tensors, [factor](auto* data, int left, int lane) {
        float x[kPerLane];
        load_elements(data, left, lane, x);
#pragma unroll
        for (int i = 0; i < kPerLane; i++)
            x[i] = __fmul_rn(x[i], factor);
        store_elements(data, left, lane, x);
    });
}

}  // namespace

cudaError_t launch_gradient_norm(
    const GradientRow* rows,
    int64_t tensors,
    int64_t chunks,
    double* partial_sums,
    float* norm,
    float* found_inf,
    cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    if (chunks > 0)
        error = launch_in_order(
            gradient_squares_kernel, static_cast<unsigned>(chunks), kThreads, 0, stream, rows,
            tensors, partial_sums);
    if (error != cudaSuccess)
        return error;
    return launch_in_order(
        gradient_norm_kernel, 1, kThreads, 0, stream, partial_sums, chunks, norm, found_inf);
}

cudaError_t launch_clip_gradients(
    const GradientRow* rows,
    int64_t tensors,
    int64_t chunks,
    const float* norm,
    float max_norm,
    cudaStream_t stream) {
    if (chunks == 0)
        return cudaSuccess;
    return launch_in_order(
        clip_gradients_kernel, static_cast<unsigned>(chunks), kThreads, 0, stream, rows, tensors,
        norm, max_norm);
}

}  // namespace lowbit::cuda
