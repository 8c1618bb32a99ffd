// Wrappers around single PTX instructions that CUDA C++ has no (or no exact) name for. sm_80 and
// newer.
#pragma once

#include <cstdint>

namespace lowbit::cuda {

// Byte i of the result is byte (selector nibble i) & 7 of the eight bytes a (0..3), b (4..7).
// Unlike __byte_perm, which spends an instruction on masking the selector, this trusts bit 3 of
// each nibble to be clear; bits 16..31 of the selector are ignored.
__device__ __forceinline__ uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
    return d;
}

// Two fp32 values rounded to nearest even, `low` in bits 0..15.
__device__ __forceinline__ uint32_t cvt_bf16x2(float low, float high) {
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

__device__ __forceinline__ uint32_t cvt_f16x2(float low, float high) {
    uint32_t d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

// Maxima that a NaN wins: the C functions fmaxf and __hmax2 drop it.
__device__ __forceinline__ float max_nan(float a, float b) {
    float d;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
    return d;
}

__device__ __forceinline__ uint32_t max_nan_bf16x2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ __forceinline__ uint32_t max_nan_f16x2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ __forceinline__ uint32_t abs_bf16x2(uint32_t a) {
    uint32_t d;
    asm("abs.bf16x2 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}

__device__ __forceinline__ uint32_t abs_f16x2(uint32_t a) {
    uint32_t d;
    asm("abs.f16x2 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}

// value + (x > limit) as one predicated addition, where C++ gives a sum and a move.
__device__ __forceinline__ uint32_t add_if_above(uint32_t value, float x, float limit) {
    asm("{.reg .pred p;\n\tsetp.gt.f32 p, %1, %2;\n\t@p add.u32 %0, %0, 1;}"
        : "+r"(value)
        : "f"(x), "f"(limit));
    return value;
}

// Estimate of 1 / x for a normal x below 2^126; one Newton step rounds it to nearest.
__device__ __forceinline__ float rcp_approx(float x) {
    float d;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}

// Estimate of 1 / sqrt(x) for a normal x.
__device__ __forceinline__ float rsqrt_approx(float x) {
    float d;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}

// Words that CTAs pass to each other: whole, but in no order with other accesses.
__device__ __forceinline__ double load_relaxed(const double* p) {
    double value;
    asm volatile("ld.relaxed.gpu.global.f64 %0, [%1];" : "=d"(value) : "l"(p) : "memory");
    return value;
}

__device__ __forceinline__ void store_relaxed(double* p, double value) {
    asm volatile("st.relaxed.gpu.global.f64 [%0], %1;" ::"l"(p), "d"(value) : "memory");
}

// 16 bytes that are read once: they take no L1 line, which spares the lines of tables and scales.
__device__ __forceinline__ uint4 load_streaming(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

// 16 bytes from global to shared memory in the background, past L1. Groups complete in order;
// wait_async<n> leaves the n youngest under way.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                     static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
                 "l"(global)
                 : "memory");
}

__device__ __forceinline__ void commit_async() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kYoungest>
__device__ __forceinline__ void wait_async() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kYoungest) : "memory");
}

}  // namespace lowbit::cuda
