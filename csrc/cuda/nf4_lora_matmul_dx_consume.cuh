// The consumer warpgroups of nf4_lora_matmul_dx_sm90.cu: products of the stages, the sum over a
// split N, and the store of dx.
#pragma once

#include "bulk_sm90.cuh"
#include "marks.cuh"
#include "nf4_lora_matmul_dx_tile.cuh"
#include "wgmma_sm90.cuh"

namespace lowbit::cuda {
namespace {

// Where a consumer warpgroup stands in the ring.
template <class P>
struct Reader {
    uint32_t smem;
    uint32_t w_offset;  // of its 64 columns in a stage
    uint32_t empty;     // barriers of the CTA whose stages this thread frees, or 0
    Position<P> at;
    int previous;

    __device__ __forceinline__ void free_previous() {
        if (empty != 0)
            barrier_arrive_remote(empty + previous * 8);
    }

    __device__ __forceinline__ uint32_t next_stage() {
        barrier_wait(smem + P::kFull + at.slot * 8, at.parity);
        return smem + at.slot * P::kStageBytes;
    }

    // Leaves `kPending` of the products running, none of which reads the stage before.
    template <int kPending>
    __device__ __forceinline__ void leave_stage(bool free) {
        wgmma_wait<kPending>();
        if (free)
            free_previous();
        previous = at.slot;
        at.advance(1);
    }
};

// Sums of one tile in d.
template <typename T, class P>
__device__ __forceinline__ void
multiply(float (&d)[P::kTokens / 2], Reader<P>& reader, const Params& p, const Tile& tile) {
#pragma unroll 1
    for (int step = 0; step < tile.weight_steps; step++) {
        const uint32_t stage = reader.next_stage();
        const uint64_t dy = operand_descriptor(stage);
        const uint64_t w = transposed_operand_descriptor(stage + reader.w_offset);
        wgmma_fence();
        wgmma_transposed(d, w, dy, step > 0, T{});
        wgmma_transposed(d, w + kLines16, dy + 2, true, T{});
        wgmma_transposed(d, w + 2 * kLines16, dy + 4, true, T{});
        wgmma_transposed(d, w + 3 * kLines16, dy + 6, true, T{});
        wgmma_commit();
        reader.template leave_stage<1>(step > 0);
    }
    // Of a split tile's CTAs, one may have fewer steps.
    const bool low_rank = has_low_rank<P>(p, tile);
    for (int step = tile.weight_steps + low_rank; step < tile.steps; step++) {
        reader.next_stage();
        reader.template leave_stage<0>(true);
    }
    if (low_rank) {
        const uint32_t stage = reader.next_stage();
        const uint64_t u = operand_descriptor(stage);
        const uint64_t w = transposed_operand_descriptor(stage + reader.w_offset);
#pragma unroll 1
        for (int k16 = 0; k16 < (p.r + 15) / 16; k16++) {
            wgmma_fence();
            wgmma_transposed(d, w + k16 * kLines16, u + 2 * k16, true, T{});
            wgmma_commit();
        }
        reader.template leave_stage<0>(true);
    }
    wgmma_wait<0>();
    reader.free_previous();
}

// N was split: each CTA of the pair keeps one half of the tokens and is sent the other's sums of
// them, in place of dy in the stages that the next steps would fill, were there any: both CTAs have
// left them when they are free here. A warp waits for what the same warp of the other CTA sends.
template <class P>
__device__ __forceinline__ void
add_halves(float (&d)[P::kTokens / 2], const Reader<P>& reader, const uint8_t* smem_generic) {
    constexpr int kHalf = P::kOwnSums;
    constexpr int kVectorBytes = kConsumers * 16;
    constexpr int kInStage = P::kDyBytes / kVectorBytes;  // of a thread
    constexpr int kBuffers = kHalf / 4 / kInStage;
    static_assert(kBuffers * kInStage * 4 == kHalf && kBuffers < P::kStages);
    const int rank = blockIdx.x % kCluster;
    const int thread = threadIdx.x - P::kProducers;
    const uint32_t barrier = reader.smem + P::kSums + thread / kWarpSize * 8;
    if (thread % kWarpSize == 0)
        barrier_arrive_expect(barrier, kHalf * 4 * kWarpSize);
    Position<P> at = reader.at;
    uint32_t buffers[kBuffers];
#pragma unroll
    for (int b = 0; b < kBuffers; b++, at.advance(1)) {
        barrier_wait(reader.smem + P::kEmpty + at.slot * 8, at.parity ^ 1);
        buffers[b] = at.slot * P::kStageBytes + thread * 16;
    }
    const uint32_t peer = in_cta(reader.smem, rank ^ 1);
    const uint32_t peer_barrier = in_cta(barrier, rank ^ 1);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (half == rank)
            continue;
#pragma unroll
        for (int i = 0; i < kHalf / 4; i++) {
            const float* v = d + half * kHalf + 4 * i;
            const uint32_t to = peer + buffers[i / kInStage] + i % kInStage * kVectorBytes;
            store_remote_async(to, v[0], v[1], v[2], v[3], peer_barrier);
        }
    }
    barrier_wait_cluster<0>(barrier);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (half != rank)
            continue;
#pragma unroll
        for (int i = 0; i < kHalf / 4; i++) {
            const float4 v = *reinterpret_cast<const float4*>(
                smem_generic + buffers[i / kInStage] + i % kInStage * kVectorBytes);
            float* own = d + half * kHalf + 4 * i;
            own[0] += v.x, own[1] += v.y, own[2] += v.z, own[3] += v.w;
        }
    }
}

// Which of the warps that give sums of a split tile, by the share of its cluster: those of lower
// numbers are the same warp's of the shares in front.
template <class P>
__device__ __forceinline__ int giver(const Params& p, int share, int warp) {
    const int tile = blockIdx.x / kCluster >> share_log2<P>(p);
    const int cluster = tile * ((1 << share_log2<P>(p)) - 1) + share;
    return (cluster * kCluster + blockIdx.x % kCluster) * kConsumerWarps + warp;
}

// Several pairs have split N: all but the last write what add_halves has left them for it.
template <class P>
__device__ __forceinline__ void give_sums(const float (&d)[P::kTokens / 2], const Params& p) {
    const int thread = threadIdx.x - P::kProducers, lane = thread % kWarpSize;
    const int number = giver<P>(p, share_of<P>(p), thread / kWarpSize);
    float4* to = p.given + number * (P::kOwnSums / 4 * kWarpSize) + lane;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (half != blockIdx.x % kCluster)
            continue;
        store_sums<P::kOwnSums>(d + half * P::kOwnSums, to, kWarpSize);
    }
    __syncwarp();
    if (lane == 0)
        store_release(p.given_words + number, p.given_mark);
}

// The last adds them to its own in the order of the shares. They come from CTAs of lower numbers,
// which have begun and wait for nobody.
template <class P>
__device__ __forceinline__ void add_given(float (&d)[P::kTokens / 2], const Params& p) {
    const int thread = threadIdx.x - P::kProducers, lane = thread % kWarpSize;
    const int last = share_of<P>(p);
#pragma unroll 1
    for (int share = 0; share < last; share++) {
        const int number = giver<P>(p, share, thread / kWarpSize);
        const float4* from = p.given + number * (P::kOwnSums / 4 * kWarpSize) + lane;
        if (lane == 0)
            wait_for_mark(p.given_words + number, p.given_mark);
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (half != blockIdx.x % kCluster)
                continue;
            add_sums<P::kOwnSums>(d + half * P::kOwnSums, from, kWarpSize);
        }
    }
}

// Rounds the warpgroup's 64 columns of dx and stores or adds them. Two staging buffers: one fills
// while the other is read.
template <typename T, class P>
__device__ __forceinline__ void store_output(
    const float (&d)[P::kTokens / 2],
    const Maps& maps,
    const Tile& tile,
    bool adds,
    uint32_t smem) {
    constexpr int kChunks = P::kTokens / kChunkTokens;
    const int thread = threadIdx.x - P::kProducers;
    const int group = thread / kWarpgroup;
    const int warp = thread % kWarpgroup / kWarpSize, lane = thread % kWarpSize;
    const bool storing_warp = warp == 0;
    const int column0 = tile.column0 + group * 64;
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
        if (tile.split && c / (kChunks / 2) != blockIdx.x % kCluster)
            continue;
        const uint32_t buffer = smem + P::kOutput + (group * 2 + c % 2) * kChunkBytes;
        if (storing_warp && elect_lane())
            wait_stores_read<1>();
        named_barrier(1 + group, kWarpgroup);
        stage_chunk<T>(d + c * kChunkTokens / 2, nullptr, buffer, warp, lane);
        fence_async_proxy();
        named_barrier(1 + group, kWarpgroup);
        if (storing_warp && elect_lane()) {
            const int token0 = tile.token0 + c * kChunkTokens;
            if (adds)
                add_tile(maps.dx, buffer, column0, token0);
            else
                store_tile(maps.dx, buffer, column0, token0);
            commit_stores();
        }
    }
}

template <typename T, class P>
__device__ __forceinline__ void
consume(const Maps& maps, const Params& p, uint32_t smem, const uint8_t* smem_generic) {
    const uint32_t thread = threadIdx.x - P::kProducers;
    const uint32_t group = thread / kWarpgroup, own = thread % kWarpgroup;
    Reader<P> reader{
        smem,
        P::kDyBytes + group * 64 * kLineBytes,
        own < kCluster ? in_cta(smem + P::kEmpty, own) : 0,
        {0, 0},
        0};
    const int tiles = tile_count<P>(p);
    if (thread == 0)
        prefetch_map(maps.dx);
    cluster_wait_unaligned();
    for (int index = 0; index < tiles; index++) {
        const Tile tile = tile_at<P>(p, index);
        float d[P::kTokens / 2];
        multiply<T, P>(d, reader, p, tile);
        if (tile.split) {
            add_halves<P>(d, reader, smem_generic);
            if constexpr (P::kMore) {
                if (!has_last_share<P>(p)) {
                    give_sums<P>(d, p);
                    continue;
                }
                add_given<P>(d, p);
            }
        }
        store_output<T, P>(d, maps, tile, p.adds, smem);
    }
    // A CTA with a low-rank step has seen u by now, and a graph's next run, which has the same
    // mark, must not find it. Whether others find it does not matter: they never ask.
    if (thread == 0 && p.u_words != nullptr)
        p.u_words[blockIdx.x] = 0;
    if (own < kWarpSize && elect_lane())
        wait_stores_read<0>();
}

}  // namespace
}  // namespace lowbit::cuda
