// The end of a tile in nf4_lora_matmul_small_sm90.cu: from the sums of a CTA's K groups to those of
// the CTA and of the tile, the low-rank term, y.
#pragma once

#include "common.cuh"
#include "nf4_lora_matmul_small_tile.cuh"
#include "ptx_sm90.cuh"
#include "wgmma_sm90.cuh"

namespace lowbit::cuda {
namespace {

// A lane's rows of lora_B, in steps of 16 columns.
using Factor = uint32_t[kMaxRank / 16][4];

// Steps of a lane's rows up to the rank: load(value, row, j) brings elements j and j + 1 behind the
// lane's first one.
template <typename Load>
__device__ __forceinline__ void load_factor(Factor& a, int r, const Load& load) {
#pragma unroll
    for (int i = 0; i < kMaxRank / 16; i++) {
        if (i > 0 && 16 * i >= r)
            break;
        load(a[i][0], 0, 16 * i), load(a[i][1], 1, 16 * i);
        load(a[i][2], 0, 16 * i + 8), load(a[i][3], 1, 16 * i + 8);
    }
}

// One branch for all tells even ranks, whose rows are 4-byte aligned, from odd ones: the code is
// run once for a tile, and little else takes as long as code that nobody has run before.
template <typename T>
__device__ __forceinline__ void load_factor(Factor& a, const Problem& p, int row0) {
    const int lane = opaque(threadIdx.x % kWarpSize), first = lane % 4 * 2, left = p.r - first;
    const int last = static_cast<int>(p.w.N) - 1, row = row0 + row_of(lane / 4);
    const auto* const lora_B = static_cast<const uint16_t*>(p.lora_B) + first;
    const uint16_t* const rows[2] = {
        lora_B + static_cast<int64_t>(min(row, last)) * p.r,
        lora_B + static_cast<int64_t>(min(row + 2, last)) * p.r};
    if (p.r % 2 == 0)
        load_factor(a, p.r, [&](uint32_t& value, int i, int j) {
            value = 0;
            load_if(j < left, value, static_cast<const void*>(rows[i] + j));
        });
    else
        load_factor(a, p.r, [&](uint32_t& value, int i, int j) {
            const uint32_t low = j < left ? __ldg(rows[i] + j) : 0;
            const uint32_t high = j + 1 < left ? __ldg(rows[i] + j + 1) : 0;
            value = low | high << 16;
        });
}

// sums += lora_B z, by the warpgroups of K group 0; `first`: of the CTA, which waits for z.
template <typename T, typename Tile>
__device__ __forceinline__ void
add_low_rank(float (&sums)[Tile::kSums], Factor& factor, const Problem& p, uint32_t z, bool first) {
    const auto multiply = [&](int i) {
        wgmma_fence();
        wgmma(sums, factor[i], own_operand_descriptor(z + 32 * i), true, T{});
        wgmma_commit();
        wgmma_wait<0>();
    };
    if (first)
        named_barrier(kZBarrier, kGatherers + Tile::kFinishers);
    multiply(0);
    if (p.r <= 16)
        return;
#pragma unroll
    for (int i = 1; i < kMaxRank / 16; i++) {
        if (16 * i < p.r)
            multiply(i);
    }
}

// Sums of the other K groups, in their order, into those of group 0.
template <typename Tile>
__device__ __forceinline__ void
add_groups(float (&sums)[Tile::kSums], int group, int row_group, uint32_t table) {
    const int lane = threadIdx.x % kWarpSize;
    const int warp = row_group * 4 + threadIdx.x / kWarpSize % 4;
    const auto place = [&](int from, int i) {
        const int slot = ((from - 1) * Tile::kSums + i) * (4 * Tile::kRowGroups) + warp;
        return table + slot * kTableStride + kTableStride / 2 + lane * 4;
    };
    if (group > 0) {
#pragma unroll
        for (int i = 0; i < Tile::kSums; i++)
            store_shared(place(group, i), sums[i]);
    }
    named_barrier(1 + row_group, Tile::kGroups * kWarpgroup);
    if (group == 0) {
#pragma unroll
        for (int from = 1; from < Tile::kGroups; from++) {
#pragma unroll
            for (int i = 0; i < Tile::kSums; i++)
                sums[i] += __uint_as_float(load_shared_at<0>(place(from, i)));
        }
    }
    named_barrier(1 + row_group, Tile::kGroups * kWarpgroup);
}

// Each two sums with the mark beside them. The one thread that waits for a pair sets its mark back.
template <typename Tile>
__device__ __forceinline__ MarkedPair* marked_of(const Problem& p, int cta) {
    return reinterpret_cast<MarkedPair*>(p.partials) +
           static_cast<int64_t>(cta) * (Tile::kFinishers * Tile::kSums / 2) + threadIdx.x;
}

// To the CTA that finishes the tile.
template <typename Tile>
__device__ __forceinline__ void
hand_over(const float (&sums)[Tile::kSums], const Problem& p, int cta) {
    if constexpr (Tile::kMarkSums) {
        MarkedPair* const out = marked_of<Tile>(p, cta);
#pragma unroll
        for (int i = 0; i < Tile::kSums; i += 2)
            store_relaxed(out + i / 2 * Tile::kFinishers, {sums[i], sums[i + 1], p.mark});
    } else {
        store_partial<Tile>(sums, p, cta);
    }
}

// What other CTAs have handed over of this tile; see add_partials.
template <typename Tile>
__device__ __forceinline__ void
add_marked(float (&sums)[Tile::kSums], const Problem& p, int own, int tile_begin) {
    for (int cta = p.shares.pieces.piece_before(own, tile_begin); cta < own; cta++) {
        MarkedPair* const in = marked_of<Tile>(p, cta);
        MarkedPair pairs[Tile::kSums / 2];
        bool there;
        do {
            there = true;
#pragma unroll
            for (int i = 0; i < Tile::kSums / 2; i++)
                pairs[i] = load_relaxed(in + i * Tile::kFinishers);
#pragma unroll
            for (const MarkedPair& pair : pairs)
                there = there && pair.mark == p.mark;
        } while (!__all_sync(kFullWarp, there));
#pragma unroll
        for (int i = 0; i < Tile::kSums / 2; i++) {
            store_relaxed(in + i * Tile::kFinishers, {0.0f, 0.0f, 0});
            sums[2 * i] += pairs[i].a, sums[2 * i + 1] += pairs[i].b;
        }
    }
}

// From the sums of K group 0 to y. With few tokens lora_B and the bias have been loaded.
template <typename T, typename Tile>
__device__ __forceinline__ void finish_tile(
    float (&sums)[Tile::kSums],
    Factor& factor,
    const T (&bias)[2],
    const Problem& p,
    const Segment& s,
    const Piece& piece,
    int cta,
    int row0,
    uint32_t smem) {
    if (Tile::kMarkSums && !s.whole)
        add_marked<Tile>(sums, p, cta, s.tile * p.shares.units);
    if (p.r > 0) {
        if (!Tile::kMarkSums)
            load_factor<T>(factor, p, row0);
        add_low_rank<T, Tile>(sums, factor, p, smem + Tile::kZ, finishes_first(s, piece, p.shares));
    }
    if (!Tile::kMarkSums && !s.whole)
        add_partials<Tile>(sums, p, cta, s.tile * p.shares.units);
    store_y<T>(sums, p, row0, 0, Tile::kMarkSums ? bias : nullptr);
}

}  // namespace
}  // namespace lowbit::cuda
