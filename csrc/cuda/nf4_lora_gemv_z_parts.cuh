// What a CTA of nf4_lora_gemv_sm90.cu adds to z: two ways, of which either serves every rank.
//
// The CTAs of a cluster divide K among them in chunks of 64 columns. The sums over a CTA's chunks
// go to every CTA of the cluster.
#pragma once

#include "bulk_sm90.cuh"
#include "nf4_lora_gemv_plan.cuh"
#include "ptx_sm90.cuh"
#include "wgmma_sm90.cuh"

namespace lowbit::cuda {
namespace {

// Chunks of this CTA; shifts divide, as cluster_log2 is exact.
struct ZShare {
    int begin, end;

    __device__ __forceinline__ ZShare(const Plan& plan, int64_t K) {
        const int chunks = static_cast<int>(K) / kZColumns;
        const int rank = static_cast<int>(cluster_rank());
        begin = chunks * rank >> plan.cluster_log2;
        end = chunks * (rank + 1) >> plan.cluster_log2;
    }
};

// A line of lora_A is a row of a chunk. Of more than 16 rows a cluster asks for 16, in turn.
template <typename T>
__device__ __forceinline__ void prefetch_lora_a(const LoraMatmulArgs& args, const Plan& plan) {
    const ZShare share(plan, args.w.K);
    const int cluster = blockIdx.x >> plan.cluster_log2, tiles = rank_tiles(args.r);
    const int first = (cluster - divide(cluster, plan.by_rank_tiles) * tiles) * 16;
    const int thread = threadIdx.x % kZThreads;
    const int row = first + thread % 16;
    const T* a = static_cast<const T*>(args.lora_A) + row * args.w.K;
    for (int chunk = share.begin + thread / 16; chunk < share.end; chunk += kZThreads / 16) {
        if (row < args.r)
            prefetch_l2(a + chunk * kZColumns);
    }
}

// ---- up to kFewRanks ----------------------------------------------------------------------------
//
// A warp copies its chunks of x and lora_A to shared memory in the background and multiplies them
// by itself; the warps' sums meet in shared memory. A stage holds rows of 128 bytes, those of
// lora_A up to a multiple of 16 and then x; in odd rows the halves change places, so that no 8
// lanes that read 16 bytes of two neighbouring rows meet in a bank.

template <typename T>
__device__ __forceinline__ void
copy_chunk(unsigned char* stage, const LoraMatmulArgs& args, int chunk) {
    const int lane = threadIdx.x % kWarpSize, rows = 16 * rank_tiles(args.r);
    const int column = chunk * kZColumns + lane % 8 * 8, last = args.r - 1;
    const T* a = static_cast<const T*>(args.lora_A) + column;
    unsigned char* to = stage + (lane / 8 % 2 * 4 ^ lane % 8) * 16;
#pragma unroll 4
    for (int row = lane / 8; row < rows; row += 4)
        copy_async_16(to + row * kZRowBytes, a + min(row, last) * args.w.K);
    if (lane < 8)
        copy_async_16(
            stage + rows * kZRowBytes + lane * 16, static_cast<const T*>(args.x) + column);
}

// Lane 4 g + t reads columns 8 t..8 t + 7 of 32 of rows g and g + 8. That is the operand of two
// products if their k runs in this order in both factors. All columns of the product are the same
// x; column 0 counts.
template <typename T>
__device__ __forceinline__ void multiply_chunk(
    float (&c)[kMaxRank / 16][4], const unsigned char* stage, const LoraMatmulArgs& args) {
    const int g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
    const auto load = [&](int row, int half) {
        return *reinterpret_cast<const uint4*>(
            stage + row * kZRowBytes + ((half + row) % 2 * 4 + t) * 16);
    };
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint4 x = load(16 * rank_tiles(args.r), half);
#pragma unroll
        for (int i = 0; i < kMaxRank / 16; i++) {
            if (16 * i >= args.r)
                break;
            const uint4 low = load(16 * i + g, half), high = load(16 * i + g + 8, half);
            mma_16x8x16(c[i], {low.x, high.x, low.y, high.y}, x.x, x.y, T{});
            mma_16x8x16(c[i], {low.z, high.z, low.w, high.w}, x.z, x.w, T{});
        }
    }
}

template <typename T, typename Meanwhile>
__device__ __forceinline__ void send_z_parts_mma(
    const LoraMatmulArgs& args,
    const Plan& plan,
    unsigned char* stages,
    Scratch& scratch,
    const Meanwhile& meanwhile) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize % kZWarps;
    const ZShare share(plan, args.w.K);
    const int stage_bytes = z_warp_stage_bytes(args.r);
    stages += warp * kZWarpStages * stage_bytes;
    int copied = share.begin + warp;
    const auto copy_next = [&](int stage) {
        if (copied < share.end)
            copy_chunk<T>(stages + stage * stage_bytes, args, copied);
        commit_async();
        copied += kZWarps;
    };
#pragma unroll
    for (int stage = 0; stage < kZWarpStages; stage++)
        copy_next(stage);
    meanwhile();
    float c[kMaxRank / 16][4] = {};
    int stage = 0;
#pragma unroll 1
    for (int chunk = share.begin + warp; chunk < share.end; chunk += kZWarps) {
        wait_async<kZWarpStages - 1>();
        __syncwarp();
        multiply_chunk<T>(c, stages + stage * stage_bytes, args);
        __syncwarp();
        copy_next(stage);
        stage = (stage + 1) % kZWarpStages;
    }
    if (lane % 4 == 0) {
#pragma unroll
        for (int i = 0; i < kMaxRank / 16; i++) {
            scratch.z_warp[warp][16 * i + lane / 4] = c[i][0];
            scratch.z_warp[warp][16 * i + lane / 4 + 8] = c[i][2];
        }
    }
    named_barrier(kZBarrier, kZThreads);
    const int j = threadIdx.x % kMaxRank;
    if (j >= args.r)
        return;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kZWarps; i++)
        sum += scratch.z_warp[i][j];
    const uint32_t part = shared_address(&scratch.z_parts[cluster_rank()][j]);
    const uint32_t arrived = shared_address(&scratch.z_arrived), size = cluster_size();
#pragma unroll 4
    for (uint32_t peer = threadIdx.x % kZThreads / kMaxRank; peer < size;
         peer += kZThreads / kMaxRank)
        store_remote_async(in_cta(part, peer), sum, in_cta(arrived, peer));
}

// ---- more ---------------------------------------------------------------------------------------
//
// TMA brings a chunk of lora_A, rows up to a multiple of 16, and one of x: operands of wgmma, of
// which all 64 rows of the sums but only the first column count.

template <typename T, typename Meanwhile>
__device__ __forceinline__ void send_z_parts_wgmma(
    const LoraMatmulArgs& args,
    const Plan& plan,
    const CUtensorMap& lora_A,
    uint32_t stages,
    Scratch& scratch,
    const Meanwhile& meanwhile) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize % kZWarps;
    const bool copying_warp = warp == 0;
    const ZShare share(plan, args.w.K);
    const int count = share.end - share.begin;
    const uint32_t a_bytes = z_rows_bytes(args.r), stage_bytes = a_bytes + kZTokenBytes;
    const uint32_t full = shared_address(scratch.z_full);
    const auto copy = [&](int i) {
        const int chunk = share.begin + i, stage = i % kZStages;
        const uint32_t to = stages + stage * stage_bytes, barrier = full + 8 * stage;
        barrier_arrive_expect(barrier, a_bytes + kZRowBytes);
        load_tile(to, lora_A, chunk * kZColumns, 0, barrier);
        load_bulk(
            to + a_bytes, static_cast<const T*>(args.x) + chunk * kZColumns, kZRowBytes, barrier);
    };
    if (copying_warp && elect_lane()) {
        for (int i = 0; i < min(count, kZStages); i++)
            copy(i);
    }
    __syncwarp();
    meanwhile();
    float sums[4] = {};
#pragma unroll 1
    for (int i = 0; i < count; i++) {
        const uint32_t stage = stages + i % kZStages * stage_bytes;
        barrier_wait(full + 8 * (i % kZStages), i / kZStages % 2);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++)
            wgmma(
                sums, own_operand_descriptor(stage + 32 * k),
                own_operand_descriptor(stage + a_bytes + 32 * k), true, T{});
        wgmma_commit();
        if (i > 0 && i - 1 + kZStages < count) {
            wgmma_wait<1>();
            named_barrier(kZBarrier, kZThreads);
            if (copying_warp && elect_lane())
                copy(i - 1 + kZStages);
            __syncwarp();
        }
    }
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < 4; i++)
        asm volatile("" : "+f"(sums[i])::"memory");
    // Column 0 is with lane 4 g: rows g and g + 8 of the warp's 16. Its neighbours help to send.
    const int j = 16 * warp + lane / 4;
    const float low = __shfl_sync(kFullWarp, sums[0], lane & ~3);
    const float high = __shfl_sync(kFullWarp, sums[2], lane & ~3);
    const uint32_t part = shared_address(&scratch.z_parts[cluster_rank()][j]);
    const uint32_t arrived = shared_address(&scratch.z_arrived), size = cluster_size();
    for (uint32_t peer = lane % 4; peer < size; peer += 4) {
        if (j < args.r)
            store_remote_async(in_cta(part, peer), low, in_cta(arrived, peer));
        if (j + 8 < args.r)
            store_remote_async(in_cta(part + 8 * sizeof(float), peer), high, in_cta(arrived, peer));
    }
}

}  // namespace
}  // namespace lowbit::cuda
