// Wrappers around single PTX instructions of sm_90: thread block clusters, transaction barriers,
// programmatic dependent launch; and loads and prefetches that C++ cannot express.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

namespace lowbit::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void prefetch_l2(const void* p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// Whole 16-byte units of [begin, begin + bytes), by the bulk engine.
__device__ __forceinline__ void prefetch_l2(const void* begin, uint64_t bytes) {
    const uint64_t at = reinterpret_cast<uint64_t>(begin), first = at & ~uint64_t{15};
    const uint32_t size = static_cast<uint32_t>((at + bytes - first) & ~uint64_t{15});
    if (size > 0)
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(first), "r"(size));
}

// The loads of the main loop. Predicated by hand: behind a branch the compiler moves them down to
// where their values are used. Not the read-only path: the grid may start before x is written.
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

__device__ __forceinline__ void load_if(bool wanted, uint4& v, const uint8_t* p) {
    asm volatile("{.reg .pred p;\n\tsetp.ne.u32 p, %5, 0;\n\t"
                 "@p ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];}"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
                 : "l"(p), "r"(static_cast<uint32_t>(wanted))
                 : "memory");
}

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ uint32_t cluster_size() {
    uint32_t size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

// Stores to the same place in a peer's shared memory and counts it on the peer's barrier.
__device__ __forceinline__ void
send(const float* slot, const uint64_t* barrier, uint32_t peer, float value) {
    asm volatile(
        "{.reg .b32 slot, bar;\n\t"
        "mapa.shared::cluster.u32 slot, %0, %2;\n\t"
        "mapa.shared::cluster.u32 bar, %1, %2;\n\t"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [slot], %3, [bar];}" ::"r"(
            shared_address(slot)),
        "r"(shared_address(barrier)), "r"(peer), "r"(__float_as_uint(value))
        : "memory");
}

__device__ __forceinline__ void expect_bytes(const uint64_t* barrier, uint32_t bytes) {
    const uint32_t at = shared_address(barrier);
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
                 : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void wait_for_bytes(const uint64_t* barrier) {
    asm volatile("{.reg .pred done;\n\t"
                 "again:\n\t"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n\t"
                 "@!done bra again;}" ::"r"(shared_address(barrier))
                 : "memory");
}

// Waits until the kernels in front of this one have ended and their writes are visible.
__device__ __forceinline__ void wait_for_earlier_kernels() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

__device__ __forceinline__ void let_next_kernel_start() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Relaxed: orders nothing; a release would wait for all of memory.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

}  // namespace lowbit::cuda

#endif
