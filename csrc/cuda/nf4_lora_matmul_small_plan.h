// How the host of nf4_lora_matmul_small_sm90.cu chooses tile height and number of CTAs, and divides
// the workspace.
#pragma once

#include <algorithm>

#include "nf4_lora_matmul.h"
#include "nf4_lora_matmul_small_tile.cuh"

namespace lowbit::cuda {
namespace {

struct Plan {
    int tokens;      // padded
    int row_groups;  // see Tile
    int ctas;
};

int padded_tokens(int64_t M) {
    return M <= 8 ? 8 : M <= 16 ? 16 : M <= 32 ? 32 : 64;
}

int units_of(const LoraMatmulArgs& a, const Plan& plan) {
    return static_cast<int>(ceil_div(a.w.K / kBlock, kUnitBlocks * (4 / plan.row_groups)));
}

int tiles_of(const LoraMatmulArgs& a, const Plan& plan) {
    return static_cast<int>(ceil_div(a.w.N, 64 * plan.row_groups));
}

// Microseconds the product will take, fitted to layers of 0.4 to 235 million weights (H100,
// 2026-11-24, when a launch in front packed x). A unit is 16 KB of codes in every plan.
double estimate(const LoraMatmulArgs& a, const Plan& plan) {
    constexpr double kUnitMemory = 0.00615;  // times the number of CTAs that share the bandwidth
    constexpr double kSegment = 1.0;         // a CTA's change to another tile
    constexpr double kExchange = 0.6;        // CTAs of a tile wait for each other; times row groups
    constexpr double kPartial = 0.4;         // each one's sums, latency
    constexpr double kPartialPerKb = 0.0125;  // and transfer
    const double decode = plan.tokens <= 32 ? 0.75 : plan.row_groups == 4 ? 1.05 : 1.15;
    const double memory = kUnitMemory * plan.ctas;
    const int units = units_of(a, plan), tiles = tiles_of(a, plan);
    const auto per_cta = static_cast<double>(ceil_div(int64_t{units} * tiles, plan.ctas));
    double time = per_cta * (decode > memory ? decode : memory);
    if (plan.ctas % tiles != 0)
        time += kSegment * static_cast<double>(ceil_div(tiles, plan.ctas));
    if (plan.ctas != tiles) {
        const int partials = plan.ctas <= tiles ? 1 : (plan.ctas - 1) / tiles;
        const double kilobytes = plan.row_groups * plan.tokens / 4;
        time += kExchange * plan.row_groups + partials * (kPartial + kPartialPerKb * kilobytes);
    }
    return time;
}

// CTAs that compute z.
int projectors_of(const LoraMatmulArgs& a) {
    return a.lora_A == nullptr || a.r == 0 ? 0 : kProjectors;
}

// Microseconds that CTAs wait for an SM where those that compute z leave none: these take 0.1 TB/s
// each (H200, 2026-11).
double project_time(const LoraMatmulArgs& a, const Plan& plan) {
    const auto columns = static_cast<double>(a.w.K / kProjectors);
    return 2.5 + columns * 2e-5 * (padded_rank(a.r) + plan.tokens);
}

Plan make_plan(const LoraMatmulArgs& a, int sms) {
    const int projectors = projectors_of(a), beside = std::max(1, sms - projectors);
    Plan best{};
    double best_time = 0.0;
    const auto consider = [&](const Plan& plan) {
        const double time = estimate(a, plan) + (plan.ctas > beside ? project_time(a, plan) : 0.0);
        if (best.ctas == 0 || time < best_time)
            best = plan, best_time = time;
    };
    for (const int row_groups : {1, 2, 4}) {
        Plan plan{padded_tokens(a.M), row_groups, 0};
        if (row_groups == 1 && plan.tokens > 16)  // sums of four K groups do not fit
            continue;
        const int tiles = tiles_of(a, plan), units = units_of(a, plan);
        // Equal shares of each tile, or of everything.
        for (int share = 1; share <= units && tiles * share <= sms; share++) {
            plan.ctas = tiles * share;
            consider(plan);
        }
        for (const int most : {beside, sms}) {
            plan.ctas = int64_t{tiles} * units < most ? tiles * units : most;
            consider(plan);
        }
    }
    return best;
}

size_t round_up(size_t bytes) {
    return (bytes + 1023) / 1024 * 1024;
}

struct Workspace {
    size_t flags, z_flags, partials, bytes;  // behind partial_z
};

Workspace layout_workspace(const LoraMatmulArgs& a, const Plan& plan) {
    Workspace s{};
    s.flags = sizeof(float) * projectors_of(a) * plan.tokens * kMaxRank;
    s.z_flags = s.flags + round_up(plan.ctas * sizeof(uint64_t));
    s.partials = s.z_flags + round_up(plan.ctas * projectors_of(a) * sizeof(uint64_t));
    s.bytes = s.partials + sizeof(float) * plan.ctas * plan.row_groups * 64 * plan.tokens *
                               (marks_sums(plan.tokens) ? 2 : 1);
    return s;
}

}  // namespace
}  // namespace lowbit::cuda
