// Walks through what lora_grads_sm90.cu and nf4_lora_matmul_dx_sm90.cu plan on the host, and ends
// with 1 and a line at the first plan that is wrong. For each four arguments M N K r
// it prints instead on how many of 132 SMs the gradients run beside dx, in how many launches dx,
// and whether dx makes the gradient of lora_A. See test_plans.py.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "cuda/lora_grads_plan.h"
#include "cuda/nf4_lora_matmul_dx_plan.h"

using namespace lowbit;
using namespace lowbit::cuda;

namespace {

// Rectangles that cover an activation of C columns once, and at most so many where they must meet.
const char* check_passes(const Division& d, int64_t M, int64_t C) {
    if ((d.column_parts - 1) * d.cta_columns >= C || d.column_parts * d.cta_columns < C)
        return "columns";
    const int64_t tokens = d.pass_tokens < M ? d.pass_tokens : M;
    if ((d.token_parts - 1) * d.cta_tokens >= tokens || d.token_parts * d.cta_tokens < tokens)
        return "tokens of a pass";
    if ((d.passes - 1) * d.pass_tokens >= M || d.passes * d.pass_tokens < M)
        return "passes";
    return nullptr;
}

// All parts of u, and units for at most the CTAs that are there where they are divided.
const char* check_parts_of_u(int64_t parts, int64_t units, int64_t ctas) {
    const int log2 = u_split_log2(parts, units, ctas);
    const int64_t share = ((parts - 1) >> log2) + 1;
    const bool divides = log2 == 0 || (units << log2 <= ctas && log2 <= kMostUSplitLog2);
    return share << log2 >= parts && divides ? nullptr : "parts of u";
}

// At most 28 MiB with the copy of lora_A, but where one part of the sums over tokens takes more.
const char* check_workspace(const LoraGradsArgs& a, const LoraGradsPlan& d) {
    const int64_t copy = a.rounded_lora_A != nullptr ? 2 * a.r * a.K : 0;
    const int64_t dy = 4 * lay_out(d.dy, a, a.N, copies_of(a)).end;
    const int64_t x = d.makes_A ? 4 * lay_out(d.x, a, a.K, {}).end : 0;
    const int64_t least = 16 * lora_columns(a.r) * std::max(a.N, a.K) + (1 << 20);
    return std::max(dy, x) + copy > std::max<int64_t>(kWorkspaceLimit, least + copy) ? "workspace"
                                                                                     : nullptr;
}

int64_t most_tokens(int columns) {
    return columns == 16   ? GradPlan<16, true>::kMaxTokens
           : columns == 32 ? GradPlan<32, true>::kMaxTokens
                           : GradPlan<64, true>::kMaxTokens;
}

const char* check_grads(const LoraGradsArgs& a, int sms, int& together) {
    const LoraGradsPlan d = plan_of_rank(a, sms);
    const char* wrong = check_passes(d.dy, a.M, a.N);
    if (wrong == nullptr && d.makes_A)
        wrong = check_passes(d.x, a.M, a.K);
    if (wrong == nullptr)
        wrong = check_parts_of_u(
            d.dy.column_parts, finish_units(d.dy.pass_tokens * lora_columns(a.r)), d.dy.ctas());
    if (wrong == nullptr)
        wrong = check_workspace(a, d);
    if (wrong != nullptr)
        return wrong;
    if (d.dy.cta_tokens > most_tokens(lora_columns(a.r)))
        return "tokens that find no room in shared memory";
    if (d.one_launch && (d.dy.ctas() > sms || (d.makes_A && d.x.ctas() > sms)))
        return "CTAs that meet";
    if (is_whole(d.dy, a) && d.dy.token_parts * d.dy.passes > 1)
        return "parts that are taken for whole sums";
    together += d.one_launch;
    return nullptr;
}

// Clusters for each split tile, whose parts cover N, none of them empty.
const char* check_dealt(const Dealt& d, int64_t N, int clusters, int& shared) {
    if (d.split_tiles << d.share_log2 > d.clusters || d.clusters < 1 || d.clusters > clusters)
        return "tiles that are split";
    const int parts = kCluster << d.share_log2;
    const int64_t steps = ceil_div(N, kStepN),
                  part = part_steps(static_cast<int>(steps), d.share_log2);
    if (d.split_tiles > 0 && (part * parts < steps || part * (parts - 1) >= steps))
        return "parts of split tiles";
    shared += d.share_log2 > 0;
    return nullptr;
}

const char* check_products(const LoraDxArgs& a, int clusters, int& shared) {
    const Products p = choose_products(a, clusters);
    const int64_t all = ceil_div(a.w.K, kTileColumns);
    if (p.given_bytes > (7 << 20) || (a.M > 256 && p.given_bytes > 0))
        return "workspace of the product";
    if (p.clusters < 1 || p.clusters > clusters || p.head < 1 || p.head > all)
        return "clusters of the product";
    if ((p.plan == Products::kTwo) != (p.head < all))
        return "columns of the first launch";
    switch (p.plan) {
    case Products::kSharedDy256:
        return check_dealt(deal<SharedDy256>(a, all, clusters), a.w.N, clusters, shared);
    case Products::kSharedDy128:
        return check_dealt(deal<SharedDy128>(a, all, clusters), a.w.N, clusters, shared);
    default:
        break;
    }
    const char* wrong = check_dealt(deal<SharedW256>(a, p.head, clusters), a.w.N, clusters, shared);
    return wrong != nullptr || p.head == all
               ? wrong
               : check_dealt(deal<SharedDy256>(a, all - p.head, clusters), a.w.N, clusters, shared);
}

// `made`: plans of the gradients on the way to it.
LoraGradsPlan
choose(const LoraDxArgs& a, const LoraGradsArgs& grads, int sms, int room, int* made = nullptr) {
    return choose_grads(a, sms, room, [&](int count) {
        if (made != nullptr)
            ++*made;
        return plan_of_rank(grads, count);
    });
}

void set_sizes(LoraGradsArgs& g, LoraDxArgs& a, int64_t M, int64_t N, int64_t K, int r) {
    g.dtype = g.lora_A_dtype = g.lora_B_dtype = Dtype::kBFloat16;
    g.M = a.M = M, g.N = a.w.N = N, g.K = a.w.K = K, g.r = a.r = r;
    g.z = g.u = g.d_lora_B = g.d_lora_A = &g;
}

}  // namespace

int main(int argc, char** argv) {
    for (int at = 1; at + 4 <= argc; at += 4) {
        LoraGradsArgs g{};
        LoraDxArgs a{};
        const auto size = [&](int i) { return std::atoi(argv[at + i]); };
        set_sizes(g, a, size(0), size(1), size(2), size(3));
        const int sms = 132;
        const LoraGradsPlan grads = choose(a, g, sms, sms);
        const Products p = choose_products(a, clusters_of(sms, grads.spare_sms > 0));
        std::printf(
            "%d %d %d\n", grads.spare_sms, p.plan == Products::kTwo ? 2 : 1, grads.leaves_A);
    }
    if (argc > 1)
        return 0;
    std::mt19937 random(0);
    int together = 0, pays = 0, shared = 0, left = 0, left_in_front = 0;
    for (int i = 0; i < 20000; i++) {
        LoraGradsArgs g{};
        LoraDxArgs a{};
        set_sizes(
            g, a, 1 + random() % (64 << random() % 10), 8 * (1 + random() % (2 << random() % 13)),
            64 * (1 + random() % (1 << random() % 12)), static_cast<int>(1 + random() % 64));
        g.lora_B_dtype = random() % 2 ? Dtype::kBFloat16 : Dtype::kFloat32;
        g.d_lora_A = random() % 4 ? &g : nullptr;
        g.rounded_lora_A = random() % 2 ? &g : nullptr;
        const int sms = static_cast<int>(2 + random() % 158);
        const int room = static_cast<int>(random() % (sms + 1)) / kBesideCluster * kBesideCluster;
        int made = 0;
        const LoraGradsPlan chosen = choose(a, g, sms, room, &made);
        const int spare = chosen.spare_sms;
        const char* wrong = made > 3 ? "plans that were made" : nullptr;
        const bool makes_A = chosen.makes_A || chosen.leaves_A;
        if (makes_A != (g.d_lora_A != nullptr) || (chosen.makes_A && chosen.leaves_A))
            wrong = "who makes the gradient of lora_A";
        const Products products = choose_products(a, clusters_of(sms, spare > 0));
        if (chosen.leaves_A && (!chosen.one_launch || products.plan == Products::kTwo))
            wrong = "a gradient left to dx";
        left += chosen.leaves_A && spare > 0;
        left_in_front += chosen.leaves_A && spare == 0;
        const int hiding = hiding_sms(a, choose_products(a, clusters_of(sms, false)), sms);
        for (const int on : {sms, plan_beside(a, sms, room).spare_sms, hiding}) {
            if (wrong == nullptr && on > 0)
                wrong = check_grads(g, on, together);
        }
        if (wrong == nullptr)
            wrong = check_products(a, clusters_of(sms, spare > 0), shared);
        const int busy = kCluster * products.clusters;
        if (wrong == nullptr && (spare % kBesideCluster != 0 || spare > room || busy + spare > sms))
            wrong = "SMs left to the gradients";
        if (wrong != nullptr) {
            std::printf(
                "%s: M %lld, N %lld, K %lld, r %d, %d SMs\n", wrong, static_cast<long long>(a.M),
                static_cast<long long>(a.w.N), static_cast<long long>(a.w.K), a.r, sms);
            return 1;
        }
        pays += spare > 0;
    }
    std::printf("%d %d %d %d %d\n", together, pays, shared, left, left_in_front);
}
