// The consumer warpgroups of nf4_lora_matmul_mid_sm90.cu: products of the stages, the sum over a
// divided K, and the store of y.
#pragma once

#include "bulk_sm90.cuh"
#include "nf4_lora_matmul_mid_tile.cuh"
#include "wgmma_sm90.cuh"

namespace lowbit::cuda {
namespace {

// Where a consumer warpgroup stands in the ring.
template <class P>
struct Reader {
    uint32_t smem;
    uint32_t w_offset;  // of its 64 rows in a stage
    bool frees_own;
    uint32_t frees_peer;  // barriers of the other CTA, whose stages this thread frees, or 0
    Position<P> at;
    int previous;

    __device__ __forceinline__ void free_previous() {
        if (frees_own)
            barrier_arrive(smem + P::kEmpty + previous * 8);
        if (frees_peer != 0)
            barrier_arrive_remote(frees_peer + previous * 8);
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

// 16 of K.
template <typename T, class P>
__device__ __forceinline__ void
multiply_tokens(Sums<P>& d, uint64_t w, uint64_t x, bool accumulate) {
#pragma unroll
    for (int i = 0; i < P::kProducts; i++)
        wgmma(d[i], w, x + i * (P::kProductTokens * kLineBytes / 16), accumulate, T{});
}

// Sum i of a thread: four neighbouring ones belong to 8 tokens.
template <class P>
__device__ __forceinline__ float* sum_at(Sums<P>& d, int i) {
    return &d[i / (P::kProductTokens / 2)][i % (P::kProductTokens / 2)];
}

// Sums of one tile in d.
template <typename T, class P>
__device__ __forceinline__ void multiply(Sums<P>& d, Reader<P>& reader, const Tile& tile, int r) {
#pragma unroll 1
    for (int step = 0; step < tile.weight_steps; step++) {
        const uint32_t stage = reader.next_stage();
        const uint64_t x = operand_descriptor(stage);
        const uint64_t w = operand_descriptor(stage + reader.w_offset);
        wgmma_fence();
        multiply_tokens<T, P>(d, w, x, step > 0);
        multiply_tokens<T, P>(d, w + 2, x + 2, true);
        multiply_tokens<T, P>(d, w + 4, x + 4, true);
        multiply_tokens<T, P>(d, w + 6, x + 6, true);
        wgmma_commit();
        reader.template leave_stage<1>(step > 0);
    }
    if (tile.steps > tile.weight_steps) {
        const uint32_t stage = reader.next_stage();
        const uint64_t x = operand_descriptor(stage);
        const uint64_t w = operand_descriptor(stage + reader.w_offset);
#pragma unroll 1
        for (int k16 = 0; k16 < (r + 15) / 16; k16++) {
            wgmma_fence();
            multiply_tokens<T, P>(d, w + 2 * k16, x + 2 * k16, true);
            wgmma_commit();
        }
        reader.template leave_stage<0>(true);
    }
    wgmma_wait<0>();
    reader.free_previous();
}

// A quarter of the tokens, of a part's sums in the workspace.
template <class P>
__device__ __forceinline__ float4* partial_of(const Params& p, int cta, int quarter) {
    constexpr int kVectors = kTileRows * P::kTokens / 4;  // of a CTA
    const int64_t first = int64_t{cta} * kVectors + quarter * (kVectors / 4);
    return reinterpret_cast<float4*>(p.partials) + first + threadIdx.x - P::kProducers;
}

// A quarter of the tokens as it lies among a thread's sums.
template <class P>
struct Quarter {
    static constexpr int kSums = P::kTokens / 8;

    // Sum i of quarter q.
    static __device__ __forceinline__ float* at(Sums<P>& d, int q, int i) {
        return sum_at<P>(d, q * kSums + i);
    }

    static __device__ __forceinline__ void store(Sums<P>& d, int q, float4* out) {
        store_sums<kSums>(at(d, q, 0), out, kConsumers);
    }

    // Into the place of quarter q.
    static __device__ __forceinline__ void load(Sums<P>& d, int q, const float4* in) {
#pragma unroll
        for (int i = 0; i < kSums; i += 4) {
            const float4 v = __ldcg(in + i / 4 * kConsumers);
            float* to = at(d, q, i);
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        }
    }

    static __device__ __forceinline__ void add(Sums<P>& d, int q, int from) {
#pragma unroll
        for (int i = 0; i < kSums; i++)
            *at(d, q, i) += *at(d, from, i);
    }

    static __device__ __forceinline__ void load_and_add(Sums<P>& d, int q, const float4* in) {
        add_sums<kSums>(at(d, q, 0), in, kConsumers);
    }
};

// What has been given to a part.
struct Turns {
    const Params& p;
    const Tile& tile;
    uint32_t given;  // bit i: turn i

    __device__ __forceinline__ int giver_cta(int turn) const {
        return own_cta(p) + (giver_to(tile.part, tile.parts, turn) - tile.part) * kCluster;
    }
    // By a warp, which asks for all turns at a time.
    __device__ __forceinline__ void take(int turn) {
        const int lane = threadIdx.x % kWarpSize;
        while ((given >> turn & 1) == 0) {
            bool is_given = false;
            if (lane > 0 && lane < tile.parts)
                is_given = load_acquire(given_word(p, giver_cta(lane), lane)) == p.mark;
            given = __ballot_sync(kFullWarp, is_given);
        }
        __syncwarp();
    }
    // By all consumers, whose warps have taken all, or nothing: a part without a quarter of its own
    // never asks for its words, so it does not matter whether this or the mark comes last.
    __device__ __forceinline__ void forget(int thread) const {
        named_barrier(kGivenBarrier, kConsumers);
        if (thread > 0 && thread < tile.parts)
            *given_word(p, giver_cta(thread), thread) = 0;
    }
};

// The parts of a tile give what they have of each quarter of the tokens to its owner, which adds it
// to its own: the next part's first, then around the end. They give all before they take, so level
// parts, all of them running, never wait in a circle. A part in a row gives in one turn, to the
// last, and while its producers are at the next tile, so it says itself that this is done.
template <class P>
__device__ __forceinline__ void exchange_parts(Sums<P>& d, const Params& p, const Tile& tile) {
    const int thread = threadIdx.x - P::kProducers;
    Turns turns{p, tile, 0};
#pragma unroll 1
    for (int turn = 1; turn < tile.parts; turn++) {
        const int receiver = receiver_of(tile.part, tile.parts, turn);
#pragma unroll
        for (int q = 0; q < 4; q++) {
            if (owner_of(p.level, tile.parts, q) == receiver)
                Quarter<P>::store(d, q, partial_of<P>(p, own_cta(p), q));
        }
        if (p.level) {
            named_barrier_arrive(kGivenBarrier + turn, kConsumers + kWarpSize);
        } else if (receiver == tile.parts - 1) {
            named_barrier(kGivenBarrier, kConsumers);
            if (thread == 0)
                give(p, turn);
        }
    }
#pragma unroll
    for (int q = 0; q < 4; q++) {
        if (owner_of(p.level, tile.parts, q) != tile.part)
            continue;
        const auto partial = [&](int turn) { return partial_of<P>(p, turns.giver_cta(turn), q); };
        if (!p.level) {
#pragma unroll 1
            for (int turn = 1; turn < tile.parts; turn++) {
                turns.take(turn);
                Quarter<P>::load_and_add(d, q, partial(turn));
            }
            continue;
        }
        // Two turns under way, in the place of two quarters that never are this part's.
        const int even = q ^ 2, odd = q ^ 3;
        turns.take(1);
        Quarter<P>::load(d, odd, partial(1));
#pragma unroll 1
        for (int turn = 1; turn < tile.parts; turn += 2) {
            const bool second = turn + 1 < tile.parts;
            if (second) {
                turns.take(turn + 1);
                Quarter<P>::load(d, even, partial(turn + 1));
            }
            Quarter<P>::add(d, q, odd);
            if (turn + 2 < tile.parts) {
                turns.take(turn + 2);
                Quarter<P>::load(d, odd, partial(turn + 2));
            }
            if (second)
                Quarter<P>::add(d, q, even);
        }
    }
}

// Adds the bias, rounds, and stores the warpgroup's 64 columns of y, of the tokens that this part
// owns. Two staging buffers: one fills while the other is read.
template <typename T, class P>
__device__ __forceinline__ void
store_output(Sums<P>& d, const Maps& maps, const Params& p, const Tile& tile, uint32_t smem) {
    constexpr int kChunks = P::kTokens / kChunkTokens;
    const int thread = threadIdx.x - P::kProducers;
    const int group = thread / kWarpgroup;
    const int warp = thread % kWarpgroup / kWarpSize, lane = thread % kWarpSize;
    const bool stores = thread % kWarpgroup == 0;
    const int column0 = tile.row0 + group * 64;
    float bias[2] = {};
    if (p.bias != nullptr) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int64_t n = column0 + warp * 16 + lane / 4 + h * 8;
            bias[h] = to_float(static_cast<const T*>(p.bias)[min(n, p.w.N - 1)]);
        }
    }
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
        if (tile.parts > 1 && owner_of(p.level, tile.parts, c / (kChunks / 4)) != tile.part)
            continue;
        const uint32_t buffer = smem + P::kOutput + (group * 2 + c % 2) * kChunkBytes;
        if (stores)
            wait_stores_read<1>();
        named_barrier(1 + group, kWarpgroup);
        stage_chunk<T>(sum_at<P>(d, c * kChunkTokens / 2), bias, buffer, warp, lane);
        fence_async_proxy();
        named_barrier(1 + group, kWarpgroup);
        if (stores) {
            store_tile(maps.y, buffer, column0, tile.token0 + c * kChunkTokens);
            commit_stores();
        }
    }
}

template <typename T, class P>
__device__ __forceinline__ void consume(const Maps& maps, const Params& p, uint32_t smem) {
    const uint32_t thread = threadIdx.x - P::kProducers;
    const uint32_t group = thread / kWarpgroup, own = thread % kWarpgroup;
    Reader<P> reader{smem,     P::kXBytes + group * 64 * kLineBytes,
                     own == 0, own == 1 ? in_cta(smem + P::kEmpty, blockIdx.x % kCluster ^ 1) : 0,
                     {0, 0},   0};
    const Schedule schedule(p);
    const int tiles = schedule.count();
    if (thread == 0) {
        prefetch_map(maps.y);
        if (p.r > 0)
            prefetch_map(maps.z);
    }
    wait_for_operands(p);
    cluster_wait_unaligned();
    for (int index = 0; index < tiles; index++) {
        const Tile tile = tile_at<P>(p, schedule, index);
        Sums<P> d;
        multiply<T, P>(d, reader, tile, p.r);
        if (index == tiles - 1)
            let_next_kernel_start();
        if (tile.parts > 1)
            exchange_parts<P>(d, p, tile);
        store_output<T, P>(d, maps, p, tile, smem);
        // A graph's next run has the same mark and must not find it.
        if (index == tiles - 1 && takes_parts(p.level, tile))
            Turns{p, tile, 0}.forget(thread);
    }
    // A CTA with a low-rank step has seen all of them set. Others' may be set later and stay so:
    // these CTAs never ask, in a graph's next run neither.
    if (thread < p.projectors)
        *z_word(p, thread, own_cta(p)) = 0;
    if (own == 0)
        wait_stores_read<0>();
}

}  // namespace
}  // namespace lowbit::cuda
