// How nf4_lora_matmul_small_sm90.cu cuts the product into tiles and units, what its kernels are
// told, and the order in which x is packed.
#pragma once

#include "common.cuh"
#include "nf4_lora_matmul_shares.cuh"
#include "nf4_lora_matmul_tables.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kUnitBlocks = 2;  // blocks along K per unit and K group
constexpr int kMaxRank = 64;
// Fetched into L2 while this call's x is being packed. More would make lora_A wait: with 8 stages a
// 4096 x 14336 layer takes 3 us longer (H100, 2026-11-24).
constexpr int kPrefetchStages = 2;
constexpr int kWarpgroup = 128;  // threads
constexpr int kConsumers = 4 * kWarpgroup;
constexpr int kThreads = kConsumers + kWarpgroup;  // one more warpgroup, of which one thread copies
constexpr int kConsumerWarps = kConsumers / kWarpSize;
// 640 threads may have 96 registers each; the consumers take what the copying warpgroup leaves.
constexpr int kConsumerRegisters = 112;
constexpr int kCopyRegisters = 24;

constexpr int kPackRow = kBlock * 2;  // bytes of a token in a block

// The other halves of the pair table's entries are where K groups hand over their sums.
// Where dynamic shared memory starts on sm_90 in a kernel without static shared memory. A constant,
// so that the base is part of the load instruction; nf4_lora_matmul_small_kernel checks it.
constexpr int kSharedStart = 1024;

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

    static constexpr int kBoxBytes = kRows * kUnitBlocks * kBlock / 2;  // codes of a K group
    static constexpr int kWeightBytes = kGroups * kBoxBytes;
    static constexpr int kTokenBytes = kUnitBlocks * kTokens * kPackRow;  // of a K group
    static constexpr int kStageBytes = kWeightBytes + kGroups * kTokenBytes;

    static constexpr int kZ = kTableBytes;
    static constexpr int kScales = kZ + kTokens * kPackRow;
    static constexpr int kNestedCodebook = kScales + kConsumerWarps * kScaleBytes;
    static constexpr int kBarriers = kNestedCodebook + 256 * 4;
    static constexpr int kStage0 = kBarriers + 1024;
    static constexpr int kSharedBytes = 227 * 1024;
    static constexpr int kFit = (kSharedBytes - kStage0) / kStageBytes;
    static constexpr int kStages = kFit < 8 ? kFit : 8;
    static constexpr int kBytes = kStage0 + kStages * kStageBytes;

    static_assert(kStage0 % 1024 == 0 && kStageBytes % 1024 == 0, "swizzled tiles");
    static_assert((kGroups - 1) * kSums * 4 * kRowGroups <= 256, "sums fit beside the table");
};

struct Problem {
    WeightView w;
    const void* lora_B;
    const void* bias;
    const uint8_t* packed_x;  // [units kUnit][kTokens][64] T, see pack_tokens_kernel
    const float* partial_z;   // [z_slices][kTokens][padded rank], null: z_in
    const void* z_in;         // [M, r]
    void* z_out;              // [M, r] or null
    const float* lora_scaling;
    float scaling;
    int z_slices;
    float* partials;  // [CTAs][kRows kTokens]
    uint32_t* flags;  // [CTAs], 1 when the CTA's partial is there; zeroed while packing
    void* y;
    int M;
    int r;
    Divisor by_rank;  // padded to a multiple of 16; if r > 0
    Shares shares;
};

// Element p of a token's 64 in a packed block, in 16-byte chunks c = p / 8 = 2 s + h, is
//     k = 16 t + 4 s + 2 h + e   where p = 8 c + 2 t + e,
// because lane t of a quad decodes 8 neighbouring bytes, 16 codes, and feeds them to four products
// s, which want of it elements 2 t + e and 8 + 2 t + e. Chunks are exchanged as the 128-byte
// swizzle has it: c is stored at c ^ (token % 8).
__device__ __forceinline__ uint32_t packed_offset(int token, int chunk) {
    return token * kPackRow + ((chunk ^ (token & 7)) << 4);
}

}  // namespace
}  // namespace lowbit::cuda
