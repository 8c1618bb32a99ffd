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
// Callers have checked serves_nf4_lora_matmul_dx_large.

#include "lora_factors.cuh"
#include "lora_grads.h"
#include "nf4_lora_matmul_dx_large.h"
#include "nf4_lora_matmul_large_launch.cuh"

namespace lowbit::cuda {
namespace {

// Before the main kernel: the ring's first chunks, and a 16-bit copy of an fp32 lora_A.
template <typename T>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(const Params p, const __grid_constant__ FactorCopy lora_A, uint4* ring) {
    const int first = blockIdx.x * kPrepareThreads + threadIdx.x;
    const int stride = gridDim.x * kPrepareThreads;
    start_ring<T, DxProduct>(p, ring, first, stride);
    for (int64_t i = first; i < lora_A.rows * lora_A.columns; i += stride)
        copy_element<T>(lora_A, i);
}

Plan plan_of(const LoraDxArgs& a, int clusters) {
    return make_plan(a.M, a.w.K, a.w.N, a.r, false, clusters);
}

bool rounds_lora_A(const LoraDxArgs& a) {
    return a.r > 0 && a.lora_A_dtype == Dtype::kFloat32;
}

Workspace lay_out(const LoraDxArgs& a, const Plan& plan) {
    return lay_out(plan, 0, rounds_lora_A(a) ? int64_t{2} * a.r * a.w.K : 0);
}

template <typename T>
cudaError_t launch(const LoraDxArgs& a, const Plan& plan, cudaStream_t stream) {
    const Workspace space = lay_out(a, plan);
    auto* base = static_cast<uint8_t*>(a.workspace);
    Params p{};
    p.plan = plan;
    p.w = a.w;
    p.y = a.dx;
    p.adds = a.adds;
    place_counters(p, base);

    TensorMaps maps{};
    const bool rounds = rounds_lora_A(a);
    bool ok = make_map(maps.x, a.dtype, a.dy, a.M, plan.depth, kCtaTokens) &&
              make_ring_maps(maps, a.dtype, plan, base + space.ring);
    if (a.r > 0)
        ok =
            ok && make_map(maps.z, a.dtype, a.u, a.M, lora_columns(a.r), kCtaTokens) &&
            make_map(maps.lora_A, a.dtype, rounds ? base + space.factor : a.lora_A, a.r, a.w.K, 64);
    if (!ok)
        return cudaErrorInvalidValue;

    const FactorCopy copy{a.lora_A, true, rounds ? a.r : 0, a.w.K, a.w.K, base + space.factor};
    const LaunchConfig prepare(prepare_ctas(plan), kPrepareThreads, 0, stream);
    const cudaError_t error = cudaLaunchKernelEx(
        prepare.get(), prepare_kernel<T>, p, copy, reinterpret_cast<uint4*>(base + space.ring));
    return error == cudaSuccess ? launch_main<T, DxProduct>(maps, p, stream) : error;
}

}  // namespace

bool serves_nf4_lora_matmul_dx_large(const LoraDxArgs& a) {
    constexpr size_t kMaxWorkspaceBytes = 32 << 20;
    const WeightView& w = a.w;
    return a.dtype != Dtype::kFloat32 &&
           (a.lora_A_dtype == a.dtype || a.lora_A_dtype == Dtype::kFloat32) && w.flat && w.N > 0 &&
           w.N <= (1 << 20) && w.N % 8 == 0 && w.K > 0 && w.K <= (1 << 20) && w.K % kLine == 0 &&
           w.blocksize_log2 >= 6 && a.r <= 64 && a.M <= (1 << 19) && is_aligned(a.dy) &&
           is_aligned(a.u) && is_aligned(a.lora_A) && is_aligned(a.dx) && is_aligned(w.qweight) &&
           resident_clusters<DxProduct>() > 0 && tensor_map_encoder() != nullptr &&
           nf4_lora_matmul_dx_large_workspace_bytes(a) <= kMaxWorkspaceBytes;
}

size_t nf4_lora_matmul_dx_large_workspace_bytes(const LoraDxArgs& a) {
    const int clusters = resident_clusters<DxProduct>();
    if (a.M == 0 || clusters == 0)
        return 0;
    return static_cast<size_t>(lay_out(a, plan_of(a, clusters)).end);
}

cudaError_t launch_nf4_lora_matmul_dx_large(const LoraDxArgs& a, cudaStream_t stream) {
    if (a.M == 0)
        return cudaSuccess;
    const int clusters = resident_clusters<DxProduct>();
    if (clusters == 0)
        return cudaErrorNotSupported;
    const Plan plan = plan_of(a, clusters);
    return a.dtype == Dtype::kBFloat16 ? launch<__nv_bfloat16>(a, plan, stream)
                                       : launch<__half>(a, plan, stream);
}

}  // namespace lowbit::cuda
