// The arithmetic of AdamW and Lion on the eight elements of a lane.
//
//     AdamW:  m += (1 - beta1) (g - m)          v = beta2 v + (1 - beta2) g g
//             p = decay p - step_size * m / (sqrt(v) / correction + eps)
//     Lion:   p = decay p - step_size * sign(beta1 m + (1 - beta1) g)
//             m = beta2 m + (1 - beta2) g
//
// fp32, every operation rounded by itself and in the order of torch.optim.AdamW. Division and root
// are IEEE's. The compiler's own versions of them branch to a slow path per element, which keeps
// eight elements from overlapping; here the fast path, the same instructions, is computed for all
// eight, and one branch takes the compiler's functions if an operand of any lies where the fast
// path may be wrong (very small or large, NaN, Inf). State in host memory, whose latency is long,
// is updated at 41 instead of 30 GB/s each way for it (H100, 2026-11).
#pragma once

#include "optimizer_elements.cuh"

namespace lowbit::cuda {

// fp32 as written: the compiler may not contract these into fused multiply-adds.
__device__ __forceinline__ float mul(float a, float b) {
    return __fmul_rn(a, b);
}
__device__ __forceinline__ float add(float a, float b) {
    return __fadd_rn(a, b);
}
__device__ __forceinline__ float sub(float a, float b) {
    return __fsub_rn(a, b);
}

// ---- division and root --------------------------------------------------------------------------

// 1 / d to within what `quotient` needs, for |d| from 2^-120 to 2^120.
__device__ __forceinline__ float near_reciprocal(float d) {
    const float r = rcp_approx(d);
    return __fmaf_rn(r, __fmaf_rn(-d, r, 1.0f), r);
}

// a / d with r = near_reciprocal(d), correctly rounded: the sequence of __fdiv_rn, where neither
// the quotient nor the remainder a - q d, which is exact, under- or overflows.
__device__ __forceinline__ float quotient(float a, float d, float r) {
    const float q = mul(a, r);
    return __fmaf_rn(r, __fmaf_rn(-d, q, a), q);
}

constexpr float kLeastRadicand = 0x1p-101f;

// sqrt(x) for 0 and from kLeastRadicand on, correctly rounded: the sequence of __fsqrt_rn.
__device__ __forceinline__ float root(float x) {
    const float r = rsqrt_approx(fmaxf(x, kLeastRadicand));
    const float s = mul(x, r);
    return __fmaf_rn(__fmaf_rn(-s, s, x), mul(r, 0.5f), s);
}

// The range of several numbers' bits; the least is that of the bits less one, so that 0 is no small
// number.
struct BitRange {
    uint32_t least = 0xffffffffu, most = 0;

    __device__ __forceinline__ void take(uint32_t bits) {
        least = min(least, bits - 1);
        most = max(most, bits);
    }
    // All are 0 or from low to high, which are positive; false for NaN and negative numbers.
    __device__ __forceinline__ bool within(float low, float high) const {
        return least >= __float_as_uint(low) - 1 && most <= __float_as_uint(high);
    }
};

// ---- rules --------------------------------------------------------------------------------------

struct AdamW {
    static constexpr int kStates = 2;

    static __device__ __forceinline__ void update(
        const float (&g)[kPerLane],
        float (&p)[kPerLane],
        float (&state)[kStates][kPerLane],
        const StepNumbers& n) {
        auto &m = state[0], &v = state[1];
        const float inverse_correction = near_reciprocal(n.correction);
        float update[kPerLane];
        BitRange numerators, squares;
#pragma unroll
        for (int i = 0; i < kPerLane; i++) {
            // torch.lerp: exact at both ends
            m[i] = n.one_minus_beta1 < 0.5f ? add(m[i], mul(n.one_minus_beta1, sub(g[i], m[i])))
                                            : sub(g[i], mul(sub(g[i], m[i]), n.beta1));
            v[i] = add(mul(v[i], n.beta2), mul(mul(n.one_minus_beta2, g[i]), g[i]));
            const float a = mul(n.step_size, m[i]);
            const float d = add(quotient(root(v[i]), n.correction, inverse_correction), n.eps);
            update[i] = copysignf(quotient(a, d, near_reciprocal(d)), a);  // 0 keeps its sign
            numerators.take(__float_as_uint(fabsf(a)));
            squares.take(__float_as_uint(v[i]));
        }
        // The denominator is then from 2^-80 to 2^31, the quotient and its remainder normal or 0.
        const bool tame = numerators.within(0x1p-88f, 0x1p40f) &&
                          squares.within(kLeastRadicand, 0x1p40f) && n.correction >= 0x1p-10f &&
                          n.eps >= 0x1p-80f && n.eps <= 1.0f;
        if (!tame) {
#pragma unroll
            for (int i = 0; i < kPerLane; i++) {
                const float d = add(__fdiv_rn(__fsqrt_rn(v[i]), n.correction), n.eps);
                update[i] = __fdiv_rn(mul(n.step_size, m[i]), d);
            }
        }
#pragma unroll
        for (int i = 0; i < kPerLane; i++)
            p[i] = sub(mul(p[i], n.decay), update[i]);
    }
};

struct Lion {
    static constexpr int kStates = 1;

    static __device__ __forceinline__ void update(
        const float (&g)[kPerLane],
        float (&p)[kPerLane],
        float (&state)[kStates][kPerLane],
        const StepNumbers& n) {
        auto& m = state[0];
#pragma unroll
        for (int i = 0; i < kPerLane; i++) {
            const float u = add(mul(m[i], n.beta1), mul(n.one_minus_beta1, g[i]));
            const float direction = static_cast<float>((u > 0.0f) - (u < 0.0f));
            p[i] = sub(mul(p[i], n.decay), mul(n.step_size, direction));
            m[i] = add(mul(m[i], n.beta2), mul(n.one_minus_beta2, g[i]));
        }
    }
};

}  // namespace lowbit::cuda
