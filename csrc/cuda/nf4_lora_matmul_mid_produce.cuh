// The producer warps of nf4_lora_matmul_mid_sm90.cu: they fill the stages with decoded weights and
// have TMA bring x and packed weights.
//
// A warp decodes 32 rows of one step at a time, a lane one block of 64 codes; warps that share rows
// take steps in turn. Packed weights come in groups of one or two turns, into two buffers, and
// their scales in fours. The stage is waited for first; then words are decoded and stored one by
// one. Groups of one turn where W is shared cost 3% (gate of an 8B model, M 1024). Slower on an
// H100 (2026-11): to decode into registers ahead of the wait, 1 to 11%; to load the next words and
// build their table while the stores drain, 5%; to deal out the loads of x among the warps and to
// fetch packed weights into L2 ahead, 1 to 2%.
#pragma once

#include "block_decode.cuh"
#include "bulk_sm90.cuh"
#include "nf4_lora_matmul_mid_tile.cuh"
#include "ptx_sm90.cuh"

namespace lowbit::cuda {
namespace {

// Keeps two groups of packed weights loaded or on their way. One thread.
template <class P>
struct PackedLoader {
    const Maps& maps;
    const Params& p;
    const Schedule& schedule;
    uint32_t smem;
    int own_row;
    Tile tile;
    int index, step, buffer;

    __device__ __forceinline__ void load_next() {
        if (step >= tile.weight_steps) {
            if (index + 1 >= schedule.count())
                return;
            tile = tile_at<P>(p, schedule, ++index);
            step = 0;
        }
        const uint32_t full = smem + P::kPackedFull + buffer * 8;
        barrier_arrive_expect(full, P::kPackedBytes);
        load_tile(
            smem + P::kPacked + buffer * P::kPackedBytes, maps.packed,
            (tile.first_step + step) * (kStepK / 2), tile.row0 + own_row, full);
        step += P::kGroupSteps;
        buffer ^= 1;
    }
};

// Scales of four steps of a row, as loaded.
template <bool kNested>
struct RawScales {
    float4 absmax;
};
template <>
struct RawScales<true> {
    uint32_t codes;
    float nested;
};

template <bool kNested>
__device__ __forceinline__ RawScales<kNested> load_scales(const WeightView& w, uint32_t block) {
    if constexpr (kNested) {
        return {
            __ldg(reinterpret_cast<const uint32_t*>(w.absmax_8bit) + block / 4),
            __ldg(w.nested_absmax + (block >> w.nested_blocksize_log2))};
    } else {
        return {__ldg(reinterpret_cast<const float4*>(w.absmax) + block / 4)};
    }
}

__device__ __forceinline__ void
unpack_scales(float (&scales)[4], RawScales<false> raw, const float*, float) {
    scales[0] = raw.absmax.x, scales[1] = raw.absmax.y;
    scales[2] = raw.absmax.z, scales[3] = raw.absmax.w;
}

__device__ __forceinline__ void
unpack_scales(float (&scales)[4], RawScales<true> raw, const float* nested_codes, float offset) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float value = nested_codes[raw.codes >> (8 * i) & 0xff];
        scales[i] = __fadd_rn(__fmul_rn(value, raw.nested), offset);
    }
}

// Table of step `step`.
template <typename T>
__device__ __forceinline__ ScaledTable<true>
table_of(uint32_t smem_codebook, const float (&scales)[4], int step) {
    const float low = step & 1 ? scales[1] : scales[0], high = step & 1 ? scales[3] : scales[2];
    return table_of<T>(smem_codebook, step & 2 ? high : low);
}

// r elements of lora_B as a row of a stage, with zeros behind them. Lanes have rows of their own,
// so a load of single elements costs as much as one of 16 bytes.
template <typename T>
__device__ __forceinline__ void store_lora_row(uint32_t row, const T* lora_B, int r) {
    if (r % 8 == 0 && reinterpret_cast<uintptr_t>(lora_B) % 16 == 0) {
        const uint4* vectors = reinterpret_cast<const uint4*>(lora_B);
#pragma unroll 4
        for (int c = 0; c < 8; c++)
            store_shared(row ^ (c << 4), c * 8 < r ? __ldg(vectors + c) : uint4{});
        return;
    }
#pragma unroll 1
    for (int c = 0; c < 8; c++) {
        uint32_t pair[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int j = c * 8 + i * 2;
            const float first = j < r ? to_float(lora_B[j]) : 0.0f;
            const float second = j + 1 < r ? to_float(lora_B[j + 1]) : 0.0f;
            pair[i] = pack_pair(first, second, T{});
        }
        store_shared(row ^ (c << 4), {pair[0], pair[1], pair[2], pair[3]});
    }
}

// The consumers of level parts, whose last tile this is, store for one turn of the exchange after
// the other; to say that it is there takes as long as the stores do, so they leave it to producers.
template <class P>
__device__ __forceinline__ void give_turns(const Params& p, const Tile& tile) {
    for (int turn = 1 + threadIdx.x / kWarpSize; turn < tile.parts; turn += P::kProducerWarps) {
        named_barrier(kGivenBarrier + turn, kConsumers + kWarpSize);
        if (threadIdx.x % kWarpSize == 0)
            give(p, turn);
        __syncwarp();
    }
}

// By a warp one of whose lanes loads z. Those that project wait for nobody. Two warps may ask at a
// time, for different tiles, so the consumers set the words back.
__device__ __forceinline__ void wait_for_z(const Params& p) {
    if (p.projectors == 0) {
        wait_for_previous_kernel();
        return;
    }
    const int lane = threadIdx.x % kWarpSize;
    if (lane < p.projectors) {
        while (load_acquire(z_word(p, lane, own_cta(p))) != p.mark) {
        }
    }
    __syncwarp();
    fence_async_proxy_global();
}

template <typename T, bool kNested, class P>
__device__ __forceinline__ void
produce(const Maps& maps, const Params& p, uint32_t smem, float* tables) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int rank = blockIdx.x % kCluster;
    const int own_row = P::kSharesW ? rank * P::kOwnRows : 0;  // the first that this CTA decodes
    const int unit_row = warp % P::kUnits * kUnitRows;
    // Not elect_lane(): 1 to 4 % more cycles where a decoding warp copies (H200, 2026-11).
    const bool loads_x = warp % P::kUnits == 0 && lane == 0;
    // Not of a warp that loads x: 1 to 3 % more time at 256 tokens (H200, 2026-11).
    const bool loads_packed = threadIdx.x == P::kProducers - kWarpSize;
    const uint32_t peer = in_cta(smem, rank ^ 1) - smem;
    const Schedule schedule(p);
    const int tiles = schedule.count();
    Tile tile = tile_at<P>(p, schedule, 0);

    PackedLoader<P> loader{maps, p, schedule, smem, own_row, tile, 0, 0, 0};
    wait_for_operands(p);
    named_barrier(kTablesBarrier, P::kProducers);  // keeps __ldg behind the wait
    if (loads_packed) {
        loader.load_next();
        loader.load_next();
    }
    __syncwarp();
    int buffer = 0;
    uint32_t buffer_parity = 0;
    const uint32_t packed_swizzle = P::kPackedRow == 128 ? lane % 8 : lane / 2 % 4;
    const uint32_t packed_row = smem + P::kPacked + (unit_row + lane) * P::kPackedRow;

    auto lane_row = [&](const Tile& t) {
        return min(static_cast<int64_t>(t.row0 + own_row + unit_row + lane), p.w.N - 1);
    };
    uint32_t block = static_cast<uint32_t>(lane_row(tile) * p.steps + tile.first_step);
    const float nested_offset = kNested ? __ldg(p.w.nested_offset) : 0.0f;
    RawScales<kNested> raw{};
    if (p.quick_scales)
        raw = load_scales<kNested>(p.w, block);
    float scales[kQuad];

    int step = warp / P::kUnits;
    Position<P> at{step, 1};
    load_tables<P>(p.w, kNested, tables);
    named_barrier(kTablesBarrier, P::kProducers);
    cluster_wait_unaligned();  // up to here nothing was the other CTA's

    for (int index = 0; index < tiles; index++) {
        const Tile next = tile_at<P>(p, schedule, min(index + 1, tiles - 1));
        const auto next_block = static_cast<uint32_t>(lane_row(next) * p.steps + next.first_step);
        const T* lora_B = static_cast<const T*>(p.lora_B) + lane_row(tile) * p.r;
        if (tile.steps > tile.weight_steps)
            prefetch_l2(lora_B);
#pragma unroll 1
        for (int group = 0; group < tile.weight_steps; group += P::kGroupSteps) {
            // The table before the wait: for a tile's first stage all comes at the same time.
            if (group % kQuad == 0 && p.quick_scales) {
                unpack_scales(scales, raw, tables + 16, nested_offset);
                const bool last = group + kQuad >= tile.weight_steps;
                raw = load_scales<kNested>(p.w, last ? next_block : block + group + kQuad);
            } else if (group % kQuad == 0) {
#pragma unroll
                for (int i = 0; i < kQuad; i++) {
                    const uint32_t own = block + min(group + i, tile.weight_steps - 1);
                    scales[i] = block_scale<kNested>(p.w, own >> (p.w.blocksize_log2 - 6));
                }
            }
            ScaledTable<true> table = table_of<T>(smem + P::kTables, scales, step);
            const uint32_t packed_empty = smem + P::kPackedEmpty + buffer * 8;
            barrier_wait(smem + P::kPackedFull + buffer * 8, buffer_parity);
            uint4 packed[P::kTurns][2];
#pragma unroll
            for (int i = 0; i < 2 * P::kTurns; i++) {
                const uint32_t chunk = (step - group + i / 2 * P::kStride) * 2 + i % 2;
                packed[i / 2][i % 2] = load_shared(
                    packed_row + buffer * P::kPackedBytes + ((chunk ^ packed_swizzle) << 4));
            }
            if (step >= tile.weight_steps) {  // no step of this group is the warp's
                uint32_t loaded = 0;
#pragma unroll
                for (int i = 0; i < 2 * P::kTurns; i++)
                    loaded |= packed[i / 2][i % 2].w;
                __syncwarp();
                if (lane == 0)
                    barrier_arrive_behind(packed_empty, loaded);
            }
#pragma unroll
            for (int turn = 0; turn < P::kTurns; turn++) {
                if (step < tile.weight_steps) {
                    const uint32_t full = smem + P::kFull + at.slot * 8;
                    const uint32_t stage = smem + at.slot * P::kStageBytes;
                    barrier_wait(smem + P::kEmpty + at.slot * 8, at.parity);
                    if (loads_x) {
                        barrier_arrive_expect(full, P::kArrivingBytes);
                        load_tokens<P>(
                            P::kSharesW, stage, maps.x, (tile.first_step + step) * kStepK,
                            tile.token0, full);
                    }
                    __syncwarp();
                    const uint32_t piece = stage + P::kXBytes + (own_row + unit_row) * kLineBytes;
                    const uint32_t row = piece + lane * kLineBytes + lane % 8 * 16;
                    const uint32_t* words = &packed[turn][0].x;
#pragma unroll
                    for (int c = 0; c < 8; c++)
                        store_shared(row ^ (c << 4), decode_word(table, words[c]));
                    if (turn + 1 < P::kTurns)  // while the stores drain
                        table = table_of<T>(smem + P::kTables, scales, step + P::kStride);
                    publish<P>(peer, piece, full);
                    if (turn == 0 && lane == 0)  // the fence has waited for all words, too
                        barrier_arrive(packed_empty);
                    step += P::kStride;
                    at.advance(P::kStride);
                }
                if (turn == 0 && loads_packed) {
                    barrier_wait(packed_empty, buffer_parity);
                    loader.load_next();
                }
                __syncwarp();
            }
            buffer ^= 1;
            buffer_parity ^= buffer == 0;
        }
        if (step < tile.steps) {  // the low-rank term, one warp of each row unit
            const uint32_t full = smem + P::kFull + at.slot * 8;
            const uint32_t stage = smem + at.slot * P::kStageBytes;
            if (warp % P::kUnits == 0)
                wait_for_z(p);
            barrier_wait(smem + P::kEmpty + at.slot * 8, at.parity);
            if (loads_x) {
                barrier_arrive_expect(full, P::kArrivingBytes);
                load_tokens<P>(true, stage, maps.z, 0, tile.token0, full);
            }
            __syncwarp();
            const uint32_t piece = stage + P::kXBytes + (own_row + unit_row) * kLineBytes;
            store_lora_row(piece + lane * kLineBytes + lane % 8 * 16, lora_B, p.r);
            publish<P>(peer, piece, full);
            step += P::kStride;
            at.advance(P::kStride);
        }
        step -= tile.steps;
        tile = next;
        block = next_block;
    }
    if (p.level)
        give_turns<P>(p, tile);
    // The other CTA's consumers have freed all stages here, so nothing from there is on its way:
    // they waited for its copies, and for those from here.
    for (int i = 0; i < P::kStages; i += P::kStride, at.advance(P::kStride))
        barrier_wait(smem + P::kEmpty + at.slot * 8, at.parity);
}

}  // namespace
}  // namespace lowbit::cuda
