// How the host of nf4_lora_matmul_dx_sm90.cu chooses tiles and deals them out, and on which SMs the
// gradients of the adapter are made.
#pragma once

#include <algorithm>

#include "launch_config.h"
#include "nf4_lora_matmul_dx_tile.cuh"

namespace lowbit::cuda {
namespace {

using SharedDy256 = Plan<256, false>;
using SharedDy128 = Plan<128, false>;
using SharedW256 = Plan<256, true>;

// Several clusters split a tile's N up to so many tokens and rows of W. That takes 6 MiB with 64
// clusters, and what the gradients take beside it, 20 MiB up to here, grows with the rows.
constexpr int64_t kGivingTokens = 256, kGivingRows = 32 << 10;
constexpr int kMostShareLog2 = 2;

// Up to here the product also begins beside gradients that have all SMs, as they take few: 27
// instead of 44 us for both at 4096 x 4096 and 16 tokens (H200, 2026-11).
constexpr int64_t kOverlappingTokens = 256;

// How a launch deals out its tiles: whole rounds, and tiles whose N clusters split where those
// after the last full round are few enough.
struct Dealt {
    int64_t full_tiles;   // of clusters
    int64_t split_tiles;  // of CTAs
    int share_log2;       // of the clusters that split one
    int clusters;         // that have work
    int last_clusters;    // that have work in the last round
    // The first tiles' end, and the last ones', on an H100 (2026-11), in units of 10 ns. Only the
    // order of the results matters.
    int64_t first_end_10ns, time_10ns;
    int64_t given_sums_bytes;  // workspace for what CTAs of a shared tile give away
    int64_t given_bytes;       // with a word for each of their warps
};

template <class P>
Dealt deal(const LoraDxArgs& a, int64_t column_tiles, int clusters) {
    constexpr int kStep = P::kTokens == 128 ? 62 : P::kSharesW ? 72 : 97;
    constexpr int kLaunch = 300, kSplit = 300, kShare = P::kTokens == 128 ? 350 : 450;
    const int64_t tiles =
        ceil_div(column_tiles, P::kColumnTiles) * ceil_div(a.M, P::kTokens * P::kTokenTiles);
    const int64_t steps = ceil_div(a.w.N, kStepN), rest = tiles % clusters;
    const int64_t round_10ns = kLaunch + steps * kStep;
    Dealt d{};
    d.full_tiles = tiles, d.first_end_10ns = round_10ns;
    d.time_10ns = kLaunch + ceil_div(tiles, clusters) * steps * kStep;
    // Where clusters have whole tiles as well sharing is slower (3584 x 18944, 128 tokens: 3 %).
    const bool may_share = a.M <= kGivingTokens && a.w.N <= kGivingRows && tiles < clusters;
    const int most_log2 = P::kSharesW || rest == 0 ? -1 : may_share ? kMostShareLog2 : 0;
    for (int log2 = 0; log2 <= most_log2; log2++) {
        const int parts = kCluster << log2;
        const int64_t split = rest * P::kColumnTiles;
        const int64_t part = part_steps(static_cast<int>(steps), log2);
        const int64_t time_10ns =
            kLaunch + kSplit + log2 * kShare + (tiles / clusters * steps + part) * kStep;
        if (split << log2 > clusters || steps < 8 * parts || (parts - 1) * part >= steps)
            break;
        if (d.split_tiles > 0 && time_10ns >= d.time_10ns)
            continue;
        d.full_tiles = tiles - rest, d.split_tiles = split, d.share_log2 = log2;
        d.first_end_10ns = std::min(round_10ns, time_10ns), d.time_10ns = time_10ns;
    }
    d.clusters = static_cast<int>(
        std::min<int64_t>(clusters, std::max(d.full_tiles, d.split_tiles << d.share_log2)));
    d.last_clusters = static_cast<int>(
        d.split_tiles > 0 ? d.split_tiles << d.share_log2 : (tiles - 1) % clusters + 1);
    const int64_t giving_ctas = kCluster * d.split_tiles * ((1 << d.share_log2) - 1);
    d.given_sums_bytes = giving_ctas * P::kGivenBytes;
    d.given_bytes = d.given_sums_bytes + giving_ctas * kConsumerWarps * 8;
    return d;
}

// The fastest way to compute the column tiles of a layer.
struct Products {
    enum Plan { kSharedDy256, kSharedDy128, kSharedW256, kTwo } plan;
    int64_t head;                 // of two launches, the column tiles of the first; otherwise all
    int clusters, last_clusters;  // that have work, in the last round
    int64_t first_end_10ns, time_10ns;
    int64_t given_bytes;  // workspace for sums that pairs give to others
};

inline Products choose_products(const LoraDxArgs& a, int clusters) {
    const int64_t all = ceil_div(a.w.K, kTileColumns);
    Products best{};
    const auto consider = [&](Products::Plan plan, const Dealt& d) {
        if (best.clusters == 0 || d.time_10ns < best.time_10ns)
            best = {plan,        all,          d.clusters, d.last_clusters, d.first_end_10ns,
                    d.time_10ns, d.given_bytes};
    };
    consider(Products::kSharedW256, deal<SharedW256>(a, all, clusters));
    consider(Products::kSharedDy256, deal<SharedDy256>(a, all, clusters));
    consider(Products::kSharedDy128, deal<SharedDy128>(a, all, clusters));
    // Shared W for the rounds that it fills, and what is left split along N.
    const int64_t groups = ceil_div(a.M, 2 * SharedW256::kTokens);
    const int64_t head = all * groups / clusters * clusters / groups;
    if (head == 0 || head == all)
        return best;
    const Dealt first = deal<SharedW256>(a, head, clusters);
    const Dealt second = deal<SharedDy256>(a, all - head, clusters);
    const int64_t time_10ns = first.time_10ns + second.time_10ns;
    if (time_10ns >= best.time_10ns)
        return best;
    return {Products::kTwo,       head,      clusters,          second.last_clusters,
            first.first_end_10ns, time_10ns, second.given_bytes};
}

// SMs come in pairs.
inline int clusters_of(int sms, bool beside_grads) {
    return (sms - (beside_grads ? kBesideCluster : 0)) / kCluster;
}

// The product beside the gradients of the adapter.
struct Beside {
    int spare_sms;                      // left to them, whole clusters; 0: not possible
    int64_t first_end_10ns, time_10ns;  // of the product
    int64_t d_lora_A_10ns;              // what it takes longer with this gradient; 0: not possible
};

// Fitted to an H200 (bench/NOTES.md): a round, its batches of loads, its tiles of ranks, and how
// much the last steps and the store of dx hide, once for all rounds. x is loaded once where each
// warp has all of its tokens at once, else for each tile.
inline int64_t d_lora_A_time_10ns(const LoraDxArgs& a, const Products& products) {
    constexpr int64_t kRound = 360, kBatch = 115, kTile = 25, kHidden = 485;
    if (products.plan == Products::kTwo)
        return 0;
    const int warps = products.plan == Products::kSharedDy128 ? SharedDy128::kProducerWarps
                                                              : SharedDy256::kProducerWarps;
    const int64_t rounds = ceil_div(a.w.K, kGradColumns * kCluster * products.clusters);
    const int64_t batches = ceil_div(a.M, kGradTokens * warps), tiles = ceil_div(a.r, kGradRank);
    const int64_t loads = batches == 1 ? 1 : batches * tiles;
    return std::max<int64_t>(1, rounds * (kRound + loads * kBatch + tiles * kTile) - kHidden);
}

// `room`: of clusters of the gradients.
inline Beside plan_beside(const LoraDxArgs& a, int sms, int room) {
    if (a.r == 0 || sms < 4 * kBesideCluster)
        return {};
    const Products products = choose_products(a, clusters_of(sms, true));
    const int left = std::min(sms - kCluster * products.clusters, room);
    return {
        left / kBesideCluster * kBesideCluster, products.first_end_10ns, products.time_10ns,
        d_lora_A_time_10ns(a, products)};
}

// Gradients in front of the product, and both.
struct InFront {
    LoraGradsPlan grads;
    int64_t time_10ns;
};

// How many SMs gradients may have for the product to begin beside them with the clusters of its
// last round, whose second tiles then hide them (3584 x 18944, 256 tokens, rank 64: 74 CTAs took 11
// us less than 112, H200, 2026-11). One SM of a GPC may find no other. 0: none hides them.
inline int hiding_sms(const LoraDxArgs& a, const Products& alone, int sms) {
    constexpr int kGpcs = 8;
    const bool hides = a.M <= kOverlappingTokens && alone.plan != Products::kTwo &&
                       alone.first_end_10ns < alone.time_10ns;
    return hides ? std::max(0, sms - kCluster * alone.last_clusters - kGpcs) : 0;
}

inline InFront time_in_front(
    const LoraDxArgs& a, const Products& alone, int hiding_sms, const LoraGradsPlan& grads) {
    const int64_t ctas = std::max(grads.dy.ctas(), grads.makes_A ? grads.x.ctas() : 0);
    const int64_t hidden_10ns =
        grads.one_launch && ctas <= hiding_sms ? alone.time_10ns - alone.first_end_10ns : 0;
    const int64_t time_10ns = alone.time_10ns + std::max<int64_t>(0, grads.time_10ns - hidden_10ns);
    return {grads, time_10ns + (grads.leaves_A ? d_lora_A_time_10ns(a, alone) : 0)};
}

// But for the gradient of lora_A where that is expected to be faster.
inline InFront choose_what_is_in_front(
    const LoraDxArgs& a, const Products& alone, int hiding_sms, const LoraGradsPlan& grads) {
    const InFront all = time_in_front(a, alone, hiding_sms, grads);
    if (!grads.one_launch || !grads.makes_A || a.r == 0 || alone.plan == Products::kTwo)
        return all;
    const InFront less = time_in_front(a, alone, hiding_sms, grads.without_A());
    return less.time_10ns < all.time_10ns ? less : all;
}

template <typename PlanGrads>
InFront choose_in_front(const LoraDxArgs& a, const Products& alone, int sms, PlanGrads plan_grads) {
    const int hiding = hiding_sms(a, alone, sms);
    const auto on = [&](int count) {
        return choose_what_is_in_front(a, alone, hiding, plan_grads(count));
    };
    const InFront hidden = hiding > 0 ? on(hiding) : InFront{};
    if (hidden.grads.one_launch && hidden.time_10ns <= alone.time_10ns)
        return hidden;
    const InFront all = on(sms);
    return hidden.grads.one_launch && hidden.time_10ns < all.time_10ns ? hidden : all;
}

// Gradients beside the product, and both. The first tiles wait for u, which comes before d_lora_A
// where the gradients make that, and all ends with the last of the two.
inline int64_t time_beside(const LoraDxArgs& a, const Beside& beside, const LoraGradsPlan& grads) {
    // A launch, which in front is hidden, and memory that the product keeps busy. Stages that wait
    // for their bytes take longer where L2 does not keep an activation beside the weights.
    constexpr int64_t kBeside = 530, kKeptBytes = 32 << 20;
    const auto slower = [&](int64_t columns, int64_t time_10ns) {
        const int64_t bytes = a.w.N * a.w.K / 2 + a.M * columns * 2;
        return bytes > kKeptBytes ? time_10ns * 13 / 10 : time_10ns;
    };
    const int64_t dy_10ns = grads.time_10ns - grads.time_of_A_10ns;
    const int64_t u_10ns = kBeside + (a.r <= kGradRank ? slower(a.w.N, dy_10ns) : dy_10ns);
    const int64_t end_10ns = u_10ns + slower(a.w.K, grads.time_of_A_10ns);
    const int64_t product_10ns =
        beside.time_10ns + std::max<int64_t>(0, u_10ns - beside.first_end_10ns);
    return grads.makes_A ? std::max(product_10ns, end_10ns)
                         : product_10ns + (grads.leaves_A ? beside.d_lora_A_10ns : 0);
}

// The gradients beside the product where that is expected to be faster, else in front of it.
// plan_grads(SMs) makes their plan. Of both it is asked only where it matters.
template <typename PlanGrads>
LoraGradsPlan choose_grads(const LoraDxArgs& a, int sms, int room, PlanGrads plan_grads) {
    const Products alone = choose_products(a, clusters_of(sms, false));
    const Beside beside = plan_beside(a, sms, room);
    LoraGradsPlan on_few = beside.spare_sms > 0 ? plan_grads(beside.spare_sms) : LoraGradsPlan{};
    if (on_few.time_10ns == 0)
        return choose_in_front(a, alone, sms, plan_grads).grads;
    on_few.spare_sms = beside.spare_sms;
    int64_t time_10ns = time_beside(a, beside, on_few);
    if (on_few.makes_A && beside.d_lora_A_10ns > 0) {
        const LoraGradsPlan less = on_few.without_A();
        const int64_t less_10ns = time_beside(a, beside, less);
        if (less_10ns < time_10ns)
            on_few = less, time_10ns = less_10ns;
    }
    if (time_10ns <= alone.time_10ns && hiding_sms(a, alone, sms) == 0)
        return on_few;
    const InFront front = choose_in_front(a, alone, sms, plan_grads);
    return time_10ns < front.time_10ns ? on_few : front.grads;
}

}  // namespace
}  // namespace lowbit::cuda
