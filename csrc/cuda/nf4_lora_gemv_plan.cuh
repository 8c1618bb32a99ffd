// Sizes of nf4_lora_gemv_sm90.cu, its shared memory, and which rows a CTA and a warp compute.
#pragma once

#include "common.cuh"
#include "divisor.h"
#include "nf4_lora_matmul.h"

namespace lowbit::cuda {
namespace {

constexpr int kWarps = 16;  // of the weight
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kZWarps = 4;
constexpr int kZThreads = kZWarps * kWarpSize;
constexpr int kRows = 4;             // that share a warp's x in registers
constexpr int kColumnsPerLane = 32;  // 16 bytes of codes, never more than one block
constexpr int kStep = kColumnsPerLane * kWarpSize;
constexpr int kTableBytes = 256 * 256;
constexpr int kMaxRank = 64;
constexpr int kMaxCluster = 8;
constexpr int kXUnit = 16;      // columns a thread stages at a time
constexpr int kXUnits = 4;      // times, all loaded before any is stored
constexpr int kXExponent = 10;  // |x| < 2^11, |codebook| < 2: 8 products stay below 2^15
constexpr int64_t kMaxColumns = kXUnits * kXUnit * kThreads;
constexpr int kMaxSharedBytes = 227 * 1024;
constexpr int kFewRanks = 16;  // more are multiplied by wgmma: see nf4_lora_gemv_z_parts.cuh
constexpr int kZColumns = 64;  // of lora_A in a stage
constexpr int kZRowBytes = 2 * kZColumns;
constexpr int kZWarpStages = 2;     // few ranks: on their way for each warp
constexpr int kZStages = 8;         // more: for the CTA
constexpr int kZTokenBytes = 1024;  // of x in one of these: 8 rows, of which the first is written
// Named barriers.
constexpr int kBarrier = 1;   // of the warps of the weight
constexpr int kZBarrier = 2;  // of those of z
constexpr int kYBarrier = 3;  // of all: what y is added up from is there

// Of a CTA's warps, the steps that each takes and one more; 1 for 0.
struct RunDivisors {
    Divisor by_each, by_longer;
};

inline RunDivisors make_run_divisors(uint32_t steps) {
    const auto each = static_cast<int>(steps / kWarps);
    return {make_divisor(each > 0 ? each : 1), make_divisor(each + 1)};
}

// Of CTA i: groups_each groups, one more if i < groups_extra.
struct Plan {
    uint32_t groups_each, groups_extra;
    uint32_t steps;  // per group: K / 1024, rounded up
    Divisor by_steps, by_rank_tiles;
    RunDivisors runs, runs_of_more;  // with groups_each groups, with one more
    // Of a cluster's CTAs, a power of two.
    int cluster_log2;
    uint32_t most_groups;    // of a CTA
    uint32_t stages_bytes;   // offset of the stages of z
    uint32_t scratch_bytes;  // offset of Scratch
    bool exchange;           // z is computed here
};

// Shared memory: the table, x as fp16 (2 KiB per step), stages of z (up to 72 KiB), Scratch,
// partial sums of most_groups + kWarps groups, lora_B z of most_groups, nested_absmax of the CTA's
// rows.
struct Scratch {
    float absmax_codebook[256];
    union {
        float z_warp[kZWarps][kMaxRank];  // few ranks: this CTA's columns, by warp
        uint64_t z_full[kZStages];        // more: barriers of the stages
    };
    float z_parts[kMaxCluster][kMaxRank];  // by CTA of the cluster
    uint64_t z_arrived;                    // barrier: z_parts are complete
    uint32_t x_max[kWarps];
    float sums[1];  // and on: see nf4_lora_gemv_kernel
};

__host__ __device__ constexpr int rank_tiles(int r) {
    return (r + 15) / 16;
}

__host__ __device__ constexpr int z_rows_bytes(int r) {
    return 16 * rank_tiles(r) * kZRowBytes;
}

__host__ __device__ constexpr int z_warp_stage_bytes(int r) {
    return z_rows_bytes(r) + kZRowBytes;
}

constexpr int z_stages_bytes(int r) {
    if (r <= kFewRanks)
        return kZWarps * kZWarpStages * z_warp_stage_bytes(r);
    // Products read 64 rows from the start of a stage, whatever they are.
    return (kZStages - 1) * (z_rows_bytes(r) + kZTokenBytes) + z_rows_bytes(kMaxRank) +
           kZTokenBytes;
}

// What a CTA knows about its part of the weight.
struct Share {
    uint32_t first_group, groups, first_row, rows;
    uint32_t steps;        // of all its groups
    uint32_t each, extra;  // warp i takes `each` steps, one more if i < extra

    __device__ __forceinline__ Share(const Plan& plan, uint32_t N) {
        const uint32_t cta = blockIdx.x;
        first_group = cta * plan.groups_each + min(cta, plan.groups_extra);
        groups = plan.groups_each + (cta < plan.groups_extra);
        first_row = row_of(0, N);
        rows = min((first_group + groups) * kRows, N) - first_row;
        steps = groups * plan.steps;
        each = steps / kWarps, extra = steps % kWarps;
    }

    // The last group of the weight is moved back to end with row N - 1; it computes rows of the
    // group before it again, and store_y drops them: their sums may be split differently.
    __device__ __forceinline__ uint32_t row_of(uint32_t group, uint32_t N) const {
        return min((first_group + group) * kRows, N - kRows);
    }

    __device__ __forceinline__ uint32_t warp_of(const Plan& plan, uint32_t step) const {
        const RunDivisors& runs = groups > plan.groups_each ? plan.runs_of_more : plan.runs;
        const uint32_t longer = extra * (each + 1);
        return step < longer ? divide(step, runs.by_longer)
                             : extra + divide(step - longer, runs.by_each);
    }
};

}  // namespace
}  // namespace lowbit::cuda
