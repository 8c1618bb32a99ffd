// The products of lora_grads_tile.cuh: what a stage in shared memory, g [64 tokens, 256 columns] of
// dy or x (128 with 64 ranks) and t [64, ranks] of z or u, adds to the projection of its tokens, g
// f, and to the sums of its columns, g^T t. 16-bit operands, fp32 sums; ranks padded to 16, 32, 64.
//
// By mma.sync with up to 32 ranks. With 64 the products of a stage are as many as mma.sync computes
// in the time in which shared memory brings it, and by wgmma half of that.
#pragma once

#include "common.cuh"
#include "ptx_sm90.cuh"
#include "wgmma_sm90.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kStageTokens = 64;
constexpr int kBoxColumns = 64;  // 128 bytes: a swizzled line
constexpr int kBoxBytes = kStageTokens * kBoxColumns * 2;
constexpr int kComputeWarps = 8;
constexpr int kGradThreads = (kComputeWarps + 1) * kWarpSize;

// Shared memory, 137 to 226 KiB: stages (g, then t), with a projection two chunks of f, barriers,
// and the sums of the projection.
template <int kRank_, bool kProjects_>
struct GradPlan {
    static constexpr int kRank = kRank_;  // r padded: 16, 32 or 64
    static constexpr bool kProjects = kProjects_;
    static constexpr int kColumns = kRank == 64 ? 128 : 256;
    static constexpr int kStages = 4;
    static_assert(kStages >= 2, "a stage is freed behind the next");
    static constexpr int kSumWarps = kProjects ? kComputeWarps / 2 : kComputeWarps;
    static constexpr int kTiles = kColumns / 16 / kSumWarps;  // of 16 columns, per warp
    static constexpr bool kByWarpgroups = kRank == 64;
    static constexpr int kMaxTokens = !kProjects ? 1 << 30 : kRank == 16 ? 1024 : 384;
    static constexpr int kGBytes = kColumns * kStageTokens * 2;
    static constexpr int kFactorRow = kRank * 2;
    static constexpr int kTBytes = kStageTokens * kFactorRow;
    static constexpr int kStageBytes = kGBytes + kTBytes;
    static constexpr int kFBytes = kColumns * kFactorRow;
    static constexpr int kF = kStages * kStageBytes;
    static constexpr int kFull = kF + (kProjects ? 2 * kFBytes : 0);
    static constexpr int kEmpty = kFull + kStages * 8;
    static constexpr int kFFull = kEmpty + kStages * 8;
    static constexpr int kFEmpty = kFFull + 2 * 8;
    static constexpr int kProjection = kFull + 128;
    static constexpr int kSmemBytes = kProjection + (kProjects ? kMaxTokens * kRank * 4 : 0) + 1024;
    static_assert(kFEmpty + 2 * 8 <= kProjection && kTiles >= 1 && kSmemBytes <= 227 * 1024);
};

// A warp's sums of kTiles x 16 columns: a thread has pairs of neighbouring j.
template <class P>
using ColumnSums = float[P::kTiles][P::kRank / 8][4];

// Of a warp's tiles, which the warps take in turn, the first column of half a tile `i`, behind that
// of its first.
template <class P>
__device__ __forceinline__ constexpr int tile_column(int i) {
    return i / 2 * 16 * P::kSumWarps + i % 2 * 8;
}

// Byte of 16-byte chunk `chunk` of row `row` in a box with rows of kRowBytes, as TMA swizzles it.
template <int kRowBytes>
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
    constexpr int kChunks = kRowBytes / 16;
    return row * kRowBytes + ((chunk ^ (row / (8 / kChunks) % kChunks)) << 4);
}

// b of k16 x 16 columns from rows of kRank elements: b0, b1 of the first 8 columns, then of the
// others.
template <class P>
__device__ __forceinline__ void
load_factor(uint32_t (&b)[4], uint32_t rows, int row0, int column16, int lane) {
    load_matrices_transposed(
        b, rows + swizzled<P::kFactorRow>(row0 + lane % 16, 2 * column16 + lane / 16));
}

// Factors of a chunk that stay in registers for all of its stages, by 16s of the rank.
template <class P>
struct HeldFactors {
    static constexpr int kHeld = P::kByWarpgroups ? 0 : P::kRank / 16;
    uint32_t b[P::kColumns / 16][kHeld > 0 ? kHeld : 1][4];

    __device__ __forceinline__ void load(uint32_t f) {
#pragma unroll
        for (int k16 = 0; k16 < P::kColumns / 16; k16++) {
#pragma unroll
            for (int t = 0; t < kHeld; t++)
                load_factor<P>(b[k16][t], f, k16 * 16, t, threadIdx.x % kWarpSize);
        }
    }
};

// Of kRank / 8 x 4 sums in a thread's registers.
template <int kCount>
__device__ __forceinline__ float (&flat(float (&d)[kCount][4]))
    [kCount * 4] { return reinterpret_cast<float (&)[kCount * 4]>(d); }

// The projection of a warp's 16 tokens of a stage. d is 0.
template <typename T, class P>
__device__ __forceinline__ void project_stage(
    float (&d)[P::kRank / 8][4],
    const HeldFactors<P>& factors,
    uint32_t f,
    uint32_t stage,
    int warp) {
    if constexpr (P::kByWarpgroups) {
        const uint64_t b = transposed_operand_descriptor(f);
        wgmma_fence();
#pragma unroll
        for (int k16 = 0; k16 < P::kColumns / 16; k16++)
            wgmma_transposed_b(
                flat(d), operand_descriptor(stage + k16 / 4 * kBoxBytes) + k16 % 4 * 2,
                b + k16 * kLines16, k16 > 0, T{});
        wgmma_commit();
        wgmma_wait<0>();
    } else {
        const int lane = threadIdx.x % kWarpSize;
        // Of even and odd k16, where few columns would make the products wait for each other.
        constexpr int kSets = P::kRank == 16 ? 2 : 1;
        float odd[P::kRank / 8][4] = {};
        const uint32_t rows = stage + warp * 16 * 128;
#pragma unroll
        for (int k16 = 0; k16 < P::kColumns / 16; k16++) {
            uint32_t a[4];
            load_matrices(
                a, rows + k16 / 4 * kBoxBytes + swizzled<128>(lane % 16, k16 % 4 * 2 + lane / 16));
#pragma unroll
            for (int t = 0; t < P::kRank / 16; t++) {
                const uint32_t (&b)[4] = factors.b[k16][t];
                float (&sums)[P::kRank / 8][4] = k16 % kSets == 0 ? d : odd;
                mma_16x8x16(sums[2 * t], a, b[0], b[1], T{});
                mma_16x8x16(sums[2 * t + 1], a, b[2], b[3], T{});
            }
        }
#pragma unroll
        for (int i = 0; kSets == 2 && i < P::kRank / 2; i++)
            d[i / 4][i % 4] += odd[i / 4][i % 4];
    }
}

// A pair of ones.
__device__ __forceinline__ uint32_t ones(__nv_bfloat16) {
    return 0x3f803f80;
}
__device__ __forceinline__ uint32_t ones(__half) {
    return 0x3c003c00;
}

// By mma. Without kSums only column_sums, d stays as it is.
template <typename T, class P, bool kSums>
__device__ __forceinline__ void add_stage_by_warps(
    ColumnSums<P>& d,
    float (&column_sums)[P::kTiles][4],
    uint32_t stage,
    int warp,
    bool wants_column_sums) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int k16 = 0; k16 < kStageTokens / 16; k16++) {
        uint32_t a[P::kTiles][4];
#pragma unroll
        for (int i = 0; i < P::kTiles; i++) {
            const int column = warp * 16 + tile_column<P>(2 * i);
            const int token = k16 * 16 + lane / 16 * 8 + lane % 8;
            load_matrices_transposed(
                a[i], stage + column / kBoxColumns * kBoxBytes +
                          swizzled<128>(token, column % kBoxColumns / 8 + lane / 8 % 2));
        }
        if constexpr (!P::kByWarpgroups && kSums) {
#pragma unroll
            for (int t = 0; t < P::kRank / 16; t++) {
                uint32_t b[4];
                load_factor<P>(b, stage + P::kGBytes, k16 * 16, t, lane);
#pragma unroll
                for (int i = 0; i < P::kTiles; i++) {
                    mma_16x8x16(d[i][2 * t], a[i], b[0], b[1], T{});
                    mma_16x8x16(d[i][2 * t + 1], a[i], b[2], b[3], T{});
                }
            }
        }
        if (wants_column_sums) {
#pragma unroll
            for (int i = 0; i < P::kTiles; i++)
                mma_16x8x16(column_sums[i], a[i], ones(T{}), ones(T{}), T{});
        }
    }
}

// What a stage adds to the sums of a warp's columns.
template <typename T, class P>
__device__ __forceinline__ void add_stage(
    ColumnSums<P>& d,
    float (&column_sums)[P::kTiles][4],
    uint32_t stage,
    int warp,
    bool first,
    bool wants_sums,
    bool wants_column_sums) {
    if constexpr (P::kByWarpgroups) {
        if (wants_sums) {
            const uint64_t t = transposed_operand_descriptor(stage + P::kGBytes);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < P::kTiles; i++) {
                const int box = i * P::kSumWarps / 4 + warp / 4;
                const uint64_t g = transposed_operand_descriptor(stage + box * kBoxBytes);
#pragma unroll
                for (int k16 = 0; k16 < kStageTokens / 16; k16++)
                    wgmma_both_transposed(
                        flat(d[i]), g + k16 * kLines16, t + k16 * kLines16, !first || k16 > 0, T{});
            }
            wgmma_commit();
            wgmma_wait<0>();
        }
        if (!wants_column_sums)
            return;
    }
    if (!P::kByWarpgroups && wants_sums)
        add_stage_by_warps<T, P, true>(d, column_sums, stage, warp, wants_column_sums);
    else
        add_stage_by_warps<T, P, false>(d, column_sums, stage, warp, wants_column_sums);
}

}  // namespace
}  // namespace lowbit::cuda
