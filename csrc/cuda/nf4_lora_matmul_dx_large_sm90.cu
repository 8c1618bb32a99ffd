// The gradient of a 4-bit linear layer's input for many tokens: each weight is decoded once per
// wave of tiles, not once per tile.
//
//     dx[m, k] = sum_n dy[m, n] W[n, k] + sum_j u[m, j] lora_A[j, k]        (+ dx[m, k])
//
// Operands: see nf4_lora_matmul_dx.h and weight.h (flat). W enters as RN_T(codebook[q] * absmax), T
// = bf16 or fp16, the same bits as dequantization gives. Accumulates in fp32 and rounds once; on
// request the result is added to what is in dx, which rounds once more, as another pass would.
// Every sum has a fixed order.
//
// The persistent kernel of nf4_lora_matmul_large_kernel.cuh with columns of W for rows and rows of
// W as what the sums run along: a decoded block of 64 codes is a line along the output, and wgmma
// reads it transposed. Decoding puts the scales in, so that they may vary along the sums. The
// low-rank term is one more step, [dy | u] [W | lora_A], with lora_A as it is. Bound by the tensor
// cores, that is by the power limit.
//
// launch_nf4_lora_backward_large has the same kernel make u = s dy lora_B, in jobs in front of each
// group of tiles, and beside dx the gradients of both factors: nf4_lora_matmul_large_grads.cuh.
//
// Callers have checked serves_nf4_lora_matmul_dx_large or serves_nf4_lora_backward_large.

#include "lora_factors.cuh"
#include "lora_grads.h"
#include "nf4_lora_matmul_dx_large.h"
#include "nf4_lora_matmul_large_launch.cuh"

namespace lowbit::cuda {
namespace {

// Before the main kernel: _prepare.cuh, with a fp32 lora_A in 16 bits, and lora_B transposed.
template <typename T>
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(
    const __grid_constant__ Params p,
    const Wave range,  // the first with tiles
    const T* dy,       // [M, N]
    const __grid_constant__ FactorCopy lora_A,
    const __grid_constant__ FactorCopy lora_B,
    uint4* ring) {
    let_next_kernel_start();
    if (starts_ring(p.plan)) {
        start_ring<T, DxProduct>(p, range, dy, ring);
        return;
    }
    const CopyShare share(p.plan);
    if (share.first < lora_B.rows)
        prefetch_row(lora_B, share.first);
    wait_for_previous_kernel();
    for (int64_t row = share.first; row < lora_B.rows; row += share.stride)
        copy_row_transposed<T, kGradRanks>(lora_B, row);
    for (int64_t i = share.first; i < lora_A.rows * lora_A.columns; i += share.stride)
        copy_element<T>(lora_A, i);
}

bool rounds_lora_A(const LoraDxArgs& a) {
    return a.r > 0 && a.lora_A_dtype == Dtype::kFloat32;
}

// What lies behind that of nf4_lora_matmul_large_launch.cuh, 256-byte aligned.
struct DxWorkspace : Workspace {
    int64_t lora_B, u_transposed;
    int64_t d_A_parts, d_B_parts;
};

// `grads`: null where u is an input.
DxWorkspace lay_out(const LoraDxArgs& a, const LoraGradsArgs* grads, const Plan& plan) {
    const int64_t factor_bytes = rounds_lora_A(a) ? int64_t{2} * a.r * a.w.K : 0;
    DxWorkspace space{lay_out(plan, 0, factor_bytes), 0, 0, 0, 0};
    if (grads == nullptr)
        return space;
    const int64_t parts = int64_t{groups(plan)} * plan.strip_parts;
    const bool makes_A = plan.strips > 0, makes_B = grads->d_lora_B != nullptr;
    auto place = [&](int64_t& part, int64_t bytes) {
        part = space.end;
        space.end += ceil_div(bytes, 256) * 256;
    };
    place(space.lora_B, kGradRanks * a.w.N * 2);
    place(space.u_transposed, makes_A ? kGradRanks * plan.token_tiles * kTileTokens * 2 : 0);
    place(space.d_A_parts, parts * plan.strips * kStripSums * kStripFloats * 4);
    place(space.d_B_parts, makes_B ? largest_group(plan) * a.w.N * kGradRanks * 4 : 0);
    return space;
}

constexpr int64_t kMaxWorkspaceBytes = 32 << 20;

// d_lora_A in as many parts as there are tiles and memory for.
Plan plan_of(const LoraDxArgs& a, const LoraGradsArgs* grads, int clusters) {
    const Plan plan = make_plan(a.M, a.w.K, a.w.N, a.r, grads != nullptr, clusters);
    if (grads == nullptr || grads->d_lora_A == nullptr)
        return plan;
    for (int strip_parts = 2; strip_parts > 0; strip_parts--) {
        Plan with_riders = plan;
        add_riders(with_riders, strip_parts);
        if (with_riders.strips > 0 &&
            lay_out(a, grads, with_riders).end + a.M * kGradRanks * 2 <= kMaxWorkspaceBytes)
            return with_riders;
    }
    return plan;
}

FactorGradients gradients_of(const LoraGradsArgs& a, const DxWorkspace& space, uint8_t* base) {
    FactorGradients g{};
    g.z = a.d_lora_B != nullptr ? a.z : nullptr;
    g.u_transposed = base + space.u_transposed;
    g.d_A_parts = reinterpret_cast<float*>(base + space.d_A_parts);
    g.d_B_parts = reinterpret_cast<float*>(base + space.d_B_parts);
    g.d_lora_A = a.d_lora_A;
    g.d_lora_B = a.d_lora_B;
    g.d_A_is_float = a.lora_A_dtype == Dtype::kFloat32;
    g.d_B_is_float = a.lora_B_dtype == Dtype::kFloat32;
    return g;
}

template <typename T>
cudaError_t
launch(const LoraDxArgs& a, const LoraGradsArgs* grads, const Plan& plan, cudaStream_t stream) {
    const DxWorkspace space = lay_out(a, grads, plan);
    auto* base = static_cast<uint8_t*>(a.workspace);
    Params p{};
    p.plan = plan;
    p.w = a.w;
    p.y = a.dx;
    p.adds = a.adds;
    FactorCopy lora_B{};
    if (grads != nullptr) {
        p.lora_scaling = grads->lora_scaling;
        p.scaling = grads->scaling;
        p.z_scaled = grads->u;
        p.gradients = gradients_of(*grads, space, base);
        lora_B = {grads->lora_B, grads->lora_B_dtype == Dtype::kFloat32,
                  a.w.N,         a.r,
                  kGradRanks,    base + space.lora_B};
    }
    place_counters(p, base);

    TensorMaps maps{};
    const bool rounds = rounds_lora_A(a);
    bool ok = make_map(maps.x, a.dtype, a.dy, a.M, plan.depth, kCtaTokens) &&
              make_ring_maps(maps, a.dtype, plan, base + space.ring);
    if (a.r > 0)
        ok =
            ok && make_map(maps.z, a.dtype, a.u, a.M, lora_columns(a.r), kCtaTokens) &&
            make_map(maps.lora_A, a.dtype, rounds ? base + space.factor : a.lora_A, a.r, a.w.K, 64);
    if (grads != nullptr)
        ok = ok && make_map(maps.lora_B, a.dtype, lora_B.to, kGradRanks, a.w.N, kGradRanks);
    if (plan.strips > 0)
        ok = ok && make_map(maps.layer_x, a.dtype, grads->x, a.M, a.w.K, kCtaTokens) &&
             make_map(
                 maps.u_transposed, a.dtype, base + space.u_transposed, kGradRanks,
                 plan.token_tiles * kTileTokens, kGradRanks);
    if (!ok)
        return cudaErrorInvalidValue;

    const FactorCopy copy{a.lora_A, true, rounds ? a.r : 0, a.w.K, a.w.K, base + space.factor};
    const Wave range = locate_wave(plan, plan.start);
    const dim3 grid = prepare_grid(plan, range, std::max(lora_B.rows, copy.rows * copy.columns));
    cudaError_t error = allow_shared_memory<prepare_kernel<T>>(kPrepareSmemBytes);
    if (error != cudaSuccess)
        return error;
    const LaunchConfig prepare(grid, kPrepareThreads, prepare_smem_bytes(plan, grid), stream);
    error = cudaLaunchKernelEx(
        prepare.get(), prepare_kernel<T>, p, range, static_cast<const T*>(a.dy), copy, lora_B,
        reinterpret_cast<uint4*>(base + space.ring));
    return error == cudaSuccess ? launch_main<T, DxProduct>(maps, p, stream) : error;
}

// d_lora_A by a pass over x of its own.
bool reads_x_later(const LoraGradsArgs* grads, const Plan& plan) {
    return grads != nullptr && grads->d_lora_A != nullptr && plan.strips == 0;
}

size_t workspace_bytes(const LoraDxArgs& a, const LoraGradsArgs* grads) {
    const int clusters = resident_clusters<DxProduct>();
    if (a.M == 0 || clusters == 0)
        return 0;
    const Plan plan = plan_of(a, grads, clusters);
    const auto bytes = static_cast<size_t>(lay_out(a, grads, plan).end);
    if (!reads_x_later(grads, plan))
        return bytes;
    return std::max(bytes, lora_grads_workspace_bytes(*grads, plan_lora_grads(*grads)));
}

cudaError_t launch(const LoraDxArgs& a, const LoraGradsArgs* grads, cudaStream_t stream) {
    if (a.M == 0)
        return cudaSuccess;
    const int clusters = resident_clusters<DxProduct>();
    if (clusters == 0)
        return cudaErrorNotSupported;
    const Plan plan = plan_of(a, grads, clusters);
    const cudaError_t error = a.dtype == Dtype::kBFloat16
                                  ? launch<__nv_bfloat16>(a, grads, plan, stream)
                                  : launch<__half>(a, grads, plan, stream);
    if (error == cudaSuccess && reads_x_later(grads, plan))
        return launch_lora_grads_x(*grads, stream);
    return error;
}

}  // namespace

bool serves_nf4_lora_matmul_dx_large(const LoraDxArgs& a) {
    const WeightView& w = a.w;
    return a.dtype != Dtype::kFloat32 &&
           (a.lora_A_dtype == a.dtype || a.lora_A_dtype == Dtype::kFloat32) && w.flat && w.N > 0 &&
           w.N <= (1 << 20) && w.N % 8 == 0 && w.K > 0 && w.K <= (1 << 20) && w.K % kLine == 0 &&
           w.blocksize_log2 >= 6 && a.r <= 64 && a.M <= (1 << 19) && is_aligned(a.dy) &&
           is_aligned(a.u) && is_aligned(a.lora_A) && is_aligned(a.dx) && is_aligned(w.qweight) &&
           resident_clusters<DxProduct>() > 0 && tensor_map_encoder() != nullptr &&
           static_cast<int64_t>(workspace_bytes(a, nullptr)) <= kMaxWorkspaceBytes;
}

size_t nf4_lora_matmul_dx_large_workspace_bytes(const LoraDxArgs& a) {
    return workspace_bytes(a, nullptr);
}

cudaError_t launch_nf4_lora_matmul_dx_large(const LoraDxArgs& a, cudaStream_t stream) {
    return launch(a, nullptr, stream);
}

bool serves_nf4_lora_backward_large(const LoraDxArgs& a, const LoraGradsArgs& grads) {
    const int64_t u_bytes = a.M * kGradRanks * 2;
    return a.r > 0 && a.r <= kGradRanks && grads.d_bias == nullptr &&
           grads.d_lora_scaling == nullptr && serves_nf4_lora_matmul_dx_large(a) &&
           static_cast<int64_t>(workspace_bytes(a, &grads)) + u_bytes <= kMaxWorkspaceBytes;
}

size_t nf4_lora_backward_large_workspace_bytes(const LoraDxArgs& a, const LoraGradsArgs& grads) {
    return workspace_bytes(a, &grads);
}

cudaError_t launch_nf4_lora_backward_large(
    const LoraDxArgs& a, const LoraGradsArgs& grads, cudaStream_t stream) {
    return launch(a, &grads, stream);
}

}  // namespace lowbit::cuda
