// Wrappers around single PTX instructions that CUDA C++ has no (or no exact) name for. sm_80 and
// newer.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

// The same number, of which the compiler knows nothing: what follows from it is computed here and
// not in front of a loop, whose registers it would take.
__device__ __forceinline__ int opaque(int number) {
    asm volatile("" : "+r"(number));
    return number;
}

// A maximum that a NaN wins: the C functions fmaxf and __hmax2 drop it.
__device__ __forceinline__ float max_nan(float a, float b) {
    float d;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
    return d;
}

// Pairs of 16-bit elements travel as one 32-bit word, the first element in the low half. fp32
// values are rounded to nearest even; maxima as above.
#define LOWBIT_PAIRS(TYPE, NAME)                                                                   \
    __device__ __forceinline__ uint32_t pack_pair(float first, float second, TYPE) {               \
        uint32_t d;                                                                                \
        asm("cvt.rn." NAME ".f32 %0, %1, %2;" : "=r"(d) : "f"(second), "f"(first));                \
        return d;                                                                                  \
    }                                                                                              \
    __device__ __forceinline__ uint32_t max_nan_pair(uint32_t a, uint32_t b, TYPE) {               \
        uint32_t d;                                                                                \
        asm("max.NaN." NAME " %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));                            \
        return d;                                                                                  \
    }                                                                                              \
    __device__ __forceinline__ uint32_t abs_pair(uint32_t a, TYPE) {                               \
        uint32_t d;                                                                                \
        asm("abs." NAME " %0, %1;" : "=r"(d) : "r"(a));                                            \
        return d;                                                                                  \
    }
LOWBIT_PAIRS(__nv_bfloat16, "bf16x2")
LOWBIT_PAIRS(__half, "f16x2")
#undef LOWBIT_PAIRS

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

// Fetches the line into L2 only, which is right even while an earlier kernel still writes it.
__device__ __forceinline__ void prefetch_l2(const void* p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// Flags and counters.
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* counter) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
}

__device__ __forceinline__ uint64_t load_acquire(const uint64_t* mark) {
    uint64_t value;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(mark) : "memory");
    return value;
}

__device__ __forceinline__ void store_release(uint64_t* mark, uint64_t value) {
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(mark), "l"(value) : "memory");
}

__device__ __forceinline__ void store_relaxed(uint64_t* mark, uint64_t value) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(mark), "l"(value) : "memory");
}

__device__ __forceinline__ void store_release(uint32_t* counter, uint32_t value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

// Two values and a mark in 16 bytes, which CTAs pass to each other as a whole: who sees the mark
// has the values. PTX's memory model ends at 64 bits (8.2.4 of ISA 9.1, on vectors) and says
// nothing of b128. CUDA C++ promises that loads and stores of 16 bytes are atomic from sm_70 on
// (__nv_atomic_load, __nv_atomic_store), and nvcc 13.0 makes these two instructions of them.
struct alignas(16) MarkedPair {
    float a, b;
    uint64_t mark;
};

__device__ __forceinline__ MarkedPair load_relaxed(const MarkedPair* p) {
    MarkedPair v;
    asm volatile("{.reg .b128 whole;\n\t.reg .b64 pair;\n\t"
                 "ld.relaxed.gpu.global.b128 whole, [%3];\n\t"
                 "mov.b128 {pair, %2}, whole;\n\tmov.b64 {%0, %1}, pair;}"
                 : "=f"(v.a), "=f"(v.b), "=l"(v.mark)
                 : "l"(p)
                 : "memory");
    return v;
}

__device__ __forceinline__ void store_relaxed(MarkedPair* p, const MarkedPair& v) {
    asm volatile("{.reg .b128 whole;\n\t.reg .b64 pair;\n\t"
                 "mov.b64 pair, {%1, %2};\n\tmov.b128 whole, {pair, %3};\n\t"
                 "st.relaxed.gpu.global.b128 [%0], whole;}" ::"l"(p),
                 "f"(v.a), "f"(v.b), "l"(v.mark)
                 : "memory");
}

// Addresses in shared memory are 32-bit.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory in the background, past L1. Groups complete in order;
// wait_async<n> leaves the n youngest under way.
__device__ __forceinline__ void copy_async_16(uint32_t shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// The same through L1: what all SMs read at the same time comes faster so, though none has it yet.
__device__ __forceinline__ void copy_shared_async_16(void* shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
                 "l"(global)
                 : "memory");
}

// As copy_async_16, or zeros.
__device__ __forceinline__ void
copy_async_16_or_zeros(uint32_t shared, const void* global, bool wanted) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
                 "r"(wanted ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void commit_async() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kYoungest>
__device__ __forceinline__ void wait_async() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kYoungest) : "memory");
}

// ---- shared memory ------------------------------------------------------------------------------

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

__device__ __forceinline__ uint2 load_shared_pair(uint32_t address) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
    return v;
}

// At `address` + kOffset; the constant becomes part of the instruction.
template <int kOffset>
__device__ __forceinline__ uint32_t load_shared_at(uint32_t address) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(v) : "r"(address), "n"(kOffset));
    return v;
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, uint16_t value) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(value) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, const uint4& v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y),
                 "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ void store_shared_pair(uint32_t address, uint32_t a, uint32_t b) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}

// The same word four times, 16-byte aligned.
__device__ __forceinline__ void store_shared_four(uint32_t address, uint32_t value) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(value) : "memory");
}

// ---- within a CTA and a warp --------------------------------------------------------------------

// Barrier over `threads` threads of the CTA; id 0 is __syncthreads.
__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// An 8 x 8 matrix of 16-bit elements, two per lane, row lane / 4: transposed.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t pair) {
    uint32_t d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(pair));
    return d;
}

// d += a b over a 16 x 8 tile, a's rows along K like b's columns.
#define LOWBIT_MMA(TYPE, NAME)                                                                     \
    __device__ __forceinline__ void mma_16x8x16(                                                   \
        float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, TYPE) {                   \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                        \
                     ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"        \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                              \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));              \
    }
LOWBIT_MMA(__nv_bfloat16, "bf16")
LOWBIT_MMA(__half, "f16")
#undef LOWBIT_MMA

}  // namespace lowbit::cuda
