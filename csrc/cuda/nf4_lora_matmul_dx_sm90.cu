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
// decoding, and a lane needs another one each step, 64 rows further on. Two consumer
// warpgroups own a block column each. The low-rank term is one step more, lora_A as it is. Clusters
// are pairs of CTAs in one of two shapes:
//   shared dy  two column tiles, one token tile: each loads half of dy for both
//   shared W   one column tile, two token tiles: each decodes half of W for both and copies it over
// Grids are persistent. When the last tiles would leave half of the pairs idle, a pair with shared
// dy takes one column tile instead of two, splits N, and sums through the other's shared memory. Up
// to 256 tokens two or four pairs may share the N of such a tile; the last adds the others' sums to
// its own, by way of L2, as no device has room for as many clusters of four.
//
// The gradients of the adapter are made in front of it or, where that is expected to be faster, at
// the same time on SMs that are left idle, four of them at least: then it waits for u at its last
// step (nf4_lora_matmul_dx_plan.h). Gradients of one launch set a mark for each CTA when u is there
// (marks.h); of others it awaits the end. Its own end comes after theirs in any case. Where those
// few SMs would be at it longer than the product takes, or in front a pass over x takes longer than
// it does here, the gradient of lora_A is made in here (nf4_lora_matmul_dx_grads.cuh).
//
// Bound by shared memory and by the latency of decoding, as the forward product is. From 2048
// tokens on nf4_lora_matmul_dx_large_sm90.cu is faster (H200, 2026-11).
//
// Callers have checked what serves_nf4_lora_matmul_dx lists.

#include "launch_config.h"
#include "lora_grads.h"
#include "nf4_lora_matmul_dx.h"
#include "nf4_lora_matmul_dx_consume.cuh"
#include "nf4_lora_matmul_dx_plan.h"
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
        init_barriers<P>(smem);
        for (int i = 0; i < kConsumerWarps; i++)
            barrier_init(smem + P::kSums + i * 8, 1);
        barrier_init_fence();
    }
    // The first product of a call waits for all that it reads, or for u alone when it comes to it
    // (wait_for_u). Then a second one, which reads the same, fills the SMs that it leaves idle.
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
        produce<T, P>(maps, p, smem, smem_generic);
    } else {
        if (kMovesRegisters)
            grow_registers<200>();
        consume<T, P>(maps, p, smem, smem_generic);
    }
    // Whoever waits for this kernel waits for those in front. One CTA is enough, and the others
    // make room.
    if (blockIdx.x == 0 && (!p.is_first || p.waits_for_u))
        wait_for_previous_kernel();
}

// ---- launch -------------------------------------------------------------------------------------

bool waits_for_u(const LoraDxArgs& a) {
    return a.follows_grads && a.r > 0 && (a.beside_grads || a.M <= kOverlappingTokens);
}

template <class P>
cudaError_t make_maps(Maps& maps, const LoraDxArgs& a) {
    const CUtensorMapDataType type = tensor_map_type(a.dtype);
    cudaError_t error = make_tensor_map(maps.dy, type, a.dy, a.M, a.w.N, {P::kBoxTokens, kStepN});
    if (error == cudaSuccess)
        error = make_tensor_map(maps.dx, type, a.dx, a.M, a.w.K, {kChunkTokens, 64});
    if (error == cudaSuccess)
        error = make_tensor_map(
            maps.packed, CU_TENSOR_MAP_DATA_TYPE_UINT8, a.w.qweight, a.w.N, a.w.K / 2,
            {P::kOwnRows, kPackedRow});
    if (error == cudaSuccess && a.r > 0)
        error = make_tensor_map(maps.u, type, a.u, a.M, lora_columns(a.r), {P::kBoxTokens, kStepN});
    if (error == cudaSuccess && a.r > 0)
        error = make_tensor_map(maps.lora_A, type, a.lora_A, a.r, a.w.K, {kStepN, 64});
    return error;
}

// Column tiles of dx that one launch computes.
struct Columns {
    int64_t first, count;
};

template <typename T, class P>
cudaError_t launch_kernel(const Maps& maps, const Params& p, cudaStream_t stream) {
    constexpr auto kKernel = nf4_lora_matmul_dx_kernel<T, P>;
    const cudaError_t error = allow_shared_memory<kKernel>(P::kSmemBytes);
    if (error != cudaSuccess)
        return error;
    LaunchConfig config(kCluster * p.clusters, P::kThreads, P::kSmemBytes, stream);
    config.cluster(kCluster);
    return cudaLaunchKernelEx(config.get(), kKernel, maps, p);
}

template <class P>
Params params_of(const LoraDxArgs& a, Columns columns, int clusters) {
    Params p{};
    p.w = a.w;
    const bool nested = a.w.absmax == nullptr;
    p.scales = nested ? a.w.nested_absmax : a.w.absmax;
    p.scale_log2 = nested ? a.w.nested_blocksize_log2 : 0;
    p.blocks = static_cast<int>(a.w.K / 64);
    p.step_blocks = static_cast<int>(kStepN * a.w.K >> a.w.blocksize_log2);
    p.r = a.r;
    p.steps = static_cast<int>(ceil_div(a.w.N, kStepN));
    p.first_column = static_cast<int>(columns.first * kTileColumns);
    p.column_groups = static_cast<int>(ceil_div(columns.count, P::kColumnTiles));
    const auto token_groups = static_cast<int>(ceil_div(a.M, P::kTokens * P::kTokenTiles));
    p.last_slab = (token_groups - 1) / P::kSlabGroups;
    p.last_slab_groups = token_groups - p.last_slab * P::kSlabGroups;
    p.by_column_groups = make_divisor(p.column_groups);
    p.by_last_slab_groups = make_divisor(p.last_slab_groups);
    const Dealt dealt = deal<P>(a, columns.count, clusters);
    p.full_tiles = static_cast<int>(dealt.full_tiles);
    p.split_tiles = static_cast<int>(dealt.split_tiles);
    p.share_log2 = dealt.share_log2;
    if (p.share_log2 > 0) {
        auto* const workspace = static_cast<uint8_t*>(a.workspace);
        p.given = reinterpret_cast<float4*>(workspace);
        p.given_words = reinterpret_cast<uint64_t*>(workspace + dealt.given_sums_bytes);
        p.given_mark = next_mark();
    }
    p.clusters = dealt.clusters;
    p.by_clusters = make_divisor(p.clusters);
    return p;
}

template <typename T, class P>
cudaError_t
launch_product(const LoraDxArgs& a, Columns columns, int clusters, cudaStream_t stream) {
    Maps maps{};
    const cudaError_t error = make_maps<P>(maps, a);
    if (error != cudaSuccess)
        return error;
    Params p = params_of<P>(a, columns, clusters);
    p.is_first = columns.first == 0;
    p.is_last = columns.first + columns.count == ceil_div(a.w.K, kTileColumns);
    p.waits_for_u = waits_for_u(a);
    if (a.u_marks.words != nullptr) {
        p.u_words = a.u_marks.words + (p.is_first ? 0 : sm_count());
        p.u_mark = a.u_marks.mark;
    }
    p.adds = a.adds;
    if (p.is_last)
        p.grad = {
            static_cast<const uint8_t*>(a.x),
            static_cast<const uint8_t*>(a.u),
            a.d_lora_A,
            a.d_lora_A_dtype == Dtype::kFloat32,
            static_cast<int>(a.M),
            lora_columns(a.r)};
    return p.share_log2 > 0 || p.grad.out != nullptr
               ? launch_kernel<T, typename P::More>(maps, p, stream)
               : launch_kernel<T, P>(maps, p, stream);
}

template <typename T>
cudaError_t launch_products(const LoraDxArgs& a, cudaStream_t stream) {
    const int clusters = clusters_of(sm_count(), a.beside_grads);
    const Products products = choose_products(a, clusters);
    const int64_t head = products.head, all = ceil_div(a.w.K, kTileColumns);
    switch (products.plan) {
    case Products::kSharedDy256:
        return launch_product<T, SharedDy256>(a, {0, all}, clusters, stream);
    case Products::kSharedDy128:
        return launch_product<T, SharedDy128>(a, {0, all}, clusters, stream);
    default:
        break;
    }
    const cudaError_t error = launch_product<T, SharedW256>(a, {0, head}, clusters, stream);
    if (error != cudaSuccess || head == all)
        return error;
    return launch_product<T, SharedDy256>(a, {head, all - head}, clusters, stream);
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

LoraGradsPlan plan_grads_of_nf4_lora_matmul_dx(
    const LoraDxArgs& a, const LoraGradsArgs& grads, cudaStream_t stream) {
    if (a.M == 0 || a.w.K == 0)
        return plan_lora_grads(grads);
    return choose_grads(a, sm_count(), lora_grads_room(stream), [&](int sms) {
        return plan_lora_grads(grads, sms);
    });
}

size_t nf4_lora_matmul_dx_workspace_bytes(const LoraDxArgs& a) {
    return a.M == 0 || a.w.K == 0
               ? 0
               : choose_products(a, clusters_of(sm_count(), a.beside_grads)).given_bytes;
}

// Two launches of at most one CTA for each SM.
int nf4_lora_matmul_dx_marks(const LoraDxArgs& a) {
    return waits_for_u(a) ? 2 * sm_count() : 0;
}

cudaError_t launch_nf4_lora_matmul_dx(const LoraDxArgs& a, cudaStream_t stream) {
    if (a.M == 0 || a.w.K == 0)
        return cudaSuccess;
    if (a.r > 0 && a.lora_A_dtype != a.dtype)
        return cudaErrorInvalidValue;
    return a.dtype == Dtype::kBFloat16 ? launch_products<__nv_bfloat16>(a, stream)
                                       : launch_products<__half>(a, stream);
}

}  // namespace lowbit::cuda
