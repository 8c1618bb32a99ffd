// z = x lora_A^T for the low-rank term, deterministic, sm_90: see lora_project_tile.cuh.
//
// On all SMs, before the product that wants it. Clusters have eight CTAs where the device can hold
// such; up to eight divide K.
//
// Bound by what an SM takes in: per 256 tokens and 1024 of K 640 KB at rank 64, 544 KB at 16, at 95
// and 115 bytes in a nanosecond. 7 to 8 us for 256 to 1024 tokens (K 4096, rank 64; H200, 2026-11).
// Callers have checked shapes, dtypes and alignment.

#include "lora_project.h"

#include "launch_config.h"
#include "lora_project_tile.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kMostWarpgroups = 4;
constexpr int kMostThreads = kMostWarpgroups * projection::kWarpgroup + kWarpSize;
constexpr int kScaleThreads = 256;

template <typename T, int kColumns>
__global__ void __launch_bounds__(kMostThreads, 1)
    project_kernel(const __grid_constant__ projection::Params p) {
    extern __shared__ uint8_t smem_raw[];
    wait_for_previous_kernel();
    let_next_kernel_start();
    projection::project<T, kColumns, kMostWarpgroups>(p, smem_raw, nullptr);
}

// z computed elsewhere: scaled and padded only.
template <typename T>
__global__ void __launch_bounds__(kScaleThreads) scale_kernel(
    const T* z_in,              // [M, r]
    const float* lora_scaling,  // [r] or null
    const float scaling,
    const int count,  // M columns
    const int r,
    const int columns,
    const Divisor by_columns,
    T* z_scaled) {  // [M, columns]
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int i = blockIdx.x * kScaleThreads + threadIdx.x;
    if (i >= count)
        return;
    const int m = divide(i, by_columns), j = i - m * columns;
    float z = 0;
    if (j < r)
        z = __fmul_rn(
            to_float(z_in[m * r + j]), projection::column_scale(lora_scaling, scaling, j));
    z_scaled[i] = from_float<T>(z);
}

// ---- launch -------------------------------------------------------------------------------------

template <typename T, int kColumns>
cudaError_t launch_project(const LoraMatmulArgs& a, void* z_scaled, cudaStream_t stream) {
    using L = projection::Layout<kColumns>;
    const ClusterRoom room = projection_room();
    const ProjectionTiling tiling = tile_projection(a.M, room);
    projection::Params params{};
    cudaError_t error =
        projection::make_params<kColumns>(params, a, room.cluster, tiling, z_scaled);
    constexpr auto kernel = project_kernel<T, kColumns>;
    if (error == cudaSuccess)
        error = allow_shared_memory<kernel>(L::kSmemBytes);
    if (error != cudaSuccess)
        return error;
    const int threads = tiling.tokens / projection::kBoxTokens * projection::kWarpgroup + kWarpSize;
    LaunchConfig config(params.ctas, threads, L::kSmemBytes, stream);
    config.cluster(room.cluster);
    return cudaLaunchKernelEx(config.get(), kernel, params);
}

template <typename T>
cudaError_t launch(const LoraMatmulArgs& a, void* z_scaled, cudaStream_t stream) {
    const int columns = padded_rank(a.r);
    if (a.lora_A == nullptr) {
        const auto count = static_cast<int>(a.M * columns);
        const auto grid = static_cast<unsigned>(ceil_div(count, kScaleThreads));
        const LaunchConfig config(grid, kScaleThreads, 0, stream);
        return cudaLaunchKernelEx(
            config.get(), scale_kernel<T>, static_cast<const T*>(a.z_in), a.lora_scaling, a.scaling,
            count, a.r, columns, make_divisor(columns), static_cast<T*>(z_scaled));
    }
    return columns == 16 ? launch_project<T, 16>(a, z_scaled, stream)
                         : launch_project<T, 64>(a, z_scaled, stream);
}

}  // namespace

ClusterRoom projection_room() {
    static Answers answers;
    const auto kernel = reinterpret_cast<const void*>(project_kernel<__nv_bfloat16, 64>);
    return room_for_clusters(answers, kernel, 8, kMostThreads, projection::Layout<64>::kSmemBytes);
}

cudaError_t launch_lora_project(const LoraMatmulArgs& args, void* z_scaled, cudaStream_t stream) {
    return args.dtype == Dtype::kBFloat16 ? launch<__nv_bfloat16>(args, z_scaled, stream)
                                          : launch<__half>(args, z_scaled, stream);
}

}  // namespace lowbit::cuda
