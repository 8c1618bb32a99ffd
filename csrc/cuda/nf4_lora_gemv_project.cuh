// z = x lora_A^T of nf4_lora_gemv_sm90.cu, by CTAs that do nothing else: each multiplies 16 rows of
// lora_A by a slice of K. They leave their sums to every other CTA in a place of its own, two and a
// mark in 16 bytes (MarkedPair), so that z is there with the one load that finds the marks. Memory
// may hold anything and a captured graph runs again with the same mark: the one thread that waits
// for a pair sets its mark back.
#pragma once

#include "nf4_lora_gemv_plan.cuh"
#include "ptx_sm90.cuh"

namespace lowbit::cuda {
namespace {

// 64 columns of 16 rows: lane 4 g + t has columns 8 t..8 t + 7 of each 32 of rows g and g + 8. That
// is the operand of two products if their k runs in this order in both factors.
struct Chunk {
    uint4 low[kZColumns / 32], high[kZColumns / 32];
};

// `low` and `high`: the lane's two rows of lora_A.
template <typename T>
__device__ __forceinline__ void load_chunk(Chunk& c, const T* low, const T* high, int chunk) {
#pragma unroll
    for (int i = 0; i < kZColumns / 32; i++) {
        c.low[i] = *reinterpret_cast<const uint4*>(low + chunk * kZColumns + 32 * i);
        c.high[i] = *reinterpret_cast<const uint4*>(high + chunk * kZColumns + 32 * i);
    }
}

// All columns of the product are the same x; column 0 counts.
template <typename T>
__device__ __forceinline__ void
multiply_chunk(float (&sums)[4], const Chunk& c, const uint4* smem_x) {
#pragma unroll
    for (int i = 0; i < kZColumns / 32; i++) {
        const uint4 &low = c.low[i], &high = c.high[i], x = smem_x[threadIdx.x % 4 + 4 * i];
        mma_16x8x16(sums, {low.x, high.x, low.y, high.y}, x.x, x.y, T{});
        mma_16x8x16(sums, {low.z, high.z, low.w, high.w}, x.z, x.w, T{});
    }
}

// Where a CTA finds the sums of projectors, each kZPairs.
__device__ __forceinline__ MarkedPair*
sums_for(const LoraMatmulArgs& args, const Plan& plan, uint32_t cta) {
    return static_cast<MarkedPair*>(args.workspace) + cta * plan.projectors * kZPairs;
}

// By all threads of a CTA; its first kWarps warps take every 16th chunk of the slice each.
template <typename T>
__device__ __forceinline__ void
project(const LoraMatmulArgs& args, const Plan& plan, uint4* smem_x, Scratch& scratch) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int slice = blockIdx.x & (1 << plan.slices_log2) - 1;
    const int row0 = (blockIdx.x >> plan.slices_log2) * kZRows;
    const int chunks = static_cast<int>(args.w.K) / kZColumns;
    const int begin = chunks * slice >> plan.slices_log2;
    const int end = chunks * (slice + 1) >> plan.slices_log2;
    const T* const lora_A = static_cast<const T*>(args.lora_A);
    // A line is a row of a chunk. x has just been written, so it is in L2.
    for (int i = threadIdx.x; i < kZRows * (end - begin); i += kCtaThreads) {
        const int row = row0 + i % kZRows;
        if (row < args.r)
            prefetch_l2(lora_A + row * args.w.K + (begin + i / kZRows) * kZColumns);
    }
    wait_for_previous_kernel();
    let_next_kernel_start();
    for (int i = threadIdx.x; i < (end - begin) * (kZColumns / 8); i += kCtaThreads)
        copy_shared_async_16(smem_x + i, static_cast<const T*>(args.x) + begin * kZColumns + 8 * i);
    commit_async();
    const T* const low = lora_A + min(row0 + lane / 4, args.r - 1) * args.w.K + lane % 4 * 8;
    const T* const high = lora_A + min(row0 + lane / 4 + 8, args.r - 1) * args.w.K + lane % 4 * 8;
    Chunk under_way[kZChunks];
    int chunk = warp < kWarps ? begin + warp : end;
#pragma unroll
    for (int i = 0; i < kZChunks; i++) {
        if (chunk + i * kWarps < end)
            load_chunk(under_way[i], low, high, chunk + i * kWarps);
    }
    wait_async<0>();
    __syncthreads();
    float sums[4] = {};
#pragma unroll 1
    for (; chunk < end; chunk += kZChunks * kWarps) {
#pragma unroll
        for (int i = 0; i < kZChunks; i++) {
            const int current = chunk + i * kWarps, next = current + kZChunks * kWarps;
            if (current < end)
                multiply_chunk<T>(sums, under_way[i], smem_x + (current - begin) * (kZColumns / 8));
            if (next < end)
                load_chunk(under_way[i], low, high, next);
        }
    }
    if (warp < kWarps && lane % 4 == 0) {
        scratch.z_warp[warp][lane / 4] = sums[0];
        scratch.z_warp[warp][lane / 4 + 8] = sums[2];
    }
    __syncthreads();
    // Every thread adds up the pair that it stores.
    const int pair = threadIdx.x % kZPairs;
    float2 z = {};
#pragma unroll
    for (int i = 0; i < kWarps; i++) {
        const float2 part = *reinterpret_cast<const float2*>(&scratch.z_warp[i][2 * pair]);
        z.x += part.x, z.y += part.y;
    }
    const uint32_t ctas = gridDim.x - plan.projectors;
    for (uint32_t cta = threadIdx.x / kZPairs; cta < ctas; cta += kCtaThreads / kZPairs)
        store_relaxed(
            sums_for(args, plan, cta) + blockIdx.x * kZPairs + pair, {z.x, z.y, plan.mark});
}

// z[j] for j = 2 lane and 2 lane + 1, of which those from r on mean nothing; by all gatherers.
__device__ __forceinline__ float2
gather_z(const LoraMatmulArgs& args, const Plan& plan, uint32_t cta, Scratch& scratch) {
    const uint32_t thread = threadIdx.x % kGatherers, lane = threadIdx.x % kWarpSize;
    static_assert(kMaxProjectors * kZPairs == kGatherers);
    if (thread < plan.projectors * kZPairs) {
        MarkedPair* const place = sums_for(args, plan, cta) + thread;
        MarkedPair part;
        do
            part = load_relaxed(place);
        while (part.mark != plan.mark);
        store_relaxed(place, {0.0f, 0.0f, 0});
        scratch.z_parts[thread / kZPairs][thread % kZPairs] = {part.a, part.b};
    }
    named_barrier(kZBarrier, kGatherers);
    float2 z = {};
    if (2 * lane < args.r) {
        const float2* const parts = scratch.z_parts[lane / kZPairs << plan.slices_log2];
#pragma unroll 4
        for (int i = 0; i < 1 << plan.slices_log2; i++) {
            const float2 part = parts[i * kZPairs + lane % kZPairs];
            z.x += part.x, z.y += part.y;
        }
    }
    return z;
}

}  // namespace
}  // namespace lowbit::cuda
