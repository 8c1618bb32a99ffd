// Some hundred tokens through a 4-bit linear layer with a low-rank update: the weight is decoded
// inside the product.
//
//     y[m, n] = sum_k x[m, k] W[n, k] + sum_j z_scaled[m, j] lora_B[n, j] + bias[n],  M > 64
//
// Operands: see nf4_lora_matmul.h and weight.h (flat). W enters as RN_T(codebook[q] * absmax), T =
// bf16 or fp16, the same bits as dequantization gives. z_scaled [M, r rounded up to 16] comes from
// lora_project_sm90.cu, launched just before. fp32 accumulators, one rounding, on store. No
// atomics: every sum has a fixed order.
//
// A CTA computes 128 rows of W (the M side of wgmma) x 256 or 128 tokens in steps of 64 along K,
// through a ring of stages in shared memory. Two consumer warpgroups own 64 rows each. The producer
// warps decode, 32 rows and one step at a time, a lane a block, into the swizzled layout that wgmma
// reads; single lanes of them issue the TMA loads of x and of packed weights. The low-rank term is
// one step more: z_scaled against rows of lora_B. Clusters are pairs of CTAs, since no larger size
// fills an H100 (fours and eights reached 120 of 132 SMs), in one of two shapes:
//   shared x   two row tiles, one token tile: each loads half of x for both
//   shared W   one row tile, two token tiles: each decodes half of W for both and copies it over
// Grids are persistent. When the last tiles would leave half of the pairs idle, a pair with shared
// x takes one row tile instead of two, splits K, and sums through the other's shared memory.
//
// Bound by shared memory and by the latency of decoding: wgmma reads 80 of the 128 bytes that
// shared memory gives per clock, x takes 32, decoded weights 16, and the four decoding warps that
// registers allow beside 256 tokens have little to hide it behind. Per step of 128 x 256: 0.70 us
// with shared W, 0.86 with shared x (H100, 2026-11). Packed weights come by TMA as well: with
// ordinary loads, a row per lane and so 32 lines per instruction, a step took 1.2 us.
//
// Callers have checked what serves_nf4_lora_matmul_mid lists.

#include <algorithm>

#include "launch_config.h"
#include "lora_project.h"
#include "nf4_lora_matmul_mid.h"
#include "nf4_lora_matmul_mid_consume.cuh"
#include "nf4_lora_matmul_mid_produce.cuh"
#include "tensor_map.h"

namespace lowbit::cuda {
namespace {

// ---- kernel -------------------------------------------------------------------------------------

// 384 threads with 168 registers (256 tokens) or 512 with 128. ptxas 13.0 does not compile products
// of 256 tokens for 128 registers, so there are no eight decoding warps beside them.
template <typename T, bool kNested, class P>
__global__ void __launch_bounds__(P::kThreads, 1)
    nf4_lora_matmul_mid_kernel(const __grid_constant__ Maps maps, const Params p) {
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
    // The projection, if any, has waited for everything before it; what it computes itself is
    // waited for where it is read. Only the second product of a call may start early: the CTAs of a
    // later projection would crowd on the few idle SMs (M 1024, N 4096, K 14336: 202 us instead of
    // 180, H100, 2026-11).
    if (p.waits_first)
        wait_for_previous_kernel();
    if (p.lets_next_start)
        let_next_kernel_start();
    float* tables = reinterpret_cast<float*>(smem_generic + P::kTables);
    if (threadIdx.x < 16)
        tables[threadIdx.x] = __ldg(p.w.codebook + threadIdx.x);
    if (kNested && threadIdx.x < kNestedCodes)
        tables[16 + threadIdx.x] = __ldg(p.w.nested_codebook + threadIdx.x);
    __syncthreads();
    cluster_sync_unaligned();
    constexpr bool kMovesRegisters = P::kTokens == 256;
    if (threadIdx.x < P::kProducers) {
        if (kMovesRegisters)
            shrink_registers<104>();
        produce<T, kNested, P>(maps, p, smem, tables);
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
}

// ---- launch -------------------------------------------------------------------------------------

template <class P>
cudaError_t make_maps(Maps& maps, const LoraMatmulArgs& a) {
    const CUtensorMapDataType type = tensor_map_type(a.dtype);
    cudaError_t error = make_tensor_map(maps.x, type, a.x, a.M, a.w.K, {P::kXBoxTokens, kStepK});
    if (error == cudaSuccess)
        error = make_tensor_map(maps.y, type, a.y, a.M, a.w.N, {kChunkTokens, 64});
    if (error == cudaSuccess)
        error = make_tensor_map(
            maps.packed, CU_TENSOR_MAP_DATA_TYPE_UINT8, a.w.qweight, a.w.N, a.w.K / 2,
            {P::kOwnRows, P::kPackedRow});
    if (error == cudaSuccess && a.r > 0)
        error = make_tensor_map(
            maps.z, type, a.workspace, a.M, padded_rank(a.r), {P::kXBoxTokens, kStepK});
    return error;
}

// Row tiles of W that one launch computes, and how many tiles of clusters that is.
struct Rows {
    int64_t first, count;
};

template <class P>
int64_t cluster_tiles(const LoraMatmulArgs& a, int64_t row_tiles) {
    return ceil_div(row_tiles, P::kRowTiles) * ceil_div(a.M, P::kTokens * P::kTokenTiles);
}

// Whether the tiles after the last full round are few enough to be split.
template <class P>
bool splits(const LoraMatmulArgs& a, int64_t tiles, int clusters) {
    return !P::kSharesW && tiles % clusters * 2 <= clusters && a.w.K >= 16 * kStepK;
}

bool quick_scales(const WeightView& w) {
    const auto misaligned = w.absmax == nullptr ? reinterpret_cast<uintptr_t>(w.absmax_8bit) % 4
                                                : reinterpret_cast<uintptr_t>(w.absmax) % 16;
    return w.K % (4 * kStepK) == 0 && w.blocksize_log2 == 6 && misaligned == 0 &&
           (w.absmax != nullptr || w.nested_blocksize_log2 >= 2);
}

template <typename T, bool kNested, class P>
cudaError_t launch_product(const LoraMatmulArgs& a, Rows rows, int clusters, cudaStream_t stream) {
    Maps maps{};
    cudaError_t error = make_maps<P>(maps, a);
    if (error != cudaSuccess)
        return error;
    const int64_t tiles = cluster_tiles<P>(a, rows.count);
    const int64_t rest = splits<P>(a, tiles, clusters) ? tiles % clusters : 0;
    Params p{};
    p.w = a.w;
    p.lora_B = a.lora_B;
    p.bias = a.bias;
    p.r = a.r;
    p.steps = static_cast<int>(a.w.K / kStepK);
    p.first_row = static_cast<int>(rows.first * kTileRows);
    p.token_groups = static_cast<int>(ceil_div(a.M, P::kTokens * P::kTokenTiles));
    p.full_tiles = static_cast<int>(tiles - rest);
    p.split_tiles = static_cast<int>(rest * P::kRowTiles);
    p.waits_first = a.r == 0;
    p.lets_next_start = rows.first == 0 && rows.count < ceil_div(a.w.N, kTileRows);
    p.quick_scales = quick_scales(a.w);

    const auto kernel = nf4_lora_matmul_mid_kernel<T, kNested, P>;
    error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, P::kSmemBytes);
    if (error != cudaSuccess)
        return error;
    const int grid = kCluster * std::min(clusters, std::max(p.full_tiles, p.split_tiles));
    LaunchConfig config(grid, P::kThreads, P::kSmemBytes, stream);
    config.cluster(kCluster);
    return cudaLaunchKernelEx(config.get(), kernel, maps, p);
}

using SharedX256 = Plan<256, false>;
using SharedX128 = Plan<128, false>;
using SharedW256 = Plan<256, true>;

// Time of a launch, in hundredths of microseconds on an H100 (2026-11): what a step costs in each
// plan, and what splitting K adds. Only the order of the results matters.
template <class P>
int64_t estimate(const LoraMatmulArgs& a, int64_t row_tiles, int clusters) {
    constexpr int kStep = P::kTokens == 128 ? 60 : P::kSharesW ? 70 : 86;
    constexpr int kLaunch = 300, kSplit = 300;
    const int64_t tiles = cluster_tiles<P>(a, row_tiles), steps = a.w.K / kStepK;
    if (!splits<P>(a, tiles, clusters) || tiles % clusters == 0)
        return kLaunch + ceil_div(tiles, clusters) * steps * kStep;
    return kLaunch + kSplit + (tiles / clusters * steps + steps / 2) * kStep;
}

template <typename T, bool kNested>
cudaError_t launch_products(const LoraMatmulArgs& a, int clusters, cudaStream_t stream) {
    const int64_t row_tiles = ceil_div(a.w.N, kTileRows);
    const Rows all{0, row_tiles};
    // Shared W for the rounds that it fills, and what is left split along K.
    const int64_t groups = ceil_div(a.M, 2 * SharedW256::kTokens);
    const int64_t head = row_tiles * groups / clusters * clusters / groups;
    const int64_t shared_w = estimate<SharedW256>(a, row_tiles, clusters);
    const int64_t shared_x = estimate<SharedX256>(a, row_tiles, clusters);
    const int64_t narrow = estimate<SharedX128>(a, row_tiles, clusters);
    const int64_t two = head == 0 || head == row_tiles
                            ? INT64_MAX
                            : estimate<SharedW256>(a, head, clusters) +
                                  estimate<SharedX256>(a, row_tiles - head, clusters);
    const int64_t best = std::min(std::min(shared_w, shared_x), std::min(narrow, two));
    if (best == shared_w)
        return launch_product<T, kNested, SharedW256>(a, all, clusters, stream);
    if (best == shared_x)
        return launch_product<T, kNested, SharedX256>(a, all, clusters, stream);
    if (best == narrow)
        return launch_product<T, kNested, SharedX128>(a, all, clusters, stream);
    const cudaError_t error =
        launch_product<T, kNested, SharedW256>(a, {0, head}, clusters, stream);
    if (error != cudaSuccess)
        return error;
    return launch_product<T, kNested, SharedX256>(a, {head, row_tiles - head}, clusters, stream);
}

template <typename T>
cudaError_t launch(const LoraMatmulArgs& a, int clusters, cudaStream_t stream) {
    return a.w.absmax == nullptr ? launch_products<T, true>(a, clusters, stream)
                                 : launch_products<T, false>(a, clusters, stream);
}

}  // namespace

bool serves_nf4_lora_matmul_mid(const LoraMatmulArgs& a) {
    const WeightView& w = a.w;
    return a.dtype != Dtype::kFloat32 && w.flat && w.K % kStepK == 0 && w.N % 16 == 0 &&
           w.blocksize_log2 >= 6 && w.blocksize_log2 <= 12 && a.r <= 64 &&
           w.N * (w.K / kStepK) <= UINT32_MAX && a.M <= (1 << 19) && is_aligned(a.x) &&
           is_aligned(a.lora_A) && is_aligned(a.y) && is_aligned(w.qweight) && device_is_sm90();
}

size_t nf4_lora_matmul_mid_workspace_bytes(const LoraMatmulArgs& a) {
    return static_cast<size_t>(a.M) * padded_rank(a.r) * 2;
}

cudaError_t launch_nf4_lora_matmul_mid(const LoraMatmulArgs& a, cudaStream_t stream) {
    if (a.M == 0 || a.w.N == 0)
        return cudaSuccess;
    if (a.r > 0) {
        const cudaError_t error = launch_lora_project(a, a.workspace, stream);
        if (error != cudaSuccess)
            return error;
    }
    const int clusters = sm_count() / kCluster;  // SMs come in pairs
    return a.dtype == Dtype::kBFloat16 ? launch<__nv_bfloat16>(a, clusters, stream)
                                       : launch<__half>(a, clusters, stream);
}

}  // namespace lowbit::cuda
