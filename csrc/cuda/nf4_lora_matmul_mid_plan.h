// How the host of nf4_lora_matmul_mid_sm90.cu chooses tiles and divides them among clusters, and
// what lies where in the workspace.
#pragma once

#include <algorithm>

#include "lora_project.h"
#include "nf4_lora_matmul_mid_tile.cuh"

namespace lowbit::cuda {
namespace {

using SharedX256 = Plan<256, false>;
using SharedX128 = Plan<128, false>;
using SharedW256 = Plan<256, true>;
enum PlanKind { kSharedX256, kSharedX128, kSharedW256 };

struct Division {
    PlanKind plan;
    int clusters;    // launched
    int full_tiles;  // see Params
    int split_tiles;
    int split_clusters;
    int spare_sms;  // where the projection runs beside the product, or 0: before it
    int64_t time;   // expected
};

// Of a plan, in hundredths of microseconds on an H100 (2026-11). Only the order of the results
// matters.
struct Rates {
    int step;     // of a tile
    int partial;  // storing and adding a CTA's sums
};

inline Rates rates_of(PlanKind plan) {
    return plan == kSharedX256   ? Rates{81, 660}
           : plan == kSharedX128 ? Rates{56, 330}
                                 : Rates{70, 660};
}

constexpr int64_t kMostParts = 8;  // of a tile, level

// Clusters of four SMs: two pairs, so that no pair loses one. More than one only for more than 16
// columns.
constexpr int kSpareSms = 4;

// Until z is there, projected on the spare SMs or on all.
inline int64_t projection_time(const LoraMatmulArgs& a, int spare_sms) {
    if (a.lora_A == nullptr)
        return 200;
    const int64_t bytes_of_a = 2 * padded_rank(a.r) * a.w.K;
    if (spare_sms == 0) {
        // 2.5 TB/s; more of lora_A than 16 rows comes from L2 again and again, with 4 TB/s.
        const int64_t groups = ceil_div(a.M, projection_tokens(a.M, a.r));
        return 400 + a.M * a.w.K * 2 / 25000 + (a.r > 16 ? groups * bytes_of_a / 40000 : 0);
    }
    const int64_t passes = ceil_div(ceil_div(a.M, spare_sm_tokens(a.r)), spare_sms);
    // With K = 4096 and rank 64 10 us; the next ones, beside the product, 20 each (H200, 2026-11).
    if (a.r > 16)
        return 200 + a.w.K / 4 + (passes - 1) * a.w.K / 2;
    return 200 + passes * (2 * spare_sm_tokens(a.r) * a.w.K + bytes_of_a) / 1000;  // 0.1 TB/s each
}

// The best division of a plan's tiles: whole rounds, then what is left.
inline Division
divide(const LoraMatmulArgs& a, PlanKind plan, int64_t tiles, int sms, int spare_sms) {
    const Rates rates = rates_of(plan);
    const int64_t steps = a.w.K / kStepK, quads = ceil_div(steps, kQuad);
    const int clusters = (sms - spare_sms) / kCluster;
    const int64_t rounds = tiles / clusters, rest = tiles % clusters;
    const auto consider = [&](Division& best, int64_t split, int64_t split_clusters,
                              int64_t extra_steps, int64_t extra) {
        const int64_t full = tiles - split;
        Division d{};
        d.plan = plan;
        d.clusters = static_cast<int>(std::min<int64_t>(clusters, std::max(full, split_clusters)));
        d.full_tiles = static_cast<int>(full);
        d.split_tiles = static_cast<int>(split);
        d.split_clusters = static_cast<int>(split_clusters);
        d.spare_sms = spare_sms == 0 ? 0 : (sms - d.clusters * kCluster) / kSpareSms * kSpareSms;
        const int64_t z = a.r == 0 ? 0 : projection_time(a, d.spare_sms);
        const int64_t first_end = (full > 0 ? steps : extra_steps) * rates.step;
        d.time = (rounds * steps + extra_steps) * rates.step + extra;
        d.time += spare_sms == 0 ? z : std::max<int64_t>(0, z - first_end);
        if (best.clusters == 0 || d.time < best.time)
            best = d;
    };
    Division best{};
    consider(best, 0, 0, rest > 0 ? steps : 0, 0);
    if (rest == 0)
        return best;
    // In a row: a cluster stores one part and adds one or two. Shares that come out equal would be
    // level, which waits for more.
    const int64_t in_row = std::min<int64_t>(clusters, rest * quads);
    if (in_row > rest && in_row <= 3 * rest && in_row % rest != 0)
        consider(best, rest, in_row, ceil_div(rest * quads, in_row) * kQuad, 6 * rates.partial / 5);
    for (int64_t parts = 2; parts <= std::min({kMostParts, clusters / rest, quads}); parts++)
        consider(
            best, rest, rest * parts, ceil_div(quads, parts) * kQuad,
            rates.partial * (parts - 1) / parts);
    return best;
}

inline Division divide(const LoraMatmulArgs& a, int sms) {
    const int64_t row_tiles = ceil_div(a.w.N, kTileRows);
    const int64_t row_pairs = ceil_div(row_tiles, 2);
    Division best{};
    for (const int spare_sms : {0, kSpareSms, 2 * kSpareSms, 4 * kSpareSms}) {
        if (spare_sms > 0 && (a.lora_A == nullptr || a.r == 0 || sms <= 2 * spare_sms))
            continue;
        if (spare_sms > kSpareSms && a.r <= 16)
            continue;
        for (const PlanKind plan : {kSharedX256, kSharedX128, kSharedW256}) {
            const int64_t tiles = plan == kSharedX256   ? row_pairs * ceil_div(a.M, 256)
                                  : plan == kSharedX128 ? row_pairs * ceil_div(a.M, 128)
                                                        : row_tiles * ceil_div(a.M, 512);
            const Division d = divide(a, plan, tiles, sms, spare_sms);
            if (best.clusters == 0 || d.time < best.time)
                best = d;
        }
    }
    return best;
}

// Whether a kernel comes before the product: it projects, or clears flags.
inline bool has_first_kernel(const LoraMatmulArgs& a, const Division& division) {
    return a.r > 0 || division.split_tiles > 0;
}

struct Workspace {
    size_t flags, partials, bytes;  // after z
};

inline Workspace layout_workspace(const LoraMatmulArgs& a, const Division& division) {
    constexpr size_t kAlignment = 1024;
    const auto round_up = [](size_t bytes) {
        return (bytes + kAlignment - 1) / kAlignment * kAlignment;
    };
    const size_t ctas = kCluster * division.split_clusters;
    const size_t tokens = division.plan == kSharedX128 ? 128 : 256;
    Workspace space{};
    space.flags = round_up(static_cast<size_t>(a.M) * padded_rank(a.r) * 2);
    space.partials = space.flags + round_up(ctas * sizeof(uint32_t));
    space.bytes = space.partials + ctas * kTileRows * tokens * sizeof(float);
    return space;
}

}  // namespace
}  // namespace lowbit::cuda
