// Many tokens through a 4-bit linear layer with a low-rank update: dense wgmma speed from a 4-bit
// weight.
//
//     y[m, n] = sum_k x[m, k] W[n, k] + sum_j s_j z[m, j] lora_B[n, j] + bias[n],  z = x lora_A^T
//
// Operands: see nf4_lora_matmul.h and weight.h (flat). W enters as RN_T(codebook[q] * absmax), T =
// bf16 or fp16, the same bits as dequantization gives. Accumulates in fp32; s_j z is rounded to T;
// y is rounded once. Sums run in a fixed order.
//
// A short launch (counters, the first chunks of W), then the persistent kernel of
// nf4_lora_matmul_large_kernel.cuh. The low-rank term is one more step of the contraction, [x | s
// z] [W | lora_B]^T. z itself comes from extra tiles, 256 tokens by r columns, in front of the
// tiles of y that read the same x. Bound by the tensor cores, that is by the power limit.
//
// Callers have checked serves_nf4_lora_matmul_large.

#include "nf4_lora_matmul_large.h"
#include "nf4_lora_matmul_large_launch.cuh"

namespace lowbit::cuda {
namespace {

// Before the main kernel: _prepare.cuh, with z scaled and padded, and lora_B padded.
template <typename T>
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(
    const __grid_constant__ Params p,
    const Wave range,  // the first with tiles
    const T* x,        // [M, K]
    const T* z_in,     // [M, rank] or null
    const T* lora_B,   // [N, rank] or null: no copy
    T* lora_B_padded,  // [N, rank_columns]
    uint4* ring) {
    const Plan& plan = p.plan;
    let_next_kernel_start();
    if (starts_ring(plan)) {
        start_ring<T, ForwardProduct>(p, range, x, ring);
        return;
    }
    wait_for_previous_kernel();
    const CopyShare share(plan);
    const int columns_log2 = plan.rank_columns == 16 ? 4 : 6;
    if (z_in != nullptr) {
        T* z_scaled = static_cast<T*>(p.z_scaled);
        for (int i = share.first; i < plan.M << columns_log2; i += share.stride) {
            const int token = i >> columns_log2, column = i % plan.rank_columns;
            const float z = column < plan.rank ? to_float(z_in[token * plan.rank + column]) : 0.0f;
            z_scaled[i] = from_float<T>(z * column_scale(p, column));
        }
    }
    if (lora_B != nullptr) {
        for (int i = share.first; i < plan.rows << columns_log2; i += share.stride) {
            const int n = i >> columns_log2, column = i % plan.rank_columns;
            lora_B_padded[i] =
                column < plan.rank ? lora_B[n * plan.rank + column] : from_float<T>(0.0f);
        }
    }
}

Plan plan_of(const LoraMatmulArgs& args, int clusters) {
    const bool makes_z = args.r > 0 && args.z_in == nullptr;
    return make_plan(args.M, args.w.N, args.w.K, args.r, makes_z, clusters);
}

// TMA takes rows of a multiple of 16 bytes.
bool pads_lora_B(const Plan& plan) {
    return plan.rank % 8 != 0;
}

Workspace lay_out(const Plan& plan) {
    const int64_t row_bytes = int64_t{plan.rank_columns} * 2;
    return lay_out(plan, plan.M * row_bytes, pads_lora_B(plan) ? plan.rows * row_bytes : 0);
}

template <typename T>
cudaError_t launch(const LoraMatmulArgs& args, const Plan& plan, cudaStream_t stream) {
    const Workspace space = lay_out(plan);
    auto* base = static_cast<uint8_t*>(args.workspace);
    Params p{};
    p.plan = plan;
    p.w = args.w;
    p.bias = args.bias;
    p.y = args.y;
    p.lora_scaling = args.lora_scaling;
    p.scaling = args.scaling;
    p.z_scaled = base + space.z_scaled;
    p.z_out = args.z_out;
    place_counters(p, base);

    TensorMaps maps{};
    const Dtype dtype = args.dtype;
    const bool pads = pads_lora_B(plan);
    bool ok = make_map(maps.x, dtype, args.x, args.M, plan.depth, kCtaTokens) &&
              make_ring_maps(maps, dtype, plan, base + space.ring);
    if (plan.z_depth > 0)
        ok = ok &&
             make_map(maps.lora_A, dtype, args.lora_A, plan.rank, plan.depth, plan.rank_columns);
    if (plan.rank > 0) {
        const void* b = pads ? base + space.factor : args.lora_B;
        const int columns = pads ? plan.rank_columns : plan.rank;
        ok = ok && make_map(maps.lora_B, dtype, b, plan.rows, columns, kCtaRows) &&
             make_map(maps.z, dtype, p.z_scaled, args.M, plan.rank_columns, kCtaTokens);
    }
    if (!ok)
        return cudaErrorInvalidValue;

    const Wave range = locate_wave(plan, plan.start);
    const void* z_in = args.r > 0 ? args.z_in : nullptr;
    const int64_t copied_rows =
        std::max<int64_t>(z_in != nullptr ? args.M : 0, pads ? plan.rows : 0);
    const dim3 grid = prepare_grid(plan, range, copied_rows * plan.rank_columns);
    cudaError_t error = allow_shared_memory<prepare_kernel<T>>(kPrepareSmemBytes);
    if (error != cudaSuccess)
        return error;
    const LaunchConfig prepare(grid, kPrepareThreads, prepare_smem_bytes(plan, grid), stream);
    error = cudaLaunchKernelEx(
        prepare.get(), prepare_kernel<T>, p, range, static_cast<const T*>(args.x),
        static_cast<const T*>(z_in), static_cast<const T*>(pads ? args.lora_B : nullptr),
        reinterpret_cast<T*>(base + space.factor), reinterpret_cast<uint4*>(base + space.ring));
    return error == cudaSuccess ? launch_main<T, ForwardProduct>(maps, p, stream) : error;
}

}  // namespace

bool serves_nf4_lora_matmul_large(const LoraMatmulArgs& args) {
    const WeightView& w = args.w;
    constexpr int64_t kLimit = 1 << 30;  // sizes are int on the device
    constexpr size_t kWorkspaceLimit = 32 << 20;
    return w.flat && w.K >= kStepDepth && w.K % kStepDepth == 0 && w.N % 16 == 0 && w.N > 0 &&
           w.blocksize_log2 >= 6 && args.r <= 64 && args.dtype != Dtype::kFloat32 &&
           args.M < kLimit && w.N < kLimit && w.K < kLimit &&
           ceil_div(args.M, kTileTokens) * ceil_div(w.N, kPanelRows) < kLimit &&
           is_aligned(args.x) && is_aligned(args.y) && is_aligned(w.qweight) &&
           is_aligned(args.lora_A) && is_aligned(args.lora_B) &&
           resident_clusters<ForwardProduct>() > 0 && tensor_map_encoder() != nullptr &&
           nf4_lora_matmul_large_workspace_bytes(args) <= kWorkspaceLimit;
}

size_t nf4_lora_matmul_large_workspace_bytes(const LoraMatmulArgs& args) {
    const int clusters = resident_clusters<ForwardProduct>();
    if (args.M == 0 || clusters == 0)
        return 0;
    return static_cast<size_t>(lay_out(plan_of(args, clusters)).end);
}

cudaError_t launch_nf4_lora_matmul_large(const LoraMatmulArgs& args, cudaStream_t stream) {
    if (args.M == 0)
        return cudaSuccess;
    const int clusters = resident_clusters<ForwardProduct>();
    if (clusters == 0)
        return cudaErrorNotSupported;
    const Plan plan = plan_of(args, clusters);
    return args.dtype == Dtype::kBFloat16 ? launch<__nv_bfloat16>(args, plan, stream)
                                          : launch<__half>(args, plan, stream);
}

}  // namespace lowbit::cuda
