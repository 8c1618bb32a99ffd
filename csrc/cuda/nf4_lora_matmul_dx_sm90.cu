// The gradient of a 4-bit linear layer's input: the weight is decoded inside the product, sm_90a.
//
//     dx[m, k] = sum_n dy[m, n] W[n, k] + sum_j u[m, j] lora_A[j, k]
//
// dy [M, N], u [M, 16, 32 or 64], lora_A [r, K], dx [M, K]: one 16-bit dtype T, row-major. W:
// weight.h, flat, the copy that the forward pass reads; its elements enter as RN_T(codebook *
// absmax), the same bits as dequantization gives. u is scaled and rounded by lora_grads_sm90.cu.
// fp32 accumulators, one rounding, on store; on request the result is added to what is in dx, which
// rounds once more, as another pass would. Every sum has a fixed order.
//
// nf4_lora_matmul_mid_sm90.cu turned by a quarter. A CTA computes 128 columns of W (the M side of
// wgmma) x 256 or 128 tokens in steps of 64 rows of W, through a ring of stages in shared memory. A
// decoded block of 64 codes is a line of 128 bytes as there, but here the line runs along the
// output and wgmma reads it transposed. Scales vary along the contraction, so they enter with the
// decoding, and a lane needs another one each step, K / 64 blocks further on. Two consumer
// warpgroups own a block column each. The low-rank term is one step more, lora_A as it is. Clusters
// are pairs of CTAs in one of two shapes:
//   shared dy  two column tiles, one token tile: each loads half of dy for both
//   shared W   one column tile, two token tiles: each decodes half of W for both and copies it over
// Grids are persistent. When the last tiles would leave half of the pairs idle, a pair with shared
// dy takes one column tile instead of two, splits N, and sums through the other's shared memory.
//
// Bound by shared memory and by the latency of decoding, as the forward product is. From 2048
// tokens on nf4_lora_matmul_dx_large_sm90.cu is faster (H200, 2026-11).
//
// Callers have checked what serves_nf4_lora_matmul_dx lists.

#include <algorithm>

#include "launch_config.h"
#include "lora_factors.cuh"
#include "lora_grads.h"
#include "nf4_lora_matmul_dx.h"
#include "nf4_lora_matmul_dx_consume.cuh"
#include "nf4_lora_matmul_dx_produce.cuh"
#include "tensor_map.h"

namespace lowbit::cuda {
namespace {

// ---- product ------------------------------------------------------------------------------------

// 384 threads with 168 registers (256 tokens) or 512 with 128.
template <typename T, class P>
__global__ void __launch_bounds__(P::kThreads, 1)
    nf4_lora_matmul_dx_kernel(const __grid_constant__ Maps maps, const Params p) {
    extern __shared__ uint8_t smem_raw[];
    const uint32_t raw = shared_address(smem_raw);
    const uint32_t smem = (raw + kSmemAlignment - 1) / kSmemAlignment * kSmemAlignment;
    uint8_t* smem_generic = smem_raw + (smem - raw);
    if (threadIdx.x == 0) {
        for (int i = 0; i < P::kStages; i++) {
            barrier_init(smem + P::kFull + i * 8, 1 + P::kUnits);
            barrier_init(smem + P::kEmpty + i * 8, kCluster * kConsumers / kWarpgroup);
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(smem + P::kPackedFull + i * 8, 1);
            barrier_init(smem + P::kPackedEmpty + i * 8, P::kProducerWarps);
        }
        barrier_init_fence();
    }
    // The first product of a call waits for all that it reads, or for u alone when it comes to it
    // (load_last_step). Then a second one, which reads the same, fills the SMs that it leaves idle.
    // A kernel that must wait would only keep its CTAs waiting on those few SMs.
    if (p.is_first && !p.waits_for_u)
        wait_for_previous_kernel();
    if (!p.is_last)
        let_next_kernel_start();
    __syncthreads();
    // Produce and consume wait. Thread 0 has fenced its barriers; a release would wait for all of
    // memory.
    cluster_arrive_relaxed();
    constexpr bool kMovesRegisters = P::kTokens == 256;
    if (threadIdx.x < P::kProducers) {
        if (kMovesRegisters)
            shrink_registers<104>();
        produce<T, P>(maps, p, smem, reinterpret_cast<float*>(smem_generic + P::kCodebook));
        __syncwarp();
        if (blockIdx.x / kCluster < p.split_tiles) {  // the two of add_halves
            cluster_sync_unaligned();
            cluster_sync_unaligned();
        }
    } else {
        if (kMovesRegisters)
            grow_registers<200>();
        consume<T, P>(maps, p, smem, smem_generic);
    }
    __syncwarp();
    cluster_sync_unaligned();  // nobody leaves while the other may write here
    // Whoever waits for this kernel waits for both. One CTA is enough, and the others make room.
    if (!p.is_first && blockIdx.x == 0)
        wait_for_previous_kernel();
}

// ---- launch -------------------------------------------------------------------------------------

// Up to here the product begins beside the adapter's gradients: 27 instead of 44 us for both at
// 4096 x 4096 and 16 tokens, 39.2 and 40.0 at 256 (H200, 2026-11). An earlier overlap, of the pass
// over dy alone, cost up to 11 % from 1024 tokens on (H100, 2026-11).
constexpr int64_t kOverlappingTokens = 256;

bool rounds_lora_A(const LoraDxArgs& a) {
    return a.r > 0 && a.lora_A_dtype != a.dtype;
}

template <class P>
cudaError_t make_maps(Maps& maps, const LoraDxArgs& a) {
    const CUtensorMapDataType type = tensor_map_type(a.dtype);
    cudaError_t error = make_tensor_map(maps.dy, type, a.dy, a.M, a.w.N, {P::kDyBoxTokens, kStepN});
    if (error == cudaSuccess)
        error = make_tensor_map(maps.dx, type, a.dx, a.M, a.w.K, {kChunkTokens, 64});
    if (error == cudaSuccess)
        error = make_tensor_map(
            maps.packed, CU_TENSOR_MAP_DATA_TYPE_UINT8, a.w.qweight, a.w.N, a.w.K / 2,
            {P::kOwnRows, kPackedRow});
    if (error == cudaSuccess && a.r > 0)
        error =
            make_tensor_map(maps.u, type, a.u, a.M, lora_columns(a.r), {P::kDyBoxTokens, kStepN});
    if (error == cudaSuccess && a.r > 0)
        error = make_tensor_map(maps.lora_A, type, a.lora_A, a.r, a.w.K, {kStepN, 64});
    return error;
}

// Column tiles of dx that one launch computes.
struct Columns {
    int64_t first, count;
};

// Tiles of clusters.
template <class P>
int64_t cluster_tiles(const LoraDxArgs& a, int64_t column_tiles) {
    return ceil_div(column_tiles, P::kColumnTiles) * ceil_div(a.M, P::kTokens * P::kTokenTiles);
}

// Whether the tiles after the last full round are few enough to be split.
template <class P>
bool splits(const LoraDxArgs& a, int64_t tiles, int clusters) {
    return !P::kSharesW && tiles % clusters * 2 <= clusters && a.w.N >= 16 * kStepN;
}

template <typename T, class P>
cudaError_t
launch_product(const LoraDxArgs& a, Columns columns, int clusters, cudaStream_t stream) {
    Maps maps{};
    cudaError_t error = make_maps<P>(maps, a);
    if (error != cudaSuccess)
        return error;
    const int64_t tiles = cluster_tiles<P>(a, columns.count);
    const int64_t rest = splits<P>(a, tiles, clusters) ? tiles % clusters : 0;
    Params p{};
    p.w = a.w;
    const bool nested = a.w.absmax == nullptr;
    p.scales = nested ? a.w.nested_absmax : a.w.absmax;
    p.scale_log2 = nested ? a.w.nested_blocksize_log2 : 0;
    p.blocks = static_cast<int>(a.w.K / 64);
    p.r = a.r;
    p.steps = static_cast<int>(ceil_div(a.w.N, kStepN));
    p.first_column = static_cast<int>(columns.first * kTileColumns);
    p.column_groups = static_cast<int>(ceil_div(columns.count, P::kColumnTiles));
    const auto token_groups = static_cast<int>(ceil_div(a.M, P::kTokens * P::kTokenTiles));
    p.last_slab = (token_groups - 1) / P::kSlabGroups;
    p.last_slab_groups = token_groups - p.last_slab * P::kSlabGroups;
    p.by_column_groups = make_divisor(p.column_groups);
    p.by_last_slab_groups = make_divisor(p.last_slab_groups);
    p.full_tiles = static_cast<int>(tiles - rest);
    p.split_tiles = static_cast<int>(rest * P::kColumnTiles);
    p.is_first = columns.first == 0;
    p.is_last = columns.first + columns.count == ceil_div(a.w.K, kTileColumns);
    p.waits_for_u = a.follows_grads && a.r > 0 && a.M <= kOverlappingTokens;
    p.adds = a.adds;

    constexpr auto kKernel = nf4_lora_matmul_dx_kernel<T, P>;
    error = allow_shared_memory<kKernel>(P::kSmemBytes);
    if (error != cudaSuccess)
        return error;
    p.clusters = std::min(clusters, std::max(p.full_tiles, p.split_tiles));
    p.by_clusters = make_divisor(p.clusters);
    LaunchConfig config(kCluster * p.clusters, P::kThreads, P::kSmemBytes, stream);
    config.cluster(kCluster);
    return cudaLaunchKernelEx(config.get(), kKernel, maps, p);
}

using SharedDy256 = Plan<256, false>;
using SharedDy128 = Plan<128, false>;
using SharedW256 = Plan<256, true>;

// Time of a launch, in hundredths of microseconds on an H100 (2026-11): what a step costs in each
// plan, and what splitting N adds. Only the order of the results matters.
template <class P>
int64_t estimate(const LoraDxArgs& a, int64_t column_tiles, int clusters) {
    constexpr int kStep = P::kTokens == 128 ? 62 : P::kSharesW ? 72 : 97;
    constexpr int kLaunch = 300, kSplit = 300;
    const int64_t tiles = cluster_tiles<P>(a, column_tiles), steps = ceil_div(a.w.N, kStepN);
    if (!splits<P>(a, tiles, clusters) || tiles % clusters == 0)
        return kLaunch + ceil_div(tiles, clusters) * steps * kStep;
    return kLaunch + kSplit + (tiles / clusters * steps + steps / 2) * kStep;
}

template <typename T>
cudaError_t launch_products(const LoraDxArgs& a, int clusters, cudaStream_t stream) {
    const int64_t column_tiles = ceil_div(a.w.K, kTileColumns);
    const Columns all{0, column_tiles};
    // Shared W for the rounds that it fills, and what is left split along N.
    const int64_t groups = ceil_div(a.M, 2 * SharedW256::kTokens);
    const int64_t head = column_tiles * groups / clusters * clusters / groups;
    const int64_t shared_w = estimate<SharedW256>(a, column_tiles, clusters);
    const int64_t shared_dy = estimate<SharedDy256>(a, column_tiles, clusters);
    const int64_t narrow = estimate<SharedDy128>(a, column_tiles, clusters);
    const int64_t two = head == 0 || head == column_tiles
                            ? INT64_MAX
                            : estimate<SharedW256>(a, head, clusters) +
                                  estimate<SharedDy256>(a, column_tiles - head, clusters);
    const int64_t best = std::min(std::min(shared_w, shared_dy), std::min(narrow, two));
    if (best == shared_w)
        return launch_product<T, SharedW256>(a, all, clusters, stream);
    if (best == shared_dy)
        return launch_product<T, SharedDy256>(a, all, clusters, stream);
    if (best == narrow)
        return launch_product<T, SharedDy128>(a, all, clusters, stream);
    const cudaError_t error = launch_product<T, SharedW256>(a, {0, head}, clusters, stream);
    if (error != cudaSuccess)
        return error;
    return launch_product<T, SharedDy256>(a, {head, column_tiles - head}, clusters, stream);
}

template <typename T>
cudaError_t launch(LoraDxArgs a, cudaStream_t stream) {
    if (rounds_lora_A(a)) {
        const FactorCopy copy{a.lora_A, true, a.r, a.w.K, a.w.K, a.workspace};
        const cudaError_t error = copy_factors<T>(copy, {}, stream);
        if (error != cudaSuccess)
            return error;
        a.lora_A = a.workspace;
    }
    return launch_products<T>(a, sm_count() / kCluster, stream);  // SMs come in pairs
}

}  // namespace

bool serves_nf4_lora_matmul_dx(const LoraDxArgs& a) {
    const WeightView& w = a.w;
    return a.dtype != Dtype::kFloat32 &&
           (a.lora_A_dtype == a.dtype || a.lora_A_dtype == Dtype::kFloat32) && w.flat &&
           w.K % 64 == 0 && w.K <= (1 << 18) && w.N % 8 == 0 && w.N <= (1 << 20) &&
           w.blocksize_log2 >= 6 && w.blocksize_log2 <= 12 && a.r <= 64 && a.M <= (1 << 19) &&
           is_aligned(a.dy) && is_aligned(a.u) && is_aligned(a.lora_A) && is_aligned(a.dx) &&
           is_aligned(w.qweight) && device_is_sm90();
}

size_t nf4_lora_matmul_dx_workspace_bytes(const LoraDxArgs& a) {
    return rounds_lora_A(a) ? size_t{2} * a.r * a.w.K : 0;
}

cudaError_t launch_nf4_lora_matmul_dx(const LoraDxArgs& a, cudaStream_t stream) {
    if (a.M == 0 || a.w.K == 0)
        return cudaSuccess;
    return a.dtype == Dtype::kBFloat16 ? launch<__nv_bfloat16>(a, stream)
                                       : launch<__half>(a, stream);
}

}  // namespace lowbit::cuda
