// A warp's share of a tensor: 256 elements, 8 per lane, in registers.
//
// Lane l has elements 4 l .. 4 l + 3 and 128 + 4 l .. 128 + 4 l + 3: every access of a warp is one
// contiguous piece, also over the link to host memory. Nothing is touched twice within a step, so
// whole blocks take the streaming forms of loads and stores.
#pragma once

#include "common.cuh"
#include "optimizer.h"

namespace lowbit::cuda {

constexpr int kPerLane = kStateBlock / kWarpSize;
constexpr int kHalves = 2, kQuad = 4;

__device__ __forceinline__ int element_of(int half, int quad, int lane) {
    return half * (kStateBlock / kHalves) + lane * kQuad + quad;
}

template <typename T>
__device__ __forceinline__ bool is_quad_aligned(const T* p) {
    return (reinterpret_cast<uintptr_t>(p) & (kQuad * sizeof(T) - 1)) == 0;
}

// Of a block that starts at `first`: at most kStateBlock, none or less past the end.
__device__ __forceinline__ int elements_left(int64_t count, int64_t first) {
    const int64_t left = count - first;
    return static_cast<int>(left < kStateBlock ? left : kStateBlock);
}

// A lane's elements as they lie in memory: half as many registers as floats for 16-bit types.
template <typename T>
struct Raw {
    static constexpr int kWords = kPerLane * sizeof(T) / sizeof(uint32_t);
    uint32_t word[kWords];

    __device__ __forceinline__ void to_floats(float (&x)[kPerLane]) const {
#pragma unroll
        for (int i = 0; i < kWords; i++) {
            if constexpr (sizeof(T) == 4) {
                x[i] = __uint_as_float(word[i]);
            } else {
                const float2 pair = unpack_pair(word[i], T{});
                x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
            }
        }
    }
};

// A whole block at a multiple of a quad's bytes.
template <typename T>
__device__ __forceinline__ Raw<T> load_block(const T* p, int lane) {
    Raw<T> raw;
#pragma unroll
    for (int half = 0; half < kHalves; half++) {
        const T* quad = p + element_of(half, 0, lane);
        if constexpr (sizeof(T) == 4) {
            const uint4 v = __ldcs(reinterpret_cast<const uint4*>(quad));
            uint32_t* out = raw.word + half * 4;
            out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
        } else {
            const uint2 v = __ldcs(reinterpret_cast<const uint2*>(quad));
            raw.word[half * 2] = v.x, raw.word[half * 2 + 1] = v.y;
        }
    }
    return raw;
}

// Elements past `left` read as 0.
template <typename T>
__device__ __forceinline__ Raw<T> load_raw(const T* p, int left, int lane) {
    if (left == kStateBlock && is_quad_aligned(p))
        return load_block(p, lane);
    Raw<T> raw{};
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
        const int at = element_of(i / kQuad, i % kQuad, lane);
        if (at >= left)
            continue;
        if constexpr (sizeof(T) == 4)
            raw.word[i] = reinterpret_cast<const uint32_t*>(p)[at];
        else
            raw.word[i / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(p)[at])
                               << (i % 2 * 16);
    }
    return raw;
}

template <typename T>
__device__ __forceinline__ void
load_elements(const T* p, int left, int lane, float (&x)[kPerLane]) {
    load_raw(p, left, lane).to_floats(x);
}

template <typename T>
__device__ __forceinline__ void store_block(T* p, int lane, const float (&x)[kPerLane]) {
#pragma unroll
    for (int half = 0; half < kHalves; half++) {
        T* quad = p + element_of(half, 0, lane);
        const float* in = x + half * kQuad;
        if constexpr (sizeof(T) == 4)
            __stcs(reinterpret_cast<float4*>(quad), float4{in[0], in[1], in[2], in[3]});
        else
            __stcs(
                reinterpret_cast<uint2*>(quad),
                uint2{pack_pair(in[0], in[1], T{}), pack_pair(in[2], in[3], T{})});
    }
}

template <typename T>
__device__ __forceinline__ void
store_elements(T* p, int left, int lane, const float (&x)[kPerLane]) {
    if (left == kStateBlock && is_quad_aligned(p))
        return store_block(p, lane, x);
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
        const int at = element_of(i / kQuad, i % kQuad, lane);
        if (at < left)
            p[at] = from_float<T>(x[i]);
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
