// Who computes what, and when, in nf4_lora_matmul_large_kernel.cuh: numbers and formulas that host
// and device share. Rows are those of the product's weight operand, columns of the output: rows of
// W for y, its columns for dx. Depth is what the sums run along.
//
// A tile is 256 rows (a panel) x 256 tokens; a cluster of CTAs computes it. Token tiles form groups
// of about 16, and tiles are counted within a panel of a group first, then panel by panel, then
// group by group:
//
//     group 0                       group 1
//     panel 0:  tiles  0 1 2 ..     panel 0: ...
//     panel 1:        16 17 ..
//
// All clusters together take consecutive tiles, a wave at a time. The first wave is the short one:
// clusters that have no tile in it compute z. A wave touches few panels, and decoders write those
// chunk by chunk, a depth of 512 at a time.
#pragma once

#include <algorithm>

#include "nf4_lora_matmul.h"  // ceil_div

namespace lowbit::cuda {
namespace {

constexpr int kCtas = 2;  // of a cluster; the device holds too few clusters of 4
constexpr int kTileTokens = 256;
constexpr int kCtaTokens = kTileTokens / kCtas;  // that a CTA loads for all
constexpr int kCtaRows = 128;
constexpr int kPanelRows = kCtas * kCtaRows;
constexpr int kStepDepth = 64;
constexpr int kStages = 4;
constexpr int kChunkSteps = 8;
constexpr int kChunkDepth = kChunkSteps * kStepDepth;

// A line is 64 elements, 128 bytes: a row of the swizzle, and a decoded block. A step of a panel is
// 256 lines, whichever way they run.
constexpr int kLine = 64;
constexpr int kLineBytes = 128;

// A decoder's task: 32 rows of W, one per lane, by two blocks of 64, whose decodes interleave: a
// lone warp beside wgmma waits for latency, not for issue slots.
constexpr int kTaskLanes = 32;
constexpr int kTaskBlocks = 2;
constexpr int kTasksPerPanel = kPanelRows * kChunkSteps / (kTaskLanes * kTaskBlocks);

// Token tiles in a group: 66 clusters then work on 4 panels x 16 token tiles. With 8 the decoders
// fall behind, with 32 x is read from HBM more often: 12-20 % and 7 % longer in an early version
// (H100, N = K = 4096, M = 4096 and 16384, 2026-11).
constexpr int kGroupTiles = 16;

// Chunks that the ring holds: enough for clusters that run apart, few enough to be read from L2.
// With 12 the four layers of bench/ took 2-5 % longer (H100, M = 16384, 2026-11).
constexpr int kSlots = 8;
constexpr int64_t kRingBytes = 24 << 20;  // at most, for a small M

// Numbers that host and device share.
struct Plan {
    int M, rows, depth, rank;
    int rank_columns;  // rank padded: 16 or 64; 0: no low-rank term
    int steps;         // depth / 64, rounded up
    int chunks;        // ceil(steps / 8)
    int token_tiles;   // in groups of `group` or, the first larger_groups of them, one more
    int group;
    int larger_groups;
    int panels;  // ceil(rows / 256)
    int tiles;   // token_tiles * panels
    int clusters;
    int waves;
    int idle;         // cluster c computes tile w * clusters + c - idle in wave w
    int slots;        // chunks in the ring
    int slot_panels;  // panels in a slot: at most so many occur in a wave
    int z_clusters;   // the first so many clusters compute z; 0: z is an input
};

struct Params {
    Plan plan;
    WeightView w;
    const void* bias;           // [N] or null
    void* y;                    // [M, rows], y or dx
    bool adds;                  // to dx
    const float* lora_scaling;  // [rank] or null
    float scaling;
    void* z_scaled;     // [M, rank_columns] s z for the tiles
    void* z_out;        // [M, rank] or null
    uint32_t* ready;    // [waves * chunks] tasks written
    uint32_t* done;     // [waves * chunks] CTAs that have read the chunk
    uint32_t* z_ready;  // [token_tiles] warpgroups that have written their part of z_scaled
};

struct Tile {
    int token_tile;
    int panel;
    int sequence;  // panels counted through all groups
};

__host__ __device__ inline Tile locate(const Plan& plan, int tile) {
    int size = plan.group + 1, first_token_tile = 0, first_sequence = 0;
    const int in_larger = plan.larger_groups * size * plan.panels;
    if (tile >= in_larger) {
        tile -= in_larger;
        first_token_tile = plan.larger_groups * size;
        first_sequence = plan.larger_groups * plan.panels;
        size--;
    }
    const int sequence = tile / size;
    const int group = sequence / plan.panels;
    return {
        first_token_tile + group * size + tile - sequence * size, sequence - group * plan.panels,
        first_sequence + sequence};
}

struct Wave {
    int first_panel;
    int first_sequence;
    int panels;
};

__host__ __device__ inline Wave locate_wave(const Plan& plan, int wave) {
    const int start = wave * plan.clusters - plan.idle;
    const Tile first = locate(plan, start < 0 ? 0 : start);
    const Tile last = locate(plan, (wave + 1) * plan.clusters - plan.idle - 1);
    return {first.panel, first.sequence, last.sequence - first.sequence + 1};
}

// First row of a wave's i-th panel. They follow one another but for a step from the last panel of a
// group of tiles to the first of the next.
__host__ __device__ inline int panel_row(const Plan& plan, const Wave& wave, int i) {
    int panel = wave.first_panel + i;
    while (panel >= plan.panels)
        panel -= plan.panels;
    return panel * kPanelRows;
}

// The ring is a matrix of lines: slots, their steps, the panels of each.
__host__ __device__ inline int ring_line(const Plan& plan, int slot, int step) {
    return (slot * kChunkSteps + step) * (plan.slot_panels * kPanelRows);
}

// All that Params has, one after the other.
__host__ __device__ inline int counters(const Plan& plan) {
    return 2 * plan.waves * plan.chunks + plan.token_tiles;
}

// z tiles are a CTA's own business, but afterwards both CTAs of a cluster must agree on the stage,
// so both walk over equally many; what lies beyond the tokens reads zeros and writes nothing.
__host__ __device__ inline int z_tiles(const Plan& plan, int cluster) {
    const int ctas = plan.z_clusters * kCtas;
    return cluster < plan.z_clusters ? (plan.token_tiles + ctas - 1) / ctas : 0;
}

__host__ __device__ inline int z_tile(const Plan& plan, int cluster, int rank, int i) {
    return (i * plan.z_clusters + cluster) * kCtas + rank;
}

// The first wave is the short one: clusters without a tile in it have time to compute z.
__host__ __device__ inline int first_wave(const Plan& plan, int cluster) {
    return cluster < plan.idle ? 1 : 0;
}

inline Plan make_plan(int64_t M, int64_t rows, int64_t depth, int r, bool makes_z, int clusters) {
    Plan plan{};
    plan.M = static_cast<int>(M);
    plan.rows = static_cast<int>(rows);
    plan.depth = static_cast<int>(depth);
    plan.rank = r;
    plan.rank_columns = r == 0 ? 0 : r <= 16 ? 16 : 64;
    plan.steps = static_cast<int>(ceil_div(depth, kStepDepth));
    plan.chunks = static_cast<int>(ceil_div(plan.steps, kChunkSteps));
    plan.token_tiles = static_cast<int>(ceil_div(M, kTileTokens));
    const int groups = static_cast<int>(ceil_div(plan.token_tiles, kGroupTiles));
    plan.group = plan.token_tiles / groups;
    plan.larger_groups = plan.token_tiles % groups;
    plan.panels = static_cast<int>(ceil_div(rows, kPanelRows));
    plan.tiles = plan.token_tiles * plan.panels;
    plan.clusters = std::min(clusters, plan.tiles);
    plan.waves = static_cast<int>(ceil_div(plan.tiles, plan.clusters));
    plan.idle = plan.waves * plan.clusters - plan.tiles;
    plan.slot_panels = (plan.clusters - 1) / plan.group + 2;
    const int64_t slot_bytes = int64_t{ring_line(plan, 1, 0)} * kLineBytes;
    plan.slots = std::max(2, static_cast<int>(std::min<int64_t>(kSlots, kRingBytes / slot_bytes)));
    if (makes_z) {
        // A tile of z takes three quarters of the time of one of y. Where the idle clusters would
        // have to do more than two each, all take part.
        const int pairs = static_cast<int>(ceil_div(plan.token_tiles, kCtas));
        plan.z_clusters = std::min(pairs, 2 * plan.idle >= pairs ? plan.idle : plan.clusters);
    }
    return plan;
}

}  // namespace
}  // namespace lowbit::cuda
