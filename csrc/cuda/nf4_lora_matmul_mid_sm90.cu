// Some hundred tokens through a 4-bit linear layer with a low-rank update: the weight is decoded
// inside the product.
//
//     y[m, n] = sum_k x[m, k] W[n, k] + sum_j z_scaled[m, j] lora_B[n, j] + bias[n],  M > 64
//
// Operands: see nf4_lora_matmul.h and weight.h (flat). W enters as RN_T(codebook[q] * absmax), T =
// bf16 or fp16, the same bits as dequantization gives. z_scaled [M, r rounded up to 16] is made as
// lora_project_tile.cuh describes, by the first CTAs of the grid or by a kernel launched just
// before. fp32 accumulators, one rounding, on store. No atomics: every sum has a fixed order.
//
// A CTA computes 128 rows of W (the M side of wgmma) x 256 or 128 tokens in steps of 64 along K,
// through a ring of stages in shared memory. Two consumer warpgroups own 64 rows each. The producer
// warps decode, 32 rows and one step at a time, a lane a block, into the swizzled layout that wgmma
// reads; single lanes of them issue the TMA loads of x and of packed weights. The low-rank term is
// one step more: z_scaled against rows of lora_B. Clusters are pairs of CTAs, since no larger size
// fills an H100 (fours and eights reached 120 of 132 SMs), in one of two shapes:
//   shared x   two row tiles, one token tile: each loads half of x for both
//   shared W   one row tile, two token tiles: each decodes half of W for both and copies it over
//
// Grids are persistent: whole rounds of tiles, one to a cluster. The tiles that are left, fewer
// than clusters, are divided along K and their partial sums exchanged through the workspace, in one
// of two ways or not at all, whatever nf4_lora_matmul_mid_plan.h expects to be fastest:
//   in a row   equal shares of all their steps: a part that does not end its tile comes first, so
//              that it is stored while the cluster that ends the tile, its last, still works
//   level      parts of equal length, which end together: each adds up a share of the tokens,
//              its own sums first, then those of the next parts, around the end
// Level parts wait for each other, so they are launched cooperatively: all start, or none. Where
// the whole grid does not fit (a green context), the last part has all tokens, as in a row, and
// waits for those before it alone, which give before they take. Up to some 1000 tokens, 2000 at
// ranks up to 16, the grid's first four CTAs or more have no tiles and project meanwhile, which
// hides 7 us; in a launch of their own in front that cost 0.5 to 1.3 us more (H200, 2026-11). They
// wait for nobody. So in a grid that is not cooperative CTAs wait for lower numbers only, which the
// device starts first, however few SMs there are. What is waited for is told by marks (marks.h).
//
// Bound by decoding beside wgmma and by shared memory: per step wgmma reads 80 KB (96 with shared
// x, see Plan), x takes 32, decoded weights 16. A step of 128 x 256 takes 0.70 us with shared W,
// 0.81 with shared x, 0.72 there with decoding switched off (H100, 2026-11). Eight decoding warps
// instead of four gain 6% with shared x. An exchange costs 5 to 8 us at 256 tokens;
// in turns 0.5 us less than with one flag for all (H200, 2026-11).
//
// Callers have checked what serves_nf4_lora_matmul_mid lists.

#include "device.h"
#include "launch_config.h"
#include "lora_project_tile.cuh"
#include "marks.h"
#include "nf4_lora_matmul_mid.h"
#include "nf4_lora_matmul_mid_consume.cuh"
#include "nf4_lora_matmul_mid_plan.h"
#include "nf4_lora_matmul_mid_produce.cuh"
#include "tensor_map.h"

namespace lowbit::cuda {
namespace {

// ---- kernel -------------------------------------------------------------------------------------

// By the CTAs in front, which wait for nobody: their share of z, told to all that have tiles.
template <typename T, int kColumns>
__device__ __forceinline__ void
project_and_tell(const projection::Params& projecting, const Params& p, uint8_t* smem_raw) {
    const auto tell = [&p] {
        for (int cta = threadIdx.x; cta < p.clusters * kCluster; cta += blockDim.x)
            store_release(z_word(p, blockIdx.x, cta), p.mark);
    };
    projection::project<T, kColumns, kConsumers / kWarpgroup>(projecting, smem_raw, tell);
}

// 384 threads with 168 registers (shared W) or 512 with 128, to begin with.
template <typename T, bool kNested, class P>
__global__ void __cluster_dims__(kCluster) __launch_bounds__(P::kThreads, 1)
    nf4_lora_matmul_mid_kernel(
        const __grid_constant__ Maps maps,
        const Params p,
        const __grid_constant__ projection::Params projecting) {
    extern __shared__ uint8_t smem_raw[];
    if (blockIdx.x < p.projectors) {
        wait_for_previous_kernel();
        if (projecting.r > 16)
            project_and_tell<T, 64>(projecting, p, smem_raw);
        else
            project_and_tell<T, 16>(projecting, p, smem_raw);
        return;
    }
    const uint32_t raw = shared_address(smem_raw);
    const uint32_t smem = (raw + kSmemAlignment - 1) / kSmemAlignment * kSmemAlignment;
    if (threadIdx.x == 0) {
        init_barriers<P>(smem);
        barrier_init_fence();
    }
    __syncthreads();
    // Produce and consume wait. Thread 0 has fenced its barriers; a release would wait for all of
    // memory.
    cluster_arrive_relaxed();
    constexpr bool kMovesRegisters = P::kTokens == 256;
    if (threadIdx.x < P::kProducers) {
        if (kMovesRegisters)
            shrink_registers<P::kSharesW ? 104 : 80>();
        float* tables = reinterpret_cast<float*>(smem_raw + (smem - raw) + P::kTables);
        produce<T, kNested, P>(maps, p, smem, tables);
    } else {
        if (kMovesRegisters)
            grow_registers<P::kSharesW ? 200 : 176>();
        consume<T, P>(maps, p, smem);
    }
}

// ---- launch -------------------------------------------------------------------------------------

template <class P>
cudaError_t make_maps(Maps& maps, const LoraMatmulArgs& a) {
    const CUtensorMapDataType type = tensor_map_type(a.dtype);
    cudaError_t error = make_tensor_map(maps.x, type, a.x, a.M, a.w.K, {P::kBoxTokens, kStepK});
    if (error == cudaSuccess)
        error = make_tensor_map(maps.y, type, a.y, a.M, a.w.N, {kChunkTokens, 64});
    if (error == cudaSuccess)
        error = make_tensor_map(
            maps.packed, CU_TENSOR_MAP_DATA_TYPE_UINT8, a.w.qweight, a.w.N, a.w.K / 2,
            {P::kOwnRows, P::kPackedRow});
    if (error == cudaSuccess && a.r > 0)
        error = make_tensor_map(
            maps.z, type, a.workspace, a.M, padded_rank(a.r), {P::kBoxTokens, kStepK});
    return error;
}

bool quick_scales(const WeightView& w) {
    const auto misaligned = w.absmax == nullptr ? reinterpret_cast<uintptr_t>(w.absmax_8bit) % 4
                                                : reinterpret_cast<uintptr_t>(w.absmax) % 16;
    return w.K % (4 * kStepK) == 0 && w.blocksize_log2 == 6 && misaligned == 0 &&
           (w.absmax != nullptr || w.nested_blocksize_log2 >= 2);
}

// Level parts wait for each other: beside a kernel of another stream whose CTAs do so too, each may
// hold the SMs that the other one needs, unless all start together.
template <typename T, bool kNested, class P>
cudaError_t launch_grid(
    const Maps& maps, const Params& p, const projection::Params& projecting, cudaStream_t stream) {
    static_assert(P::kSmemBytes >= projection::Layout<16>::kSmemBytes);
    static_assert(P::kSmemBytes >= projection::Layout<64>::kSmemBytes);
    constexpr auto kernel = nf4_lora_matmul_mid_kernel<T, kNested, P>;
    const cudaError_t error = allow_shared_memory<kernel>(P::kSmemBytes);
    if (error != cudaSuccess)
        return error;
    LaunchConfig config(p.projectors + kCluster * p.clusters, P::kThreads, P::kSmemBytes, stream);
    if (p.level)
        config.cooperative();
    return cudaLaunchKernelEx(config.get(), kernel, maps, p, projecting);
}

cudaError_t
make_projection(projection::Params& p, const LoraMatmulArgs& a, const ClusterRoom& room) {
    const ProjectionTiling tiling = tile_projection(a.M, room);
    return a.r > 16 ? projection::make_params<64>(p, a, room.cluster, tiling, a.workspace)
                    : projection::make_params<16>(p, a, room.cluster, tiling, a.workspace);
}

template <typename T, bool kNested, class P>
cudaError_t launch_product(const LoraMatmulArgs& a, const Division& division, cudaStream_t stream) {
    Maps maps{};
    cudaError_t error = make_maps<P>(maps, a);
    if (error != cudaSuccess)
        return error;
    const Workspace space = layout_workspace(a, division);
    uint8_t* workspace = static_cast<uint8_t*>(a.workspace);
    Params p{};
    p.w = a.w;
    p.lora_B = a.lora_B;
    p.bias = a.bias;
    p.partials = reinterpret_cast<float*>(workspace + space.partials);
    p.given_words = reinterpret_cast<uint64_t*>(workspace + space.words);
    p.z_words = p.given_words + kCluster * division.split_clusters * kMostParts;
    p.mark = next_mark();
    p.projectors = projecting_ctas(a, division);
    p.r = a.r;
    p.steps = static_cast<int>(a.w.K / kStepK);
    p.token_groups = static_cast<int>(ceil_div(a.M, P::kTokens * P::kTokenTiles));
    p.clusters = division.clusters;
    p.by_token_groups = make_divisor(p.token_groups);
    p.by_clusters = make_divisor(p.clusters);
    p.full_tiles = division.full_tiles;
    if (division.split_tiles > 0)
        p.split = make_split_tiles(division.split_tiles, division.split_clusters, p.steps);
    // A launch that a graph records is not refused before the graph runs; hence the question.
    p.level = division.split_tiles > 0 && division.split_clusters % division.split_tiles == 0 &&
              !in_green_context(stream);
    p.waits_first = a.r == 0 || p.projectors > 0;
    p.quick_scales = quick_scales(a.w);

    projection::Params projecting{};
    if (p.projectors > 0) {
        error = make_projection(projecting, a, projection_room_beside(division.spare_sms));
        if (error != cudaSuccess)
            return error;
    }
    error = launch_grid<T, kNested, P>(maps, p, projecting, stream);
    // Fewer CTAs may be resident than sm_count says: in a share of MPS, or in a context that
    // in_green_context does not see. The workspace does not depend on level.
    if (p.level && error == cudaErrorCooperativeLaunchTooLarge) {
        cudaGetLastError();  // left in place it would be taken for another call's
        p.level = false;
        error = launch_grid<T, kNested, P>(maps, p, projecting, stream);
    }
    return error;
}

template <typename T, bool kNested>
cudaError_t launch(const LoraMatmulArgs& a, const Division& division, cudaStream_t stream) {
    switch (division.plan) {
    case kSharedW256:
        return launch_product<T, kNested, SharedW256>(a, division, stream);
    case kSharedX256:
        return launch_product<T, kNested, SharedX256>(a, division, stream);
    default:
        return launch_product<T, kNested, SharedX128>(a, division, stream);
    }
}

template <typename T>
cudaError_t launch(const LoraMatmulArgs& a, const Division& division, cudaStream_t stream) {
    return a.w.absmax == nullptr ? launch<T, true>(a, division, stream)
                                 : launch<T, false>(a, division, stream);
}

Machine this_machine() {
    return {sm_count(), projection_room()};
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
    return layout_workspace(a, choose_division(a, this_machine())).bytes;
}

cudaError_t launch_nf4_lora_matmul_mid(const LoraMatmulArgs& a, cudaStream_t stream) {
    if (a.M == 0 || a.w.N == 0)
        return cudaSuccess;
    const Division division = choose_division(a, this_machine());
    if (a.r > 0 && projecting_ctas(a, division) == 0) {
        const cudaError_t error = launch_lora_project(a, a.workspace, stream);
        if (error != cudaSuccess)
            return error;
    }
    return a.dtype == Dtype::kBFloat16 ? launch<__nv_bfloat16>(a, division, stream)
                                       : launch<__half>(a, division, stream);
}

}  // namespace lowbit::cuda
