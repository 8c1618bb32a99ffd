// How lora_grads_sm90.cu divides an activation [tokens, C] among CTAs, and what its workspace
// holds.
//
// A CTA has cta_columns x cta_tokens. Wide ones leave fewer partial sums of the projection, long
// ones fewer of the features, and there should be one for each SM.
#pragma once

#include <algorithm>

#include "lora_grads.h"
#include "lora_grads_finish.cuh"
#include "lora_grads_tile.cuh"

namespace lowbit::cuda {
namespace {

constexpr int64_t kWorkspaceLimit = 28 << 20;

using Division = LoraGradsDivision;

// Threads that add up parts have four neighbours each.
int finish_units(int64_t elements) {
    return static_cast<int>(ceil_div(elements, 4 * kFinishThreads));
}

// In units of 10 ns, as all that follows, fitted to an H200 (bench/NOTES.md): a CTA's stages and
// the ends of its chunks, unless the memory takes longer, and partial sums written and read. Stages
// wait for products where more than 16 ranks are projected on, else for their bytes.
template <class P>
int64_t pass_time_10ns(const Division& d, int processors) {
    constexpr int64_t kLaunch = 400;
    constexpr bool kWaitsForBytes = !P::kProjects || P::kRank == 16;
    constexpr int64_t kStage = kWaitsForBytes ? P::kColumns * 11 / 64 : P::kRank == 32 ? 117 : 81;
    constexpr int64_t kChunkEnd = P::kRank * 5 / 4;
    const int64_t chunks = d.cta_columns / P::kColumns, blocks = d.cta_tokens / kStageTokens;
    const int64_t bytes_of_all =
        d.cta_columns * d.cta_tokens * 2 * std::min<int64_t>(d.ctas(), processors);
    const int64_t cta = std::max(chunks * (blocks * kStage + kChunkEnd), bytes_of_all / 40000);
    const int64_t launch = d.ctas() > processors ? kLaunch : 0;  // another, that adds up
    return launch + ceil_div(d.ctas(), processors) * cta + d.bytes() * 2 / 40000;
}

bool wants_sums(const LoraGradsArgs& a) {
    return a.z != nullptr && (a.d_lora_B != nullptr || a.d_lora_scaling != nullptr);
}

bool wants_scaling(const LoraGradsArgs& a) {
    return a.z != nullptr && a.d_lora_scaling != nullptr;
}

// Whether sums over the tokens are results as they are.
bool is_whole(const Division& d, const LoraGradsArgs& a) {
    return d.token_parts == 1 && d.passes == 1 && a.r % 2 == 0 && !wants_scaling(a);
}

// Into how many (2^this) the lanes of a warp divide the parts of u, so that more CTAs have one.
int u_split_log2(int64_t parts, int64_t units, int64_t ctas) {
    int log2 = 0;
    while (log2 < kMostUSplitLog2 && units << (log2 + 1) <= ctas && parts > 8 << log2)
        log2++;
    return log2;
}

// What units of a CTA take, one after the other: a trip to memory for each kPartLoads parts.
int64_t finish_time_10ns(const Division& d, const LoraGradsArgs& a, int processors) {
    constexpr int64_t kUnit = 10, kTrip = 70;
    const int64_t ctas = std::min<int64_t>(d.ctas(), processors);
    const auto time_of = [&](int64_t units, int64_t parts) {
        return ceil_div(units, ctas) * (kUnit + ceil_div(parts, kPartLoads) * kTrip);
    };
    const int64_t units = finish_units(d.projection_floats / d.column_parts);
    const int log2 = u_split_log2(d.column_parts, units, ctas);
    return time_of(units << log2, ceil_div(d.column_parts, 1 << log2)) +
           time_of(is_whole(d, a) ? 0 : finish_units(d.sum_floats / d.token_parts), d.token_parts);
}

// The fastest that fits; of 0 passes if none does.
template <class P, typename Fits>
Division divide_pass(
    const LoraGradsArgs& a,
    int64_t tokens,
    int passes,
    int64_t C,
    bool projects,
    int processors,
    Fits fits) {
    const int64_t chunks = ceil_div(C, P::kColumns);
    Division best{};
    best.time_10ns = INT64_MAX;
    int64_t width = 1;
    while (width <= chunks) {
        Division d{};
        d.cta_columns = width * P::kColumns;
        d.column_parts = ceil_div(chunks, width);
        d.passes = passes;
        // Next, the least width that leaves fewer parts.
        width = d.column_parts == 1 ? chunks + 1 : (chunks - 1) / (d.column_parts - 1) + 1;
        // As many parts as there are processors, or one, which leaves nothing to add up.
        for (const int64_t wanted :
             {std::max<int64_t>(1, processors / d.column_parts), int64_t{1}}) {
            const int64_t rows = ceil_div(ceil_div(tokens, wanted), kStageTokens) * kStageTokens;
            const int64_t cta_tokens = std::min<int64_t>(rows, P::kMaxTokens);
            if (cta_tokens == d.cta_tokens)  // the same again
                continue;
            d.cta_tokens = cta_tokens;
            d.token_parts = ceil_div(tokens, d.cta_tokens);
            d.projection_floats = projects ? d.column_parts * tokens * P::kRank : 0;
            d.sum_floats = d.token_parts * C * P::kRank;
            d.column_sum_floats = d.token_parts * C;
            d.time_10ns = pass_time_10ns<P>(d, processors) + finish_time_10ns(d, a, processors);
            if (d.time_10ns < best.time_10ns && fits(d))
                best = d;
        }
    }
    return best;
}

// Floats of the workspace, each part 128-byte aligned.
struct Workspace {
    int64_t projection, sums, column_sums, running_sums, running_column_sums, scaling_parts;
    int64_t z, lora_B;  // copies of them
    int64_t end;
};

// Factors that the pass over dy cannot read as they are: TMA wants rows of 16 bytes, in dtype.
struct Copies {
    bool z, lora_B;
};

Copies copies_of(const LoraGradsArgs& a) {
    const bool ragged = a.r % 8 != 0;
    return {a.z != nullptr && ragged, a.u != nullptr && (ragged || a.lora_B_dtype != a.dtype)};
}

Workspace lay_out(const Division& d, const LoraGradsArgs& a, int64_t C, Copies copies) {
    const int columns = lora_columns(a.r);
    const auto aligned = [](bool wanted, int64_t floats) {
        return wanted ? ceil_div(floats, 32) * 32 : 0;
    };
    const bool parts = !is_whole(d, a);
    Workspace w{};
    w.sums = aligned(true, d.projection_floats);
    w.column_sums = w.sums + aligned(parts, d.sum_floats);
    w.running_sums = w.column_sums + aligned(parts, d.column_sum_floats);
    w.running_column_sums = w.running_sums + aligned(d.passes > 1, C * columns);
    w.scaling_parts = w.running_column_sums + aligned(d.passes > 1, C);
    w.z = w.scaling_parts + aligned(parts, int64_t{finish_units(C * columns)} * columns);
    w.lora_B = w.z + aligned(copies.z, a.M * columns / 2);
    w.end = w.lora_B + aligned(copies.lora_B, a.N * columns / 2);
    return w;
}

// The fastest of those whose workspace keeps to its limit, in one pass or several. More passes save
// workspace only while tokens are in several parts or there is a projection; otherwise they add
// running sums.
template <class P>
Division divide(const LoraGradsArgs& a, int64_t C, bool projects, Copies copies, int processors) {
    const int64_t rounded_bytes = a.rounded_lora_A != nullptr ? 2 * a.r * a.K : 0;
    const int64_t limit = std::max(kWorkspaceLimit / 2, kWorkspaceLimit - rounded_bytes);
    Division best{};
    for (int passes = 1;; passes *= 2) {
        const int64_t tokens = ceil_div(ceil_div(a.M, passes), kStageTokens) * kStageTokens;
        const int count = static_cast<int>(ceil_div(a.M, tokens));
        const auto divide_so = [&](auto fits) {
            return divide_pass<P>(a, std::min(tokens, a.M), count, C, projects, processors, fits);
        };
        const auto keeps_limit = [&](const Division& d) {
            const bool least = tokens == kStageTokens || (!projects && d.token_parts == 1);
            return least || lay_out(d, a, C, copies).end * 4 <= limit;
        };
        Division d = divide_so([](const Division&) { return true; });
        const bool is_free = keeps_limit(d);
        if (!is_free)
            d = divide_so(keeps_limit);
        d.pass_tokens = tokens;
        const bool found = d.passes > 0;
        if (found && (best.passes == 0 || count * d.time_10ns < best.passes * best.time_10ns))
            best = d;
        if (is_free)
            return best;
    }
}

// Of both passes on so many SMs.
template <int kRank>
LoraGradsPlan plan_on(const LoraGradsArgs& a, int sms) {
    LoraGradsPlan plan{};
    plan.dy = divide<GradPlan<kRank, true>>(a, a.N, a.u != nullptr, copies_of(a), sms);
    plan.makes_A = a.d_lora_A != nullptr && a.K > 0;
    if (plan.makes_A)
        plan.x = divide<GradPlan<kRank, false>>(a, a.K, false, {}, sms);
    const auto is_one_wave = [&](const Division& d) { return d.passes == 1 && d.ctas() <= sms; };
    plan.one_launch =
        !wants_scaling(a) && is_one_wave(plan.dy) && (!plan.makes_A || is_one_wave(plan.x));
    if (!plan.one_launch)
        return plan;
    constexpr int64_t kSecond = 270;  // barriers, and the first stages
    plan.time_of_A_10ns = plan.makes_A ? kSecond + plan.x.time_10ns : 0;
    plan.time_10ns = plan.dy.time_10ns + plan.time_of_A_10ns;
    return plan;
}

inline LoraGradsPlan plan_of_rank(const LoraGradsArgs& a, int sms) {
    switch (lora_columns(a.r)) {
    case 16:
        return plan_on<16>(a, sms);
    case 32:
        return plan_on<32>(a, sms);
    default:
        return plan_on<64>(a, sms);
    }
}

}  // namespace
}  // namespace lowbit::cuda
