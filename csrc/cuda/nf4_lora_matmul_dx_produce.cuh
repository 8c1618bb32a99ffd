// The producer warps of nf4_lora_matmul_dx_sm90.cu: they fill the stages with decoded weights and
// have TMA bring dy and packed weights.
//
// A warp decodes 32 rows of one block column in one step, a lane one block of 64 codes; warps that
// share them take steps in turn. Packed weights and scales come in groups of two turns, the former
// into two buffers, the latter into registers, as they are stored, a group ahead. What a group does
// besides decoding counts: scales asked for without branches and behind a stage's fence, packed
// weights by a warp that asks for no dy, took 5.5 of 80 us off the backward pass (gate of an 8B
// model, 256 tokens, H200, 2026-11).
#pragma once

#include "block_decode.cuh"
#include "bulk_sm90.cuh"
#include "nf4_lora_matmul_dx_grads.cuh"
#include "nf4_lora_matmul_dx_tile.cuh"
#include "ptx_sm90.cuh"

namespace lowbit::cuda {
namespace {

// Keeps two groups of packed weights loaded or on their way. One thread.
template <class P>
struct PackedLoader {
    const Maps& maps;
    const Params& p;
    uint32_t smem;
    int own_row;
    int tiles;
    Tile tile;
    int index, step, buffer;

    __device__ __forceinline__ void load_next() {
        if (step >= tile.weight_steps) {
            if (index + 1 >= tiles)
                return;
            tile = tile_at<P>(p, ++index);
            step = 0;
        }
        const uint32_t full = smem + P::kPackedFull + buffer * 8;
        barrier_arrive_expect(full, P::kPackedBytes);
#pragma unroll
        for (int i = 0; i < P::kGroupSteps; i++)
            load_tile(
                smem + P::kPacked + buffer * P::kPackedBytes + i * P::kPackedStep, maps.packed,
                tile.column0 / 2, (tile.first_step + step + i) * kStepN + own_row, full);
        step += P::kGroupSteps;
        buffer ^= 1;
    }
};

// What a scale is made of: two loads that do not wait for each other.
struct StoredScale {
    uint32_t value;  // bits of absmax, or of nested_absmax
    uint32_t code;   // of the nested codebook; 0 where absmax is plain
};

// Loads a lane's scales, one for each step of its warp. The rows of a step are whole blocks of any
// size, so from step to step the number of the lane's block grows by the same.
template <class P>
struct ScaleLoader {
    const Params& p;
    int block_column, row;  // of the lane, within a tile and a step
    uint32_t number;        // of the next block, below 2^32 where its row is one of W
    int rows;               // from that row to N

    __device__ __forceinline__ void begin(const Tile& tile, int step) {
        const int first = (tile.first_step + step) * kStepN + row;
        const int block = min(tile.column0 / 64 + block_column, p.blocks - 1);
        number = (static_cast<uint32_t>(first) * p.blocks + block) >> (p.w.blocksize_log2 - 6);
        rows = static_cast<int>(p.w.N) - first;
    }

    // Of rows from N on, 0: they have codes of TMA's zeros, and dy has zeros for them.
    __device__ __forceinline__ StoredScale load_next() {
        StoredScale s{};
        const void* value = p.scales + (number >> p.scale_log2);
        load_if(rows > 0, s.value, value);
        load_if(rows > 0 && p.w.absmax_8bit != nullptr, s.code, p.w.absmax_8bit + number);
        number += P::kStride * p.step_blocks;
        rows -= P::kStride * kStepN;
        return s;
    }
};

// The scale as block_scale gives it, with the nested codebook in shared memory. Where absmax is
// plain, that codebook is ones and the offset -0, which leave it as it is.
template <class P>
__device__ __forceinline__ float scale_of(const StoredScale& s, uint32_t smem, float offset) {
    const uint32_t of_code = load_shared_at<P::kNestedCodebook>(smem + s.code * 4);
    return __fadd_rn(__fmul_rn(__uint_as_float(of_code), __uint_as_float(s.value)), offset);
}

// Waiting here for the kernel that makes u keeps nobody from an SM: this one could not begin before
// every CTA in front was running, or had ended (let_next_kernel_start). Where that kernel sets
// marks, each CTA has a word of its own. Two warps may wait for it at a time, for different tiles,
// so the consumers set it back.
__device__ __forceinline__ void wait_for_u(const Params& p) {
    if (!p.waits_for_u)
        return;
    if (p.u_words == nullptr) {
        wait_for_previous_kernel();
        return;
    }
    while (load_acquire(p.u_words + blockIdx.x) != p.u_mark) {
    }
    fence_async_proxy_global();
}

// The low-rank term as one step: u against lora_A, whose rows are lines as they are. Every CTA has
// its own.
template <class P>
__device__ __forceinline__ void
load_low_rank(const Maps& maps, const Tile& tile, uint32_t stage, uint32_t full) {
    barrier_arrive_expect(full, P::kDyBytes + P::kWBytes);
    load_tokens<P>(true, stage, maps.u, 0, tile.token0, full);
    const uint32_t lines = stage + P::kDyBytes;
    load_tile(lines, maps.lora_A, tile.column0, 0, full);
    load_tile(lines + P::kWBytes / 2, maps.lora_A, tile.column0 + 64, 0, full);
}

template <typename T, class P>
__device__ __forceinline__ void
produce(const Maps& maps, const Params& p, uint32_t smem, uint8_t* smem_generic) {
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0);
    const int lane = threadIdx.x % kWarpSize;
    const int rank = blockIdx.x % kCluster;
    const int own_row = P::kSharesW ? rank * P::kOwnRows : 0;  // the first that this CTA decodes
    const int unit = warp % P::kUnits;
    const int unit_block = unit % 2, unit_row = unit / 2 * kUnitRows;
    // One warp for both would be late for a step, as it waits for the others to have read theirs.
    const bool loading_warp = unit == 0, packed_warp = warp == P::kProducerWarps - 1;
    const uint32_t peer = in_cta(smem, rank ^ 1) - smem;
    const int tiles = tile_count<P>(p);

    PackedLoader<P> loader{maps, p, smem, own_row, tiles, tile_at<P>(p, 0), 0, 0, 0};
    if (packed_warp && elect_lane()) {
        loader.load_next();
        loader.load_next();
    }
    __syncwarp();
    int buffer = 0;
    uint32_t buffer_parity = 0;
    const uint32_t packed_row = smem + P::kPacked + (unit_row + lane) * kPackedRow;
    const uint32_t packed_swizzle = lane / 2 % 4;
    const uint32_t piece_offset =
        P::kDyBytes + (unit_block * kStepN + own_row + unit_row) * kLineBytes;

    int step = warp / P::kUnits;
    Position<P> at{step, 1};
    Tile tile = tile_at<P>(p, 0);
    ScaleLoader<P> scales{p, unit_block, own_row + unit_row + lane, 0, 0};
    scales.begin(tile, step);
    StoredScale stored[2];
    stored[0] = scales.load_next();
    stored[1] = scales.load_next();
    const bool nests = p.w.absmax_8bit != nullptr;
    const float offset = nests ? __ldg(p.w.nested_offset) : -0.0f;
    load_tables<P>(p.w, nests, reinterpret_cast<float*>(smem_generic + P::kCodebook));
    named_barrier(kProducersBarrier, P::kProducers);
    cluster_wait_unaligned();  // up to here nothing was the other CTA's

    for (int index = 0; index < tiles; index++) {
        const Tile next = tile_at<P>(p, min(index + 1, tiles - 1));
        if (packed_warp && has_low_rank<P>(p, tile) && elect_lane()) {
            prefetch_map(maps.u);
            prefetch_tile_l2(maps.lora_A, tile.column0, 0);
            prefetch_tile_l2(maps.lora_A, tile.column0 + 64, 0);
        }
#pragma unroll 1
        for (int group = 0; group < tile.weight_steps; group += P::kGroupSteps) {
            // The table before the wait: for a tile's first stage all comes at the same time.
            const float scale = scale_of<P>(stored[0], smem, offset);
            const float second_scale = scale_of<P>(stored[1], smem, offset);
            ScaledTable<true> table = table_of<T>(smem + P::kCodebook, scale);
            const uint32_t packed_empty = smem + P::kPackedEmpty + buffer * 8;
            barrier_wait(smem + P::kPackedFull + buffer * 8, buffer_parity);
            uint4 packed[2][2];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t chunk = unit_block * 2 + i % 2;
                packed[i / 2][i % 2] = load_shared(
                    packed_row + buffer * P::kPackedBytes +
                    (step - group + i / 2 * P::kStride) * P::kPackedStep +
                    ((chunk ^ packed_swizzle) << 4));
            }
            if (step >= tile.weight_steps) {  // no step of this group is the warp's
                __syncwarp();
                if (lane == 0)
                    barrier_arrive_behind(
                        packed_empty,
                        packed[0][0].w | packed[0][1].w | packed[1][0].w | packed[1][1].w);
            }
            if (group + P::kGroupSteps >= tile.weight_steps)  // this warp's first step of the next
                scales.begin(next, (step ^ tile.steps) & (P::kStride - 1));
#pragma unroll
            for (int turn = 0; turn < 2; turn++) {
                if (step < tile.weight_steps) {
                    const uint32_t full = smem + P::kFull + at.slot * 8;
                    const uint32_t stage = smem + at.slot * P::kStageBytes;
                    barrier_wait(smem + P::kEmpty + at.slot * 8, at.parity);
                    if (loading_warp && elect_lane()) {
                        barrier_arrive_expect(full, P::kArrivingBytes);
                        load_tokens<P>(
                            P::kSharesW || tile.split, stage, maps.dy,
                            (tile.first_step + step) * kStepN, tile.token0, full);
                    }
                    __syncwarp();
                    const uint32_t piece = stage + piece_offset;
                    const uint32_t line = piece + lane * kLineBytes + lane % 8 * 16;
                    const uint32_t* words = &packed[turn][0].x;
#pragma unroll
                    for (int c = 0; c < 8; c++)
                        store_shared(line ^ (c << 4), decode_word(table, words[c]));
                    if (turn == 0)  // while the stores drain
                        table = table_of<T>(smem + P::kCodebook, second_scale);
                    publish<P>(peer, piece, full);
                    if (turn == 0 && lane == 0)  // the fence has waited for all words, too
                        barrier_arrive(packed_empty);
                    step += P::kStride;
                    at.advance(P::kStride);
                }
                if (turn == 0) {
                    // Behind the first stage: its fence waits for loads, too.
                    stored[0] = scales.load_next();
                    stored[1] = scales.load_next();
                    if (packed_warp && elect_lane()) {
                        barrier_wait(packed_empty, buffer_parity);
                        loader.load_next();
                    }
                }
                __syncwarp();
            }
            buffer ^= 1;
            buffer_parity ^= buffer == 0;
        }
        for (; step < tile.steps; step += P::kStride, at.advance(P::kStride)) {
            const uint32_t full = smem + P::kFull + at.slot * 8;
            // Asked for while the stage is not free yet: the answer takes a trip to L2.
            const bool low_rank = step == tile.steps - 1 && has_low_rank<P>(p, tile);
            if (loading_warp && low_rank && elect_lane())
                wait_for_u(p);
            __syncwarp();
            barrier_wait(smem + P::kEmpty + at.slot * 8, at.parity);
            if (loading_warp && elect_lane()) {
                if (low_rank) {
                    load_low_rank<P>(maps, tile, smem + at.slot * P::kStageBytes, full);
                } else {
                    barrier_arrive(full);  // for a step that nobody multiplies
                }
            }
            __syncwarp();
            if (lane == 0)
                barrier_arrive(full);
        }
        step -= tile.steps;
        tile = next;
    }
    if constexpr (P::kMore) {
        if (p.grad.out != nullptr)
            make_d_lora_A<T, P>(p, smem_generic);
    }
    // The other CTA's consumers have freed all stages here, so nothing from there is on its way:
    // they waited for its copies, and for those from here. Halves of sums are waited for by those
    // that add them.
    for (int i = 0; i < P::kStages; i += P::kStride, at.advance(P::kStride))
        barrier_wait(smem + P::kEmpty + at.slot * 8, at.parity);
}

}  // namespace
}  // namespace lowbit::cuda
