// One token through a 4-bit linear layer with a low-rank update, in one launch, no workspace.
//
//     y[n] = sum_k x[k] W[n, k] + sum_j s_j z[j] lora_B[n, j] + bias[n],  z = x lora_A^T,  M = 1
//
// Operands: see nf4_lora_matmul.h and weight.h (flat). x and the codebook are multiplied by powers
// of two that make them fit fp16, runs of 8 products are added up in fp16, everything else, z
// included, stays in fp32; y is rounded once. Relative error 1.7e-3 for bf16, nearly all from
// rounding y, and 2e-4 to 5e-4 for fp16.
//
// Rows are dealt to one CTA per SM in groups of 4, and a CTA's work, (group, 1024 columns) steps,
// to its 16 warps in equal runs: a run may start or end within a group, so each leaves partial sums
// in shared memory, added in a fixed order at the end. A byte of codes is decoded by one lookup in
// a table of 256 pairs, held 32 times over so that lane l only touches bank l; a row of the table
// takes 256 bytes (the upper half is unused) because then one PRMT makes the address.
//
// z: the CTAs of a cluster divide K among them, and send their partial sums to all others straight
// into shared memory. Four warps of their own do that, and then lora_B z of the CTA's rows, so that
// the weight's warps meet nothing of either before y is added up. Up to rank 16 each copies and
// multiplies by itself; above, they are a warpgroup for wgmma, whose sums come later where K is
// large but at the same time for all ranks.
//
// Bound by the weight's bytes for large N K (90 % of copy rate at 28672 x 8192 with rank 16; H100,
// 2026-11); at 4096 x 4096 by the latency from launch to first product: 6.1 us with rank 16, 6.7
// with 64 (H200, 2026-11). Shared memory lookups come next: 104 wavefronts per 4096 weights, 39
// weights per clock and SM where HBM needs 22.
// Callers have checked sizes, dtypes, alignment and serves_nf4_lora_gemv. The kernel is in parts:
// nf4_lora_gemv_plan.cuh (sizes), _operands.cuh (before the loop), _rows.cuh (in it), _z_parts.cuh
// and _z.cuh.

#include "nf4_lora_gemv.h"

#include <algorithm>

#include "bulk_sm90.cuh"
#include "launch_config.h"
#include "nf4_lora_gemv_operands.cuh"
#include "nf4_lora_gemv_plan.cuh"
#include "nf4_lora_gemv_rows.cuh"
#include "nf4_lora_gemv_z.cuh"
#include "tensor_map.h"

namespace lowbit::cuda {
namespace {

template <typename T, bool kNested, bool kManyRanks>
__global__ void __launch_bounds__(kThreads + kZThreads, 1) nf4_lora_gemv_kernel(
    const __grid_constant__ LoraMatmulArgs args,  // M = 1
    const __grid_constant__ Plan plan,
    const __grid_constant__ CUtensorMap lora_A) {  // if kManyRanks
    extern __shared__ __align__(1024) unsigned char smem[];
    unsigned char* smem_x = smem + kTableBytes;
    Scratch& scratch = *reinterpret_cast<Scratch*>(smem + plan.scratch_bytes);
    float* sums = scratch.sums;  // [most_groups + kWarps][kRows], warp w's of group g at g + w
    float* low_rank = sums + (plan.most_groups + kWarps) * kRows;  // [most_groups][kRows] if r > 0
    float* nested = low_rank + (args.r > 0 ? plan.most_groups * kRows : 0);
    const int lane = threadIdx.x % kWarpSize;
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0);

    if (threadIdx.x == kThreads) {
        if (kManyRanks && plan.exchange)
            prefetch_map(lora_A);
        const uint32_t z_arrived = shared_address(&scratch.z_arrived);
        barrier_init(z_arrived, 1);
        barrier_arrive_expect(z_arrived, cluster_size() * args.r * sizeof(float));
        for (int i = 0; kManyRanks && i < kZStages; i++)
            barrier_init(shared_address(&scratch.z_full[i]), 1);
        barrier_init_fence();
    }
    __syncwarp();
    cluster_arrive_relaxed();  // the thread has fenced its barriers
    const WeightView& w = args.w;
    const uint32_t N = static_cast<uint32_t>(w.N), K = static_cast<uint32_t>(w.K);
    const Share share(plan, N);
    if (warp >= kWarps) {
        if (plan.exchange)
            prefetch_lora_a<T>(args, plan);
        cluster_wait();
        wait_for_previous_kernel();
        let_next_kernel_start();
        if (args.r > 0) {
            low_rank_term<T, kManyRanks>(
                args, lora_A, plan, share, smem + plan.stages_bytes, scratch, low_rank);
            named_barrier_arrive(kYBarrier, kThreads + kZThreads);
        }
        return;
    }
    uint32_t unit = warp * share.each + min(static_cast<uint32_t>(warp), share.extra);
    const uint32_t unit_end = unit + share.each + (warp < share.extra);
    uint32_t group = divide(unit, plan.by_steps), step = unit - group * plan.steps;
    prefetch_inputs<T, kNested>(args, share, share.row_of(group, N), step, unit < unit_end);
    cluster_wait();  // in front of the first loads: it empties L1
    wait_for_previous_kernel();
    let_next_kernel_start();

    Operands operands;
    load_operands<T, kNested>(operands, args, share);
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

    const float unscale = store_operands<T, kNested>(operands, args, plan, smem, scratch, nested);

    const int nested_shift = w.blocksize_log2 + w.nested_blocksize_log2;
    float acc[kRows] = {};
    for (; unit < unit_end; unit++) {
        const bool ends_group = step + 1 == plan.steps, more = unit + 1 < unit_end;
        const uint32_t next_group = group + ends_group, next_step = ends_group ? 0 : step + 1;
        const uint32_t next_element = element_at(next_group, next_step);
        uint4 x[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            x[i] =
                *reinterpret_cast<const uint4*>(smem_x + step * (2 * kStep) + i * 512 + lane * 16);
#pragma unroll
        for (int i = 0; i < kRows; i++) {
            const float sum = dot(smem, rows.codes[i], x);
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
    if (args.r > 0)
        named_barrier(kYBarrier, kThreads + kZThreads);
    else
        named_barrier(kBarrier, kThreads);
    store_y<T>(args, plan, share, sums, low_rank);
}

// ---- launch -------------------------------------------------------------------------------------

int64_t ctas_of(const LoraMatmulArgs& args, int ctas, int cluster) {
    const int64_t groups = ceil_div(args.w.N, kRows);
    return std::min<int64_t>(ctas / cluster, ceil_div(groups, cluster)) * cluster;
}

size_t make_plan(const LoraMatmulArgs& args, int64_t ctas, Plan& plan) {
    const WeightView& w = args.w;
    const int64_t groups = ceil_div(w.N, kRows), most = ceil_div(groups, ctas);
    plan.groups_each = static_cast<uint32_t>(groups / ctas);
    plan.groups_extra = static_cast<uint32_t>(groups % ctas);
    plan.steps = static_cast<uint32_t>(ceil_div(w.K, kStep));
    plan.by_steps = make_divisor(static_cast<int>(plan.steps));
    plan.by_rank_tiles = make_divisor(std::max(1, rank_tiles(args.r)));
    plan.runs = make_run_divisors(plan.groups_each * plan.steps);
    plan.runs_of_more = make_run_divisors((plan.groups_each + 1) * plan.steps);
    plan.most_groups = static_cast<uint32_t>(most);
    plan.exchange = args.r > 0 && args.lora_A != nullptr;
    plan.stages_bytes = kTableBytes + plan.steps * 2 * kStep;
    plan.scratch_bytes = plan.stages_bytes + (plan.exchange ? z_stages_bytes(args.r) : 0);
    const int nested_shift = w.blocksize_log2 + w.nested_blocksize_log2;
    const int64_t nested = w.absmax == nullptr ? ((most * kRows * w.K) >> nested_shift) + 2 : 0;
    return plan.scratch_bytes + sizeof(Scratch) +
           sizeof(float) * (((args.r > 0 ? 2 : 1) * most + kWarps) * kRows + nested);
}

template <typename T, bool kNested, bool kManyRanks>
cudaError_t launch(const LoraMatmulArgs& args, cudaStream_t stream) {
    const auto kernel = nf4_lora_gemv_kernel<T, kNested, kManyRanks>;
    // Smaller clusters read more of lora_A per CTA.
    static Answers answers;
    constexpr int kCtaThreads = kThreads + kZThreads;
    const ClusterRoom room = room_for_clusters(
        answers, reinterpret_cast<const void*>(kernel), kMaxCluster, kCtaThreads, kMaxSharedBytes);
    const bool exchange = args.r > 0 && args.lora_A != nullptr;
    const int cluster = exchange ? room.cluster : 1;
    const int64_t ctas =
        ctas_of(args, exchange ? room.cluster * room.clusters : std::max(1, sm_count()), cluster);
    Plan plan;
    const size_t smem_bytes = make_plan(args, ctas, plan);
    plan.cluster_log2 = log2_of(cluster);  // a power of two: see room_for_clusters
    LaunchConfig config(static_cast<unsigned>(ctas), kCtaThreads, smem_bytes, stream);
    config.cluster(cluster);
    CUtensorMap lora_A{};
    if (kManyRanks && exchange) {
        const cudaError_t error = make_tensor_map(
            lora_A, tensor_map_type(args.dtype), args.lora_A, args.r, args.w.K,
            {16 * rank_tiles(args.r), kZColumns}, CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
        if (error != cudaSuccess)
            return error;
    }
    return cudaLaunchKernelEx(config.get(), kernel, args, plan, lora_A);
}

template <typename T, bool kNested>
cudaError_t launch(const LoraMatmulArgs& args, cudaStream_t stream) {
    return args.r > kFewRanks ? launch<T, kNested, true>(args, stream)
                              : launch<T, kNested, false>(args, stream);
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
    const int fewest = std::max(1, sm_count() / 2);  // see launch
    return make_plan(args, ctas_of(args, fewest, 1), plan) <= kMaxSharedBytes;
}

cudaError_t launch_nf4_lora_gemv(const LoraMatmulArgs& args, cudaStream_t stream) {
    return args.dtype == Dtype::kBFloat16 ? launch<__nv_bfloat16>(args, stream)
                                          : launch<__half>(args, stream);
}

}  // namespace lowbit::cuda
