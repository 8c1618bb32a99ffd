// Walks through what lora_grads_sm90.cu and nf4_lora_matmul_dx_sm90.cu plan on the host, and ends
// with 1 and a line at the first plan that is wrong. See test_plans.py.
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

template <int kRank>
const char* check_grads(const LoraGradsArgs& a, int sms, int& together) {
    const Divisions d = divide_both<kRank>(a, sms);
    const char* wrong = check_passes(d.dy, a.M, a.N);
    if (wrong == nullptr)
        wrong = check_passes(d.x, a.M, a.K);
    if (wrong != nullptr)
        return wrong;
    if (d.dy.cta_tokens > GradPlan<kRank, true>::kMaxTokens)
        return "tokens that find no room in shared memory";
    if (d.one_launch && (d.dy.ctas() > sms || (d.makes_A && d.x.ctas() > sms)))
        return "CTAs that meet";
    if (is_whole(d.dy, a) && d.dy.token_parts * d.dy.passes > 1)
        return "parts that are taken for whole sums";
    together += d.one_launch;
    if ((time_of<kRank>(a, sms) > 0) != d.one_launch)
        return "time";
    return nullptr;
}

const char* check_products(const LoraDxArgs& a, int sms, bool beside) {
    const int clusters = clusters_of(sms, beside);
    const Products p = choose_products(a, clusters);
    const int64_t all = ceil_div(a.w.K, kTileColumns);
    if (p.clusters < 1 || p.clusters > clusters || p.head < 1 || p.head > all)
        return "clusters of the product";
    if ((p.plan == Products::kTwo) != (p.head < all))
        return "columns of the first launch";
    const Dealt d = p.plan == Products::kSharedDy256   ? deal<SharedDy256>(a, all, clusters)
                    : p.plan == Products::kSharedDy128 ? deal<SharedDy128>(a, all, clusters)
                                                       : deal<SharedW256>(a, p.head, clusters);
    if (d.split_tiles > d.clusters || d.clusters > clusters)
        return "tiles that are split";
    const int spare = spare_sms(a, sms);
    if (beside && (spare % kBesideCluster != 0 || kCluster * p.clusters + spare > sms))
        return "SMs left to the gradients";
    if (beside && sms >= 4 * kBesideCluster && spare < kBesideCluster)
        return "no SMs left to the gradients";
    return nullptr;
}

}  // namespace

int main() {
    std::mt19937 random(0);
    int together = 0, pays = 0;
    for (int i = 0; i < 20000; i++) {
        LoraGradsArgs g{};
        LoraDxArgs a{};
        g.dtype = g.lora_A_dtype = Dtype::kBFloat16;
        g.lora_B_dtype = random() % 2 ? Dtype::kBFloat16 : Dtype::kFloat32;
        g.M = a.M = 1 + random() % (64 << random() % 10);
        g.N = a.w.N = 8 * (1 + random() % (2 << random() % 11));
        g.K = a.w.K = 64 * (1 + random() % (1 << random() % 9));
        g.r = a.r = static_cast<int>(1 + random() % 64);
        g.z = g.u = g.d_lora_B = &g;
        g.d_lora_A = random() % 4 ? &g : nullptr;
        g.rounded_lora_A = random() % 2 ? &g : nullptr;
        const int sms = static_cast<int>(4 + random() % 156);
        const int columns = lora_columns(g.r);
        const auto check = [&](int on) {
            return columns == 16   ? check_grads<16>(g, on, together)
                   : columns == 32 ? check_grads<32>(g, on, together)
                                   : check_grads<64>(g, on, together);
        };
        const char* wrong = check(sms);
        const int spare = spare_sms(a, sms);
        if (wrong == nullptr && spare > 0)
            wrong = check(spare);
        for (const bool beside : {false, true}) {
            if (wrong == nullptr && clusters_of(sms, beside) > 0)
                wrong = check_products(a, sms, beside);
        }
        if (wrong != nullptr) {
            std::printf(
                "%s: M %lld, N %lld, K %lld, r %d, %d SMs\n", wrong, static_cast<long long>(a.M),
                static_cast<long long>(a.w.N), static_cast<long long>(a.w.K), a.r, sms);
            return 1;
        }
        if (spare > 0 && columns == 16)
            pays += pays_beside(a, sms, time_of<16>(g, spare), time_of<16>(g, sms));
    }
    std::printf("%d %d\n", together, pays);
}
