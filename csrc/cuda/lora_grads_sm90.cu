// The skinny products of the backward pass of a low-rank adapter, deterministic, sm_90a.
//
//     u[m, j] = s_j sum_n dy[m, n] lora_B[n, j]        s_j = scaling * lora_scaling[j]
//     d_lora_B[n, j] = s_j sum_m dy[m, n] z[m, j]      d_bias[n] = sum_m dy[m, n]
//     d_lora_scaling[j] = scaling * sum_m (dy lora_B)[m, j] z[m, j]
//     d_lora_A[j, k] = sum_m u[m, j] x[m, k]
//
// dy [M, N], x [M, K], z [M, r], u [M, 16, 32 or 64], d_bias [N]: one 16-bit dtype T, row-major;
// lora_B and d_lora_B [N, r], d_lora_A [r, K] in T or fp32, lora_B rounded to T for the products;
// d_lora_scaling fp32.
// Sums in fp32 in an order fixed by the shapes and the number of SMs; each result is rounded once.
// u is rounded before it enters d_lora_A and dx.
//
// One launch for dy and one for x: products over rectangles, at most one per SM, with partial sums
// into the workspace (lora_grads_tile.cuh), and after a grid barrier a sum over the parts in order
// (lora_grads_finish.cuh). With more rectangles than SMs the sums are a launch of their own.
// d_lora_scaling needs no u: it is scaling * sum_n lora_B[n, j] (dy^T z)[n, j]. Where the workspace
// would exceed its limit the tokens are cut into passes, which add to the sums of features before
// them.
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

// ---- launch -------------------------------------------------------------------------------------

// One pass over the tokens of g: the product, and what is made of its sums.
template <typename T, class P>
cudaError_t launch_pass(
    const GradMaps& maps, GradParams g, FinishParams f, const Division& d, cudaStream_t stream) {
    constexpr auto kKernel = lora_grads_kernel<T, P>;
    cudaError_t error = allow_shared_memory<kKernel>(P::kSmemBytes);
    if (error != cudaSuccess)
        return error;
    const bool has_features = f.sums != nullptr || f.column_sums != nullptr;
    f.units = f.projection_units + (has_features ? finish_units(f.C * f.columns) : 0);
    const dim3 grid(
        static_cast<unsigned>(d.column_parts),
        static_cast<unsigned>(ceil_div(f.tokens, d.cta_tokens)));
    g.finishes = grid.x * grid.y <= static_cast<unsigned>(sm_count());
    LaunchConfig config(grid, kGradThreads, P::kSmemBytes, stream);
    if (g.finishes)
        config.cooperative();
    error = cudaLaunchKernelEx(config.get(), kKernel, maps, g, f);
    if (error != cudaSuccess || g.finishes)
        return error;
    LaunchConfig finish(static_cast<unsigned>(f.units), kFinishThreads, 0, stream);
    return cudaLaunchKernelEx(finish.get(), finish_kernel<T>, f);
}

template <typename T, int kRank>
cudaError_t launch_dy(const LoraGradsArgs& a, cudaStream_t stream) {
    using P = GradPlan<kRank, true>;
    const Copies copies = copies_of(a);
    const Division d = divide<P>(a, a.N, a.u != nullptr, copies, sm_count());
    const Workspace space = lay_out(d, a, a.N, copies);
    float* base = static_cast<float*>(a.workspace);
    const bool wants_sums =
        a.z != nullptr && (a.d_lora_B != nullptr || a.d_lora_scaling != nullptr);

    void *z = base + space.z, *lora_B = base + space.lora_B;
    cudaError_t error = cudaSuccess;
    if (copies.z || copies.lora_B)
        error = copy_factors<T>(
            {a.z, false, copies.z ? a.M : 0, a.r, kRank, z},
            {a.lora_B, a.lora_B_dtype != a.dtype, copies.lora_B ? a.N : 0, a.r, kRank, lora_B},
            stream);
    const CUtensorMapDataType type = tensor_map_type(a.dtype);
    GradMaps maps{};
    if (error == cudaSuccess)
        error = make_tensor_map(maps.g, type, a.dy, a.M, a.N, {kStageTokens, kBoxColumns});
    if (error == cudaSuccess && wants_sums)
        error = make_tensor_map(
            maps.t, type, copies.z ? z : a.z, a.M, copies.z ? kRank : a.r, {kStageTokens, kRank});
    if (error == cudaSuccess && a.u != nullptr)
        error = make_tensor_map(
            maps.f, type, copies.lora_B ? lora_B : a.lora_B, a.N, copies.lora_B ? kRank : a.r,
            {P::kColumns, kRank});

    for (int pass = 0; pass < d.passes && error == cudaSuccess; pass++) {
        const int64_t first = pass * d.pass_tokens, end = std::min(a.M, first + d.pass_tokens);
        GradParams g{};
        g.C = static_cast<int>(a.N);
        g.first_token = static_cast<int>(first), g.end_token = static_cast<int>(end);
        g.cta_columns = static_cast<int>(d.cta_columns);
        g.cta_tokens = static_cast<int>(d.cta_tokens);
        g.wants_projection = a.u != nullptr;
        g.wants_sums = wants_sums;
        g.wants_column_sums = a.d_bias != nullptr;
        g.projection = base + space.projection;
        g.sums = base + space.sums;
        g.column_sums = base + space.column_sums;
        FinishParams f{};
        f.columns = kRank, f.r = a.r;
        f.lora_scaling = a.lora_scaling, f.scaling = a.scaling;
        f.tokens = end - first, f.first_token = first, f.end_token = end;
        if (a.u != nullptr) {
            f.projection = g.projection;
            f.projection_parts = static_cast<int>(d.column_parts);
            f.projection_units = finish_units(f.tokens * kRank);
        }
        f.sums = wants_sums ? g.sums : nullptr;
        f.parts = static_cast<int>(ceil_div(f.tokens, d.cta_tokens));
        f.C = a.N;
        f.running_sums = base + space.running_sums;
        f.first_pass = pass == 0, f.last_pass = pass == d.passes - 1;
        f.scales_sums = true;
        f.stride_c = a.r, f.stride_j = 1;
        f.column_sums = a.d_bias != nullptr ? g.column_sums : nullptr;
        f.running_column_sums = base + space.running_column_sums;
        f.scaling_parts = wants_sums && a.d_lora_scaling ? base + space.scaling_parts : nullptr;
        f.lora_B = a.lora_B;
        f.lora_B_is_float = a.lora_B_dtype == Dtype::kFloat32;
        f.u = a.u;
        f.out = a.d_lora_B, f.out_is_float = a.lora_B_dtype == Dtype::kFloat32;
        f.d_bias = a.d_bias;
        error = launch_pass<T, P>(maps, g, f, d, stream);
    }
    if (error != cudaSuccess || !wants_sums || a.d_lora_scaling == nullptr)
        return error;
    LaunchConfig config(1, kFinishThreads, 0, stream);
    return cudaLaunchKernelEx(
        config.get(), finish_scaling_kernel, static_cast<const float*>(base + space.scaling_parts),
        finish_units(a.N * kRank), kRank, a.r, a.scaling, a.d_lora_scaling);
}

template <typename T, int kRank>
cudaError_t launch_x(const LoraGradsArgs& a, cudaStream_t stream) {
    using P = GradPlan<kRank, false>;
    const Division d = divide<P>(a, a.K, false, {}, sm_count());
    const Workspace space = lay_out(d, a, a.K, {});
    float* base = static_cast<float*>(a.workspace);
    const CUtensorMapDataType type = tensor_map_type(a.dtype);
    GradMaps maps{};
    cudaError_t error = make_tensor_map(maps.g, type, a.x, a.M, a.K, {kStageTokens, kBoxColumns});
    if (error == cudaSuccess)
        error = make_tensor_map(maps.t, type, a.u, a.M, kRank, {kStageTokens, kRank});
    for (int pass = 0; pass < d.passes && error == cudaSuccess; pass++) {
        const int64_t first = pass * d.pass_tokens, end = std::min(a.M, first + d.pass_tokens);
        GradParams g{};
        g.C = static_cast<int>(a.K);
        g.first_token = static_cast<int>(first), g.end_token = static_cast<int>(end);
        g.cta_columns = static_cast<int>(d.cta_columns);
        g.cta_tokens = static_cast<int>(d.cta_tokens);
        g.wants_sums = true;
        g.sums = base + space.sums;
        FinishParams f{};
        f.columns = kRank, f.r = a.r;
        f.tokens = end - first;
        f.sums = g.sums;
        f.parts = static_cast<int>(ceil_div(f.tokens, d.cta_tokens));
        f.C = a.K;
        f.running_sums = base + space.running_sums;
        f.first_pass = pass == 0, f.last_pass = pass == d.passes - 1;
        f.stride_c = 1, f.stride_j = a.K;
        f.out = a.d_lora_A, f.out_is_float = a.lora_A_dtype == Dtype::kFloat32;
        error = launch_pass<T, P>(maps, g, f, d, stream);
    }
    return error;
}

template <int kRank>
size_t workspace_bytes(const LoraGradsArgs& a, int processors) {
    const Copies copies = copies_of(a);
    const Division dy = divide<GradPlan<kRank, true>>(a, a.N, a.u != nullptr, copies, processors);
    const Division x = divide<GradPlan<kRank, false>>(a, a.K, false, {}, processors);
    const int64_t floats = std::max(lay_out(dy, a, a.N, copies).end, lay_out(x, a, a.K, {}).end);
    return static_cast<size_t>(floats) * sizeof(float);
}

}  // namespace

bool serves_lora_grads(const LoraGradsArgs& a) {
    constexpr int64_t kLimit = 1 << 30;  // sizes are int on the device
    const auto is_master = [&](Dtype t) { return t == a.dtype || t == Dtype::kFloat32; };
    return a.dtype != Dtype::kFloat32 && is_master(a.lora_A_dtype) && is_master(a.lora_B_dtype) &&
           a.r >= 1 && a.r <= 64 && a.N % 8 == 0 && a.K % 8 == 0 && a.M < kLimit && a.N < kLimit &&
           a.K < kLimit && is_aligned(a.dy) && is_aligned(a.x) && is_aligned(a.z) &&
           is_aligned(a.lora_B) && is_aligned(a.u) && device_is_sm90();
}

size_t lora_grads_workspace_bytes(const LoraGradsArgs& a) {
    const int processors = sm_count();
    if (a.M == 0 || processors == 0)
        return 0;
    switch (lora_columns(a.r)) {
    case 16:
        return workspace_bytes<16>(a, processors);
    case 32:
        return workspace_bytes<32>(a, processors);
    default:
        return workspace_bytes<64>(a, processors);
    }
}

// The 16-bit type and the padded rank of a call as template arguments.
#define LOWBIT_LAUNCH(FUNCTION)                                                                    \
    const bool is_bf16 = args.dtype == Dtype::kBFloat16;                                           \
    switch (lora_columns(args.r)) {                                                                \
    case 16:                                                                                       \
        return is_bf16 ? FUNCTION<__nv_bfloat16, 16>(args, stream)                                 \
                       : FUNCTION<__half, 16>(args, stream);                                       \
    case 32:                                                                                       \
        return is_bf16 ? FUNCTION<__nv_bfloat16, 32>(args, stream)                                 \
                       : FUNCTION<__half, 32>(args, stream);                                       \
    default:                                                                                       \
        return is_bf16 ? FUNCTION<__nv_bfloat16, 64>(args, stream)                                 \
                       : FUNCTION<__half, 64>(args, stream);                                       \
    }

cudaError_t launch_lora_grads_dy(const LoraGradsArgs& args, cudaStream_t stream) {
    if (args.M == 0 || args.N == 0)
        return cudaSuccess;
    LOWBIT_LAUNCH(launch_dy)
}

cudaError_t launch_lora_grads_x(const LoraGradsArgs& args, cudaStream_t stream) {
    if (args.M == 0 || args.K == 0)
        return cudaSuccess;
    LOWBIT_LAUNCH(launch_x)
}

#undef LOWBIT_LAUNCH

}  // namespace lowbit::cuda
