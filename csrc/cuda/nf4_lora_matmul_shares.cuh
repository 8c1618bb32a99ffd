// What the kernels that cut a weight into equal contiguous shares, one for each CTA, have in
// common: which tiles and units a CTA has, how a tile's sums come together across CTAs, and what is
// done with them.
//
// Tiles of rows, cut along K into units, form one sequence, of which a CTA takes a piece. It walks
// its piece from the end. So what it contributes to a tile that a later CTA finishes comes first,
// and it waits for nobody before it has stored that.
#pragma once

#include "common.cuh"
#include "divisor.h"
#include "marks.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kBlock = 64;  // codes along K that a lane quad decodes at a time: 32 bytes

// How the units of all tiles are shared out.
struct Shares {
    EqualPieces pieces;  // one for each CTA
    int units;           // of a tile
    Divisor by_units;
};

inline Shares make_shares(int units, int tiles, int ctas) {
    return {cut_evenly(units * tiles, ctas), units, make_divisor(units)};
}

// A run of units within one tile.
struct Segment {
    int tile;
    int first;  // unit of the tile
    int count;
    bool finishes;  // it has the tile's last unit
    bool whole;

    __host__ __device__ __forceinline__ Segment(int begin, int end, const Shares& shares) {
        tile = divide(end - 1, shares.by_units);
        const int tile_begin = tile * shares.units;
        first = max(begin - tile_begin, 0);
        count = end - tile_begin - first;
        finishes = end == tile_begin + shares.units;
        whole = finishes && first == 0;
    }
};

struct Piece {
    int begin;
    int end;
};

__host__ __device__ __forceinline__ Piece piece_of(const Shares& shares, int cta) {
    return {shares.pieces.begin(cta), shares.pieces.begin(cta + 1)};
}

// Whether a tile ends within the CTA's piece.
__host__ __device__ __forceinline__ bool finishes_tiles(const Shares& shares, int cta) {
    const Piece piece = piece_of(shares, cta);
    return divide(piece.end, shares.by_units) > divide(piece.begin, shares.by_units);
}

// Whether this is the first tile that the CTA finishes, that is, the last one that ends there.
__host__ __device__ __forceinline__ bool
finishes_first(const Segment& s, const Piece& piece, const Shares& shares) {
    return s.finishes && (s.tile + 2) * shares.units > piece.end;
}

// Lane l of a quad row g holds rows row_of(g) and row_of(g) + 2 of its warp's 16 as rows g and g +
// 8 of the product: reads of codes then fall into different banks, and after transposing a lane has
// four neighbouring n.
__device__ __forceinline__ int row_of(int g) {
    return 4 * (g >> 1) + (g & 1);
}

// lora_B[row, j], lora_B[row, j + 1], zero past the rank.
template <typename T>
__device__ __forceinline__ uint32_t load_lora_pair(const T* row, int j, int r) {
    const uint16_t* p = reinterpret_cast<const uint16_t*>(row) + j;
    if (j + 1 < r && r % 2 == 0)
        return __ldg(reinterpret_cast<const uint32_t*>(p));
    const uint32_t low = j < r ? __ldg(p) : 0, high = j + 1 < r ? __ldg(p + 1) : 0;
    return low | high << 16;
}

// ---- sums of a tile -----------------------------------------------------------------------------
//
// Problem: w, bias, y, M; and partials [CTAs][kRows kTokens] f32, flags [CTAs], `mark` when the
// CTA's partial is there and something else when the kernel begins, and shares. kSums sums are
// those of one of Tile::kFinishers threads, the first ones of the CTA.

constexpr int kFinishBarrier = 6;

template <typename Tile, int kSums, typename Problem>
__device__ __forceinline__ float4* partial_of(const Problem& p, int cta) {
    return reinterpret_cast<float4*>(p.partials) +
           static_cast<int64_t>(cta) * (Tile::kFinishers * kSums / 4) + threadIdx.x;
}

template <typename Tile, int kSums, typename Problem>
__device__ __forceinline__ void
store_partial(const float (&sums)[kSums], const Problem& p, int cta) {
    store_sums<kSums>(sums, partial_of<Tile, kSums>(p, cta), Tile::kFinishers);
    named_barrier(kFinishBarrier, Tile::kFinishers);
    if (threadIdx.x == 0)
        store_release(p.flags + cta, p.mark);
}

// What earlier CTAs have of this tile, from its first unit on; they stored it before they waited
// for anybody. No other CTA asks for it.
template <typename Tile, int kSums, typename Problem>
__device__ __forceinline__ void
add_partials(float (&sums)[kSums], const Problem& p, int own, int tile_begin) {
    const int first = p.shares.pieces.piece_before(own, tile_begin);
    for (int cta = first + static_cast<int>(threadIdx.x); cta < own; cta += Tile::kFinishers)
        wait_for_mark(p.flags + cta, p.mark);
    named_barrier(kFinishBarrier, Tile::kFinishers);
    for (int cta = first; cta < own; cta++) {
        const float4* in = partial_of<Tile, kSums>(p, cta);
#pragma unroll
        for (int i = 0; i < kSums; i += 4) {
            const float4 v = __ldcg(in + i / 4 * Tile::kFinishers);
            sums[i] += v.x, sums[i + 1] += v.y, sums[i + 2] += v.z, sums[i + 3] += v.w;
        }
    }
}

// Of a lane's two rows, which exist; there is a bias.
template <typename T, typename Problem>
__device__ __forceinline__ void load_bias(T (&bias)[2], const Problem& p, int row0, int g) {
    const T* rows = static_cast<const T*>(p.bias) + row0 + row_of(g);
    bias[0] = rows[0], bias[1] = rows[2];
}

// Of a warp's 16 rows, for 2 kSums tokens from token0 on. The rows are whole 32-byte sectors of y:
// transposing within the warp is enough. `early`: the bias, where it has been loaded.
template <typename T, int kSums, typename Problem>
__device__ __forceinline__ void store_y(
    const float (&sums)[kSums],
    const Problem& p,
    int row0,
    int token0 = 0,
    const T* early = nullptr) {
    if (row0 >= p.w.N)
        return;
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
    float low = 0.0f, high = 0.0f;
    if (p.bias != nullptr) {
        T bias[2];
        if (early == nullptr)
            load_bias(bias, p, row0, g);
        low = to_float(early != nullptr ? early[0] : bias[0]);
        high = to_float(early != nullptr ? early[1] : bias[1]);
    }
#pragma unroll
    for (int i = 0; i < kSums; i += 4) {
        uint2 out;
        out.x = transpose_8x8(pack_pair(sums[i] + low, sums[i + 1] + low, T{}));
        out.y = transpose_8x8(pack_pair(sums[i + 2] + high, sums[i + 3] + high, T{}));
        const int token = token0 + 2 * i + g;
        if (token < p.M)
            *reinterpret_cast<uint2*>(static_cast<T*>(p.y) + token * p.w.N + row0 + 4 * t) = out;
    }
}

}  // namespace
}  // namespace lowbit::cuda
