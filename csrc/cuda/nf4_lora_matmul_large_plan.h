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
// The z of a group is made by a few jobs of their own in front of its tiles. All clusters together
// take consecutive jobs, a wave at a time; the first wave is the short one. A wave touches few
// panels, and decoders write those chunk by chunk, a depth of 512 at a time.
#pragma once

#include <algorithm>

#include "divisor.h"
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

// A decoder's task: 64 rows of W, one per lane of two warps, by two blocks of 64, whose decodes
// interleave: a lone warp beside wgmma waits for latency, not for issue slots.
constexpr int kTaskLanes = 64;
constexpr int kTaskBlocks = 2;
constexpr int kTasksPerPanel = kPanelRows * kChunkSteps / (kTaskLanes * kTaskBlocks);

// Token tiles in a group: 66 clusters then work on 4 panels x 16 token tiles. With 8 the decoders
// fall behind, with 32 x is read from HBM more often: 12-20 % and 7 % longer in an early version
// (H100, N = K = 4096, M = 4096 and 16384, 2026-11).
constexpr int kGroupTiles = 16;

// With fewer clusters a whole wave could be jobs of z; now at most the first, short one is.
constexpr int kLeastClusters = kGroupTiles / kCtas + 1;

// Chunks that the ring holds. It bounds how far clusters run apart, and so what must stay in L2: x
// and the ring's chunks. With 8 in place of 5 an H100 read 1.65 to 1.8 times as much from HBM and
// took up to 3 % longer; with 3 clusters wait for each other (2026-11).
constexpr int kSlots = 5;
constexpr int64_t kRingBytes = 24 << 20;  // at most, for a small M

// Chunks decoded by prepare_kernel. With 1 all CTAs wait for the next one.
constexpr int kFirstChunks = 2;  // at most the ring's chunks

// What all groups of `tiles` token tiles have in common.
struct GroupSize {
    int tiles;
    int z_jobs;  // in front of their tiles
    int jobs;    // these and the tiles
    Divisor by_tiles, by_jobs;
};

// Numbers that host and device share.
struct Plan {
    int M, rows, depth, rank;
    int rank_columns;  // rank padded: 16 or 64; 0: no low-rank term
    int steps;         // depth / 64, rounded up
    int chunks;        // ceil(steps / 8)
    int token_tiles;   // in groups of `group` or, the first larger_groups of them, one more
    int group;
    int larger_groups;
    GroupSize smaller, larger;  // of `group` tiles, and of one more
    int panels;                 // ceil(rows / 256)
    int clusters;
    int z_depth;  // token tiles per CTA in a job of z; 0: z is an input
    int waves;
    int idle;         // cluster c has job w * clusters + c - idle in wave w
    int start;        // the first wave with tiles: 1 if the first of all has jobs of z alone
    int slots;        // chunks in the ring
    int slot_panels;  // panels in a slot: at most so many occur in a wave
    // For d_lora_A, x in strips of 64 columns and parts of a group's tokens: see Rider.
    int strips, strip_parts;  // 0 strips: it is not made here
    int rider_shift, rider_stride;
    int last_rider_wave;
};

// What is made beside dx from the tiles of dy that u is made from, and from x.
struct FactorGradients {
    const void* z;       // [M, rank], null: no d_lora_B
    void* u_transposed;  // [16, 256 token_tiles], for d_lora_A
    float* d_A_parts;    // [groups, strip_parts, strips, 4, 64, 16]
    float* d_B_parts;    // [token tiles of the largest group, depth, 16]
    uint32_t* finished;  // CTAs whose d_A_parts are written
    void* d_lora_A;      // [rank, rows]
    void* d_lora_B;      // [depth, rank]
    bool d_A_is_float, d_B_is_float;
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
    uint32_t* ready;    // [waves * chunks] tasks written, by chunk_index
    uint32_t* done;     // [waves * chunks] CTAs that have read the chunk or need not
    uint32_t* z_ready;  // [token_tiles] warpgroups that have written their part of z_scaled
    FactorGradients gradients;
};

struct Job {
    int z_job;       // of the group, or negative: a tile of y
    int token_tile;  // of the tile, or the first of the group
    int panel;
    int sequence;   // panels counted through all groups
    int last_tile;  // of the group; no z beyond it
};

// A job of z has the panel and the sequence of the group's first tile.
__host__ __device__ inline Job locate(const Plan& plan, int job) {
    const int in_larger = plan.larger_groups * plan.larger.jobs;
    const bool larger = job < in_larger;
    const GroupSize& size = larger ? plan.larger : plan.smaller;
    const int first_group = larger ? 0 : plan.larger_groups;
    if (!larger)
        job -= in_larger;
    const int group = divide(job, size.by_jobs);
    const int tile = job - group * size.jobs - size.z_jobs;  // of the group; negative: z
    const int first_token_tile = first_group * plan.larger.tiles + group * size.tiles;
    const int first_sequence = (first_group + group) * plan.panels;
    const int last_tile = first_token_tile + size.tiles - 1;
    if (tile < 0)
        return {tile + size.z_jobs, first_token_tile, 0, first_sequence, last_tile};
    const int panel = divide(tile, size.by_tiles);
    return {
        -1, first_token_tile + tile - panel * size.tiles, panel, first_sequence + panel, last_tile};
}

struct Wave {
    int first_panel;
    int first_sequence;
    int panels;
};

// A wave that ends with jobs of z has their group's first panel too, although no tile reads it.
__host__ __device__ inline Wave locate_wave(const Plan& plan, int wave) {
    const int start = wave * plan.clusters - plan.idle;
    const Job first = locate(plan, start < 0 ? 0 : start);
    const Job last = locate(plan, (wave + 1) * plan.clusters - plan.idle - 1);
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

// Chunks in the order of their decoding. Waves before `start` have none: a slot is written again
// when all have read it, and of a chunk that nobody reads that would not say that it is written.
__host__ __device__ inline int chunk_index(const Plan& plan, int wave, int chunk) {
    return (wave - plan.start) * plan.chunks + chunk;
}

// The ring is a matrix of lines: slots, their steps, the panels of each.
__host__ __device__ inline int ring_line(const Plan& plan, int slot, int step) {
    return (slot * kChunkSteps + step) * (plan.slot_panels * kPanelRows);
}

// All that Params has, one after the other.
__host__ __device__ inline int counters(const Plan& plan) {
    return 2 * plan.waves * plan.chunks + plan.token_tiles + 1;
}

__host__ __device__ inline int largest_group(const Plan& plan) {
    return plan.group + (plan.larger_groups > 0 ? 1 : 0);
}

__host__ __device__ inline int groups(const Plan& plan) {
    const int larger_tiles = plan.larger_groups * (plan.group + 1);
    return plan.larger_groups + (plan.token_tiles - larger_tiles) / plan.group;
}

// Some steps of d_lora_A that a tile of dx has among its own: 64 columns of x by a part of a
// group's tokens, `steps` token tiles by each CTA. Those of a group follow its jobs of z by a wave,
// so that u is there.
struct Rider {
    int index;  // of all; negative: none
    int strip;
    int first_tile, last_tile;  // of the part; of the group
    int steps;
};

// Where a rider's steps are: evenly among those of the tile, and not the first.
struct RiderSteps {
    int left, next;

    __host__ __device__ RiderSteps(const Plan& plan, int steps)
        : left(steps), next(plan.rider_stride / 2) {}

    // Whether there is one before step k of the tile.
    __host__ __device__ bool take(const Plan& plan, int k) {
        if (left == 0 || k != next)
            return false;
        left--;
        next += plan.rider_stride;
        return true;
    }
};

__host__ __device__ inline Rider locate_rider(const Plan& plan, const Job& job) {
    if (plan.strips == 0)
        return {-1, 0, 0, 0, 0};
    const int larger_tiles = plan.larger_groups * (plan.group + 1);
    int size = plan.group + (job.last_tile < larger_tiles ? 1 : 0);
    const int first = job.last_tile - size + 1;
    // Which of all tiles it is; from here on as if it came that much earlier.
    int tile = first * plan.panels + job.panel * size + job.token_tile - first - plan.rider_shift;
    if (tile < 0)
        return {-1, 0, 0, 0, 0};
    size = plan.group + (tile < larger_tiles * plan.panels ? 1 : 0);
    int group = tile / (size * plan.panels), first_tile = group * size;
    if (size == plan.group) {
        group = (tile - larger_tiles * plan.panels) / (size * plan.panels);
        first_tile = larger_tiles + group * size;
        group += plan.larger_groups;
    }
    tile -= first_tile * plan.panels;
    if (tile >= plan.strip_parts * plan.strips)
        return {-1, 0, 0, 0, 0};
    const int part = tile / plan.strips, strip = tile - part * plan.strips;
    const int ctas = plan.strip_parts * kCtas, steps = (size + ctas - 1) / ctas;
    return {
        (group * plan.strip_parts + part) * plan.strips + strip, strip,
        first_tile + part * kCtas * steps, first_tile + size - 1, steps};
}

// The first job of a cluster with `idle` above its number is in the second wave.
__host__ __device__ inline int first_wave(const Plan& plan, int cluster) {
    return cluster < plan.idle ? 1 : 0;
}

// First token tile of z that a CTA computes, of z_depth. Both CTAs of a cluster must agree on the
// stage afterwards, so both compute equally many; what lies beyond the group writes nothing.
__host__ __device__ inline int z_tile(const Plan& plan, const Job& job, int rank) {
    return job.token_tile + (job.z_job * kCtas + rank) * plan.z_depth;
}

__host__ __device__ inline int first_chunks(const Plan& plan) {
    return plan.chunks < kFirstChunks ? plan.chunks : kFirstChunks;
}
__host__ __device__ inline int first_steps(const Plan& plan) {
    const int most = kFirstChunks * kChunkSteps;
    return plan.steps < most ? plan.steps : most;
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
    const auto size_groups = [&](int tiles) {
        const int tiles_per_job = plan.z_depth * kCtas;
        const int z_jobs = tiles_per_job == 0 ? 0 : (tiles - 1) / tiles_per_job + 1;
        const int jobs = tiles * plan.panels + z_jobs;
        return GroupSize{tiles, z_jobs, jobs, make_divisor(tiles), make_divisor(jobs)};
    };
    const auto count_jobs = [&](int z_depth) {
        plan.z_depth = z_depth;
        plan.smaller = size_groups(plan.group);
        plan.larger = size_groups(plan.group + 1);
        return plan.larger_groups * plan.larger.jobs +
               (groups - plan.larger_groups) * plan.smaller.jobs;
    };
    int jobs = count_jobs(makes_z ? 1 : 0);
    plan.clusters = std::min(clusters, jobs);
    plan.waves = static_cast<int>(ceil_div(jobs, plan.clusters));
    if (makes_z) {
        // Two tiles of z take about as long as one of y: right where that saves a wave.
        const int fewer_jobs = count_jobs(2);
        const int fewer_waves = static_cast<int>(ceil_div(fewer_jobs, plan.clusters));
        if (fewer_waves < plan.waves)
            jobs = fewer_jobs, plan.waves = fewer_waves;
        else
            count_jobs(1);
    }
    plan.idle = plan.waves * plan.clusters - jobs;
    const int first_z_jobs = plan.larger_groups > 0 ? plan.larger.z_jobs : plan.smaller.z_jobs;
    plan.start = plan.clusters - plan.idle <= first_z_jobs ? 1 : 0;
    plan.slot_panels = (plan.clusters - 1) / plan.group + 2;
    const int64_t slot_bytes = int64_t{ring_line(plan, 1, 0)} * kLineBytes;
    plan.last_rider_wave = -1;
    plan.slots = std::max(2, static_cast<int>(std::min<int64_t>(kSlots, kRingBytes / slot_bytes)));
    return plan;
}

// Gives d_lora_A to the tiles, if there are enough of them.
inline void add_riders(Plan& plan, int strip_parts) {
    const GroupSize& largest = plan.larger_groups > 0 ? plan.larger : plan.smaller;
    const int strips = plan.rows / kLine, shift = std::max(0, plan.clusters - largest.z_jobs);
    const int riders = strip_parts * strips;
    const int most_steps = (largest.tiles - 1) / (strip_parts * kCtas) + 1;
    if (int64_t{plan.group} * plan.panels - shift < riders || plan.steps < 2 * most_steps)
        return;
    plan.strips = strips;
    plan.strip_parts = strip_parts;
    plan.rider_shift = shift;
    plan.rider_stride = plan.steps / most_steps;
    const int last_tile = (plan.token_tiles - plan.group) * plan.panels + shift + riders - 1;
    const int all_z_jobs = plan.larger_groups * plan.larger.z_jobs +
                           (groups(plan) - plan.larger_groups) * plan.smaller.z_jobs;
    plan.last_rider_wave = (last_tile + all_z_jobs + plan.idle) / plan.clusters;
}

}  // namespace
}  // namespace lowbit::cuda
