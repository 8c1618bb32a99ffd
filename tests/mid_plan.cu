// Walks through divisions of nf4_lora_matmul_mid_sm90.cu and tilings of its projection on the host,
// and ends with 1 and a line at the first that is wrong. See test_plans.py.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "cuda/nf4_lora_matmul_mid_plan.h"

using namespace lowbit;
using namespace lowbit::cuda;

namespace {

[[noreturn]] void fail(const char* what, const LoraMatmulArgs& a, const Machine& machine) {
    std::printf(
        "%s: M %lld, N %lld, K %lld, r %d, %d SMs, room for %d clusters of %d\n", what,
        static_cast<long long>(a.M), static_cast<long long>(a.w.N), static_cast<long long>(a.w.K),
        a.r, machine.sms, machine.room.clusters, machine.room.cluster);
    std::exit(1);
}

// Groups of tokens that have room in shared memory, enough of them, and whole groups of CTAs.
const char* check_tiling(int64_t M, const ClusterRoom& room) {
    const ProjectionTiling t = tile_projection(M, room);
    const int64_t groups = int64_t{t.clusters} * (room.cluster / t.parts);
    if (t.tokens % 64 != 0 || t.tokens < 64 || t.tokens > 256)
        return "tokens of a group";
    if (t.parts < 1 || room.cluster % t.parts != 0)
        return "parts of K";
    if (t.clusters < 1 || t.clusters > room.clusters)
        return "clusters";
    return groups * t.tokens * t.passes < M ? "tokens are left" : nullptr;
}

const char* check_division(const LoraMatmulArgs& a, const Machine& machine) {
    const Division d = choose_division(a, machine);
    if (d.clusters < 1 || d.clusters * kCluster > machine.sms)
        return "clusters of the product";
    const int64_t row_tiles = ceil_div(a.w.N, kTileRows), row_pairs = ceil_div(row_tiles, 2);
    const int64_t tiles = d.plan == kSharedX256   ? row_pairs * ceil_div(a.M, 256)
                          : d.plan == kSharedX128 ? row_pairs * ceil_div(a.M, 128)
                                                  : row_tiles * ceil_div(a.M, 512);
    if (d.full_tiles + d.split_tiles != tiles)
        return "tiles";
    if (d.split_clusters > d.clusters || (d.split_tiles == 0) != (d.split_clusters == 0))
        return "clusters of divided tiles";
    if (d.spare_sms % kSpareSms != 0 || d.clusters * kCluster + d.spare_sms > machine.sms)
        return "spare SMs";
    const int projectors = projecting_ctas(a, d);
    if (projectors % kCluster != 0 || projectors > d.spare_sms || projectors > kWarpSize)
        return "CTAs that project";
    return projectors > 0 ? check_tiling(a.M, projection_room_beside(d.spare_sms)) : nullptr;
}

// The exchange of a tile's parts, each of which gives all before it takes.
const char* check_turns(bool level, int parts) {
    for (int quarter = 0; quarter < 4; quarter++) {
        const int owner = owner_of(level, parts, quarter);
        if (owner < 0 || owner >= parts)
            return "the owner of a quarter";
        if (level && (owner_of(level, parts, quarter ^ 2) == owner ||
                      owner_of(level, parts, quarter ^ 3) == owner))
            return "a place for sums that are taken";
        for (int turn = 1; turn < parts; turn++) {
            if (giver_to(owner, parts, turn) != (owner + turn) % parts)
                return "the order of sums";
            if (receiver_of(giver_to(owner, parts, turn), parts, turn) != owner)
                return "what is given and not taken";
        }
    }
    for (int part = 0; part < parts; part++) {
        int gives = 0;
        for (int turn = 1; turn < parts; turn++)
            gives += receiver_of(part, parts, turn) == parts - 1;
        if (gives != (part != parts - 1))
            return "turns of a part in a row";
    }
    return nullptr;
}

// What clusters look up about divided tiles, by plain division and by searching.
const char* check_split_tiles(const LoraMatmulArgs& a, const Division& d) {
    const int steps = static_cast<int>(a.w.K / kStepK), quads = (steps + kQuad - 1) / kQuad;
    const SplitTiles split = make_split_tiles(d.split_tiles, d.split_clusters, steps);
    const auto begin = [&](int cluster) {
        return static_cast<int>(int64_t{d.split_tiles} * quads * cluster / d.split_clusters);
    };
    int first = 0, last = 0;
    for (int tile = 0; tile < d.split_tiles; tile++) {
        while (begin(first + 1) <= tile * quads)
            first++;
        while (begin(last + 1) < (tile + 1) * quads)
            last++;
        if (split.first_cluster(tile) != first || split.last_cluster(tile) != last)
            return "clusters of a divided tile";
        const int parts = last - first + 1;
        if (parts > kMostParts)
            return "words of a divided tile";
        const bool level = d.split_clusters % d.split_tiles == 0;
        const char* wrong = check_turns(false, parts);
        if (wrong == nullptr && level)
            wrong = check_turns(true, parts);
        if (wrong != nullptr)
            return wrong;
    }
    for (int cluster = 0; cluster <= d.split_clusters; cluster++) {
        const int at = begin(cluster);
        if (split.shares.begin(cluster) != at || divide(at, split.by_quads) != at / quads)
            return "shares of divided tiles";
    }
    return nullptr;
}

}  // namespace

int main() {
    std::mt19937 random(0);
    int level = 0;
    for (int i = 0; i < 20000; i++) {
        LoraMatmulArgs a{};
        a.M = 1 + random() % (64 << random() % 13);
        a.w.N = 16 * (1 + random() % (1 << random() % 12));
        a.w.K = 64 * (1 + random() % (1 << random() % 9));
        a.r = static_cast<int>(random() % 65);
        a.lora_A = a.r > 0 ? &a : nullptr;
        Machine machine{};
        machine.sms = static_cast<int>(2 + random() % 160);
        machine.room.cluster = 1 << random() % 4;
        machine.room.clusters = std::max(1, machine.sms / machine.room.cluster);
        const char* wrong = check_tiling(a.M, machine.room);
        if (wrong == nullptr)
            wrong = check_division(a, machine);
        const Division d = choose_division(a, machine);
        if (wrong == nullptr && d.split_tiles > 0)
            wrong = check_split_tiles(a, d);
        if (wrong != nullptr)
            fail(wrong, a, machine);
        level += d.split_tiles > 0 && d.split_clusters % d.split_tiles == 0;
    }
    std::printf("%d\n", level);
}
