// The skinny products of the backward pass of a low-rank adapter, deterministic, sm_90a.
//
//     u[m, j] = s_j sum_n dy[m, n] lora_B[n, j]        s_j = scaling * lora_scaling[j]
//     d_lora_B[n, j] = s_j sum_m dy[m, n] z[m, j]      d_bias[n] = sum_m dy[m, n]
//     d_lora_scaling[j] = scaling * sum_m (dy lora_B)[m, j] z[m, j]
//     d_lora_A[j, k] = sum_m u[m, j] x[m, k]
//
// dy [M, N], x [M, K], z [M, r], u [M, 16, 32 or 64], d_bias [N]: one 16-bit dtype T, row-major;
// lora_B and d_lora_B [N, r], d_lora_A [r, K] in T or fp32, lora_B rounded to T for the products;
// d_lora_scaling fp32. An fp32 lora_A is rounded to T on request, for the product that follows.
// Sums in fp32 in an order fixed by the shapes and the number of SMs; each result is rounded once.
// u is rounded before it enters d_lora_A and dx.
//
// A pass over dy, then one over x: products over rectangles, at most one per SM, with partial sums
// into the workspace (lora_grads_tile.cuh), and after a grid barrier a sum over the parts in order
// (lora_grads_finish.cuh). Where the workspace would exceed its limit rectangles leave fewer sums,
// or the tokens are cut into several passes over each, which add to the sums of features before
// them.
// One launch for both, if there is one pass over each, neither has more rectangles than SMs, and
// d_lora_scaling is not wanted. Between the passes it sets marks, on request, that say that u is
// there. Else each pass is a launch, and with more rectangles than SMs the sums over the parts are
// another. d_lora_scaling needs no u: it is scaling * sum_n lora_B[n, j] (dy^T z)[n, j], whose
// terms are summed up by a last launch after the passes over dy.
//
// On request the one launch keeps to a few SMs, in clusters, while a product has the others. Four
// CTAs take in 0.28 TB/s and have few to share the sums over parts, which therefore are avoided:
// long and wide rectangles over all tokens leave parts of u alone.
//
// Bound by one read of dy and one of x; partial sums, which mostly stay in L2, are 5 to 20 % of it
// at rank 16. Below about 1000 tokens bound by latency. Callers have checked serves_lora_grads.
// Source: one read of dy for two results is LoRAFusion's (Zhu et al. 2025), with atomics there.

#include "launch_config.h"
#include "lora_factors.cuh"
#include "lora_grads.h"
#include "lora_grads_plan.h"
#include "tensor_map.h"

namespace lowbit::cuda {
namespace {

// ---- passes -------------------------------------------------------------------------------------

// Pass `number` over an activation [M, C], without what it reads and makes.
GradPass new_pass(const LoraGradsArgs& a, int64_t C, const Division& d, int number) {
    const int64_t first = number * d.pass_tokens, end = std::min(a.M, first + d.pass_tokens);
    GradPass pass{};
    GradParams& g = pass.params;
    g.C = static_cast<int>(C);
    g.first_token = static_cast<int>(first), g.end_token = static_cast<int>(end);
    g.cta_columns = static_cast<int>(d.cta_columns);
    g.cta_tokens = static_cast<int>(d.cta_tokens);
    g.column_parts = static_cast<int>(d.column_parts);
    FinishParams& f = pass.finish;
    f.r = a.r;
    f.tokens = end - first, f.first_token = first, f.end_token = end;
    f.parts = static_cast<int>(ceil_div(f.tokens, d.cta_tokens));
    f.C = C;
    f.first_pass = number == 0, f.last_pass = number == d.passes - 1;
    f.whole = is_whole(d, a);
    pass.ctas = g.column_parts * f.parts;
    g.finishes = pass.ctas <= sm_count();
    return pass;
}

// Factors that must be copied have been.
template <class P>
cudaError_t make_dy_pass(GradPass& pass, const LoraGradsArgs& a, const Division& d, int number) {
    constexpr int kRank = P::kRank;
    const Copies copies = copies_of(a);
    const Workspace space = lay_out(d, a, a.N, copies);
    float* base = static_cast<float*>(a.workspace);
    pass = new_pass(a, a.N, d, number);
    GradParams& g = pass.params;
    g.wants_projection = a.u != nullptr;
    g.wants_sums = wants_sums(a);
    g.wants_column_sums = a.d_bias != nullptr;
    g.projection = base + space.projection;
    g.sums = base + space.sums;
    g.column_sums = base + space.column_sums;
    FinishParams& f = pass.finish;
    f.lora_scaling = a.lora_scaling, f.scaling = a.scaling;
    if (g.wants_projection) {
        f.projection = g.projection;
        f.projection_parts = g.column_parts;
        const int units = finish_units(f.tokens * kRank);
        f.u_split_log2 = u_split_log2(f.projection_parts, units, std::min(pass.ctas, sm_count()));
        f.projection_units = units << f.u_split_log2;
    }
    f.sums = g.wants_sums ? g.sums : nullptr;
    f.running_sums = base + space.running_sums;
    f.column_sums = g.wants_column_sums ? g.column_sums : nullptr;
    f.running_column_sums = base + space.running_column_sums;
    f.scaling_parts = wants_scaling(a) ? base + space.scaling_parts : nullptr;
    f.lora_B = a.lora_B;
    f.lora_B_is_float = a.lora_B_dtype == Dtype::kFloat32;
    f.u = a.u;
    f.out = a.d_lora_B, f.out_is_float = a.lora_B_dtype == Dtype::kFloat32;
    f.d_bias = a.d_bias;
    const bool has_features = g.wants_sums || g.wants_column_sums;
    f.units = f.projection_units + (has_features && !f.whole ? finish_units(f.C * kRank) : 0);

    const CUtensorMapDataType type = tensor_map_type(a.dtype);
    GradMaps& maps = pass.maps;
    cudaError_t error = make_tensor_map(maps.g, type, a.dy, a.M, a.N, {kStageTokens, kBoxColumns});
    if (error == cudaSuccess && g.wants_sums)
        error = make_tensor_map(
            maps.t, type, copies.z ? base + space.z : a.z, a.M, copies.z ? kRank : a.r,
            {kStageTokens, kRank});
    if (error == cudaSuccess && g.wants_projection)
        error = make_tensor_map(
            maps.f, type, copies.lora_B ? base + space.lora_B : a.lora_B, a.N,
            copies.lora_B ? kRank : a.r, {P::kColumns, kRank});
    return error;
}

template <class P>
cudaError_t make_x_pass(GradPass& pass, const LoraGradsArgs& a, const Division& d, int number) {
    const Workspace space = lay_out(d, a, a.K, {});
    float* base = static_cast<float*>(a.workspace);
    pass = new_pass(a, a.K, d, number);
    pass.params.wants_sums = true;
    pass.params.sums = base + space.sums;
    FinishParams& f = pass.finish;
    f.sums = pass.params.sums;
    f.running_sums = base + space.running_sums;
    f.out = a.d_lora_A, f.out_is_float = a.lora_A_dtype == Dtype::kFloat32;
    f.units = f.whole ? 0 : finish_units(f.C * P::kRank);
    const CUtensorMapDataType type = tensor_map_type(a.dtype);
    const cudaError_t error =
        make_tensor_map(pass.maps.g, type, a.x, a.M, a.K, {kStageTokens, kBoxColumns});
    return error != cudaSuccess
               ? error
               : make_tensor_map(pass.maps.t, type, a.u, a.M, P::kRank, {kStageTokens, P::kRank});
}

// ---- launch -------------------------------------------------------------------------------------

// CTAs that wait for each other, at least so many; beside a product, clusters.
template <typename... Passes>
cudaError_t launch_together(
    void (*kernel)(Passes...),
    bool beside,
    int ctas,
    int smem_bytes,
    cudaStream_t stream,
    const Passes&... passes) {
    if (beside)
        ctas = static_cast<int>(ceil_div(ctas, kBesideCluster)) * kBesideCluster;
    LaunchConfig config(ctas, kGradThreads, smem_bytes, stream);
    config.cooperative();
    if (beside)
        config.cluster(kBesideCluster);
    return cudaLaunchKernelEx(config.get(), kernel, passes...);
}

template <typename T, class P>
cudaError_t launch_pass(const GradPass& pass, bool beside, cudaStream_t stream) {
    constexpr auto kKernel = lora_grads_kernel<T, P>;
    cudaError_t error = allow_shared_memory<kKernel>(P::kSmemBytes);
    if (error != cudaSuccess)
        return error;
    if (pass.params.finishes)
        return launch_together<GradPass>(kKernel, beside, pass.ctas, P::kSmemBytes, stream, pass);
    const LaunchConfig config(pass.ctas, kGradThreads, P::kSmemBytes, stream);
    error = cudaLaunchKernelEx(config.get(), kKernel, pass);
    if (error != cudaSuccess || pass.finish.units == 0)
        return error;
    const LaunchConfig finish(pass.finish.units, kFinishThreads, 0, stream);
    return cudaLaunchKernelEx(finish.get(), finish_kernel<T, P>, pass.finish);
}

template <typename T, class P>
cudaError_t
launch_passes(const LoraGradsArgs& a, const Division& d, bool beside, cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    for (int number = 0; number < d.passes && error == cudaSuccess; number++) {
        GradPass pass;
        if constexpr (P::kProjects)
            error = make_dy_pass<P>(pass, a, d, number);
        else
            error = make_x_pass<P>(pass, a, d, number);
        if (error == cudaSuccess)
            error = launch_pass<T, P>(pass, beside, stream);
    }
    return error;
}

template <int kRank>
cudaError_t launch_scaling(const LoraGradsArgs& a, const Workspace& space, cudaStream_t stream) {
    const float* parts = static_cast<const float*>(a.workspace) + space.scaling_parts;
    LaunchConfig config(1, kFinishThreads, 0, stream);
    return cudaLaunchKernelEx(
        config.get(), finish_scaling_kernel, parts, finish_units(a.N * kRank), kRank, a.r,
        a.scaling, a.d_lora_scaling);
}

// One pass over each.
template <typename T, class Dy, class X>
cudaError_t launch_both(const LoraGradsArgs& a, const LoraGradsPlan& plan, cudaStream_t stream) {
    constexpr auto kKernel = lora_grads_both_kernel<T, Dy, X>;
    GradPass dy, x;
    cudaError_t error = make_dy_pass<Dy>(dy, a, plan.dy, 0);
    if (error == cudaSuccess)
        error = make_x_pass<X>(x, a, plan.x, 0);
    if (error == cudaSuccess)
        error = allow_shared_memory<kKernel>(Dy::kSmemBytes);
    if (error != cudaSuccess)
        return error;
    x.u_marks = a.u_marks;
    const int ctas = std::max(dy.ctas, x.ctas);
    return launch_together<GradPass, GradPass>(
        kKernel, plan.spare_sms > 0, ctas, Dy::kSmemBytes, stream, dy, x);
}

template <typename T, int kRank>
cudaError_t launch_x(const LoraGradsArgs& a, cudaStream_t stream) {
    using X = GradPlan<kRank, false>;
    return launch_passes<T, X>(a, divide<X>(a, a.K, false, {}, sm_count()), false, stream);
}

template <typename T, int kRank>
cudaError_t launch(const LoraGradsArgs& a, const LoraGradsPlan& plan, cudaStream_t stream) {
    using Dy = GradPlan<kRank, true>;
    using X = GradPlan<kRank, false>;
    const Copies copies = copies_of(a);
    const Workspace space = lay_out(plan.dy, a, a.N, copies);
    const bool beside = plan.spare_sms > 0;
    float* base = static_cast<float*>(a.workspace);
    cudaError_t error = copy_factors<T>(
        {{{a.z, false, copies.z ? a.M : 0, a.r, kRank, base + space.z},
          {a.lora_B, a.lora_B_dtype != a.dtype, copies.lora_B ? a.N : 0, a.r, kRank,
           base + space.lora_B},
          {a.lora_A, true, a.rounded_lora_A != nullptr ? a.r : 0, a.K, a.K, a.rounded_lora_A}}},
        stream);
    if (error == cudaSuccess && plan.marks_u())
        return launch_both<T, Dy, X>(a, plan, stream);
    if (error == cudaSuccess)
        error = launch_passes<T, Dy>(a, plan.dy, beside, stream);
    if (error == cudaSuccess && wants_scaling(a))
        error = launch_scaling<kRank>(a, space, stream);
    return error == cudaSuccess && plan.makes_A ? launch_passes<T, X>(a, plan.x, beside, stream)
                                                : error;
}

}  // namespace

bool serves_lora_grads(const LoraGradsArgs& a) {
    constexpr int64_t kLimit = 1 << 30;  // sizes are int on the device
    const auto is_master = [&](Dtype t) { return t == a.dtype || t == Dtype::kFloat32; };
    return a.dtype != Dtype::kFloat32 && is_master(a.lora_A_dtype) && is_master(a.lora_B_dtype) &&
           a.r >= 1 && a.r <= 64 && a.N % 8 == 0 && a.K % 8 == 0 && a.M < kLimit && a.N < kLimit &&
           a.K < kLimit && is_aligned(a.dy) && is_aligned(a.x) && is_aligned(a.z) &&
           is_aligned(a.lora_B) && is_aligned(a.u) && is_aligned(a.d_lora_B) && device_is_sm90();
}

LoraGradsPlan plan_lora_grads(const LoraGradsArgs& a, int sms) {
    if (sms == 0)
        sms = sm_count();
    return a.M == 0 || a.N == 0 || sms == 0 ? LoraGradsPlan{} : plan_of_rank(a, sms);
}

size_t lora_grads_workspace_bytes(const LoraGradsArgs& a, const LoraGradsPlan& plan) {
    if (plan.dy.passes == 0)
        return 0;
    const int64_t floats =
        std::max(lay_out(plan.dy, a, a.N, copies_of(a)).end, lay_out(plan.x, a, a.K, {}).end);
    return static_cast<size_t>(floats) * sizeof(float);
}

int lora_grads_room(cudaStream_t stream) {
    using Dy = GradPlan<16, true>;
    using X = GradPlan<16, false>;
    static Answers answers;
    const int found = once_per_whole_device(answers, stream, [] {
        const auto kernel = lora_grads_both_kernel<__nv_bfloat16, Dy, X>;
        return 1 + clusters_at_once(
                       reinterpret_cast<const void*>(kernel), kBesideCluster, kGradThreads,
                       Dy::kSmemBytes);
    });
    return kBesideCluster * std::max(0, found - 1);
}

// The 16-bit type and the padded rank of a call as template arguments.
#define LOWBIT_LAUNCH(FUNCTION, ...)                                                               \
    const bool is_bf16 = args.dtype == Dtype::kBFloat16;                                           \
    switch (lora_columns(args.r)) {                                                                \
    case 16:                                                                                       \
        return is_bf16 ? FUNCTION<__nv_bfloat16, 16>(__VA_ARGS__)                                  \
                       : FUNCTION<__half, 16>(__VA_ARGS__);                                        \
    case 32:                                                                                       \
        return is_bf16 ? FUNCTION<__nv_bfloat16, 32>(__VA_ARGS__)                                  \
                       : FUNCTION<__half, 32>(__VA_ARGS__);                                        \
    default:                                                                                       \
        return is_bf16 ? FUNCTION<__nv_bfloat16, 64>(__VA_ARGS__)                                  \
                       : FUNCTION<__half, 64>(__VA_ARGS__);                                        \
    }

cudaError_t
launch_lora_grads(const LoraGradsArgs& args, const LoraGradsPlan& plan, cudaStream_t stream) {
    if (args.M == 0 || args.N == 0)
        return cudaSuccess;
    LOWBIT_LAUNCH(launch, args, plan, stream)
}

cudaError_t launch_lora_grads_x(const LoraGradsArgs& args, cudaStream_t stream) {
    if (args.M == 0 || args.K == 0)
        return cudaSuccess;
    LOWBIT_LAUNCH(launch_x, args, stream)
}

#undef LOWBIT_LAUNCH

}  // namespace lowbit::cuda
