// Wrappers around single PTX instructions for kernels of sm_90, beside those of ptx_sm90.cuh: what
// the bulk engine copies in the background, with tensor maps (TMA) or without, and the lane that
// asks for it. Loads count at a barrier in shared memory, stores in groups of the thread.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace lowbit::cuda {

// One lane of a warp, all of whose lanes must call it. Always the same one, so that it may keep a
// ring's state and wait for the bulk groups that it committed. Behind it ptxas knows that a bulk
// copy has one lane; behind any other condition it makes a loop over the lanes around each copy.
__device__ __forceinline__ bool elect_lane() {
    uint32_t elected;
    asm volatile("{.reg .pred p;\n\telect.sync _|p, 0xffffffff;\n\tselp.u32 %0, 1, 0, p;}"
                 : "=r"(elected));
    return elected != 0;
}

// Ordinary stores to shared memory before it are visible to bulk copies and wgmma after it.
__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same for global memory.
__device__ __forceinline__ void fence_async_proxy_global() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// Into L2; both arguments are multiples of 16.
__device__ __forceinline__ void prefetch_bulk_l2(uint64_t address, uint32_t bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes));
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

// A box of a tensor map (tensor_map.h); what lies outside the tensor is zero.
__device__ __forceinline__ void
load_tile(uint32_t destination, const CUtensorMap& map, int column, int row, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4}], [%2];" ::"r"(destination),
        "l"(&map), "r"(barrier), "r"(column), "r"(row)
        : "memory");
}

// The same of three axes.
__device__ __forceinline__ void load_tile(
    uint32_t destination,
    const CUtensorMap& map,
    int column,
    int row,
    int plane,
    uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5}], [%2];" ::"r"(destination),
        "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(plane)
        : "memory");
}

// What L2 makes room with, as createpolicy encodes it.
constexpr uint64_t kEvictFirst = 0x12f0000000000000, kEvictLast = 0x14f0000000000000;

template <uint64_t kPolicy>
__device__ __forceinline__ void
load_tile_by(uint32_t destination, const CUtensorMap& map, int column, int row, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(destination),
                 "l"(&map), "r"(barrier), "r"(column), "r"(row), "l"(kPolicy)
                 : "memory");
}

// Read once: gives way in L2 to what is read again.
__device__ __forceinline__ void load_tile_once(
    uint32_t destination, const CUtensorMap& map, int column, int row, uint32_t barrier) {
    load_tile_by<kEvictFirst>(destination, map, column, row, barrier);
}

// The opposite: stays in L2.
__device__ __forceinline__ void load_tile_kept(
    uint32_t destination, const CUtensorMap& map, int column, int row, uint32_t barrier) {
    load_tile_by<kEvictLast>(destination, map, column, row, barrier);
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

// The map itself, which lies in a kernel's parameters.
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

__device__ __forceinline__ void prefetch_tile_l2(const CUtensorMap& map, int column, int row) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(&map),
                 "r"(column), "r"(row)
                 : "memory");
}

__device__ __forceinline__ void
prefetch_tile_l2(const CUtensorMap& map, int column, int row, int plane) {
    asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global [%0, {%1, %2, %3}];" ::"l"(&map),
                 "r"(column), "r"(row), "r"(plane)
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

// The same for what is read again soon, and then written again: it stays in L2.
__device__ __forceinline__ void
store_tile_kept(const CUtensorMap& map, uint32_t source, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group"
                 ".L2::cache_hint [%0, {%2, %3}], [%1], %4;" ::"l"(&map),
                 "r"(source), "r"(column), "r"(row), "l"(kEvictLast)
                 : "memory");
}

// Shared to global memory, added to what is there in the map's 16-bit type, each sum rounded.
__device__ __forceinline__ void
add_tile(const CUtensorMap& map, uint32_t source, int column, int row) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%0, {%2, %3}], [%1];" ::
            "l"(&map),
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

// All committed groups have been written.
__device__ __forceinline__ void wait_stores() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

}  // namespace lowbit::cuda
