// A thread's share of a weight on the way into registers: 8 or 4 elements as loads of 16 or 8
// bytes, or 2 elements where columns or pointers are odd.
#pragma once

#include "common.cuh"

namespace lowbit::cuda {

// kWidth neighbouring elements, still in their own type.
template <typename T, int kWidth>
struct Elements {
    static constexpr int kWords = kWidth * sizeof(T) / 4;
    uint32_t word[kWords];

    __device__ __forceinline__ void load(const T* p, int64_t /*count*/) {
        if constexpr (kWords == 2) {
            const uint2 v = __ldg(reinterpret_cast<const uint2*>(p));
            word[0] = v.x, word[1] = v.y;
        } else {
#pragma unroll
            for (int i = 0; i < kWords; i += 4) {
                const uint4 v = load_streaming(reinterpret_cast<const uint4*>(p) + i / 4);
                word[i] = v.x, word[i + 1] = v.y, word[i + 2] = v.z, word[i + 3] = v.w;
            }
        }
    }

    __device__ __forceinline__ void to_floats(float (&x)[kWidth]) const {
        if constexpr (sizeof(T) == 4) {
#pragma unroll
            for (int i = 0; i < kWidth; i++)
                x[i] = __uint_as_float(word[i]);
        } else {
#pragma unroll
            for (int i = 0; i < kWords; i++) {
                const float2 v = unpack_pair(word[i], T{});
                x[2 * i] = v.x, x[2 * i + 1] = v.y;
            }
        }
    }

    // Of a 16-bit type: the maxima of its even and of its odd elements.
    __device__ __forceinline__ uint32_t absmax_pair() const {
        uint32_t m = abs_pair(word[0], T{});
#pragma unroll
        for (int i = 1; i < kWords; i++)
            m = max_nan_pair(m, abs_pair(word[i], T{}), T{});
        return m;
    }

    __device__ __forceinline__ float absmax() const {
        if constexpr (sizeof(T) == 4) {
            float m = fabsf(__uint_as_float(word[0]));
#pragma unroll
            for (int i = 1; i < kWords; i++)
                m = max_nan(m, fabsf(__uint_as_float(word[i])));
            return m;
        } else {
            const float2 v = unpack_pair(absmax_pair(), T{});
            return max_nan(v.x, v.y);
        }
    }
};

template <typename T>
struct Elements<T, 2> {
    float value[2];

    __device__ __forceinline__ void load(const T* p, int64_t count) {
        value[0] = to_float(p[0]);
        value[1] = count > 1 ? to_float(p[1]) : 0.0f;
    }

    __device__ __forceinline__ void to_floats(float (&x)[2]) const {
        x[0] = value[0], x[1] = value[1];
    }

    __device__ __forceinline__ float absmax() const {
        return max_nan(fabsf(value[0]), fabsf(value[1]));
    }
};

template <int kWidth, typename T>
__device__ __forceinline__ void
scale_elements(const Elements<T, kWidth>& elements, float inverse, float (&x)[kWidth]) {
    elements.to_floats(x);
#pragma unroll
    for (int i = 0; i < kWidth; i++)
        x[i] = __fmul_rn(x[i], inverse);
}

}  // namespace lowbit::cuda
