// Sizes and the division of work of nf4_lora_matmul_mid_sm90.cu: what lies where in shared memory,
// which tile a CTA computes when, and how far along the ring of stages a warp is.
#pragma once

#include <cuda.h>

#include "common.cuh"
#include "nf4_lora_matmul.h"

namespace lowbit::cuda {
namespace {

constexpr int kStepK = 64;  // a row of a step is one swizzled line of 128 bytes
constexpr int kRowBytes = kStepK * 2;
constexpr int kTileRows = 128;
constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2 * kWarpgroup;
constexpr int kCluster = 2;
constexpr int kUnitRows = kWarpSize;  // what a warp decodes at a time
constexpr int kChunkTokens = 32;      // of y, staged for one TMA store
constexpr int kChunkBytes = kChunkTokens * 64 * 2;
constexpr int kNestedCodes = 256;
constexpr int kSmemAlignment = 1024;  // of swizzled tiles

// Shared memory in this order: stages (x, then W), two groups of packed weights, staged output, 16
// codebook values and 256 nested ones, barriers. 231 584 bytes for 256 tokens, 215 216 for 128.
template <int kTokens_, bool kSharesW_>
struct Plan {
    static constexpr int kTokens = kTokens_;
    static constexpr bool kSharesW = kSharesW_;
    static constexpr int kRowTiles = kSharesW ? 1 : 2;  // of a cluster
    static constexpr int kTokenTiles = kCluster / kRowTiles;
    static constexpr int kStages = kTokens == 256 ? 4 : 5;
    static constexpr int kProducerWarps = kTokens == 256 ? 4 : 8;
    static constexpr int kProducers = kProducerWarps * kWarpSize;
    static constexpr int kThreads = kProducers + kConsumers;
    static constexpr int kOwnRows = kTileRows / kTokenTiles;  // decoded here
    static constexpr int kUnits = kOwnRows / kUnitRows;       // per step
    static constexpr int kStride = kProducerWarps / kUnits;   // steps being decoded at a time
    static constexpr int kGroupSteps = 2 * kStride;           // of packed weights, loaded together
    static constexpr int kPackedRow = kGroupSteps * kStepK / 2;
    static constexpr int kPackedBytes = kOwnRows * kPackedRow;
    static constexpr int kXBytes = kTokens * kRowBytes;
    static constexpr int kWBytes = kTileRows * kRowBytes;
    static constexpr int kStageBytes = kXBytes + kWBytes;
    static constexpr int kXBoxTokens = kTokens / kRowTiles;
    static constexpr int kXBoxBytes = kXBoxTokens * kRowBytes;
    static constexpr int kArrivingBytes = kXBytes + (kSharesW ? kWBytes / 2 : 0);
    static constexpr int kPacked = kStages * kStageBytes;
    static constexpr int kOutput = kPacked + 2 * kPackedBytes;
    static constexpr int kTables = kOutput + 4 * kChunkBytes;
    static constexpr int kFull = kTables + (16 + kNestedCodes) * 4;
    static constexpr int kEmpty = kFull + kStages * 8;
    static constexpr int kPackedFull = kEmpty + kStages * 8;
    static constexpr int kPackedEmpty = kPackedFull + 2 * 8;
    static constexpr int kSmemBytes = kPackedEmpty + 2 * 8 + kSmemAlignment;
    static_assert(kPackedRow == 64 || kPackedRow == 128, "one of two swizzles");
    static_assert(kSmemBytes <= 227 * 1024);
};

struct Maps {
    CUtensorMap x, z, y;
    CUtensorMap packed;  // bytes of W [N, K/2]
};

struct Params {
    WeightView w;
    const void* lora_B;
    const void* bias;
    int r;
    int steps;  // K / 64
    int first_row;
    int token_groups;  // token tiles of a cluster beside each other
    int full_tiles;    // tiles of clusters: kRowTiles x kTokenTiles tiles of CTAs
    int split_tiles;   // after them, tiles of CTAs whose K a cluster splits: at most one each
    bool waits_first;  // no kernel of this call came before
    bool lets_next_start;
    bool quick_scales;  // four blocks of a row can be loaded as one word and share a nested absmax
};

// What one CTA does in one round. `steps` is the same in the whole cluster, whose CTAs free each
// other's stages; the first weight_steps of them are blocks of W, the last is the low-rank term.
struct Tile {
    int row0, token0;
    int first_step, weight_steps, steps;
    bool split;
};

template <class P>
__device__ __forceinline__ int tile_count(const Params& p) {
    const int cluster = blockIdx.x / kCluster, clusters = gridDim.x / kCluster;
    const int full = p.full_tiles > cluster ? (p.full_tiles - cluster - 1) / clusters + 1 : 0;
    return full + (cluster < p.split_tiles);
}

template <class P>
__device__ __forceinline__ Tile tile_at(const Params& p, int index) {
    const int rank = blockIdx.x % kCluster;
    const int cluster = blockIdx.x / kCluster, clusters = gridDim.x / kCluster;
    int number = cluster + index * clusters;
    int row_tile = P::kSharesW ? 0 : rank;
    Tile t{0, 0, 0, p.steps, p.steps, number >= p.full_tiles};
    if (t.split) {
        number = p.full_tiles + cluster / P::kRowTiles;
        row_tile = cluster % P::kRowTiles;
        t.steps = (p.steps + 7) / 8 * 4;  // scales are loaded in fours
        t.first_step = rank * t.steps;
        t.weight_steps = min(t.steps, p.steps - t.first_step);
    }
    t.row0 = p.first_row + (number / p.token_groups * P::kRowTiles + row_tile) * kTileRows;
    t.token0 = number % p.token_groups * P::kTokenTiles * P::kTokens;
    t.token0 += P::kSharesW ? rank * P::kTokens : 0;
    t.steps += p.r > 0;
    return t;
}

// A stage of the ring and the parity of its use.
template <class P>
struct Position {
    int slot;
    uint32_t parity;

    __device__ __forceinline__ void advance(int by) {
        slot += by;
        if (slot >= P::kStages) {
            slot -= P::kStages;
            parity ^= 1;
        }
    }
};

}  // namespace
}  // namespace lowbit::cuda
