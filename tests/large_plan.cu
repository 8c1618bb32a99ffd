// Walks through plans of the kernels for many tokens on the host, and ends with 1 and a line at the
// first that is wrong. See test_plans.py.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cuda/nf4_lora_matmul_large_plan.h"

using namespace lowbit::cuda;

namespace {

struct Case {
    int64_t M, rows, depth;
    int clusters, parts;
};

[[noreturn]] void fail(const Case& c, const char* what) {
    std::printf(
        "%s: M %lld, rows %lld, depth %lld, clusters %d, parts %d\n", what,
        static_cast<long long>(c.M), static_cast<long long>(c.rows),
        static_cast<long long>(c.depth), c.clusters, c.parts);
    std::exit(1);
}

// Only from the start on, every wave has a tile: what is decoded is read, before its slot is used
// again.
void check_waves(const Case& c, const Plan& plan) {
    std::vector<bool> has_tile(plan.waves, false);
    for (int wave = 0; wave < plan.waves; wave++)
        for (int cluster = 0; cluster < plan.clusters; cluster++)
            if (wave >= first_wave(plan, cluster) &&
                locate(plan, wave * plan.clusters + cluster - plan.idle).z_job < 0)
                has_tile[wave] = true;
    for (int wave = 0; wave < plan.waves; wave++)
        if (has_tile[wave] != (wave >= plan.start))
            fail(c, "a wave without tiles is decoded, or one with tiles is not");
}

int wave_of(const Plan& plan, int job) {
    return (job + plan.idle) / plan.clusters;
}

// Every tile of the output and every token tile of u belongs to one job.
std::vector<int> check_jobs(const Case& c, const Plan& plan) {
    std::vector<int> tiles(plan.panels * plan.token_tiles, 0), u_wave(plan.token_tiles, -1);
    const int jobs = plan.waves * plan.clusters - plan.idle;
    for (int index = 0; index < jobs; index++) {
        const Job job = locate(plan, index);
        if (job.z_job < 0) {
            tiles[job.panel * plan.token_tiles + job.token_tile]++;
            continue;
        }
        for (int rank = 0; rank < kCtas; rank++)
            for (int i = 0; i < plan.z_depth; i++) {
                const int tile = z_tile(plan, job, rank) + i;
                if (tile > job.last_tile)
                    continue;
                if (u_wave[tile] >= 0)
                    fail(c, "u is made twice");
                u_wave[tile] = wave_of(plan, index);
            }
    }
    for (const int count : tiles)
        if (count != 1)
            fail(c, "a tile has not exactly one job");
    for (const int wave : u_wave)
        if (wave < 0)
            fail(c, "u is not made");
    return u_wave;
}

// Every part of a strip of d_lora_A rides with one tile, not before its u, and within its steps.
void check_riders(const Case& c, const Plan& plan, const std::vector<int>& u_wave) {
    std::vector<int> riders(groups(plan) * plan.strip_parts * plan.strips, 0);
    std::vector<int> summed(plan.strips * plan.token_tiles, 0);
    int last_wave = -1;
    const int jobs = plan.waves * plan.clusters - plan.idle;
    for (int index = 0; index < jobs; index++) {
        const Job job = locate(plan, index);
        if (job.z_job >= 0)
            continue;
        const Rider rider = locate_rider(plan, job);
        if (rider.index < 0)
            continue;
        riders.at(rider.index)++;
        last_wave = wave_of(plan, index);
        RiderSteps riding(plan, rider.steps);
        if (riding.take(plan, 0))
            fail(c, "a rider in front of the first step");
        for (int k = 1; k < plan.steps; k++)
            riding.take(plan, k);
        if (riding.left != 0)
            fail(c, "more riders than steps");
        for (int i = 0; i < kCtas * rider.steps; i++) {
            const int tile = rider.first_tile + i;
            if (tile > rider.last_tile)
                continue;
            summed[rider.strip * plan.token_tiles + tile]++;
            if (u_wave[tile] > last_wave)
                fail(c, "a rider before its u");
        }
    }
    for (const int count : riders)
        if (count != 1)
            fail(c, "a rider is missing or there twice");
    for (const int count : summed)
        if (count != 1)
            fail(c, "x is not summed up exactly once");
    if (last_wave != plan.last_rider_wave)
        fail(c, "the last rider's wave");
}

}  // namespace

int main() {
    std::mt19937 random(0);
    auto below = [&](int limit) { return static_cast<int64_t>(random() % limit); };
    int with_riders = 0, late_starts = 0;
    for (int i = 0; i < 5000; i++) {
        const int64_t most_tokens = i % 3 == 0 ? 3000 : i % 3 == 1 ? 20000 : 70000;
        Case c{1 + below(most_tokens), 64 * (1 + below(i % 2 ? 80 : 240)), 0, 66, 0};
        c.depth = 8 * (1 + below(i % 5 ? 2000 : 60));
        if (i % 4 == 0)
            c.clusters = kLeastClusters + static_cast<int>(below(66 - kLeastClusters));
        const Plan plan = make_plan(c.M, c.rows, c.depth, 16, true, c.clusters);
        check_waves(c, plan);
        late_starts += plan.start;
        const std::vector<int> u_wave = check_jobs(c, plan);
        for (c.parts = 1; c.parts <= 2; c.parts++) {
            Plan riding = plan;
            add_riders(riding, c.parts);
            if (riding.strips == 0)
                continue;
            with_riders++;
            check_riders(c, riding, u_wave);
        }
    }
    std::printf("%d %d\n", with_riders, late_starts);
    return 0;
}
