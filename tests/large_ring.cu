// Plays the kernels for many tokens on the host, task by task: decoders that write the ring's
// chunks, clusters that read them, jobs of z or u, and riders. Ends with 1 and a line where a slot
// is written before the chunk in it is complete and read, or where all wait for each other. See
// test_plans.py.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/nf4_lora_matmul_large_plan.h"

using namespace lowbit::cuda;

namespace {

class Play {
public:
    // `gradients`: jobs make u, and a group's wait for the group before (d_lora_B); tiles may carry
    // riders.
    Play(const Plan& plan, bool gradients)
        : plan_(plan), gradients_(gradients), ctas_(kCtas * plan.clusters),
          chunks_((plan.waves - plan.start) * plan.chunks), tasks_(chunks_), written_(chunks_, 0),
          read_(chunks_, 0), z_(plan.token_tiles, false), decoders_(ctas_),
          clusters_(plan.clusters) {
        for (int wave = plan.start; wave < plan.waves; wave++) {
            const Wave range = locate_wave(plan, wave);
            if (range.panels > plan.slot_panels)
                fault_ = "a wave has more panels than a slot";
            for (int chunk = 0; chunk < plan.chunks; chunk++)
                tasks_[chunk_index(plan, wave, chunk)] = range.panels * kTasksPerPanel;
        }
        for (int i = 0; i < first_chunks(plan); i++)
            written_[i] = tasks_[i];
        for (int cta = 0; cta < ctas_; cta++) {
            decoders_[cta] = {first_chunks(plan), cta};
            settle(decoders_[cta]);
        }
        for (int i = 0; i < plan.clusters; i++) {
            clusters_[i].wave = first_wave(plan, i);
            if (clusters_[i].wave > 0)
                skip(0);
        }
    }

    // Until nobody can go on; in an order of its own each time. What went wrong, or null.
    const char* run(std::mt19937& random) {
        std::vector<int> order(ctas_ + plan_.clusters);
        std::iota(order.begin(), order.end(), 0);
        for (bool moved = true; moved && fault_ == nullptr;) {
            moved = false;
            std::shuffle(order.begin(), order.end(), random);
            for (const int who : order) {
                const int most = 1 + static_cast<int>(random() % 40);
                for (int i = 0; i < most && fault_ == nullptr; i++) {
                    if (!(who < ctas_ ? decode(decoders_[who]) : go_on(who - ctas_)))
                        break;
                    moved = true;
                }
            }
        }
        if (fault_ != nullptr)
            return fault_;
        for (const Decoder& decoder : decoders_)
            if (decoder.chunk < chunks_)
                return "a decoder waits for ever";
        for (const Cluster& cluster : clusters_)
            if (cluster.wave < plan_.waves)
                return "a cluster waits for ever";
        for (int i = 0; i < chunks_; i++)
            if (read_[i] != ctas_ || written_[i] != tasks_[i])
                return "a counter ends at another value";
        return nullptr;
    }

private:
    struct Decoder {
        int chunk, task;
    };
    struct Cluster {
        int wave, position;  // in a tile the chunks read, in a job of z whether it has begun
    };

    void settle(Decoder& at) const {
        while (at.chunk < chunks_ && at.task >= tasks_[at.chunk])
            at.task -= tasks_[at.chunk++];
    }

    void skip(int wave) {
        if (wave < plan_.start)
            return;
        for (int chunk = 0; chunk < plan_.chunks; chunk++)
            read_[chunk_index(plan_, wave, chunk)] += kCtas;
    }

    bool decode(Decoder& at) {
        const int before = at.chunk - plan_.slots;  // the chunk that had this slot
        if (at.chunk >= chunks_ || (before >= 0 && read_[before] < ctas_))
            return false;
        if (before >= 0 && written_[before] < tasks_[before])
            fault_ = "a slot is written before the chunk in it is complete";
        written_[at.chunk]++;
        at.task += ctas_;
        settle(at);
        return true;
    }

    bool go_on(int number) {
        Cluster& at = clusters_[number];
        if (at.wave == plan_.waves)
            return false;
        const Job job = locate(plan_, at.wave * plan_.clusters + number - plan_.idle);
        return job.z_job >= 0 ? make_z(job, at) : read_chunk(job, at);
    }

    bool make_z(const Job& job, Cluster& at) {
        if (at.position == 0) {
            skip(at.wave);
            at.position = 1;
        }
        std::vector<int> tiles;
        for (int rank = 0; rank < kCtas; rank++)
            for (int i = 0; i < plan_.z_depth; i++)
                if (z_tile(plan_, job, rank) + i <= job.last_tile)
                    tiles.push_back(z_tile(plan_, job, rank) + i);
        const int larger_tiles = plan_.larger_groups * (plan_.group + 1);
        const int group_before = plan_.group + (job.token_tile <= larger_tiles ? 1 : 0);
        for (const int tile : tiles)
            if (gradients_ && job.token_tile > 0 && !z_[tile - group_before])
                return false;
        for (const int tile : tiles)
            z_[tile] = true;
        at = {at.wave + 1, 0};
        return true;
    }

    bool read_chunk(const Job& job, Cluster& at) {
        if (at.position == plan_.chunks) {
            if (plan_.z_depth > 0 && !z_[job.token_tile])
                return false;
            at = {at.wave + 1, 0};
            return true;
        }
        const int chunk = chunk_index(plan_, at.wave, at.position);
        if (written_[chunk] < tasks_[chunk])
            return false;
        if (gradients_) {
            const Rider rider = locate_rider(plan_, job);
            for (int i = 0; rider.index >= 0 && i < kCtas * rider.steps; i++)
                if (rider.first_tile + i <= rider.last_tile && !z_[rider.first_tile + i])
                    return false;
        }
        read_[chunk] += kCtas;
        at.position++;
        return true;
    }

    const Plan& plan_;
    bool gradients_;
    int ctas_, chunks_;
    std::vector<int> tasks_, written_, read_;  // of each chunk
    std::vector<bool> z_;                      // whether it is made, of each token tile
    std::vector<Decoder> decoders_;
    std::vector<Cluster> clusters_;
    const char* fault_ = nullptr;
};

void check(const Plan& plan, bool gradients, std::mt19937& random) {
    const char* fault = Play(plan, gradients).run(random);
    if (fault == nullptr)
        return;
    std::printf(
        "%s: M %d, rows %d, depth %d, clusters %d, z depth %d\n", fault, plan.M, plan.rows,
        plan.depth, plan.clusters, plan.z_depth);
    std::exit(1);
}

}  // namespace

int main() {
    std::mt19937 random(0);
    auto below = [&](int limit) { return static_cast<int64_t>(random() % limit); };
    int late_starts = 0, with_riders = 0;
    for (int i = 0; i < 6000; i++) {
        const int64_t M = 1 + below(i % 3 == 0 ? 3000 : i % 3 == 1 ? 9000 : 20000);
        const int64_t rows = 64 * (1 + below(i % 2 ? 20 : 80));
        const int64_t depth = 64 * (1 + below(i % 5 ? 24 : 100));
        const int few = kLeastClusters + static_cast<int>(below(64));
        const int clusters = i % 4 == 0 ? 66 : i % 4 == 1 ? 57 : few;
        const Plan given = make_plan(M, rows, depth, 16, false, clusters);
        const Plan made = make_plan(M, rows, depth, 16, true, clusters);
        late_starts += made.start;
        check(given, false, random);
        check(made, false, random);
        for (int parts = 1; parts <= 2; parts++) {
            Plan riding = made;
            add_riders(riding, parts);
            if (riding.strips == 0)
                continue;
            with_riders++;
            check(riding, true, random);
        }
    }
    std::printf("%d %d\n", late_starts, with_riders);
    return 0;
}
