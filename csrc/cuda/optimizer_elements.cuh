// A warp's share of a tensor: 256 elements, 8 per lane, as fp32 in registers.
//
// Lane l has elements 4 l .. 4 l + 3 and 128 + 4 l .. 128 + 4 l + 3: every access of a warp is one
// contiguous piece, also over the link to host memory.
#pragma once

#include "common.cuh"
#include "optimizer.h"

namespace lowbit::cuda {

constexpr int kPerLane = kStateBlock / kWarpSize;
constexpr int kHalves = 2, kQuad = 4;

__device__ __forceinline__ int element_of(int half, int quad, int lane) {
    return half * (kStateBlock / kHalves) + lane * kQuad + quad;
}

__device__ __forceinline__ bool aligned16(const void* p) {
    return (reinterpret_cast<uintptr_t>(p) & 15) == 0;
}

// Of a block that starts at `first`: at most kStateBlock, none or less past the end.
__device__ __forceinline__ int elements_left(int64_t count, int64_t first) {
    const int64_t left = count - first;
    return static_cast<int>(left < kStateBlock ? left : kStateBlock);
}

// Elements past `left` read as 0.
template <typename T>
__device__ __forceinline__ void
load_elements(const T* p, int left, int lane, float (&x)[kPerLane]) {
    if (left < kStateBlock || !aligned16(p)) {
#pragma unroll
        for (int i = 0; i < kPerLane; i++) {
            const int at = element_of(i / kQuad, i % kQuad, lane);
            x[i] = at < left ? to_float(p[at]) : 0.0f;
        }
        return;
    }
#pragma unroll
    for (int half = 0; half < kHalves; half++) {
        const T* quad = p + element_of(half, 0, lane);
        float* out = x + half * kQuad;
        if constexpr (sizeof(T) == 4) {
            const float4 v = *reinterpret_cast<const float4*>(quad);
            out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
        } else {
            const uint2 v = *reinterpret_cast<const uint2*>(quad);
            const float2 low = unpack_pair(v.x, T{}), high = unpack_pair(v.y, T{});
            out[0] = low.x, out[1] = low.y, out[2] = high.x, out[3] = high.y;
        }
    }
}

template <typename T>
__device__ __forceinline__ void
store_elements(T* p, int left, int lane, const float (&x)[kPerLane]) {
    if (left < kStateBlock || !aligned16(p)) {
#pragma unroll
        for (int i = 0; i < kPerLane; i++) {
            const int at = element_of(i / kQuad, i % kQuad, lane);
            if (at < left)
                p[at] = from_float<T>(x[i]);
        }
        return;
    }
#pragma unroll
    for (int half = 0; half < kHalves; half++) {
        T* quad = p + element_of(half, 0, lane);
        const float* in = x + half * kQuad;
        if constexpr (sizeof(T) == 4)
            *reinterpret_cast<float4*>(quad) = {in[0], in[1], in[2], in[3]};
        else
            *reinterpret_cast<uint2*>(quad) = {
                pack_pair(in[0], in[1], T{}), pack_pair(in[2], in[3], T{})};
    }
}

// The row that chunk belongs to: the last whose first_chunk is not above it. Empty tensors have no
// chunk, so a row that shares its first_chunk with the next one is never the answer.
template <typename Row>
__device__ __forceinline__ int64_t row_of_chunk(const Row* rows, int64_t tensors, int64_t chunk) {
    int64_t low = 0, high = tensors;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (rows[middle].first_chunk <= chunk)
            low = middle;
        else
            high = middle;
    }
    return low;
}

}  // namespace lowbit::cuda
