// The producer warps of nf4_lora_matmul_dx_sm90.cu: they fill the stages with decoded weights and
// have TMA bring dy and packed weights.
//
// A warp decodes 32 rows of one block column in one step, a lane one block of 64 codes; warps that
// share them take steps in turn. Packed weights and scales come in groups of two turns, the former
// into two buffers, the latter into registers, as they are stored, a group ahead.
#pragma once

#include "block_decode.cuh"
#include "bulk_sm90.cuh"
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
    float value;    // absmax, or nested_absmax
    uint32_t code;  // of the nested codebook
};

// Of rows from N on, 0: they have codes of TMA's zeros, and dy has zeros for them.
__device__ __forceinline__ StoredScale load_scale(const Params& p, int block, int row) {
    StoredScale s{};
    if (row < static_cast<int>(p.w.N)) {
        const uint32_t own = static_cast<uint32_t>(row) * p.blocks + block;  // below 2^32
        const uint32_t number = own >> (p.w.blocksize_log2 - 6);
        s.value = __ldg(p.scales + (number >> p.scale_log2));
        if (p.w.absmax_8bit != nullptr)
            s.code = __ldg(p.w.absmax_8bit + number);
    }
    return s;
}

// The scale as block_scale gives it, with the nested codebook in shared memory.
template <class P>
__device__ __forceinline__ float scale_of(const Params& p, const StoredScale& s, uint32_t smem) {
    if (p.w.absmax_8bit == nullptr)
        return s.value;
    const uint32_t value = load_shared_at<P::kNestedCodebook>(smem + s.code * 4);
    const uint32_t offset = load_shared_at<P::kNestedOffset>(smem);
    return __fadd_rn(__fmul_rn(__uint_as_float(value), s.value), __uint_as_float(offset));
}

// The tokens of a tile from dy or u, for this CTA alone.
template <class P>
__device__ __forceinline__ void
load_tokens(uint32_t stage, const CUtensorMap& map, int column, int token0, uint32_t full) {
#pragma unroll 1
    for (int part = 0; part < P::kColumnTiles; part++) {
        const uint32_t destination = stage + part * P::kDyBoxBytes;
        load_tile(destination, map, column, token0 + part * P::kDyBoxTokens, full);
    }
}

// The same of dy, each CTA a half for both where they share it.
template <class P>
__device__ __forceinline__ void
load_dy(const Maps& maps, const Tile& tile, int step, uint32_t stage, uint32_t full) {
    const int column = (tile.first_step + step) * kStepN;
    if (P::kSharesW || tile.split) {
        load_tokens<P>(stage, maps.dy, column, tile.token0, full);
    } else {
        const int part = blockIdx.x % kCluster;
        load_tile_multicast(
            stage + part * P::kDyBoxBytes, maps.dy, column, tile.token0 + part * P::kDyBoxTokens,
            full, 0b11);
    }
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
    load_tokens<P>(stage, maps.u, 0, tile.token0, full);
    const uint32_t lines = stage + P::kDyBytes;
    load_tile(lines, maps.lora_A, tile.column0, 0, full);
    load_tile(lines + P::kWBytes / 2, maps.lora_A, tile.column0 + 64, 0, full);
}

constexpr int kTablesBarrier = 3;

template <typename T, class P>
__device__ __forceinline__ void
produce(const Maps& maps, const Params& p, uint32_t smem, float* tables) {
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0);
    const int lane = threadIdx.x % kWarpSize;
    const int rank = blockIdx.x % kCluster;
    const int own_row = P::kSharesW ? rank * P::kOwnRows : 0;  // the first that this CTA decodes
    const int unit = warp % P::kUnits;
    const int unit_block = unit % 2, unit_row = unit / 2 * kUnitRows;
    const bool loading_warp = unit == 0;
    const uint32_t peer = in_cta(smem, rank ^ 1) - smem;
    const int tiles = tile_count<P>(p);

    PackedLoader<P> loader{maps, p, smem, own_row, tiles, tile_at<P>(p, 0), 0, 0, 0};
    if (warp == 0 && elect_lane()) {
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

    auto load = [&](const Tile& t, int step) {
        const int row = (t.first_step + step) * kStepN + own_row + unit_row + lane;
        return load_scale(p, min(t.column0 / 64 + unit_block, p.blocks - 1), row);
    };
    int step = warp / P::kUnits;
    Position<P> at{step, 1};
    Tile tile = tile_at<P>(p, 0);
    StoredScale stored[2] = {load(tile, step), load(tile, step + P::kStride)};
    const bool nests = p.w.absmax_8bit != nullptr;
    const float nested_offset = nests && threadIdx.x == 0 ? __ldg(p.w.nested_offset) : 0.0f;
    load_tables<P>(p.w, nests, tables);
    if (threadIdx.x == 0)
        tables[kTableFloats] = nested_offset;
    named_barrier(kTablesBarrier, P::kProducers);
    cluster_wait_unaligned();  // up to here nothing was the other CTA's

    for (int index = 0; index < tiles; index++) {
        const Tile next = tile_at<P>(p, min(index + 1, tiles - 1));
        if (warp == P::kProducerWarps - 1 && has_low_rank(p, tile) && elect_lane()) {
            prefetch_map(maps.u);
            prefetch_tile_l2(maps.lora_A, tile.column0, 0);
            prefetch_tile_l2(maps.lora_A, tile.column0 + 64, 0);
        }
#pragma unroll 1
        for (int group = 0; group < tile.weight_steps; group += P::kGroupSteps) {
            // The table before the wait: for a tile's first stage all comes at the same time.
            const float scale = scale_of<P>(p, stored[0], smem);
            const float second_scale = scale_of<P>(p, stored[1], smem);
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
            __syncwarp();
            if (lane == 0)
                barrier_arrive(packed_empty);
            if (group + P::kGroupSteps < tile.weight_steps) {
                stored[0] = load(tile, step + 2 * P::kStride);
                stored[1] = load(tile, step + 3 * P::kStride);
            } else {  // at what step this warp begins the next tile
                const int first = (step ^ tile.steps) & (P::kStride - 1);
                stored[0] = load(next, first);
                stored[1] = load(next, first + P::kStride);
            }
#pragma unroll
            for (int turn = 0; turn < 2; turn++) {
                if (step < tile.weight_steps) {
                    const uint32_t full = smem + P::kFull + at.slot * 8;
                    const uint32_t stage = smem + at.slot * P::kStageBytes;
                    barrier_wait(smem + P::kEmpty + at.slot * 8, at.parity);
                    if (loading_warp && elect_lane()) {
                        barrier_arrive_expect(full, P::kArrivingBytes);
                        load_dy<P>(maps, tile, step, stage, full);
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
                    step += P::kStride;
                    at.advance(P::kStride);
                }
                if (turn == 0 && warp == 0 && elect_lane()) {
                    barrier_wait(packed_empty, buffer_parity);
                    loader.load_next();
                }
                __syncwarp();
            }
            buffer ^= 1;
            buffer_parity ^= buffer == 0;
        }
        for (; step < tile.steps; step += P::kStride, at.advance(P::kStride)) {
            const uint32_t full = smem + P::kFull + at.slot * 8;
            // Asked for while the stage is not free yet: the answer takes a trip to L2.
            const bool low_rank = step == tile.steps - 1 && has_low_rank(p, tile);
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
    // The other CTA's consumers have freed all stages here, so nothing from there is on its way:
    // they waited for its copies, and for those from here. Halves of sums are waited for by those
    // that add them.
    for (int i = 0; i < P::kStages; i += P::kStride, at.advance(P::kStride))
        barrier_wait(smem + P::kEmpty + at.slot * 8, at.parity);
}

}  // namespace
}  // namespace lowbit::cuda
