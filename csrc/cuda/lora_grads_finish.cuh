// The second half of lora_grads_sm90.cu: what warps make of their sums, which are results where
// they are over all tokens, and else parts in the workspace; and sums over such parts, in their
// order.
#pragma once

#include "lora_grads_products.cuh"
#include "lora_parts.cuh"
#include "ptx_sm90.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kFinishThreads = 256;
constexpr int kMostUSplitLog2 = 3;

struct FinishParams {
    int r;
    const float* lora_scaling;  // [r] or null
    float scaling;

    const float* projection;  // [projection_parts, tokens, kRank], null: no u
    int projection_parts;
    int64_t tokens;     // of this pass
    int64_t end_token;  // behind it, at most M
    int64_t first_token;
    int projection_units;
    int u_split_log2;  // lanes of a warp that divide the parts among them

    const float* sums;  // [parts, C, kRank] or null
    int parts;
    bool whole;  // one part of one pass: sums go to their results at once
    int64_t C;
    float* running_sums;  // [C, kRank] of the passes so far, unless there is but one
    bool first_pass, last_pass;

    const float* column_sums;  // [parts, C] or null
    float* running_column_sums;

    float* scaling_parts;  // [feature units, kRank] or null
    const void* lora_B;    // [C, r], for them, in T or fp32
    bool lora_B_is_float;

    int units;  // of kFinishThreads threads
    void* u;    // [M, kRank] in T
    void* out;  // d_lora_B [C, r], with P::kProjects, or d_lora_A [r, C]; in T or fp32
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

// The lanes of a warp in 2^u_split_log2 groups, each with as many of the parts, whose sums are
// added in their order.
template <typename T, class P>
__device__ __forceinline__ void finish_u(const FinishParams& p, int unit) {
    const int64_t stride = p.tokens * P::kRank;
    const int lanes = kWarpSize >> p.u_split_log2;  // of a group, a power of two
    const int lane = threadIdx.x % kWarpSize, own_lane = lane & (lanes - 1);
    const int group = (lane << p.u_split_log2) / kWarpSize;
    const int first = threadIdx.x / kWarpSize * lanes + own_lane;
    const int64_t index = (unit * int64_t{kFinishThreads >> p.u_split_log2} + first) * 4;
    float4 own{};
    if (index < stride) {
        const int share = (p.projection_parts - 1 >> p.u_split_log2) + 1;
        const int part = group * share;
        own = add_parts(
            p.projection + part * stride + index, min(share, p.projection_parts - part), stride);
    }
    float4 sum = own;
    for (int from = lane + lanes; from < lane + kWarpSize; from += lanes) {  // group 0's are used
        sum.x += __shfl_sync(kFullWarp, own.x, from), sum.y += __shfl_sync(kFullWarp, own.y, from);
        sum.z += __shfl_sync(kFullWarp, own.z, from), sum.w += __shfl_sync(kFullWarp, own.w, from);
    }
    if (group > 0 || index >= stride)
        return;
    const int j = static_cast<int>(index % P::kRank);
    const uint2 pairs = {
        pack_pair(sum.x * column_scale(p, j), sum.y * column_scale(p, j + 1), T{}),
        pack_pair(sum.z * column_scale(p, j + 2), sum.w * column_scale(p, j + 3), T{})};
    T* u = static_cast<T*>(p.u) + p.first_token * P::kRank + index;
    *reinterpret_cast<uint2*>(u) = pairs;
}

// Sums of this and all earlier passes.
template <class P>
__device__ __forceinline__ float4 finish_sums(const FinishParams& p, int64_t index) {
    float4 sum = add_parts(p.sums + index, p.parts, p.C * P::kRank);
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
#pragma unroll 4
    for (int i = 0; i < p.parts; i++)
        sum += p.column_sums[i * p.C + c];
    if (!p.first_pass)
        sum = p.running_column_sums[c] + sum;
    if (p.last_pass)
        static_cast<T*>(p.d_bias)[c] = from_float<T>(sum);
    else
        p.running_column_sums[c] = sum;
}

// A result at byte `at` of p.out.
template <typename T>
__device__ __forceinline__ void store_sum(const FinishParams& p, int64_t at, float sum) {
    uint8_t* out = static_cast<uint8_t*>(p.out) + at;
    if (p.out_is_float)
        *reinterpret_cast<float*>(out) = sum;
    else
        *reinterpret_cast<T*>(out) = from_float<T>(sum);
}

// Bytes from one j of d_lora_B or d_lora_A to the next, and from one column to the next.
struct OutStrides {
    int64_t j, column;

    template <class P>
    static __device__ __forceinline__ OutStrides of(const FinishParams& p) {
        const int64_t element = p.out_is_float ? 4 : 2;
        return P::kProjects ? OutStrides{element, p.r * element}
                            : OutStrides{p.C * element, element};
    }
};

// ---- what a warp leaves behind ------------------------------------------------------------------

// Of a part, for finish_unit.
template <class P>
__device__ __forceinline__ void
store_part(float* sums, const ColumnSums<P>& d, int column0, int C) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int i = 0; i < P::kTiles * 2; i++) {
        const int column = column0 + tile_column<P>(i) + lane / 4;
        if (column >= C)
            continue;
        float* row = sums + static_cast<int64_t>(column) * P::kRank + lane % 4 * 2;
#pragma unroll
        for (int t = 0; t < P::kRank / 8; t++) {
            const float* v = &d[i / 2][t][i % 2 * 2];
            *reinterpret_cast<float2*>(row + t * 8) = {v[0], v[1]};
        }
    }
}

// Scales of a thread's columns of d_lora_B, for all of its chunks.
template <class P>
struct Scales {
    float values[P::kProjects ? P::kRank / 4 : 1];

    __device__ __forceinline__ explicit Scales(const FinishParams& f) {
#pragma unroll
        for (int i = 0; P::kProjects && i < P::kRank / 4; i++)
            values[i] = column_scale(f, i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2);
    }
};

// Where `is_float` fp32, else T.
template <typename T>
__device__ __forceinline__ void
store_sum_if(bool wanted, bool is_float, void* out, int64_t at, float sum) {
    store_if(wanted && is_float, static_cast<float*>(out) + at, __float_as_uint(sum));
    store_if(
        wanted && !is_float, static_cast<T*>(out) + at,
        static_cast<uint16_t>(pack_pair(sum, 0.0f, T{})));
}

template <typename T>
__device__ __forceinline__ void
store_pair_if(bool wanted, bool is_float, void* out, int64_t at, float first, float second) {
    store_if(
        wanted && is_float, static_cast<float*>(out) + at,
        uint2{__float_as_uint(first), __float_as_uint(second)});
    store_if(wanted && !is_float, static_cast<T*>(out) + at, pack_pair(first, second, T{}));
}

// Results, of all tokens. Nothing hides what a warp takes for them, behind each chunk: therefore no
// branches.
template <typename T, class P>
__device__ __forceinline__ void
store_whole(const FinishParams& f, const ColumnSums<P>& d, const Scales<P>& scales, int column0) {
    const int lane = threadIdx.x % kWarpSize, row = lane / 4, pair = lane % 4 * 2;
    const int C = static_cast<int>(f.C);
#pragma unroll
    for (int i = 0; i < P::kTiles * 2; i++) {
        const int column = column0 + tile_column<P>(i) + row;
        const int ranks = f.out != nullptr && column < C ? f.r : 0;
        const int64_t at = P::kProjects ? int64_t{column} * f.r + pair : int64_t{pair} * C + column;
#pragma unroll
        for (int t = 0; t < P::kRank / 8; t++) {
            const float* v = &d[i / 2][t][i % 2 * 2];
            const bool wanted = t * 8 + pair < ranks;  // and the next, r is even
            if constexpr (P::kProjects) {
                store_pair_if<T>(
                    wanted, f.out_is_float, f.out, at + t * 8, v[0] * scales.values[2 * t],
                    v[1] * scales.values[2 * t + 1]);
            } else {
                store_sum_if<T>(wanted, f.out_is_float, f.out, at + t * 8 * int64_t{C}, v[0]);
                store_sum_if<T>(wanted, f.out_is_float, f.out, at + (t * 8 + 1) * int64_t{C}, v[1]);
            }
        }
    }
}

// ---- sums over parts ----------------------------------------------------------------------------

// By kFinishThreads threads. The first projection_units make u, the others sum over the tokens, a
// thread four columns of a row. `smem_products` has a place for each thread.
template <typename T, class P>
__device__ __forceinline__ void
finish_unit(const FinishParams& p, int unit, float4* smem_products) {
    if (P::kProjects && unit < p.projection_units) {
        finish_u<T, P>(p, unit);
        return;
    }
    unit -= p.projection_units;
    const int64_t index = (unit * int64_t{kFinishThreads} + threadIdx.x) * 4;
    const int64_t c = index / P::kRank;
    const int j = static_cast<int>(index % P::kRank);
    float products[4] = {};
    if (c < p.C && p.sums != nullptr) {
        const float4 sum = finish_sums<P>(p, index);
        float values[4] = {sum.x, sum.y, sum.z, sum.w};
        if (P::kProjects && p.scaling_parts != nullptr && p.last_pass) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                products[i] = j + i < p.r ? values[i] * factor<T>(p, c * p.r + j + i) : 0.0f;
        }
        if (P::kProjects) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                values[i] *= column_scale(p, j + i);
        }
        if (p.last_pass && p.out != nullptr) {
            const auto stride = OutStrides::of<P>(p);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (j + i < p.r)
                    store_sum<T>(p, c * stride.column + (j + i) * stride.j, values[i]);
            }
        }
    }
    if (!P::kProjects)
        return;
    if (c < p.C && j == 0 && p.column_sums != nullptr)
        finish_column_sum<T>(p, c);
    if (p.scaling_parts == nullptr || !p.last_pass)
        return;
    smem_products[threadIdx.x] = {products[0], products[1], products[2], products[3]};
    named_barrier(1, kFinishThreads);
    constexpr int kQuads = P::kRank / 4;
    if (threadIdx.x < kQuads) {
        float4 sum{};
#pragma unroll 4
        for (int i = threadIdx.x; i < kFinishThreads; i += kQuads) {
            const float4 v = smem_products[i];
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
        reinterpret_cast<float4*>(p.scaling_parts)[unit * kQuads + threadIdx.x] = sum;
    }
    named_barrier(1, kFinishThreads);
}

// One unit per CTA, where the CTAs of a product could not all wait for each other.
template <typename T, class P>
__global__ void __launch_bounds__(kFinishThreads, 1) finish_kernel(const FinishParams p) {
    __shared__ float4 smem_products[kFinishThreads];
    wait_for_previous_kernel();
    let_next_kernel_start();
    finish_unit<T, P>(p, blockIdx.x, smem_products);
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
