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
// clusters, and what the gradients take beside it, 18 MiB up to here, grows with the rows.
constexpr int64_t kGivingTokens = 256, kGivingRows = 32 << 10;
constexpr int kMostShareLog2 = 2;

// How a launch deals out its tiles: whole rounds, and tiles whose N clusters split where those
// after the last full round are few enough.
struct Dealt {
    int64_t full_tiles;   // of clusters
    int64_t split_tiles;  // of CTAs
    int share_log2;       // of the clusters that split one
    int clusters;         // that have work
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
    const int64_t giving_ctas = kCluster * d.split_tiles * ((1 << d.share_log2) - 1);
    d.given_sums_bytes = giving_ctas * P::kGivenBytes;
    d.given_bytes = d.given_sums_bytes + giving_ctas * kConsumerWarps * 8;
    return d;
}

// The fastest way to compute the column tiles of a layer.
struct Products {
    enum Plan { kSharedDy256, kSharedDy128, kSharedW256, kTwo } plan;
    int64_t head;  // of two launches, the column tiles of the first; otherwise all
    int clusters;  // that have work
    int64_t first_end_10ns, time_10ns;
    int64_t given_bytes;  // workspace for sums that pairs give to others
};

inline Products choose_products(const LoraDxArgs& a, int clusters) {
    const int64_t all = ceil_div(a.w.K, kTileColumns);
    Products best{};
    const auto consider = [&](Products::Plan plan, const Dealt& d) {
        if (best.clusters == 0 || d.time_10ns < best.time_10ns)
            best = {plan, all, d.clusters, d.first_end_10ns, d.time_10ns, d.given_bytes};
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
    return {Products::kTwo, head, clusters, first.first_end_10ns, time_10ns, second.given_bytes};
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

// Estimated, not fitted: what a batch of loads takes, and how much of it the last steps and the
// store of dx hide. Of the tiles of ranks after the first only u comes anew where each warp has all
// of its tokens at once.
inline int64_t d_lora_A_time_10ns(const LoraDxArgs& a, const Products& products) {
    constexpr int64_t kBatch = 120, kTile = 60, kHidden = 300;
    if (products.plan == Products::kTwo)
        return 0;
    const int warps = products.plan == Products::kSharedDy128 ? SharedDy128::kProducerWarps
                                                              : SharedDy256::kProducerWarps;
    const int64_t rounds = ceil_div(a.w.K, kGradColumns * kCluster * products.clusters);
    const int64_t batches = ceil_div(a.M, kGradTokens * warps), tiles = ceil_div(a.r, kGradRank);
    const int64_t time_10ns =
        batches == 1 ? kBatch + (tiles - 1) * kTile : tiles * batches * kBatch;
    return std::max<int64_t>(1, rounds * time_10ns - kHidden);
}

// `room`: of clusters of the gradients. Of more than kGradRank ranks four SMs make the gradients
// too slowly: r 64 takes 1.5 times as long beside as in front (4096 x 4096 and 14336 x 4096, 256
// tokens, H200, 2026-11).
inline Beside plan_beside(const LoraDxArgs& a, int sms, int room) {
    if (a.r == 0 || a.r > kGradRank || sms < 4 * kBesideCluster)
        return {};
    const Products products = choose_products(a, clusters_of(sms, true));
    const int left = std::min(sms - kCluster * products.clusters, room);
    return {
        left / kBesideCluster * kBesideCluster, products.first_end_10ns, products.time_10ns,
        d_lora_A_time_10ns(a, products)};
}

// In front of the product, but for the gradient of lora_A where that is expected to be faster.
// Kernels of the product with the code for it are up to 1 % slower (H200, 2026-11).
inline LoraGradsPlan
choose_in_front(const LoraDxArgs& a, const Products& alone, const LoraGradsPlan& in_front) {
    if (!in_front.one_launch || !in_front.makes_A || a.r == 0)
        return in_front;
    const int64_t d_lora_A_10ns = d_lora_A_time_10ns(a, alone);
    const bool leaves =
        d_lora_A_10ns > 0 && d_lora_A_10ns + alone.time_10ns / 100 < in_front.time_of_A_10ns;
    return leaves ? in_front.without_A() : in_front;
}

// The gradients beside the product where that is expected to be faster, else in front of it.
// plan_grads(spare SMs) makes their plan; 0: on all SMs. Of both it is asked only where it matters.
// The first tiles wait for all of the gradients: 4096 x 14336, 1024 tokens, four rounds, took 8 %
// longer beside than in front, forward and backward (H200, 2026-11).
template <typename PlanGrads>
LoraGradsPlan choose_grads(const LoraDxArgs& a, int sms, int room, PlanGrads plan_grads) {
    const Products alone = choose_products(a, clusters_of(sms, false));
    const auto in_front = [&] { return choose_in_front(a, alone, plan_grads(0)); };
    const Beside beside = plan_beside(a, sms, room);
    if (beside.spare_sms == 0)
        return in_front();
    LoraGradsPlan on_few = plan_grads(beside.spare_sms);
    if (on_few.time_10ns == 0)
        return in_front();
    const auto time_of = [&](const LoraGradsPlan& grads) {
        return beside.time_10ns + std::max<int64_t>(0, grads.time_10ns - beside.first_end_10ns);
    };
    int64_t time_10ns = time_of(on_few);
    if (on_few.makes_A && beside.d_lora_A_10ns > 0) {
        const LoraGradsPlan less = on_few.without_A();
        const int64_t less_10ns = time_of(less) + beside.d_lora_A_10ns;
        if (less_10ns < time_10ns)
            on_few = less, time_10ns = less_10ns;
    }
    if (time_10ns <= alone.time_10ns)
        return on_few;
    const LoraGradsPlan all = in_front();
    const int64_t d_lora_A_10ns = all.leaves_A ? d_lora_A_time_10ns(a, alone) : 0;
    return time_10ns < alone.time_10ns + all.time_10ns + d_lora_A_10ns ? on_few : all;
}

}  // namespace
}  // namespace lowbit::cuda
