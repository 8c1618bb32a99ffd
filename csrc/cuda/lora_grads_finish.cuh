// The second half of lora_grads_sm90.cu: sums over the parts that the first has left in the
// workspace, in their order, and the results made of them.
#pragma once

#include "lora_parts.cuh"
#include "ptx_sm90.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kFinishThreads = 256;

struct FinishParams {
    int columns;  // of the factors: 16, 32 or 64
    int r;
    const float* lora_scaling;  // [r] or null
    float scaling;

    const float* projection;  // [projection_parts, tokens, columns], null: no u
    int projection_parts;
    int64_t tokens;     // of this pass
    int64_t end_token;  // behind it, at most M
    int64_t first_token;
    int projection_units;

    const float* sums;  // [parts, C, columns] or null
    int parts;
    int64_t C;
    float* running_sums;  // [C, columns] of the passes so far, unless there is but one
    bool first_pass, last_pass;
    bool scales_sums;
    int64_t stride_c, stride_j;  // of the result

    const float* column_sums;  // [parts, C] or null
    float* running_column_sums;

    float* scaling_parts;  // [feature units, columns] or null
    const void* lora_B;    // [C, r], for them, in T or fp32
    bool lora_B_is_float;

    int units;  // of kFinishThreads threads
    void* u;    // [M, columns] in T
    void* out;  // element (c, j) at c * stride_c + j * stride_j, in T or fp32
    bool out_is_float;
    void* d_bias;  // [C] in T
};

__device__ __forceinline__ float column_scale(const FinishParams& p, int j) {
    if (j >= p.r)
        return 0.0f;
    return p.lora_scaling == nullptr ? p.scaling : __fmul_rn(p.scaling, __ldg(p.lora_scaling + j));
}

// An element of lora_B as it entered the products.
template <typename T>
__device__ __forceinline__ float factor(const FinishParams& p, int64_t at) {
    return to_float(
        p.lora_B_is_float ? from_float<T>(static_cast<const float*>(p.lora_B)[at])
                          : static_cast<const T*>(p.lora_B)[at]);
}

template <typename T>
__device__ __forceinline__ void finish_u(const FinishParams& p, int64_t index) {
    if (index >= p.tokens * p.columns)
        return;
    const float4 sum = add_parts(p.projection + index, p.projection_parts, p.tokens * p.columns);
    const int j = static_cast<int>(index % p.columns);
    const uint2 pairs = {
        pack_pair(sum.x * column_scale(p, j), sum.y * column_scale(p, j + 1), T{}),
        pack_pair(sum.z * column_scale(p, j + 2), sum.w * column_scale(p, j + 3), T{})};
    T* u = static_cast<T*>(p.u) + p.first_token * p.columns + index;
    *reinterpret_cast<uint2*>(u) = pairs;
}

// Sums of this and all earlier passes.
__device__ __forceinline__ float4 finish_sums(const FinishParams& p, int64_t index) {
    float4 sum = add_parts(p.sums + index, p.parts, p.C * p.columns);
    float4* running = reinterpret_cast<float4*>(p.running_sums + index);
    if (!p.first_pass) {
        const float4 v = *running;
        sum = {v.x + sum.x, v.y + sum.y, v.z + sum.z, v.w + sum.w};
    }
    if (!p.last_pass)
        *running = sum;
    return sum;
}

template <typename T>
__device__ __forceinline__ void finish_column_sum(const FinishParams& p, int64_t c) {
    float sum = 0;
    for (int i = 0; i < p.parts; i++)
        sum += p.column_sums[i * p.C + c];
    if (!p.first_pass)
        sum = p.running_column_sums[c] + sum;
    if (p.last_pass)
        static_cast<T*>(p.d_bias)[c] = from_float<T>(sum);
    else
        p.running_column_sums[c] = sum;
}

template <typename T>
__device__ __forceinline__ void store_sum(const FinishParams& p, int64_t c, int j, float sum) {
    const float value = p.scales_sums ? sum * column_scale(p, j) : sum;
    const int64_t at = c * p.stride_c + j * p.stride_j;
    if (p.out_is_float)
        static_cast<float*>(p.out)[at] = value;
    else
        static_cast<T*>(p.out)[at] = from_float<T>(value);
}

// By kFinishThreads threads. The first projection_units make u, the others sum over the tokens, a
// thread four columns of a row. `smem_products` has a place for each thread.
template <typename T>
__device__ __forceinline__ void
finish_unit(const FinishParams& p, int unit, float4* smem_products) {
    if (unit < p.projection_units) {
        finish_u<T>(p, (unit * int64_t{kFinishThreads} + threadIdx.x) * 4);
        return;
    }
    unit -= p.projection_units;
    const int64_t index = (unit * int64_t{kFinishThreads} + threadIdx.x) * 4;
    const int64_t c = index / p.columns;
    const int j = static_cast<int>(index % p.columns);
    float products[4] = {};
    if (c < p.C && p.sums != nullptr) {
        const float4 sum = finish_sums(p, index);
        const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (!p.last_pass || j + i >= p.r)
                continue;
            if (p.out != nullptr)
                store_sum<T>(p, c, j + i, values[i]);
            if (p.scaling_parts != nullptr)
                products[i] = values[i] * factor<T>(p, c * p.r + j + i);
        }
    }
    if (c < p.C && j == 0 && p.column_sums != nullptr)
        finish_column_sum<T>(p, c);
    if (p.scaling_parts == nullptr || !p.last_pass)
        return;
    smem_products[threadIdx.x] = {products[0], products[1], products[2], products[3]};
    named_barrier(1, kFinishThreads);
    const int quads = p.columns / 4;
    if (threadIdx.x < quads) {
        float4 sum{};
        for (int i = threadIdx.x; i < kFinishThreads; i += quads) {
            const float4 v = smem_products[i];
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
        reinterpret_cast<float4*>(p.scaling_parts)[unit * quads + threadIdx.x] = sum;
    }
    named_barrier(1, kFinishThreads);
}

// One unit per CTA, where the CTAs of a product could not all wait for each other.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const FinishParams p) {
    __shared__ float4 smem_products[kFinishThreads];
    wait_for_previous_kernel();
    let_next_kernel_start();
    finish_unit<T>(p, blockIdx.x, smem_products);
}

// One CTA: a thread sums every so many parts of one column, then one thread a column.
__global__ void __launch_bounds__(kFinishThreads) finish_scaling_kernel(
    const float* parts,  // [count, columns]
    const int count,
    const int columns,
    const int r,
    const float scaling,
    float* d_lora_scaling  // [r]
) {
    __shared__ float sums[kFinishThreads];
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int j = threadIdx.x % columns, rows = kFinishThreads / columns;
    float sum = 0;
#pragma unroll 8
    for (int i = threadIdx.x / columns; i < count; i += rows)
        sum += parts[i * columns + j];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x >= r)
        return;
    sum = 0;
    for (int i = 0; i < rows; i++)
        sum += sums[i * columns + j];
    d_lora_scaling[j] = sum * scaling;
}

}  // namespace
}  // namespace lowbit::cuda
