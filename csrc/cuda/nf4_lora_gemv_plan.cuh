// Sizes of nf4_lora_gemv_sm90.cu, its shared memory, and which rows a CTA and a warp compute.
#pragma once

#include "common.cuh"
#include "divisor.h"
#include "nf4_lora_matmul.h"

namespace lowbit::cuda {
namespace {

constexpr int kWarps = 16;  // of the weight; see store_spans
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kGatherWarps = 4;  // of the low-rank term
constexpr int kGatherers = kGatherWarps * kWarpSize;
constexpr int kCtaThreads = kThreads + kGatherers;
constexpr int kMaxProjectors = 16;  // CTAs that compute z
constexpr int kZRows = 16;          // of lora_A that each takes
constexpr int kZPairs = kZRows / 2;
constexpr int kZColumns = 64;        // that a warp multiplies at a time
constexpr int kZChunks = 4;          // such that it has under way
constexpr int kRows = 4;             // that share a warp's x in registers
constexpr int kColumnsPerLane = 32;  // 16 bytes of codes, never more than one block
constexpr int kStep = kColumnsPerLane * kWarpSize;
constexpr int kTableBytes = 256 * 256;
constexpr int kMaxRank = 64;
constexpr int kXExponent = 10;          // |x| < 2^11, |codebook| < 2: 8 products stay below 2^15
constexpr int64_t kMaxColumns = 32768;  // the table and x leave room for the rest
constexpr int kMaxSharedBytes = 227 * 1024;
// Named barriers.
constexpr int kBarrier = 1;   // of the warps of the weight
constexpr int kZBarrier = 2;  // of those of the low-rank term
constexpr int kYBarrier = 3;  // of all: what y is added up from is there

// Of a CTA's warps, the steps that each takes and one more; 1 for 0.
struct RunDivisors {
    Divisor by_each, by_longer;
};

inline RunDivisors make_run_divisors(uint32_t steps) {
    const auto each = static_cast<int>(steps / kWarps);
    return {make_divisor(each > 0 ? each : 1), make_divisor(each + 1)};
}

// Of CTA i behind the projectors: groups_each groups, one more if i < groups_extra.
struct Plan {
    uint32_t groups_each, groups_extra;
    uint32_t steps;  // per group: K / 1024, rounded up
    Divisor by_steps;
    RunDivisors runs, runs_of_more;  // with groups_each groups, with one more
    uint32_t most_groups;            // of a CTA
    uint32_t scratch_bytes;          // offset of Scratch
    uint32_t spans_bytes;            // offset of what store_spans stores
    uint32_t projectors;             // a power of two; 0: z is given, or there is no adapter
    int slices_log2;                 // of K, for 16 rows of lora_A
    uint64_t mark;                   // of this launch's parts of z
};

// Shared memory: the table, x as fp16 (2 KiB per step), its scales (128 bytes per step), Scratch,
// partial sums of most_groups + kWarps groups, lora_B z of most_groups, nested_absmax of the CTA's
// rows, a byte for each of most_groups. 86 KiB at 28672 x 8192, at most kMaxSharedBytes.
struct Scratch {
    float absmax_codebook[256];
    float2 z_parts[kMaxProjectors][kZPairs];
    union {
        float z_warp[kWarps][kZRows];  // of a projector, by warp
        float sums[1];                 // and on: see nf4_lora_gemv_kernel
    };
};

// What a CTA knows about its part of the weight.
struct Share {
    uint32_t first_group, groups, first_row, rows;
    uint32_t steps;        // of all its groups
    uint32_t each, extra;  // warp i takes `each` steps, one more if i < extra

    __device__ __forceinline__ Share(const Plan& plan, uint32_t N, uint32_t cta) {
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
