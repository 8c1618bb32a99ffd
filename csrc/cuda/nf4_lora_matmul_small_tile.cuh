// How nf4_lora_matmul_small_sm90.cu cuts the product into tiles and units, and what its kernel is
// told.
#pragma once

#include <cuda.h>

#include <algorithm>

#include "common.cuh"
#include "nf4_lora_matmul.h"
#include "nf4_lora_matmul_shares.cuh"
#include "nf4_lora_matmul_tables.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kUnitBlocks = 2;  // blocks along K per unit and K group
constexpr int kMaxRank = 64;
// Fetched into L2 before the wait for the kernel in front. All stages: 0.1 to 1.3 us more (H200,
// 2026-11-30).
constexpr int kPrefetchStages = 2;
constexpr int kWarpgroup = 128;  // threads
constexpr int kConsumers = 4 * kWarpgroup;
// One more warpgroup: a warp of which one thread copies, and three that bring z.
constexpr int kThreads = kConsumers + kWarpgroup;
constexpr int kGatherers = kWarpgroup - kWarpSize;
constexpr int kConsumerWarps = kConsumers / kWarpSize;

// 640 threads may have 96 registers each; the consumers take what the last warpgroup leaves. 104
// and 64 for up to 16 tokens, for more loads of z in flight: 3 to 4 % slower (H200, 2026-11).
constexpr int kConsumerRegisters = 112;
constexpr int kCopyRegisters = 32;

constexpr int kProjectors = 4;         // CTAs that compute z
constexpr int kMostProjectStages = 8;  // in flight for one of their warpgroups
constexpr int kProjectRing = 1024;     // where their rings start, behind barriers
// Up to so many values of z, padding included, each CTA adds what the projectors have of them. The
// last projector adds more of them, for all CTAs.
constexpr int kSharedValues = 1024;
// Floats between the sums of two tokens: the lanes of a warp, 8 rows of lora_A and 4 pairs of
// tokens, store to different banks.
constexpr int kSumsRow = kMaxRank + 4;

// Named barriers: 1 to 4 are those of warpgroups, 6 is kFinishBarrier.
constexpr int kTablesBarrier = 5, kZBarrier = 7, kGatherBarrier = 8;
constexpr int kTokenRow = kBlock * 2;  // bytes of a token, or of a row of lora_A, in a block

// Where dynamic shared memory starts on sm_90 in a kernel without static shared memory. A constant,
// so that the base is part of the load instruction; nf4_lora_matmul_small_kernel checks it.
constexpr int kSharedStart = 1024;

// Whether each two sums that go to another CTA have the mark beside them: twice the bytes, but one
// way through L2. A flag for all takes three, until the sums are stored, the mark is seen and the
// sums are loaded.
__host__ __device__ constexpr bool marks_sums(int tokens) {
    return tokens <= 16;
}

// kRowGroups warpgroups share the rows of a tile, 64 each, and 4 / kRowGroups the columns.
template <int kTokens_, int kRowGroups_>
struct Tile {
    static constexpr int kTokens = kTokens_;
    static constexpr int kRowGroups = kRowGroups_;
    static constexpr int kGroups = 4 / kRowGroups;  // along K
    static constexpr int kRows = 64 * kRowGroups;
    static constexpr int kFinishers = kRowGroups * kWarpgroup;  // threads of K group 0
    static constexpr int kSums = kTokens / 2;                   // per thread
    static constexpr int kUnit = kUnitBlocks * kGroups;         // blocks along K per stage
    static constexpr bool kScaleWeight = kTokens > 32;
    static constexpr bool kMarkSums = marks_sums(kTokens);

    static constexpr int kBoxBytes = kRows * kUnitBlocks * kBlock / 2;  // codes of a K group
    static constexpr int kWeightBytes = kGroups * kBoxBytes;
    static constexpr int kTokenBytes = kUnitBlocks * kTokens * kTokenRow;  // of a K group
    static constexpr int kStageBytes = kWeightBytes + kGroups * kTokenBytes;

    static constexpr int kZ = kTableBytes;
    static constexpr int kScales = kZ + kTokens * kTokenRow;
    static constexpr int kNestedCodebook = kScales + kConsumerWarps * kScaleBytes;
    static constexpr int kBarriers = kNestedCodebook + 256 * 4;
    static constexpr int kStage0 = kBarriers + 1024;
    static constexpr int kSharedBytes = 227 * 1024;
    static constexpr int kFit = (kSharedBytes - kStage0) / kStageBytes;
    static constexpr int kStages = kFit < 8 ? kFit : 8;
    static constexpr int kBytes = kStage0 + kStages * kStageBytes;

    // Beside the table, in the other halves of its entries: the sums that K groups hand over, and
    // behind them slices of z to be added.
    static constexpr int kSlots = kTableBytes / kTableStride;
    static constexpr int kGroupSlots = (kGroups - 1) * kSums * 4 * kRowGroups;
    static constexpr int kSliceSlots = kSharedValues * 4 / (kTableStride / 2);
    static constexpr bool kSlicesFit = kGroupSlots + kProjectors * kSliceSlots <= kSlots;

    static_assert(kStage0 % 1024 == 0 && kStageBytes % 1024 == 0, "swizzled tiles");
    static_assert(kGroupSlots <= kSlots, "sums fit beside the table");
    static_assert(
        kProjectRing + 4 * (kTokenBytes + kUnitBlocks * kMaxRank * kTokenRow) <= kBytes &&
            kProjectRing + kTokens * (4 * kSumsRow + (kProjectors - 1) * kMaxRank) * 4 <= kBytes,
        "a stage for each warpgroup of a projector; their sums, and other projectors'");
};

struct Problem {
    WeightView w;
    const void* lora_B;
    const void* bias;
    const void* z_in;  // [M, r]
    void* z_out;       // [M, r] or null
    const float* lora_scaling;
    float scaling;
    int projectors;      // CTAs in front of those with a share: kProjectors, 0 without z to compute
    int project_stages;  // of each warpgroup of theirs
    float* partial_z;    // [kProjectors][kTokens][padded rank]
    uint64_t* z_flags;   // [CTAs][kProjectors], the mark when the slice of z is there for the CTA
    float* partials;     // [CTAs][kRows kTokens], or as many MarkedPairs as pairs of them
    uint64_t* flags;     // [CTAs], the mark when the CTA's partial is there; unless kMarkSums
    uint64_t mark;
    void* y;
    int M;
    int r;
    Divisor by_rank;  // padded to a multiple of 16; if r > 0
    int ctas;         // with a share
    Shares shares;
};

// Two blocks of 64 columns at a time.
struct Maps {
    CUtensorMap codes;   // [N][K / 8] words
    CUtensorMap x;       // [K / 64][M][64]
    CUtensorMap lora_A;  // [K / 64][r][64], if there are projectors
};

// Of a projector's stage: tokens and rows of lora_A of two blocks.
template <typename Tile>
__host__ __device__ int project_stage_bytes(int r) {
    return Tile::kTokenBytes + kUnitBlocks * padded_rank(r) * kTokenRow;
}

// As many as find room for all four warpgroups, and behind the last one what products read past the
// padded rank.
template <typename Tile>
int project_stages(int r) {
    const int room = Tile::kBytes - kProjectRing - (kMaxRank - padded_rank(r)) * kTokenRow;
    return std::min(kMostProjectStages, room / 4 / project_stage_bytes<Tile>(r));
}

// Of 8 elements of a row of 64, under the 128-byte swizzle.
__device__ __forceinline__ uint32_t swizzled_offset(int row, int chunk) {
    return row * kTokenRow + ((chunk ^ (row & 7)) << 4);
}

}  // namespace
}  // namespace lowbit::cuda
