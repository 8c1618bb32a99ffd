// One token through a 4-bit linear layer with a low-rank update, in one launch.
//
//     y[n] = sum_k x[k] W[n, k] + sum_j s_j z[j] lora_B[n, j] + bias[n],  z = x lora_A^T,  M = 1
//
// Operands: see nf4_lora_matmul.h and weight.h (flat). The codebook and every 32 columns of x are
// multiplied by powers of two that make them fit fp16, runs of 8 products are added up in fp16,
// everything else, z included, stays in fp32; y is rounded once. Relative error 1.7e-3 for bf16,
// nearly all from rounding y, and 2e-4 to 5e-4 for fp16.
//
// Rows are dealt to one CTA per SM in groups of 4, and a CTA's work, (group, 1024 columns) steps,
// to its 16 warps in equal runs: a run may start or end within a group, so each leaves partial sums
// in shared memory, added in a fixed order at the end. A byte of codes is decoded by one lookup in
// a table of 256 pairs, held 32 times over so that lane l only touches bank l; a row of the table
// takes 256 bytes (the upper half is unused) because then one PRMT makes the address.
//
// z: 4, 8 or 16 CTAs in front compute it and nothing else (nf4_lora_gemv_project.cuh). In the
// others four warps of their own wait for it, and multiply it with the CTA's rows of lora_B, so
// that the weight's warps meet nothing of either before y is added up. Only CTAs behind them wait
// for those that compute z, which wait for nobody: none needs another that has not started.
//
// Bound by the weight's bytes for large N K; at 4096 x 4096 by the latency from launch to first
// product: 4.9 us with rank 16, 5.3 with 64, 4.4 without an adapter (H200, 2026-11). Shared memory
// lookups come next: 105 wavefronts per 4096 weights, 39 weights per clock and SM where HBM needs
// 22.
// Callers have checked sizes, dtypes, alignment and serves_nf4_lora_gemv. The kernel is in parts:
// nf4_lora_gemv_plan.cuh (sizes), _operands.cuh (before the loop), _rows.cuh (in it), _project.cuh
// and _z.cuh.

#include "nf4_lora_gemv.h"

#include <algorithm>

#include "launch_config.h"
#include "marks.h"
#include "nf4_lora_gemv_operands.cuh"
#include "nf4_lora_gemv_plan.cuh"
#include "nf4_lora_gemv_rows.cuh"
#include "nf4_lora_gemv_z.cuh"

namespace lowbit::cuda {
namespace {

template <typename T, bool kNested>
__global__ void __launch_bounds__(kCtaThreads, 1) nf4_lora_gemv_kernel(
    const __grid_constant__ LoraMatmulArgs args,  // M = 1
    const __grid_constant__ Plan plan) {
    extern __shared__ __align__(1024) unsigned char smem[];
    unsigned char* smem_x = smem + kTableBytes;
    float* const x_scales = reinterpret_cast<float*>(smem_x + plan.steps * (2 * kStep));
    Scratch& scratch = *reinterpret_cast<Scratch*>(smem + plan.scratch_bytes);
    float* sums = scratch.sums;  // [most_groups + kWarps][kRows], warp w's of group g at g + w
    float* low_rank = sums + (plan.most_groups + kWarps) * kRows;  // [most_groups][kRows] if r > 0
    float* nested = low_rank + (args.r > 0 ? plan.most_groups * kRows : 0);
    unsigned char* const spans = smem + plan.spans_bytes;  // [most_groups]
    const int lane = threadIdx.x % kWarpSize;
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0);

    if (blockIdx.x < plan.projectors) {
        project<T>(args, plan, reinterpret_cast<uint4*>(smem), scratch);
        return;
    }
    const WeightView& w = args.w;
    const uint32_t N = static_cast<uint32_t>(w.N), K = static_cast<uint32_t>(w.K);
    const uint32_t cta = blockIdx.x - plan.projectors;
    const Share share(plan, N, cta);
    if (warp >= kWarps) {
        store_spans(spans, plan, share);
        wait_for_previous_kernel();
        let_next_kernel_start();
        if (args.r > 0)
            low_rank_term<T>(args, plan, share, cta, scratch, low_rank);
        named_barrier_arrive(kYBarrier, kCtaThreads);
        return;
    }
    uint32_t unit = warp * share.each + min(static_cast<uint32_t>(warp), share.extra);
    const uint32_t unit_end = unit + share.each + (warp < share.extra);
    uint32_t group = divide(unit, plan.by_steps), step = unit - group * plan.steps;
    prefetch_inputs<T, kNested>(args, share, share.row_of(group, N), step, unit < unit_end);
    wait_for_previous_kernel();
    let_next_kernel_start();

    copy_x<T>(smem_x, args, plan);
    Operands operands;
    load_operands<kNested>(operands, args, share);
    // Lanes past the end of a row take its start, and meet zeros of x.
    const auto element_at = [&](uint32_t group, uint32_t step) {
        const uint32_t k = step * kStep + lane * kColumnsPerLane;
        return share.row_of(group, N) * K + (k < K ? k : 0);
    };
    Rows rows;
    uint32_t element = element_at(group, step);
#pragma unroll
    for (int i = 0; i < kRows; i++)
        load_row<kNested>(rows, i, unit < unit_end, w, element);
    prefetch_steps(w.qweight, N, K, plan, share, unit + 1, unit_end);

    const float unscale =
        store_operands<T, kNested>(operands, args, plan, smem, scratch, x_scales, nested);

    const int nested_shift = w.blocksize_log2 + w.nested_blocksize_log2;
    float acc[kRows] = {};
    for (; unit < unit_end; unit++) {
        const bool ends_group = step + 1 == plan.steps, more = unit + 1 < unit_end;
        const uint32_t next_group = group + ends_group, next_step = ends_group ? 0 : step + 1;
        const uint32_t next_element = element_at(next_group, next_step);
        const float x_scale = x_scales[step * kWarpSize + lane];
        uint4 x[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            x[i] = *reinterpret_cast<const uint4*>(
                smem_x + step * (2 * kStep) + i * kXWord + lane * 16);
#pragma unroll
        for (int i = 0; i < kRows; i++) {
            const float sum = dot(smem, rows.codes[i], x) * x_scale;
            float scale = __uint_as_float(rows.scale[i]);
            if constexpr (kNested) {
                const uint32_t at = ((element + i * K) >> nested_shift) - operands.nested_first;
                scale = scratch.absmax_codebook[rows.scale[i]];
                scale = __fadd_rn(__fmul_rn(scale, nested[at]), operands.offset);
            }
            acc[i] = __fmaf_rn(sum, scale, acc[i]);
            // Its registers are free from here on, and have a whole step to be filled again.
            load_row<kNested>(rows, i, more, w, next_element);
        }
        if (ends_group || !more) {
#pragma unroll
            for (int i = 0; i < kRows; i++)
                acc[i] *= unscale;
            const float sum = sum_rows(acc);
            if (lane % (kWarpSize / kRows) == 0)
                sums[(group + warp) * kRows + lane / (kWarpSize / kRows)] = sum;
#pragma unroll
            for (int i = 0; i < kRows; i++)
                acc[i] = 0;
        }
        group = next_group, step = next_step, element = next_element;
    }
    named_barrier(kYBarrier, kCtaThreads);
    store_y<T>(args, share, sums, low_rank, spans);
}

// ---- launch -------------------------------------------------------------------------------------

bool computes_z(const LoraMatmulArgs& args) {
    return args.r > 0 && args.lora_A != nullptr;
}

// How a launch divides the device.
struct Division {
    int projectors, slices_log2;
    int64_t ctas;  // of the weight
};

// As many projectors as let z come before the sums of the weight, by times fitted to layers of 4 to
// 235 million weights with ranks 16 and 64 (H200, 2026-11).
Division divide_device(const LoraMatmulArgs& args) {
    constexpr double kProjectorRate = 74e3, kWeightRate = 27e3;  // bytes in a microsecond
    constexpr double kProjectorStart = 3.5, kWeightStart = 2.3;
    constexpr double kWeightBytes = 0.516;  // with nested scales
    const auto columns = static_cast<double>(args.w.K);
    const int64_t groups = ceil_div(args.w.N, kRows);
    const int sms = std::max(1, sm_count());
    const auto with = [&](int projectors) {
        return std::min<int64_t>(std::max(1, sms - projectors), groups);
    };
    if (!computes_z(args))
        return {0, 0, with(0)};
    const int tiles_log2 = args.r <= kZRows ? 0 : args.r <= 2 * kZRows ? 1 : 2;
    Division best{};
    double best_time = 0;
    for (int log2 = 2; 1 << log2 <= kMaxProjectors; log2++) {
        const Division division{1 << log2, log2 - tiles_log2, with(1 << log2)};
        const double z_bytes = columns / (1 << division.slices_log2) * (2 * kZRows);
        const double bytes = kWeightBytes * columns * args.w.N / division.ctas;
        const double time = std::max(
            kProjectorStart + z_bytes / kProjectorRate, kWeightStart + bytes / kWeightRate);
        if (best.projectors == 0 || time < best_time)
            best = division, best_time = time;
    }
    return best;
}

size_t make_plan(const LoraMatmulArgs& args, const Division& division, Plan& plan) {
    const WeightView& w = args.w;
    const int64_t ctas = division.ctas, groups = ceil_div(w.N, kRows);
    const int64_t most = ceil_div(groups, ctas);
    plan.groups_each = static_cast<uint32_t>(groups / ctas);
    plan.groups_extra = static_cast<uint32_t>(groups % ctas);
    plan.steps = static_cast<uint32_t>(ceil_div(w.K, kStep));
    plan.by_steps = make_divisor(static_cast<int>(plan.steps));
    plan.runs = make_run_divisors(plan.groups_each * plan.steps);
    plan.runs_of_more = make_run_divisors((plan.groups_each + 1) * plan.steps);
    plan.most_groups = static_cast<uint32_t>(most);
    plan.projectors = division.projectors;
    plan.slices_log2 = division.slices_log2;
    plan.scratch_bytes = kTableBytes + plan.steps * (2 * kStep + sizeof(float) * kWarpSize);
    const int nested_shift = w.blocksize_log2 + w.nested_blocksize_log2;
    const int64_t nested = w.absmax == nullptr ? ((most * kRows * w.K) >> nested_shift) + 2 : 0;
    const int64_t floats = ((args.r > 0 ? 2 : 1) * most + kWarps) * kRows + nested;
    const int64_t spans = plan.scratch_bytes + sizeof(Scratch) + sizeof(float) * floats;
    plan.spans_bytes = static_cast<uint32_t>(spans);
    return spans + most;
}

template <typename T, bool kNested>
cudaError_t launch(const LoraMatmulArgs& args, cudaStream_t stream) {
    constexpr auto kKernel = nf4_lora_gemv_kernel<T, kNested>;
    const Division division = divide_device(args);
    Plan plan;
    const size_t smem_bytes = make_plan(args, division, plan);
    plan.mark = next_mark();
    const cudaError_t error = allow_shared_memory<kKernel>(kMaxSharedBytes);
    if (error != cudaSuccess)
        return error;
    const auto ctas = static_cast<unsigned>(division.projectors + division.ctas);
    const LaunchConfig config(ctas, kCtaThreads, smem_bytes, stream);
    return cudaLaunchKernelEx(config.get(), kKernel, args, plan);
}

template <typename T>
cudaError_t launch(const LoraMatmulArgs& args, cudaStream_t stream) {
    return args.w.absmax == nullptr ? launch<T, true>(args, stream)
                                    : launch<T, false>(args, stream);
}

}  // namespace

bool serves_nf4_lora_gemv(const LoraMatmulArgs& args) {
    const WeightView& w = args.w;
    if (args.M != 1 || !w.flat || w.K == 0 || w.K % 64 != 0 || w.K > kMaxColumns || w.N < kRows ||
        w.N * w.K >= int64_t{1} << 32 || w.blocksize_log2 < 5 || args.r < 0 || args.r > kMaxRank ||
        args.dtype == Dtype::kFloat32 || !is_aligned(w.qweight) ||
        (args.r > 0 && args.lora_A == nullptr && args.z_in == nullptr) || !device_is_sm90())
        return false;
    Plan plan;
    return make_plan(args, divide_device(args), plan) <= kMaxSharedBytes;
}

size_t nf4_lora_gemv_workspace_bytes(const LoraMatmulArgs& args) {
    const Division division = divide_device(args);
    return division.projectors * division.ctas * kZPairs * sizeof(MarkedPair);
}

cudaError_t launch_nf4_lora_gemv(const LoraMatmulArgs& args, cudaStream_t stream) {
    return args.dtype == Dtype::kBFloat16 ? launch<__nv_bfloat16>(args, stream)
                                          : launch<__half>(args, stream);
}

}  // namespace lowbit::cuda
