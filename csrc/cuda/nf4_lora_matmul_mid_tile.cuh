// Sizes and the division of work of nf4_lora_matmul_mid_sm90.cu: what lies where in shared memory,
// which tile a CTA computes when, and how far along the ring of stages a warp is.
#pragma once

#include <cuda.h>

#include "divisor.h"
#include "nf4_lora_matmul.h"
#include "nf4_lora_matmul_stages.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kStepK = 64;  // a row of a step is one swizzled line of 128 bytes
constexpr int kTileRows = 128;

// Shared memory in this order: stages (x, then W), two groups of packed weights, staged output, 16
// codebook values and 256 nested ones, barriers. 231 584 bytes at most.
template <int kTokens_, bool kSharesW_>
struct Plan {
    static constexpr int kTokens = kTokens_;
    static constexpr bool kSharesW = kSharesW_;
    static constexpr int kRowTiles = kSharesW ? 1 : 2;  // of a cluster
    static constexpr int kTokenTiles = kCluster / kRowTiles;
    // Eight decoding warps where a CTA decodes all of its rows. ptxas 13.0 then has no registers
    // for products of 256 tokens, and those of 128 read W twice.
    static constexpr int kProducerWarps = kSharesW ? 4 : 8;
    static constexpr int kProductTokens = kSharesW ? 256 : 128;
    static constexpr int kProducts = kTokens / kProductTokens;  // beside each other
    static constexpr int kStages = kTokens == 256 ? 4 : 6;
    static constexpr int kProducers = kProducerWarps * kWarpSize;
    static constexpr int kThreads = kProducers + kConsumers;
    static constexpr int kOwnRows = kTileRows / kTokenTiles;  // decoded here
    static constexpr int kUnits = kOwnRows / kUnitRows;       // per step
    static constexpr int kStride = kProducerWarps / kUnits;   // steps being decoded at a time
    static constexpr int kTurns = kSharesW ? 2 : 1;           // of a warp, per group
    static constexpr int kGroupSteps = kTurns * kStride;      // of packed weights, loaded together
    static constexpr int kPackedRow = kGroupSteps * kStepK / 2;
    static constexpr int kPackedBytes = kOwnRows * kPackedRow;
    static constexpr int kXBytes = kTokens * kLineBytes;
    static constexpr int kWBytes = kTileRows * kLineBytes;
    static constexpr int kStageBytes = kXBytes + kWBytes;
    static constexpr int kBoxTokens = kTokens / kRowTiles;
    static constexpr int kBoxBytes = kBoxTokens * kLineBytes;
    static constexpr int kArrivingBytes = kXBytes + (kSharesW ? kWBytes / 2 : 0);
    static constexpr int kPacked = kStages * kStageBytes;
    static constexpr int kOutput = kPacked + 2 * kPackedBytes;
    static constexpr int kTables = kOutput + 4 * kChunkBytes;
    static constexpr int kFull = kTables + kTableFloats * 4;
    static constexpr int kEmpty = kFull + kStages * 8;
    static constexpr int kPackedFull = kEmpty + kStages * 8;
    static constexpr int kPackedEmpty = kPackedFull + 2 * 8;
    static constexpr int kSmemBytes = kPackedEmpty + 2 * 8 + kSmemAlignment;
    static_assert(kPackedRow == 64 || kPackedRow == 128, "one of two swizzles");
    static_assert(kStages % kStride == 0, "a warp comes back to the same stages");
    static_assert(kSmemBytes <= 227 * 1024);
};

// Sums of a thread.
template <class P>
using Sums = float[P::kProducts][P::kProductTokens / 2];

struct Maps {
    CUtensorMap x, z, y;
    CUtensorMap packed;  // bytes of W [N, K/2]
};

// Four neighbouring scales are loaded together, so K is divided in units of four steps.
constexpr int kQuad = 4;

constexpr int kMostParts = 8;  // of a tile, level

// Of named barriers, from here on one for each turn of an exchange.
constexpr int kTablesBarrier = 3;
constexpr int kGivenBarrier = 4;

// Tiles whose quads, in a row, clusters divide evenly. Quad q of all is with the last cluster c
// whose share, all * c / clusters, begins at q or before: c = (clusters * (q + 1) - 1) / all; here
// q = tile * quads and (tile + 1) * quads - 1, all = tiles * quads. Dividend and divisor are
// divided by quads.
struct SplitTiles {
    EqualPieces shares;  // of the clusters
    int quads;           // of a tile
    int clusters;
    int first_offset;  // (clusters - 1) / quads, of first_cluster's dividend
    Divisor by_quads, by_tiles;

    // The clusters that have the first and the last quad of a tile.
    __host__ __device__ int first_cluster(int tile) const {
        return divide(tile * clusters + first_offset, by_tiles);
    }
    __host__ __device__ int last_cluster(int tile) const {
        return divide((tile + 1) * clusters - 1, by_tiles);
    }
};

// tiles > 0. There are at least as many quads as clusters, so that each has some.
inline SplitTiles make_split_tiles(int tiles, int clusters, int steps) {
    const int quads = (steps + kQuad - 1) / kQuad;
    return {
        cut_evenly(tiles * quads, clusters),
        quads,
        clusters,
        (clusters - 1) / quads,
        make_divisor(quads),
        make_divisor(tiles)};
}

struct Params {
    WeightView w;
    const void* lora_B;
    const void* bias;
    float* partials;        // [CTAs][quarters][kTileRows kTokens / 4]
    uint64_t* given_words;  // [CTAs][kMostParts], see give
    uint64_t* z_words;      // [projectors][CTAs], mark when a projector's share of z is there
    uint64_t mark;          // see marks.h
    int projectors;         // CTAs in front that project; 0: z is there when the kernel before ends
    int r;
    int steps;         // K / 64
    int token_groups;  // token tiles of a cluster beside each other
    int clusters;
    Divisor by_token_groups, by_clusters;
    int full_tiles;     // of clusters, kRowTiles x kTokenTiles tiles of CTAs: whole rounds
    SplitTiles split;   // after them, fewer than clusters; all 0 if there are none
    bool level;         // parts of equal length, which wait for each other: a cooperative launch
    bool waits_first;   // no kernel of this call came before
    bool quick_scales;  // four blocks of a row can be loaded as one word and share a nested absmax
};

// What one CTA does in one go, the same rows and steps in the whole cluster, whose CTAs free each
// other's stages. The first weight_steps of steps are blocks of W; one more is the low-rank term.
struct Tile {
    int row0, token0;
    int first_step, weight_steps, steps;
    int part, parts;  // of K, one cluster each
};

// By every thread before it touches memory. A kernel in front that projects has waited for
// everything before it; what it writes itself is waited for where it is read.
__device__ __forceinline__ void wait_for_operands(const Params& p) {
    if (p.waits_first)
        wait_for_previous_kernel();
}

// Of those that have tiles.
__device__ __forceinline__ int own_cta(const Params& p) {
    return blockIdx.x - p.projectors;
}

// A cluster's share reaches into two tiles at most. What it has of the second, which another
// cluster ends, comes first, whole tiles follow, and last what it has of the first: that other
// cluster finds the partial sums of this one when it comes to its end.
struct Schedule {
    int full, begin, end;
    int first_tile, last_tile;  // of the share's first and last quad
    bool owes, ends;

    __device__ __forceinline__ Schedule(const Params& p) {
        const int cluster = own_cta(p) / kCluster;
        full = divide(p.full_tiles - cluster + p.clusters - 1, p.by_clusters);
        begin = end = first_tile = last_tile = 0, owes = ends = false;
        if (cluster < p.split.clusters) {
            begin = p.split.shares.begin(cluster), end = p.split.shares.begin(cluster + 1);
            first_tile = divide(begin, p.split.by_quads);
            last_tile = divide(end - 1, p.split.by_quads);
            // Level parts end together.
            owes = end != (last_tile + 1) * p.split.quads && !p.level;
            ends = !owes || first_tile != last_tile;
        }
    }
    __device__ __forceinline__ int count() const {
        return full + owes + ends;
    }
};

template <class P>
__device__ __forceinline__ Tile tile_at(const Params& p, const Schedule& schedule, int index) {
    const int rank = blockIdx.x % kCluster;
    const int cluster = own_cta(p) / kCluster;
    int number = cluster + (index - schedule.owes) * p.clusters;
    Tile t{0, 0, 0, p.steps, p.steps, 0, 1};
    bool ends = true;
    const bool owed = schedule.owes && index == 0;
    if (owed || index == schedule.owes + schedule.full) {
        const int of_split = owed ? schedule.last_tile : schedule.first_tile;
        const int tile_begin = of_split * p.split.quads, tile_end = tile_begin + p.split.quads;
        const int begin = max(schedule.begin, tile_begin), end = min(schedule.end, tile_end);
        number = p.full_tiles + of_split;
        t.first_step = (begin - tile_begin) * kQuad;
        t.weight_steps = min((end - tile_begin) * kQuad, p.steps) - t.first_step;
        ends = end == tile_end;
        const int first = p.split.first_cluster(of_split);
        t.part = cluster - first, t.parts = p.split.last_cluster(of_split) - first + 1;
    }
    t.steps = t.weight_steps + (ends && p.r > 0);
    const int row_group = divide(number, p.by_token_groups);
    const int token_group = number - row_group * p.token_groups;
    t.row0 = (row_group * P::kRowTiles + (P::kSharesW ? 0 : rank)) * kTileRows;
    t.token0 = (token_group * P::kTokenTiles + (P::kSharesW ? rank : 0)) * P::kTokens;
    return t;
}

// Which part of a tile stores a quarter of its tokens: parts of equal length share them, of others
// the last has them all.
__host__ __device__ inline int owner_of(bool level, int parts, int quarter) {
    return level ? quarter * parts / 4 : parts - 1;
}

__device__ __forceinline__ bool takes_parts(bool level, const Tile& tile) {
    return tile.parts > 1 && (level || tile.part == tile.parts - 1);
}

// In turn i of an exchange, from 1 on, a part gives to the part i before its own and takes from the
// part i behind, around the end. So no two parts take from the same one at a time, and a part can
// add what it takes in the order of the turns while later turns are on their way.
__host__ __device__ inline int receiver_of(int part, int parts, int turn) {
    return part - turn + (part < turn ? parts : 0);
}
__host__ __device__ inline int giver_to(int part, int parts, int turn) {
    return part + turn - (part + turn < parts ? 0 : parts);
}

// What a CTA gives in a turn of an exchange is there when its word is the mark.
__device__ __forceinline__ uint64_t* given_word(const Params& p, int cta, int turn) {
    return p.given_words + cta * kMostParts + turn;
}

// By one thread.
__device__ __forceinline__ void give(const Params& p, int turn) {
    store_release(given_word(p, own_cta(p), turn), p.mark);
}

// Of the CTAs that have tiles, by a projecting CTA and one of them.
__device__ __forceinline__ uint64_t* z_word(const Params& p, int projector, int cta) {
    return p.z_words + projector * (p.clusters * kCluster) + cta;
}

}  // namespace
}  // namespace lowbit::cuda
