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

// SMs are left to CTAs that project in multiples of this.
constexpr int kSpareSms = 4;

struct Division {
    PlanKind plan;
    int clusters;    // launched
    int full_tiles;  // see Params
    int split_tiles;
    int split_clusters;
    int spare_sms;  // for CTAs that project beside those with tiles; 0: a kernel in front does
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

// What a division may count on: SMs of the device, and what a projection in front finds room for.
struct Machine {
    int sms;
    ClusterRoom room;
};

// Until z is there, projected on the spare SMs or on all: see lora_project_tile.cuh. All SMs
// together take in 5 TB/s.
inline int64_t projection_time(const LoraMatmulArgs& a, const Machine& machine, int spare_sms) {
    if (a.lora_A == nullptr)
        return 200;
    const bool beside = spare_sms > 0;
    const ClusterRoom room = beside ? projection_room_beside(spare_sms) : machine.room;
    const ProjectionTiling t = tile_projection(a.M, room);
    const int64_t columns = a.r > 16 ? 64 : 16;
    const int64_t bytes = (t.tokens + columns) * 2 * a.w.K / t.parts;
    const int64_t rate = std::min(columns == 16 ? 1150 : 950, 50000 / (t.clusters * room.cluster));
    return (beside ? 150 : 0) + t.passes * (400 + bytes / rate);
}

// The best division of a plan's tiles, whole rounds and then what is left; or `best` if none is
// better.
inline Division divide_tiles(
    const LoraMatmulArgs& a,
    PlanKind plan,
    int64_t tiles,
    const Machine& machine,
    int spare_sms,
    Division best) {
    const Rates rates = rates_of(plan);
    const int64_t steps = a.w.K / kStepK, quads = ceil_div(steps, kQuad);
    const int clusters = (machine.sms - spare_sms) / kCluster;
    const int64_t rounds = tiles / clusters, rest = tiles % clusters;
    const auto consider = [&](int64_t split, int64_t split_clusters, int64_t extra_steps,
                              int64_t extra) {
        const int64_t full = tiles - split;
        Division d{};
        d.time = (rounds * steps + extra_steps) * rates.step + extra;
        if (best.clusters > 0 && d.time >= best.time)
            return;
        d.plan = plan;
        d.clusters = static_cast<int>(std::min<int64_t>(clusters, std::max(full, split_clusters)));
        d.full_tiles = static_cast<int>(full);
        d.split_tiles = static_cast<int>(split);
        d.split_clusters = static_cast<int>(split_clusters);
        const int left = machine.sms - d.clusters * kCluster;
        d.spare_sms = spare_sms == 0 ? 0 : left / kSpareSms * kSpareSms;
        const int64_t z = a.r == 0 ? 0 : projection_time(a, machine, d.spare_sms);
        const int64_t first_end = (full > 0 ? steps : extra_steps) * rates.step;
        d.time += spare_sms == 0 ? z : std::max<int64_t>(0, z - first_end);
        if (best.clusters == 0 || d.time < best.time)
            best = d;
    };
    consider(0, 0, rest > 0 ? steps : 0, 0);
    if (rest == 0)
        return best;
    // In a row: a cluster stores one part and adds one or two. Shares that come out equal would be
    // level, which waits for more.
    const int64_t in_row = std::min<int64_t>(clusters, rest * quads);
    if (in_row > rest && in_row <= 3 * rest && in_row % rest != 0)
        consider(rest, in_row, ceil_div(rest * quads, in_row) * kQuad, 6 * rates.partial / 5);
    for (int64_t parts = 2; parts <= std::min<int64_t>({kMostParts, clusters / rest, quads});
         parts++)
        consider(
            rest, rest * parts, ceil_div(quads, parts) * kQuad,
            rates.partial * (parts - 1) / parts);
    return best;
}

inline Division choose_division(const LoraMatmulArgs& a, const Machine& machine) {
    const int64_t row_tiles = ceil_div(a.w.N, kTileRows);
    const int64_t row_pairs = ceil_div(row_tiles, 2);
    Division best{};
    for (const int spare_sms : {kSpareSms, 0}) {
        if (spare_sms > 0 && (a.lora_A == nullptr || a.r == 0 || machine.sms <= 2 * spare_sms))
            continue;
        for (const PlanKind plan : {kSharedX256, kSharedX128, kSharedW256}) {
            const int64_t tiles = plan == kSharedX256   ? row_pairs * ceil_div(a.M, 256)
                                  : plan == kSharedX128 ? row_pairs * ceil_div(a.M, 128)
                                                        : row_tiles * ceil_div(a.M, 512);
            best = divide_tiles(a, plan, tiles, machine, spare_sms, best);
        }
    }
    return best;
}

// CTAs of the product's grid that project, the first ones.
inline int projecting_ctas(const LoraMatmulArgs& a, const Division& division) {
    if (division.spare_sms == 0 || a.r == 0)
        return 0;
    const ClusterRoom room = projection_room_beside(division.spare_sms);
    return tile_projection(a.M, room).clusters * room.cluster;
}

struct Workspace {
    size_t words, partials, bytes;  // after z
};

inline Workspace layout_workspace(const LoraMatmulArgs& a, const Division& division) {
    constexpr size_t kAlignment = 1024;
    const auto round_up = [](size_t bytes) {
        return (bytes + kAlignment - 1) / kAlignment * kAlignment;
    };
    const size_t ctas = kCluster * division.split_clusters;
    const size_t tokens = division.plan == kSharedX128 ? 128 : 256;
    Workspace space{};
    space.words = round_up(static_cast<size_t>(a.M) * padded_rank(a.r) * 2);
    const size_t z_words =
        static_cast<size_t>(projecting_ctas(a, division)) * kCluster * division.clusters;
    space.partials = space.words + round_up((ctas * kMostParts + z_words) * sizeof(uint64_t));
    space.bytes = space.partials + ctas * kTileRows * tokens * sizeof(float);
    return space;
}

}  // namespace
}  // namespace lowbit::cuda
