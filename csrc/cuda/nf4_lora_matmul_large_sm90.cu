// Many tokens through a 4-bit linear layer with a low-rank update: dense wgmma speed from a 4-bit
// weight.
//
//     y[m, n] = sum_k x[m, k] W[n, k] + sum_j s_j z[m, j] lora_B[n, j] + bias[n],  z = x lora_A^T
//
// Operands: see nf4_lora_matmul.h and weight.h (flat). W enters as RN_T(codebook[q] * absmax), T =
// bf16 or fp16, the same bits as dequantization gives. Accumulates in fp32; s_j z is rounded to T;
// y is rounded once. Sums run in a fixed order.
//
// One persistent launch after a short one (counters, first chunk): every SM holds one CTA, pairs of
// CTAs (clusters) walk over tiles of 256 weight rows (a panel) x 256 tokens. Each CTA multiplies
// 128 rows by the pair's 256 tokens and loads half of the tokens for both. The roles of a CTA's
// warps:
//   warp 0      producer: TMA loads of 64 columns at a time into 4 stages
//   warps 1, 2  decoders: turn the 4-bit weight into T, for all CTAs together
//   warps 4-11  two warpgroups of consumers: 64 rows each, m64n256k16
// Each panel is decoded once for the whole wave of tiles that the grid works on, chunk by chunk,
// through a ring in the workspace that is read from L2 (nf4_lora_matmul_large_decode.cuh): the
// kernel that decodes in its main loop (mid) takes 2 to 6 % longer at 4096 tokens, 11 to 39 % at
// 16384 (H100, 2026-11).
// The low-rank term is one more step of the contraction, [x | s z] [W | lora_B]^T. z itself comes
// from extra tiles, 256 tokens by r columns, that the clusters with the fewest tiles do first.
//
// Bound by the tensor cores, that is by the power limit: an H100 multiplies 128 x 256 x 64 in 1024
// clocks but not at its highest clock. So bytes moved cost speed as well; hence the order of tiles:
// groups of about 16 token tiles (the x of a group is read from HBM once per wave), panels inside.
//
// CTAs wait for each other in both directions, so all of them must be resident: the grid is no
// larger than the device holds and is launched cooperatively. Callers have checked
// serves_nf4_lora_matmul_large. In parts: nf4_lora_matmul_large_plan.h (who computes what),
// _pipeline.cuh (shared memory), _decode.cuh, _consume.cuh; the producer is below.

#include <atomic>

#include "launch_config.h"
#include "nf4_lora_matmul_large.h"
#include "nf4_lora_matmul_large_consume.cuh"
#include "nf4_lora_matmul_large_decode.cuh"
#include "nf4_lora_matmul_large_pipeline.cuh"
#include "tensor_map.h"

namespace lowbit::cuda {
namespace {

constexpr int kPrepareThreads = 256;

// ---- producer -----------------------------------------------------------------------------------

// One thread. Each CTA loads its half of the tokens into both.
__device__ __forceinline__ void
load_operands(const Params& p, const TensorMaps& maps, uint32_t smem, int rank, int cluster) {
    constexpr uint16_t kAll = (1 << kCtas) - 1;
    const Plan& plan = p.plan;
    Pipeline pipe{smem, 0};
    auto load_x = [&](const CUtensorMap& map, int column, int token_tile, int other_bytes) {
        barrier_wait_asleep(pipe.empty(), pipe.parity() ^ 1);
        barrier_arrive_expect(pipe.full(), kXBytes + other_bytes);
        load_tile_multicast(
            pipe.x() + rank * (kXBytes / kCtas), map, column,
            token_tile * kTileTokens + rank * kCtaTokens, pipe.full(), kAll);
    };
    for (int i = 0; i < z_tiles(plan, cluster); i++) {
        const int token_tile = z_tile(plan, cluster, rank, i);
        for (int k = 0; k < plan.steps; k++, pipe.step++) {
            barrier_wait_asleep(pipe.empty(), pipe.parity() ^ 1);
            barrier_arrive_expect(pipe.full(), kXBytes + kLoraABytes);
            for (int half = 0; half < kCtas; half++)
                load_tile(
                    pipe.x() + half * (kXBytes / kCtas), maps.x, k * kStepColumns,
                    token_tile * kTileTokens + half * kCtaTokens, pipe.full());
            load_tile(pipe.w(), maps.lora_A, k * kStepColumns, 0, pipe.full());
        }
    }
    if (z_tiles(plan, cluster) > 0)
        barrier_wait_asleep(pipe.z_over(), 0);
    for (int wave = first_wave(plan, cluster); wave < plan.waves; wave++) {
        const int t = wave * plan.clusters + cluster - plan.idle;
        const Tile tile = locate(plan, t);
        const Wave range = locate_wave(plan, wave);
        const uint32_t tasks = range.panels * kTasksPerPanel;
        const int row = (tile.sequence - range.first_sequence) * kPanelRows + rank * kCtaRows;
        bool known_ready = false;
        for (int k = 0; k < plan.steps; k++, pipe.step++) {
            const int index = wave * plan.chunks + k / kChunkSteps;
            if (k % kChunkSteps == 0) {
                if (!known_ready)
                    wait_for_count(p.ready + index, tasks, kReadyPollNs);
                fence_async_proxy_global();
            }
            // A look ahead while stages are full, so that a chunk that is ready costs no wait.
            if (k % kChunkSteps == kChunkSteps / 2 && k / kChunkSteps + 1 < plan.chunks)
                known_ready = load_acquire(p.ready + index + 1) >= tasks;
            load_x(maps.x, k * kStepColumns, tile.token_tile, kWBytes);
            load_tile(
                pipe.w(), maps.ring_load, k % kChunkSteps * kStepColumns,
                index % plan.slots * (plan.slot_panels * kPanelRows) + row, pipe.full());
        }
        if (plan.rank_columns > 0) {
            if (plan.z_clusters > 0) {
                wait_for_count(p.z_ready + tile.token_tile, kConsumers, kReadyPollNs);
                fence_async_proxy_global();
            }
            load_x(maps.z, 0, tile.token_tile, kWBytes);
            load_tile(
                pipe.w(), maps.lora_B, 0, tile.panel * kPanelRows + rank * kCtaRows, pipe.full());
            pipe.step++;
        }
    }
}

// ---- kernels ------------------------------------------------------------------------------------

template <typename T>
__global__ void __cluster_dims__(kCtas, 1, 1) __launch_bounds__(kThreads, 1)
    nf4_lora_matmul_large_kernel(
        const __grid_constant__ TensorMaps maps, const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) uint8_t smem[];
    const uint32_t smem_address = shared_address(smem);
    const int rank = static_cast<int>(cluster_rank());
    const int cluster = blockIdx.x / kCtas;
    const int warp = threadIdx.x / kWarpSize;
    if (threadIdx.x == 0) {
        for (uint32_t stage = 0; stage < kStages; stage++) {
            const Pipeline pipe{smem_address, stage};
            barrier_init(pipe.full(), 1);
            barrier_init(pipe.empty(), kCtas * kConsumers);
        }
        barrier_init(Pipeline{smem_address, 0}.z_over(), kCtas * kConsumers);
        barrier_init_fence();
    }
    __syncthreads();
    cluster_sync();
    if (warp < 4) {
        shrink_registers<kRegistersAside>();
        if (warp == 0) {
            wait_for_previous_kernel();
            let_next_kernel_start();
            if (threadIdx.x == 0)
                load_operands(p, maps, smem_address, rank, cluster);
            __syncwarp();
        } else if (warp <= kDecoders) {
            // Neighbouring tasks on different SMs: the first chunk has fewer tasks than warps.
            decode_weight<T>(
                p, maps.ring_store, smem + kTaskOffset + (warp - 1) * kTaskBytes,
                reinterpret_cast<float*>(smem + kNestedOffset + (warp - 1) * kNestedBytes),
                (warp - 1) * gridDim.x + blockIdx.x, kDecoders * gridDim.x);
        }
    } else {
        grow_registers<kRegistersConsumer>();
        wait_for_previous_kernel();
        multiply_tiles<T>(p, smem_address, rank, cluster);
    }
    __syncthreads();
    cluster_sync();  // no CTA may end while the other one still signals into it
}

// Before the main kernel: counters at zero, the first chunk decoded by many threads, as all wait
// for it, and padded copies of operands that TMA cannot take as they are.
template <typename T>
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(
    const Params p,
    const T* z_in,     // [M, rank] or null
    const T* lora_B,   // [N, rank] or null: no copy
    T* lora_B_padded,  // [N, rank_columns]
    uint4* ring        // first slot, [rows][64] of 8 elements
) {
    const Plan& plan = p.plan;
    let_next_kernel_start();
    const int first = blockIdx.x * kPrepareThreads + threadIdx.x;
    const int stride = gridDim.x * kPrepareThreads;

    // 8 codes of the first chunk.
    const Wave range = locate_wave(plan, 0);
    const int words_per_row = min(plan.K, kChunkColumns) / 8;
    const int row_in_slot = first / words_per_row;
    const int word_in_row = first - row_in_slot * words_per_row;
    const bool decodes = row_in_slot < range.panels * kPanelRows;
    const int row = min(weight_row(plan, range, row_in_slot), plan.N - 1);
    const int64_t element = static_cast<int64_t>(row) * plan.K + word_in_row * 8;
    if (decodes)
        prefetch_l2(p.w.qweight + element / 2);
    wait_for_previous_kernel();
    if (decodes) {
        const uint32_t word = __ldg(reinterpret_cast<const uint32_t*>(p.w.qweight + element / 2));
        const int64_t block = element >> p.w.blocksize_log2;
        const float scale =
            p.w.absmax == nullptr ? block_scale<true>(p.w, block) : block_scale<false>(p.w, block);
        const Codebook codebook = load_codebook(p.w.codebook);
        ring[row_in_slot * (kChunkColumns / 8) + word_in_row] =
            decode_word(scale_codebook<T>(codebook, scale), word);
    }
    const int counters = 2 * plan.waves * plan.chunks + plan.token_tiles;
    for (int i = first; i < counters; i += stride)
        p.ready[i] = i == 0 ? range.panels * kTasksPerPanel : 0;
    if (z_in != nullptr) {
        T* z_scaled = static_cast<T*>(p.z_scaled);
        for (int64_t i = first; i < int64_t{plan.M} * plan.rank_columns; i += stride) {
            const int64_t token = i / plan.rank_columns;
            const int column = static_cast<int>(i % plan.rank_columns);
            const float z = column < plan.rank ? to_float(z_in[token * plan.rank + column]) : 0.0f;
            z_scaled[i] = from_float<T>(z * column_scale(p, column));
        }
    }
    if (lora_B != nullptr) {
        for (int64_t i = first; i < int64_t{plan.N} * plan.rank_columns; i += stride) {
            const int64_t n = i / plan.rank_columns, column = i % plan.rank_columns;
            lora_B_padded[i] =
                column < plan.rank ? lora_B[n * plan.rank + column] : from_float<T>(0.0f);
        }
    }
}

// ---- host ---------------------------------------------------------------------------------------

// How many clusters the current device holds at once; 0 if it cannot run the kernel. Asked once.
int resident_clusters() {
    constexpr int kDevices = 64;
    static std::atomic<int> known[kDevices];  // count + 1; two threads may both find out
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices)
        return 0;
    if (known[device] == 0) {
        int clusters = 0;
        for (const void* kernel :
             {reinterpret_cast<const void*>(nf4_lora_matmul_large_kernel<__nv_bfloat16>),
              reinterpret_cast<const void*>(nf4_lora_matmul_large_kernel<__half>)}) {
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes);
            LaunchConfig config(kCtas, kThreads, kSmemBytes, nullptr);
            config.cluster(kCtas);
            if (!device_is_sm90() ||
                cudaOccupancyMaxActiveClusters(&clusters, kernel, config.get()) != cudaSuccess)
                clusters = 0;
        }
        cudaGetLastError();
        known[device] = clusters + 1;
    }
    return known[device] - 1;
}

// Offsets of the parts of the workspace, each 256-byte aligned.
struct Workspace {
    int64_t counters;
    int64_t z_scaled;
    int64_t lora_B;
    int64_t ring;
    int64_t end;
    bool pads_lora_B;
};

Workspace lay_out(const Plan& plan) {
    auto aligned = [](int64_t bytes) { return ceil_div(bytes, 256) * 256; };
    Workspace space{};
    const int64_t counters = 2 * int64_t{plan.waves} * plan.chunks + plan.token_tiles;
    space.pads_lora_B = plan.rank % 8 != 0;  // TMA takes rows of a multiple of 16 bytes
    space.z_scaled = aligned(counters * 4);
    space.lora_B = space.z_scaled + aligned(int64_t{plan.M} * plan.rank_columns * 2);
    space.ring =
        space.lora_B + (space.pads_lora_B ? aligned(int64_t{plan.N} * plan.rank_columns * 2) : 0);
    space.ring = ceil_div(space.ring, 1024) * 1024;
    space.end =
        space.ring + int64_t{plan.slots} * plan.slot_panels * kPanelRows * kChunkColumns * 2;
    return space;
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
    p.ready = reinterpret_cast<uint32_t*>(base + space.counters);
    p.done = p.ready + plan.waves * plan.chunks;
    p.z_ready = p.done + plan.waves * plan.chunks;

    TensorMaps maps{};
    const CUtensorMapDataType type = tensor_map_type(args.dtype);
    const int64_t ring_rows = int64_t{plan.slots} * plan.slot_panels * kPanelRows;
    const uint8_t* ring = base + space.ring;
    const auto make = [&](CUtensorMap& map, const void* data, int64_t rows, int64_t columns,
                          int box_rows) {
        return make_tensor_map(map, type, data, rows, columns, {box_rows, kStepColumns}) ==
               cudaSuccess;
    };
    bool ok = make(maps.x, args.x, args.M, plan.K, kCtaTokens) &&
              make(maps.ring_load, ring, ring_rows, kChunkColumns, kCtaRows) &&
              make(maps.ring_store, ring, ring_rows, kChunkColumns, kTaskRows);
    if (plan.z_clusters > 0)
        ok = ok && make(maps.lora_A, args.lora_A, plan.rank, plan.K, 64);
    if (plan.rank > 0) {
        const void* b = space.pads_lora_B ? base + space.lora_B : args.lora_B;
        const int columns = space.pads_lora_B ? plan.rank_columns : plan.rank;
        ok = ok && make(maps.lora_B, b, plan.N, columns, kCtaRows) &&
             make(maps.z, p.z_scaled, args.M, plan.rank_columns, kCtaTokens);
    }
    if (!ok)
        return cudaErrorInvalidValue;

    const int64_t words = int64_t{plan.slot_panels} * kPanelRows * (kChunkColumns / 8);
    const LaunchConfig prepare(
        static_cast<unsigned>(words / kPrepareThreads), kPrepareThreads, 0, stream);
    const cudaError_t error = cudaLaunchKernelEx(
        prepare.get(), prepare_kernel<T>, p,
        static_cast<const T*>(args.r > 0 ? args.z_in : nullptr),
        static_cast<const T*>(space.pads_lora_B ? args.lora_B : nullptr),
        reinterpret_cast<T*>(base + space.lora_B), reinterpret_cast<uint4*>(base + space.ring));
    if (error != cudaSuccess)
        return error;
    LaunchConfig config(kCtas * plan.clusters, kThreads, kSmemBytes, stream);
    config.cooperative();
    return cudaLaunchKernelEx(config.get(), nf4_lora_matmul_large_kernel<T>, maps, p);
}

}  // namespace

bool serves_nf4_lora_matmul_large(const LoraMatmulArgs& args) {
    const WeightView& w = args.w;
    constexpr int64_t kLimit = 1 << 30;  // sizes are int on the device
    constexpr size_t kWorkspaceLimit = 32 << 20;
    return w.flat && w.K >= kStepColumns && w.K % kStepColumns == 0 && w.N % 16 == 0 && w.N > 0 &&
           w.blocksize_log2 >= 6 && args.r <= 64 && args.dtype != Dtype::kFloat32 &&
           args.M < kLimit && w.N < kLimit && w.K < kLimit &&
           ceil_div(args.M, kTileTokens) * ceil_div(w.N, kPanelRows) < kLimit &&
           is_aligned(args.x) && is_aligned(args.y) && is_aligned(w.qweight) &&
           is_aligned(args.lora_A) && is_aligned(args.lora_B) && resident_clusters() > 0 &&
           tensor_map_encoder() != nullptr &&
           nf4_lora_matmul_large_workspace_bytes(args) <= kWorkspaceLimit;
}

size_t nf4_lora_matmul_large_workspace_bytes(const LoraMatmulArgs& args) {
    const int clusters = resident_clusters();
    if (args.M == 0 || clusters == 0)
        return 0;
    return static_cast<size_t>(lay_out(make_plan(args, clusters)).end);
}

cudaError_t launch_nf4_lora_matmul_large(const LoraMatmulArgs& args, cudaStream_t stream) {
    if (args.M == 0)
        return cudaSuccess;
    const int clusters = resident_clusters();
    if (clusters == 0)
        return cudaErrorNotSupported;
    const Plan plan = make_plan(args, clusters);
    return args.dtype == Dtype::kBFloat16 ? launch<__nv_bfloat16>(args, plan, stream)
                                          : launch<__half>(args, plan, stream);
}

}  // namespace lowbit::cuda
