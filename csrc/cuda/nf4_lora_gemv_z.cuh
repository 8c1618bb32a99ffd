// The low-rank term of nf4_lora_gemv_sm90.cu: z, by a warpgroup that does nothing else, and lora_B.
//
// The CTAs of a cluster divide K among them in chunks of 64 columns. TMA brings a chunk of lora_A,
// rows up to a multiple of 16, and one of x: operands of wgmma, of which all 64 rows of the sums
// but only the first column count. The sums go to every CTA of the cluster.
#pragma once

#include "nf4_lora_gemv_plan.cuh"
#include "ptx_sm90.cuh"
#include "wgmma_sm90.cuh"

namespace lowbit::cuda {
namespace {

// Chunks of this CTA.
struct ZShare {
    int begin, end;

    __device__ __forceinline__ explicit ZShare(int64_t K) {
        const int chunks = static_cast<int>(K) / kZColumns;
        const int size = static_cast<int>(cluster_size()), rank = static_cast<int>(cluster_rank());
        begin = chunks * rank / size, end = chunks * (rank + 1) / size;
    }
};

// A line of lora_A is a row of a chunk. Of more than 16 rows a cluster asks for 16, in turn.
template <typename T>
__device__ __forceinline__ void prefetch_lora_a(const LoraMatmulArgs& args) {
    const ZShare share(args.w.K);
    const int first = static_cast<int>(blockIdx.x / cluster_size()) % rank_tiles(args.r) * 16;
    const int thread = threadIdx.x % kZThreads;
    const int row = first + thread % 16;
    const T* a = static_cast<const T*>(args.lora_A) + row * args.w.K;
    for (int chunk = share.begin + thread / 16; chunk < share.end; chunk += kZThreads / 16) {
        if (row < args.r)
            prefetch_l2(a + chunk * kZColumns);
    }
}

// Sums over this CTA's columns, to every CTA of the cluster.
template <typename T>
__device__ __forceinline__ void send_z_parts(
    const LoraMatmulArgs& args, const CUtensorMap& lora_A, uint32_t stages, Scratch& scratch) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize % kZWarps;
    const bool copies = threadIdx.x == kThreads;
    const ZShare share(args.w.K);
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
    if (copies) {
        for (int i = 0; i < min(count, kZStages); i++)
            copy(i);
    }
    __syncwarp();
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
            if (copies)
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

// s_j z[j], zero from r on, to scratch.z. By all warps for z; ends when all parts have come, which
// is when no peer writes to this CTA any more.
template <typename T>
__device__ __forceinline__ void compute_z(
    const LoraMatmulArgs& args,
    const CUtensorMap& lora_A,
    const Plan& plan,
    uint32_t stages,
    Scratch& scratch) {
    if (plan.exchange)
        send_z_parts<T>(args, lora_A, stages, scratch);
    const int j = threadIdx.x % kZThreads;
    if (j >= kMaxRank)
        return;
    float z = 0;
    if (j < args.r) {
        float scale = args.scaling;
        if (args.lora_scaling != nullptr)
            scale *= args.lora_scaling[j];
        if (plan.exchange) {
            barrier_wait_cluster<0>(shared_address(&scratch.z_arrived));
            const uint32_t size = cluster_size();
#pragma unroll 1
            for (uint32_t i = 0; i < size; i++)
                z += scratch.z_parts[i][j];
            if (args.z_out != nullptr && blockIdx.x == 0)
                static_cast<T*>(args.z_out)[j] = from_float<T>(z);
        } else {
            z = to_float(static_cast<const T*>(args.z_in)[j]);
        }
        z *= scale;
    }
    scratch.z[j] = z;
    barrier_arrive(shared_address(&scratch.z_ready));
}

// Elements 2 lane and 2 lane + 1 of kRows rows of lora_B. Rows are 4-byte aligned if r is even.
__device__ __forceinline__ void
load_lora_b(uint32_t (&b)[kRows], bool wanted, const LoraMatmulArgs& args, uint32_t row) {
    const int j = threadIdx.x % kWarpSize * 2, r = args.r;
    const uint16_t* p = static_cast<const uint16_t*>(args.lora_B) + static_cast<uint64_t>(row) * r;
    if (r % 2 == 0) {
#pragma unroll
        for (int i = 0; i < kRows; i++)
            b[i] = 0, load_if(wanted && j < r, b[i], static_cast<const void*>(p + i * r + j));
    } else if (wanted) {
#pragma unroll
        for (int i = 0; i < kRows; i++) {
            const uint32_t first = j < r ? p[i * r + j] : 0;
            b[i] = j + 1 < r ? first | static_cast<uint32_t>(p[i * r + j + 1]) << 16 : first;
        }
    }
}

// Adds lora_B z, the lane's part of it, to the sums of kRows rows.
template <typename T>
__device__ __forceinline__ void
add_low_rank(float (&sums)[kRows], const uint32_t (&b)[kRows], const Scratch& scratch) {
    barrier_wait(shared_address(&scratch.z_ready), 0);
    const float2 z = reinterpret_cast<const float2*>(scratch.z)[threadIdx.x % kWarpSize];
#pragma unroll
    for (int i = 0; i < kRows; i++) {
        const float2 factor = unpack_pair(b[i], T{});
        sums[i] = __fmaf_rn(z.x, factor.x, __fmaf_rn(z.y, factor.y, sums[i]));
    }
}

}  // namespace
}  // namespace lowbit::cuda
