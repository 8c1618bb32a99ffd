// sm_90a instructions that nf4_lora_matmul_small.cu uses: mbarriers, flags in global memory, bulk
// copies, warpgroup products with tokens as columns. One function, one instruction, unless it says
// otherwise. Addresses in shared memory are 32-bit.
#pragma once

#include <cuda.h>

#include "common.cuh"

namespace lowbit::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- shared memory ------------------------------------------------------------------------------

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

// The same word four times, 16-byte aligned.
__device__ __forceinline__ void store_shared_four(uint32_t address, uint32_t value) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(value) : "memory");
}

// ---- cluster ------------------------------------------------------------------------------------

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

__device__ __forceinline__ void store_cluster(uint32_t address, float value) {
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

// What threads of the cluster wrote before they arrived is visible to those that waited.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- barriers -----------------------------------------------------------------------------------

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

// ---- flags in global memory ---------------------------------------------------------------------

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* flag) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}

__device__ __forceinline__ void store_release(uint32_t* flag, uint32_t value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

// ---- copies -------------------------------------------------------------------------------------

// Ordinary stores to shared memory before it are visible to bulk copies and wgmma after it.
__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Fetches into L2 only, which is right even while an earlier kernel still writes the line.
__device__ __forceinline__ void prefetch_l2(const void* p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

__device__ __forceinline__ void prefetch_tile_l2(const CUtensorMap& map, int column, int row) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(&map),
                 "r"(column), "r"(row)
                 : "memory");
}

// Read once: gives way in L2 to what is read again.
__device__ __forceinline__ void
load_tile(uint32_t destination, const CUtensorMap& map, int column, int row, uint32_t barrier) {
    constexpr uint64_t kEvictFirst = 0x12f0000000000000;  // as createpolicy encodes it
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(destination),
                 "l"(&map), "r"(barrier), "r"(column), "r"(row), "l"(kEvictFirst)
                 : "memory");
}

__device__ __forceinline__ void
load_bulk(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(destination),
        "l"(source), "r"(bytes), "r"(barrier)
        : "memory");
}

// ---- registers and dependent launches -----------------------------------------------------------

template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The kernels before this one in the stream are complete and their writes visible.
__device__ __forceinline__ void wait_for_previous_kernel() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

__device__ __forceinline__ void let_next_kernel_start() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// ---- products -----------------------------------------------------------------------------------

// 16-bit pairs, each product rounded.
__device__ __forceinline__ uint32_t multiply_pair(uint32_t a, uint32_t b, __nv_bfloat16) {
    uint32_t d;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ __forceinline__ uint32_t multiply_pair(uint32_t a, uint32_t b, __half) {
    uint32_t d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
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

__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// All committed products are complete.
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// Shared-memory operand of wgmma: rows of 128 bytes under the 128-byte swizzle, eight of them per
// 1024 bytes.
constexpr uint64_t kDescriptorHigh = uint64_t{0x40000040} << 32;

__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
    return kDescriptorHigh | 0x10000u | (address >> 4);
}

// d = a b (+ d if `accumulate`): a 64 x 16 in registers, b kColumns x 16 in shared memory.
template <typename T, int kColumns>
struct Wgmma;

// clang-format off
#define LOWBIT_D8(o) "+f"(d[o]), "+f"(d[o + 1]), "+f"(d[o + 2]), "+f"(d[o + 3]), "+f"(d[o + 4]), "+f"(d[o + 5]), "+f"(d[o + 6]), "+f"(d[o + 7])
#define LOWBIT_WGMMA(TYPE, NAME, COLUMNS, D, A0, A1, A2, A3, B, P, ...)                            \
    template <>                                                                                    \
    struct Wgmma<TYPE, COLUMNS> {                                                                  \
        static __device__ __forceinline__ void                                                     \
        run(float (&d)[COLUMNS / 2], const uint32_t* a, uint64_t b, int accumulate) {              \
            asm volatile(                                                                          \
                "{.reg .pred p;\n\tsetp.ne.b32 p, " P ", 0;\n\t"                                   \
                "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." NAME "." NAME " {" D       \
                "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", p, 1, 1, 0;}"                         \
                : __VA_ARGS__                                                                      \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));            \
        }                                                                                          \
    };
#define LOWBIT_D4 "%0,%1,%2,%3"
#define LOWBIT_D8S LOWBIT_D4 ",%4,%5,%6,%7"
#define LOWBIT_D16 LOWBIT_D8S ",%8,%9,%10,%11,%12,%13,%14,%15"
#define LOWBIT_D32 LOWBIT_D16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LOWBIT_WGMMAS(TYPE, NAME)                                                                  \
    LOWBIT_WGMMA(TYPE, NAME, 8, LOWBIT_D4, "%4", "%5", "%6", "%7", "%8", "%9", "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])) \
    LOWBIT_WGMMA(TYPE, NAME, 16, LOWBIT_D8S, "%8", "%9", "%10", "%11", "%12", "%13", LOWBIT_D8(0)) \
    LOWBIT_WGMMA(TYPE, NAME, 32, LOWBIT_D16, "%16", "%17", "%18", "%19", "%20", "%21", LOWBIT_D8(0), LOWBIT_D8(8)) \
    LOWBIT_WGMMA(TYPE, NAME, 64, LOWBIT_D32, "%32", "%33", "%34", "%35", "%36", "%37", LOWBIT_D8(0), LOWBIT_D8(8), LOWBIT_D8(16), LOWBIT_D8(24))
LOWBIT_WGMMAS(__nv_bfloat16, "bf16")
LOWBIT_WGMMAS(__half, "f16")
#undef LOWBIT_WGMMAS
#undef LOWBIT_WGMMA
#undef LOWBIT_D32
#undef LOWBIT_D16
#undef LOWBIT_D8S
#undef LOWBIT_D4
#undef LOWBIT_D8
// clang-format on

}  // namespace lowbit::cuda
