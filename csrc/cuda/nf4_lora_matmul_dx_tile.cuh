// Sizes and the division of work of nf4_lora_matmul_dx_sm90.cu: what lies where in shared memory,
// which tile a CTA computes when, and how far along the ring of stages a warp is.
#pragma once

#include <cuda.h>

#include "divisor.h"
#include "nf4_lora_matmul_dx.h"
#include "nf4_lora_matmul_stages.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kStepN = 64;         // rows of W in a step
constexpr int kTileColumns = 128;  // of dx: two blocks of W
constexpr int kProducersBarrier = 3;
constexpr int kPackedRow = kTileColumns / 2;  // bytes
// Tokens whose tiles are computed together: with all of them a large M would read dy from memory
// once per two columns of tiles.
constexpr int kSlabTokens = 4096;

// Even, so that warps which take steps in turn have stages of their own: racecheck does not follow
// the hand-over between them. A fifth stage for 128 tokens gained nothing (H200, 2026-11).
constexpr int kRingStages = 4;

// Shared memory in this order: stages (dy, then W), two groups of packed weights, staged output, 16
// codebook values, 256 of the nested one, barriers. 231 648 bytes for 256 tokens, 182 496 for 128.
//
// Decoded W of a stage: line 64 b + i has row i of the step, block b of the tile's two. A CTA that
// shares W decodes 32 rows of both blocks for both CTAs.
//
// kMore: clusters may share the N of a tile, and the gradient of lora_A may be made. Other layers
// take kernels without the code for it, which alone costs up to 1 % (H200, 2026-11).
template <int kTokens_, bool kSharesW_, bool kMore_ = false>
struct Plan {
    static constexpr int kTokens = kTokens_;
    static constexpr bool kSharesW = kSharesW_;
    static constexpr bool kMore = kMore_;
    using More = Plan<kTokens, kSharesW, true>;
    static constexpr int kColumnTiles = kSharesW ? 1 : 2;  // of a cluster
    static constexpr int kTokenTiles = kCluster / kColumnTiles;
    static constexpr int kSlabGroups = kSlabTokens / (kTokens * kTokenTiles);
    static constexpr int kStages = kRingStages;
    static constexpr int kProducerWarps = kTokens == 256 ? 4 : 8;
    static constexpr int kProducers = kProducerWarps * kWarpSize;
    static constexpr int kThreads = kProducers + kConsumers;
    static constexpr int kOwnRows = kStepN / kTokenTiles;    // of a step, decoded here
    static constexpr int kUnits = 2 * kOwnRows / kUnitRows;  // per step
    static constexpr int kStride = kProducerWarps / kUnits;  // steps being decoded at a time
    static constexpr int kGroupSteps = 2 * kStride;          // of packed weights, loaded together
    static constexpr int kPackedStep = kOwnRows * kPackedRow;
    static constexpr int kPackedBytes = kGroupSteps * kPackedStep;
    static constexpr int kDyBytes = kTokens * kLineBytes;
    static constexpr int kWBytes = kTileColumns * kStepN * 2;
    static constexpr int kStageBytes = kDyBytes + kWBytes;
    static constexpr int kBoxTokens = kTokens / kColumnTiles;
    static constexpr int kBoxBytes = kBoxTokens * kLineBytes;
    static constexpr int kArrivingBytes = kDyBytes + (kSharesW ? kWBytes / 2 : 0);
    static constexpr int kPacked = kStages * kStageBytes;
    static constexpr int kOutput = kPacked + 2 * kPackedBytes;
    static constexpr int kCodebook = kOutput + 4 * kChunkBytes;
    static constexpr int kNestedCodebook = kCodebook + 16 * 4;
    static constexpr int kFull = kCodebook + kTableFloats * 4;
    static constexpr int kEmpty = kFull + kStages * 8;
    static constexpr int kPackedFull = kEmpty + kStages * 8;
    static constexpr int kPackedEmpty = kPackedFull + 2 * 8;
    static constexpr int kSums = kPackedEmpty + 2 * 8;  // one for each consumer warp
    static constexpr int kSmemBytes = kSums + kConsumerWarps * 8 + kSmemAlignment;
    static constexpr int kOwnSums = kTokens / 4;  // of a thread, half of those of a split tile
    static constexpr int kGivenBytes = kOwnSums * kConsumers * 4;
    static_assert(kStride == 1 || kStride == 2, "how a warp finds its first step of a tile");
    static_assert(kSmemBytes <= 227 * 1024);
};

struct Maps {
    CUtensorMap dy, u, lora_A, dx;
    CUtensorMap packed;  // bytes of W [N, K/2]
};

constexpr int kGradColumns = 32;  // of x, of a CTA at a time
constexpr int kGradTokens = 64;   // of a warp, whose loads are under way together
constexpr int kGradRank = 16;     // of a product's ranks

// The gradient of lora_A, where the product makes it: nf4_lora_matmul_dx_grads.cuh.
struct GradOfA {
    const uint8_t* x;  // [tokens, K] in T
    const uint8_t* u;  // [tokens, u_columns] in T
    void* out;         // [r, K] in T or fp32; null: it does not
    bool out_is_float;
    int tokens, u_columns;
};

struct Params {
    WeightView w;
    const float* scales;  // absmax, or nested_absmax
    int scale_log2;       // log2 of how many blocks share one of them
    int blocks;           // K / 64
    int step_blocks;      // 64 K / blocksize
    int r;
    int steps;  // N / 64, rounded up
    int first_column;
    // Tiles of clusters. They are counted within a column group of a slab first, a slab being
    // kSlabGroups of the token groups, and the last one what is left.
    int column_groups, last_slab, last_slab_groups;
    int clusters;
    Divisor by_column_groups, by_last_slab_groups, by_clusters;
    int full_tiles;  // tiles of clusters: kColumnTiles x kTokenTiles tiles of CTAs
    // After them, tiles of CTAs whose N is split, each by 2^share_log2 clusters in a row, of which
    // one has at most one. All but the last of them give their sums to it, see add_given.
    int split_tiles, share_log2;
    float4* given;          // of each CTA that gives
    uint64_t* given_words;  // of its consumer warps: given_mark when their sums are there
    uint64_t given_mark;
    bool is_first;  // of the products of a call
    bool is_last;
    bool waits_for_u;   // behind its steps of W, and for nothing else
    uint64_t* u_words;  // [CTAs], u_mark when u is there; null: it is when the gradients end
    uint64_t u_mark;
    bool adds;  // to dx
    GradOfA grad;
};

// What one CTA does in one round. `steps` is the same in the whole cluster, whose CTAs free each
// other's stages; the first weight_steps of them are rows of W, the last is the low-rank term.
struct Tile {
    int column0, token0;
    int first_step, weight_steps, steps;
    bool split;
};

// Of each part of a split tile but perhaps the last: whole groups of packed weights.
__host__ __device__ constexpr int part_steps(int steps, int share_log2) {
    const int group_log2 = 2, parts_log2 = 1 + share_log2, both = group_log2 + parts_log2;
    return (steps + (1 << both) - 1) >> both << group_log2;
}

template <class P>
__device__ __forceinline__ int share_log2(const Params& p) {
    return P::kMore ? p.share_log2 : 0;
}

// Which of the clusters that split a tile this is.
template <class P>
__device__ __forceinline__ int share_of(const Params& p) {
    return blockIdx.x / kCluster & ((1 << share_log2<P>(p)) - 1);
}

template <class P>
__device__ __forceinline__ bool has_last_share(const Params& p) {
    return share_of<P>(p) + 1 == 1 << share_log2<P>(p);
}

// Of a split tile's CTAs, one has the low-rank term.
template <class P>
__device__ __forceinline__ bool has_low_rank(const Params& p, const Tile& tile) {
    return p.r > 0 && !(tile.split && (blockIdx.x % kCluster != 0 || !has_last_share<P>(p)));
}

template <class P>
__device__ __forceinline__ int tile_count(const Params& p) {
    const int cluster = blockIdx.x / kCluster;
    const int full = divide(p.full_tiles - cluster + p.clusters - 1, p.by_clusters);
    return full + (cluster < p.split_tiles << share_log2<P>(p));
}

template <class P>
__device__ __forceinline__ Tile tile_at(const Params& p, int index) {
    const int rank = blockIdx.x % kCluster;
    const int cluster = blockIdx.x / kCluster;
    int number = cluster + index * p.clusters;
    int column_tile = P::kSharesW ? 0 : rank;
    Tile t{0, 0, 0, p.steps, p.steps, number >= p.full_tiles};
    if (t.split) {
        const int split_tile = cluster >> share_log2<P>(p);
        number = p.full_tiles + split_tile / P::kColumnTiles;
        column_tile = split_tile % P::kColumnTiles;
        t.steps = part_steps(p.steps, share_log2<P>(p));
        t.first_step = (share_of<P>(p) * kCluster + rank) * t.steps;
        t.weight_steps = min(t.steps, p.steps - t.first_step);
    }
    const int slab = divide(number / P::kSlabGroups, p.by_column_groups);
    const int in_slab = number - slab * (P::kSlabGroups * p.column_groups);
    const bool last = slab == p.last_slab;
    const int groups = last ? p.last_slab_groups : P::kSlabGroups;
    const int column_group =
        last ? divide(in_slab, p.by_last_slab_groups) : in_slab / P::kSlabGroups;
    const int token_group = slab * P::kSlabGroups + in_slab - column_group * groups;
    t.column0 = p.first_column + (column_group * P::kColumnTiles + column_tile) * kTileColumns;
    t.token0 = token_group * P::kTokenTiles * P::kTokens;
    t.token0 += P::kSharesW ? rank * P::kTokens : 0;
    t.steps += p.r > 0;
    return t;
}

}  // namespace
}  // namespace lowbit::cuda
