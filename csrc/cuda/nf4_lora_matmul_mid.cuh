// sm_90a building blocks of nf4_lora_matmul_mid.cu: mbarriers and bulk copies within a cluster,
// TMA, warpgroup products, decoding of a block. One function, one instruction, unless it says
// otherwise. Addresses in shared memory are 32-bit: in the window of the own CTA, or from in_cta()
// in that of the cluster.
#pragma once

#include <cuda.h>

#include "common.cuh"

namespace lowbit::cuda {

// ---- cluster ------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Where another CTA of the cluster keeps what this one keeps at `address`.
__device__ __forceinline__ uint32_t in_cta(uint32_t address, uint32_t rank) {
    uint32_t remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    return remote;
}

// All threads of the cluster; what they wrote before is visible after.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ void store_remote(uint32_t address, float a, float b, float c, float d) {
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(a), "f"(b),
                 "f"(c), "f"(d)
                 : "memory");
}

__device__ __forceinline__ float load_remote(uint32_t address) {
    float value;
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
    return value;
}

__device__ __forceinline__ void store_shared(uint32_t address, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y),
                 "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

// ---- mbarriers ----------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
                 : "memory");
}

// Makes initialized barriers visible to bulk copies and to the cluster.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives and adds `bytes` to what the phase still waits for.
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// Address from in_cta(). Without .release.cluster on purpose: that compiles to a memory barrier
// over the whole GPU, and all that must come before are the reads of finished products.
__device__ __forceinline__ void barrier_arrive_remote(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Blocks until the phase of this parity is complete (several instructions).
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile("{.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
                     "selp.u32 %0, 1, 0, p;}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (done == 0);
}

// Barrier over `threads` threads of the CTA; id 0 is __syncthreads.
__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- registers ----------------------------------------------------------------------------------

// By all warps of a warpgroup: registers per thread from here on.
template <int kCount>
__device__ __forceinline__ void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void claim_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- bulk copies --------------------------------------------------------------------------------

// Ordinary stores to shared memory before it are visible to bulk copies and wgmma after it.
__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Shared memory to that of another CTA, whose barrier counts the bytes.
__device__ __forceinline__ void
copy_to_cta(uint32_t destination, uint32_t source, uint32_t bytes, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
        "[%3];" ::"r"(destination),
        "r"(source), "r"(bytes), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void
load_tile(uint32_t destination, const CUtensorMap& map, int column, int row, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4}], [%2];" ::"r"(destination),
        "l"(&map), "r"(barrier), "r"(column), "r"(row)
        : "memory");
}

// To the same place in every CTA of the mask; each one's barrier counts its bytes.
__device__ __forceinline__ void load_tile_multicast(
    uint32_t destination,
    const CUtensorMap& map,
    int column,
    int row,
    uint32_t barrier,
    uint16_t mask) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(destination),
                 "l"(&map), "r"(barrier), "r"(column), "r"(row), "h"(mask)
                 : "memory");
}

// Shared to global memory; what lies outside the tensor is dropped.
__device__ __forceinline__ void
store_tile(const CUtensorMap& map, uint32_t source, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
        "r"(source), "r"(column), "r"(row)
        : "memory");
}

__device__ __forceinline__ void commit_stores() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// All but the last kPending committed groups have read their shared memory.
template <int kPending>
__device__ __forceinline__ void wait_stores_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// ---- dependent launches -------------------------------------------------------------------------

// The kernels before this one in the stream are complete and their writes visible.
__device__ __forceinline__ void wait_for_previous_kernel() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

__device__ __forceinline__ void let_next_kernel_start() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// ---- warpgroup products -------------------------------------------------------------------------

// Operand with its contraction axis contiguous: rows of 128 bytes, 16-byte chunk c of row i at
// c ^ (i % 8), groups of 8 rows 1024 bytes apart; 1024-byte aligned. Steps of 16 elements along the
// contraction add 2 to the descriptor.
__device__ __forceinline__ uint64_t operand_descriptor(uint32_t address) {
    constexpr uint64_t kGroupStride = 1024 / 16, kSwizzle128 = 1;
    return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | kGroupStride << 32 | kSwizzle128 << 62;
}

__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 tiles of 16-bit elements, transposed; each lane gives the address of one row.
__device__ __forceinline__ void
store_matrices_transposed(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a),
        "r"(b), "r"(c), "r"(d)
        : "memory");
}

// d[4 j + 2 h + e] of a thread: row 16 (warp % 4) + lane / 4 + 8 h, column 8 j + 2 (lane % 4) + e
// of the product of a (64 rows x 16) and b (2 x size(d) rows x 16).
// clang-format off
#define LOWBIT_ACC4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LOWBIT_ACC16(d, i)                                                              \
    LOWBIT_ACC4(d, i), LOWBIT_ACC4(d, i + 4), LOWBIT_ACC4(d, i + 8), LOWBIT_ACC4(d, i + 12)
#define LOWBIT_ACC64(d, i)                                                              \
    LOWBIT_ACC16(d, i), LOWBIT_ACC16(d, i + 16), LOWBIT_ACC16(d, i + 32), LOWBIT_ACC16(d, i + 48)
#define LOWBIT_LIST64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
    "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, " \
    "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
    "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LOWBIT_LIST128 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
    "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, " \
    "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
    "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, " \
    "%66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
    "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, " \
    "%98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, " \
    "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
    "%124, %125, %126, %127"
#define LOWBIT_WGMMA(n, type, list, a, b, p, ...)                                       \
    asm volatile("{.reg .pred p;\n\tsetp.ne.b32 p, %" #p ", 0;\n\t"                     \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {"   \
                 list "}, %" #a ", %" #b ", p, 1, 1, 0, 0;}"                            \
                 : __VA_ARGS__ : "l"(desc_a), "l"(desc_b), "r"(int{accumulate}))

__device__ __forceinline__ void
wgmma(float (&d)[128], uint64_t desc_a, uint64_t desc_b, bool accumulate, __nv_bfloat16) {
    LOWBIT_WGMMA(256, "bf16", LOWBIT_LIST128, 128, 129, 130,
                 LOWBIT_ACC64(d, 0), LOWBIT_ACC64(d, 64));
}

__device__ __forceinline__ void
wgmma(float (&d)[128], uint64_t desc_a, uint64_t desc_b, bool accumulate, __half) {
    LOWBIT_WGMMA(256, "f16", LOWBIT_LIST128, 128, 129, 130,
                 LOWBIT_ACC64(d, 0), LOWBIT_ACC64(d, 64));
}

__device__ __forceinline__ void
wgmma(float (&d)[64], uint64_t desc_a, uint64_t desc_b, bool accumulate, __nv_bfloat16) {
    LOWBIT_WGMMA(128, "bf16", LOWBIT_LIST64, 64, 65, 66,
                 LOWBIT_ACC64(d, 0));
}

__device__ __forceinline__ void
wgmma(float (&d)[64], uint64_t desc_a, uint64_t desc_b, bool accumulate, __half) {
    LOWBIT_WGMMA(128, "f16", LOWBIT_LIST64, 64, 65, 66,
                 LOWBIT_ACC64(d, 0));
}
// clang-format on

// ---- decoding a block ---------------------------------------------------------------------------

struct Codebook {
    float value[16];
};

// The 16 values of one block in T, split into planes of low and of high bytes, 4 codes per word.
struct ScaledTable {
    uint32_t low[4];
    uint32_t high[4];
    uint32_t halves;  // a constant of decode_word, in a register
};

template <typename T>
__device__ __forceinline__ ScaledTable scale_codebook(const Codebook& c, float scale) {
    ScaledTable t;
    asm volatile("mov.b32 %0, 0x64206420;" : "=r"(t.halves));
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float* v = c.value + 4 * i;
        const uint32_t first = pack_pair(__fmul_rn(v[0], scale), __fmul_rn(v[1], scale), T{});
        const uint32_t second = pack_pair(__fmul_rn(v[2], scale), __fmul_rn(v[3], scale), T{});
        t.low[i] = prmt(first, second, 0x6420);
        t.high[i] = prmt(first, second, 0x7531);
    }
    return t;
}

// Bytes of four codes from one plane: three bits of a code select within each half, the fourth
// between the halves.
__device__ __forceinline__ uint32_t
look_up(const uint32_t (&plane)[4], uint32_t select, uint32_t half) {
    return prmt(prmt(plane[0], plane[1], select), prmt(plane[2], plane[3], select), half);
}

// Eight codes of a word (little endian, first code in the high nibble of byte 0) to eight values.
__device__ __forceinline__ uint4 decode_word(const ScaledTable& t, uint32_t word) {
    uint32_t select = word & 0x77777777u;
    uint32_t half;  // word & 0x88888888 | halves; of two constants the compiler makes two steps
    asm("lop3.b32 %0, %1, 0x88888888, %2, 0xea;" : "=r"(half) : "r"(word), "r"(t.halves));
    half >>= 1;
    uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const uint32_t low = look_up(t.low, select, half);
        const uint32_t high = look_up(t.high, select, half);
        out[i] = prmt(low, high, 0x4051);  // of two codes in a byte the high nibble comes first
        out[i + 1] = prmt(low, high, 0x6273);
        select >>= 16;
        half >>= 16;
    }
    return {out[0], out[1], out[2], out[3]};
}

}  // namespace lowbit::cuda
