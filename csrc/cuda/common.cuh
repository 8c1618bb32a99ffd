// Device helpers shared by the kernels: 16-bit element types, scales, sums to a workspace,
// reductions within a warp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.cuh"
#include "weight.h"

namespace lowbit::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// What pack_pair makes, as fp32 again.
__device__ __forceinline__ float2 unpack_pair(uint32_t pair, __nv_bfloat16) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

__device__ __forceinline__ float2 unpack_pair(uint32_t pair, __half) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

__device__ __forceinline__ float to_float(float x) {
    return x;
}

__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
    return __bfloat162float(x);
}

__device__ __forceinline__ float to_float(__half x) {
    return __half2float(x);
}

template <typename T>
__device__ __forceinline__ T from_float(float x);

template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}

template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}

// absmax of one block. The product and the sum are rounded separately: a fused multiply-add would
// give scales that differ in the last bit from the stored format's definition. Plain or nested is a
// template argument because a branch would keep the loads around it from being in flight together.
template <bool kNested>
__device__ __forceinline__ float block_scale(const WeightView& w, int64_t block) {
    if constexpr (kNested) {
        const float nested = __ldg(w.nested_absmax + (block >> w.nested_blocksize_log2));
        const float value = __ldg(w.nested_codebook + __ldg(w.absmax_8bit + block));
        return __fadd_rn(__fmul_rn(value, nested), __ldg(w.nested_offset));
    } else {
        return __ldg(w.absmax + block);
    }
}

// Smallest divisor: zero blocks stay zero and no reciprocal overflows.
constexpr float kAbsmaxFloor = 1e-38f;

// IEEE reciprocal of an absmax; a NaN passes through the floor.
__device__ __forceinline__ float reciprocal(float absmax) {
    return __frcp_rn(absmax < kAbsmaxFloor ? kAbsmaxFloor : absmax);
}

// A thread's sums to a workspace, in vectors that lie `stride` apart.
template <int kSums>
__device__ __forceinline__ void store_sums(const float* d, float4* to, int stride) {
#pragma unroll
    for (int i = 0; i < kSums / 4; i++) {
        const float* v = d + 4 * i;
        __stcg(to + i * stride, make_float4(v[0], v[1], v[2], v[3]));
    }
}

// Maximum over groups of `lanes` neighbouring lanes (a power of two), in every lane; NaN wins.
__device__ __forceinline__ float group_max(float value, int lanes) {
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
        if (step < lanes)
            value = max_nan(value, __shfl_xor_sync(kFullWarp, value, step));
    }
    return value;
}

// Sum over the warp in a fixed order, in every lane.
__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
        value += __shfl_xor_sync(kFullWarp, value, step);
    }
    return value;
}

}  // namespace lowbit::cuda
