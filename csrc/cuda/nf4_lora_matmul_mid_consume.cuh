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

constexpr int kExchangeBarrier = 3;

// The parts of a tile give what they have of each quarter of the tokens to its owner, which adds up
// in the order of K but for its own part, the first.
template <class P>
__device__ __forceinline__ void exchange_parts(Sums<P>& d, const Params& p, const Tile& tile) {
    constexpr int kQuarter = P::kTokens / 8;  // sums of a thread
    const int thread = threadIdx.x - P::kProducers;
    bool gives = false, owns = false;
#pragma unroll
    for (int q = 0; q < 4; q++) {
        if (owner_of(p, tile, q) == tile.part) {
            owns = true;
            continue;
        }
        gives = true;
        float4* out = partial_of<P>(p, blockIdx.x, q);
#pragma unroll
        for (int i = 0; i < kQuarter; i += 4) {
            const float* v = sum_at<P>(d, q * kQuarter + i);
            __stcg(out + i / 4 * kConsumers, make_float4(v[0], v[1], v[2], v[3]));
        }
    }
    // Before this call's first kernel has ended, its zeros may be missing.
    if (gives) {
        named_barrier(kExchangeBarrier, kConsumers);
        if (thread == 0) {
            wait_for_previous_kernel();
            store_release(p.flags + blockIdx.x, 1);
        }
    }
    if (!owns)
        return;
    const int first = blockIdx.x - tile.part * kCluster;
    if (thread < tile.parts && thread != tile.part) {
        wait_for_previous_kernel();
        while (load_acquire(p.flags + first + thread * kCluster) == 0) {
        }
    }
    named_barrier(kExchangeBarrier, kConsumers);
    for (int part = 0; part < tile.parts; part++) {
        if (part == tile.part)
            continue;
#pragma unroll
        for (int q = 0; q < 4; q++) {
            if (owner_of(p, tile, q) != tile.part)
                continue;
            const float4* in = partial_of<P>(p, first + part * kCluster, q);
#pragma unroll
            for (int i = 0; i < kQuarter; i += 4) {
                const float4 v = __ldcg(in + i / 4 * kConsumers);
                float* own = sum_at<P>(d, q * kQuarter + i);
                own[0] += v.x, own[1] += v.y, own[2] += v.z, own[3] += v.w;
            }
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
        if (tile.parts > 1 && owner_of(p, tile, c / (kChunks / 4)) != tile.part)
            continue;
        const uint32_t buffer = smem + P::kOutput + (group * 2 + c % 2) * kChunkBytes;
        if (stores)
            wait_stores_read<1>();
        named_barrier(1 + group, kWarpgroup);
#pragma unroll
        for (int j = 0; j < kChunkTokens / 8; j += 2) {
            const float* v = sum_at<P>(d, (c * kChunkTokens / 8 + j) * 4);
            uint32_t pairs[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                pairs[i] = pack_pair(v[2 * i] + bias[i % 2], v[2 * i + 1] + bias[i % 2], T{});
            const int matrix = lane / 8, line = lane % 8;
            const int token = 8 * (j + matrix / 2) + line;
            const int chunk = (2 * warp + matrix % 2) ^ line;
            store_matrices_transposed(
                buffer + token * kLineBytes + chunk * 16, pairs[0], pairs[1], pairs[2], pairs[3]);
        }
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
    }
    if (own == 0)
        wait_stores_read<0>();
}

}  // namespace
}  // namespace lowbit::cuda
