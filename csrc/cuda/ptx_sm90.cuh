// Wrappers around single PTX instructions for kernels of sm_90, beside those of ptx.cuh: clusters,
// transaction barriers, programmatic dependent launch, and the warpgroup products' bookkeeping (the
// products are in wgmma_sm90.cuh, bulk copies in bulk_sm90.cuh). One function, one instruction,
// unless it says otherwise.
//
// Addresses in shared memory are 32-bit: in the window of the own CTA, from shared_address(), or in
// that of the cluster, from in_cta().
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "ptx.cuh"

namespace lowbit::cuda {

// ---- shared memory ------------------------------------------------------------------------------

// Four 8x8 tiles of 16-bit elements, transposed; each lane gives the address of one row.
__device__ __forceinline__ void
store_matrices_transposed(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a),
        "r"(b), "r"(c), "r"(d)
        : "memory");
}

// ---- global memory ------------------------------------------------------------------------------

// Loads predicated by hand: behind a branch the compiler moves them down to where their values are
// used. Not the read-only path, which may not see what a previous kernel is still writing.
__device__ __forceinline__ void load_if(bool wanted, uint32_t& v, const uint8_t* p) {
    asm volatile("{.reg .pred p;\n\tsetp.ne.u32 p, %2, 0;\n\t@p ld.global.u8 %0, [%1];}"
                 : "+r"(v)
                 : "l"(p), "r"(static_cast<uint32_t>(wanted))
                 : "memory");
}

__device__ __forceinline__ void load_if(bool wanted, uint32_t& v, const void* p) {
    asm volatile("{.reg .pred p;\n\tsetp.ne.u32 p, %2, 0;\n\t@p ld.global.u32 %0, [%1];}"
                 : "+r"(v)
                 : "l"(p), "r"(static_cast<uint32_t>(wanted))
                 : "memory");
}

__device__ __forceinline__ void load_if(bool wanted, uint2& v, const uint8_t* p) {
    asm volatile("{.reg .pred p;\n\tsetp.ne.u32 p, %3, 0;\n\t"
                 "@p ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];}"
                 : "+r"(v.x), "+r"(v.y)
                 : "l"(p), "r"(static_cast<uint32_t>(wanted))
                 : "memory");
}

__device__ __forceinline__ void load_if(bool wanted, uint4& v, const uint8_t* p) {
    asm volatile("{.reg .pred p;\n\tsetp.ne.u32 p, %5, 0;\n\t"
                 "@p ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];}"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
                 : "l"(p), "r"(static_cast<uint32_t>(wanted))
                 : "memory");
}

// Stores predicated by hand: of many in a row the compiler makes a branch each.
__device__ __forceinline__ void store_if(bool wanted, void* p, uint32_t v) {
    asm volatile("{.reg .pred p;\n\tsetp.ne.u32 p, %2, 0;\n\t@p st.global.u32 [%0], %1;}" ::"l"(p),
                 "r"(v), "r"(static_cast<uint32_t>(wanted))
                 : "memory");
}

__device__ __forceinline__ void store_if(bool wanted, void* p, uint16_t v) {
    asm volatile("{.reg .pred p;\n\tsetp.ne.u32 p, %2, 0;\n\t@p st.global.u16 [%0], %1;}" ::"l"(p),
                 "h"(v), "r"(static_cast<uint32_t>(wanted))
                 : "memory");
}

__device__ __forceinline__ void store_if(bool wanted, void* p, const uint2& v) {
    asm volatile(
        "{.reg .pred p;\n\tsetp.ne.u32 p, %3, 0;\n\t@p st.global.v2.u32 [%0], {%1, %2};}" ::"l"(p),
        "r"(v.x), "r"(v.y), "r"(static_cast<uint32_t>(wanted))
        : "memory");
}

// 16 bytes that are not read again soon.
__device__ __forceinline__ void store_streaming(void* p, const uint4& v) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y),
                 "r"(v.z), "r"(v.w)
                 : "memory");
}

// Adds pairs of 16-bit elements to 16 bytes of memory, each sum rounded; waits for nothing.
#define LOWBIT_ADD(TYPE, NAME)                                                                     \
    __device__ __forceinline__ void add_to_memory(void* p, const uint4& v, TYPE) {                 \
        asm volatile("red.relaxed.gpu.global.add.noftz.v4." NAME                                   \
                     " [%0], {%1, %2, %3, %4};" ::"l"(p),                                          \
                     "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)                                        \
                     : "memory");                                                                  \
    }
LOWBIT_ADD(__nv_bfloat16, "bf16x2")
LOWBIT_ADD(__half, "f16x2")
#undef LOWBIT_ADD

// Adds a pair to memory; waits for nothing.
__device__ __forceinline__ void add_to_memory(float* p, float a, float b) {
    asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(p), "f"(a), "f"(b)
                 : "memory");
}

__device__ __forceinline__ void increment_release(uint32_t* counter) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ __forceinline__ void increment_relaxed(uint32_t* counter) {
    asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
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

// What threads of the cluster wrote before they arrived is visible to those that waited.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// Orders nothing; a release would wait for all of memory.
__device__ __forceinline__ void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Both at once (two instructions).
__device__ __forceinline__ void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

// The same where the compiler cannot tell that a warp's threads are together.
__device__ __forceinline__ void cluster_sync_unaligned() {
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// The wait alone, for such warps.
__device__ __forceinline__ void cluster_wait_unaligned() {
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// Remote addresses come from in_cta().
__device__ __forceinline__ float4 load_remote(uint32_t address) {
    float4 v;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

// In the background; the barrier beside the destination counts the 16 bytes.
__device__ __forceinline__ void
store_remote_async(uint32_t address, const uint4& v, uint32_t barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 "
                 "[%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
                 "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier)
                 : "memory");
}

// Four sums: as the bits of one vector they would cost products their registers (ptxas C7511).
__device__ __forceinline__ void
store_remote_async(uint32_t address, float a, float b, float c, float d, uint32_t barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 "
                 "[%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
                 "f"(a), "f"(b), "f"(c), "f"(d), "r"(barrier)
                 : "memory");
}

// ---- barriers -----------------------------------------------------------------------------------

// A stage of a ring of barriers and the parity of its use.
struct Ring {
    int slot = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance(int stages) {
        if (++slot == stages) {
            slot = 0;
            parity ^= 1;
        }
    }
};

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

// Frees memory for TMA behind ordinary loads from it. `loaded`: bits of what was loaded last, or of
// what was made of it; the address depends on them, as high bits of their product with 1. A plain
// arrival overtakes loads that are under way, ptxas (CUDA 13.0) lets it; what other threads store
// comes behind them all the same, but TMA does not: in one of 500 backward passes 32 rows of W were
// those of two stages later (N = 3584, K = 18944, M = 1; H200, 2026-11).
__device__ __forceinline__ void barrier_arrive_behind(uint32_t barrier, uint32_t loaded) {
    asm volatile(
        "{.reg .b32 one, a;\n\tmov.u32 one, %%nctaid.y;\n\t"
        "mad.hi.u32 a, %1, one, %0;\n\tmbarrier.arrive.shared::cta.b64 _, [a];}" ::"r"(barrier),
        "r"(loaded)
        : "memory");
}

// Arrives and adds `bytes` to what the phase still waits for.
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// Adds `bytes` to what the phase still waits for, without arriving.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier),
                 "r"(bytes)
                 : "memory");
}

// Address from in_cta(). Without .release.cluster on purpose: that compiles to a memory barrier
// over the whole GPU, and what must come before these arrivals are only reads of finished products.
__device__ __forceinline__ void barrier_arrive_remote(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Blocks until the phase of this parity is complete (several instructions, like the next one).
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

// The same, and sees what other CTAs of the cluster have stored.
template <int kParity>
__device__ __forceinline__ void barrier_wait_cluster(uint32_t barrier) {
    asm volatile("{.reg .pred done;\n\t"
                 "again:\n\t"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t"
                 "@!done bra again;}" ::"r"(barrier),
                 "n"(kParity)
                 : "memory");
}

// Counts for the barrier without waiting at it.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- registers and dependent launches -----------------------------------------------------------

// By all warps of a warpgroup: registers per thread from here on.
template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The kernels before this one in the stream are complete and their writes visible, but not to
// __ldg: ptxas takes that for a load of what never changes, and moves it in front of the wait
// unless a branch or a barrier is between (CUDA 13.0). Ordinary loads stay behind.
__device__ __forceinline__ void wait_for_previous_kernel() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// The next kernel in the stream may start once all CTAs have called this or ended. Some kernels
// call it before they wait themselves. Those in front of them may then still be running, and only
// its own wait keeps the next kernel behind them. So no kernel touches memory before its wait, not
// even a weight that is taken for frozen (a quantization may be writing it), unless in the same
// call a kernel in front of it has waited first and let it start after that.
__device__ __forceinline__ void let_next_kernel_start() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// ---- products within a warp ---------------------------------------------------------------------

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

// Four 8x8 tiles of 16-bit elements from shared memory; lane 8 i + j gives the address of row j of
// tile i. A lane receives elements 2 (lane % 4) and the next of row lane / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&d)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(row)
                 : "memory");
}

// The same of the transposed tiles.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&d)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(row)
                 : "memory");
}

// ---- products of a warpgroup: see wgmma_sm90.cuh ------------------------------------------------

// Registers and shared memory that products use are as the program last left them.
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// All but the last kPending committed groups of products are complete.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

}  // namespace lowbit::cuda
