// 4-bit linear layer with a low-rank update for many tokens: dense wgmma speed from a 4-bit weight.
//
//     y[m, n] = sum_k x[m, k] W[n, k] + sum_j s_j z[m, j] lora_B[n, j] + bias[n],  z = x lora_A^T
//
// Operands as in nf4_lora_matmul.h; T = bf16 or fp16; W[n, k] = RN_T(codebook[q] * absmax) is what
// nf4_dequantize.cu gives. Accumulates in fp32; s_j z is rounded to T; y is rounded once. Sums run
// in a fixed order.
//
// One persistent launch after a short one (counters, first chunk): every SM holds one CTA, pairs of
// CTAs (clusters) walk over tiles of 256 weight rows (a panel) x 256 tokens. Each CTA multiplies
// 128 rows by the pair's 256 tokens and loads half of the tokens for both. The roles of a CTA's
// warps:
//   warp 0      producer: TMA loads of 64 columns at a time into 4 stages
//   warps 1, 2  decoders: turn the 4-bit weight into T, for all CTAs together
//   warps 4-11  two warpgroups of consumers: 64 rows each, m64n256k16
// Tensor cores leave no room for decoding in the loop (it costs 25-35 %), so each panel is decoded
// once for the whole wave of tiles that the grid works on, chunk by chunk, through a ring in the
// workspace that is read from L2 (nf4_lora_matmul_large_decode.cuh).
// The low-rank term is one more step of the contraction, [x | s z] [W | lora_B]^T. z itself comes
// from extra tiles, 256 tokens by r columns, that the clusters with the fewest tiles do first.
//
// Bound by the tensor cores, that is by the power limit: an H100 multiplies 128 x 256 x 64 in 1024
// clocks but not at its highest clock. So bytes moved cost speed as well; hence the order of tiles:
// groups of about 16 token tiles (the x of a group is read from HBM once per wave), panels inside.
//
// CTAs wait for each other in both directions, so all of them must be resident: the grid is no
// larger than the device holds and is launched cooperatively. Callers have checked
// serves_lora_matmul_large.

#include <atomic>

#include "nf4_lora_matmul_large.h"
#include "nf4_lora_matmul_large_decode.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kDecoders = 2;
constexpr uint32_t kReadyPollNs = 64;
constexpr int kConsumers = 2;
constexpr int kPrepareThreads = 256;
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kRegistersAside = 120, kRegistersConsumer = 192;  // sum as at launch: 3 * 168

// Shared memory, 226 KiB: stages of x [256][64] and W [128][64], decoders' output, y on its way
// out, and for each decoder the codebook of double-quantized scales: waiting for stores empties L1.
constexpr int kXBytes = kTileTokens * 128;
constexpr int kWBytes = kCtaRows * 128;
constexpr int kLoraABytes = 64 * 128;
constexpr int kOutTokens = 32;  // that a warpgroup turns at a time: 64 rows, 128 bytes per token
constexpr int kOutBuffers = 2;
constexpr int kOutBytes = kOutTokens * 128;
constexpr int kWOffset = kStages * kXBytes;
constexpr int kTaskOffset = kWOffset + kStages * kWBytes;
constexpr int kOutOffset = kTaskOffset + kDecoders * kTaskBytes;
constexpr int kNestedOffset = kOutOffset + kConsumers * kOutBuffers * kOutBytes;
constexpr int kBarrierOffset = kNestedOffset + kDecoders * kNestedBytes;
constexpr int kSmemBytes = kBarrierOffset + (2 * kStages + 1) * 8;

// Steps by which the first warpgroup of consumers runs ahead of the second, so that one multiplies
// while the other stores y. With 1 the median at M = 4096 was up to 5 % slower (H100, 2026-11), not
// much more than the noise of a card at its power limit.
constexpr int kLead = 2;

constexpr int kGroupBarrier = 1;  // and the next
constexpr int kLeadBarrier = 3;

// All with rows of 128 swizzled bytes in shared memory; outside of a tensor they read zeros.
struct TensorMaps {
    CUtensorMap x;           // box [128 tokens][64]
    CUtensorMap z;           // box [128 tokens][64]
    CUtensorMap lora_A;      // box [64 ranks][64]
    CUtensorMap lora_B;      // box [128 rows][64]
    CUtensorMap ring_load;   // box [128 rows][64]
    CUtensorMap ring_store;  // box [32 rows][64]
};

// s_j, 0 in the padding.
__device__ __forceinline__ float column_scale(const Params& p, int column) {
    if (column >= p.plan.rank)
        return 0.0f;
    return p.lora_scaling ? p.scaling * __ldg(p.lora_scaling + column) : p.scaling;
}

// ---- producer -----------------------------------------------------------------------------------

// Stages in the order of use, the same for producer and consumers.
struct Pipeline {
    uint32_t smem;
    uint32_t step;

    __device__ __forceinline__ uint32_t stage() const {
        return step % kStages;
    }
    __device__ __forceinline__ uint32_t parity() const {
        return step / kStages % 2;
    }
    __device__ __forceinline__ uint32_t x() const {
        return smem + stage() * kXBytes;
    }
    __device__ __forceinline__ uint32_t w() const {
        return smem + kWOffset + stage() * kWBytes;
    }
    __device__ __forceinline__ uint32_t full() const {
        return smem + kBarrierOffset + stage() * 8;
    }
    __device__ __forceinline__ uint32_t empty() const {
        return full() + kStages * 8;
    }
    // Both CTAs have finished their z tiles, and may load into each other's stages.
    __device__ __forceinline__ uint32_t z_over() const {
        return smem + kBarrierOffset + 2 * kStages * 8;
    }
};

// One thread. Each CTA loads its half of the tokens into both.
__device__ __forceinline__ void
load_operands(const Params& p, const TensorMaps& maps, uint32_t smem, int rank, int cluster) {
    constexpr uint16_t kAll = (1 << kCtas) - 1;
    const Plan& plan = p.plan;
    Pipeline pipe{smem, 0};
    auto load_x = [&](const CUtensorMap& map, int column, int token_tile, int other_bytes) {
        barrier_wait(pipe.empty(), pipe.parity() ^ 1);
        barrier_arrive_expect(pipe.full(), kXBytes + other_bytes);
        load_tile_multicast(
            pipe.x() + rank * (kXBytes / kCtas), map, column,
            token_tile * kTileTokens + rank * kCtaTokens, pipe.full(), kAll);
    };
    for (int i = 0; i < z_tiles(plan, cluster); i++) {
        const int token_tile = z_tile(plan, cluster, rank, i);
        for (int k = 0; k < plan.steps; k++, pipe.step++) {
            barrier_wait(pipe.empty(), pipe.parity() ^ 1);
            barrier_arrive_expect(pipe.full(), kXBytes + kLoraABytes);
            for (int half = 0; half < kCtas; half++)
                load_tile(
                    pipe.x() + half * (kXBytes / kCtas), maps.x, k * kStepColumns,
                    token_tile * kTileTokens + half * kCtaTokens, pipe.full());
            load_tile(pipe.w(), maps.lora_A, k * kStepColumns, 0, pipe.full());
        }
    }
    if (z_tiles(plan, cluster) > 0)
        barrier_wait(pipe.z_over(), 0);
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

// ---- consumers ----------------------------------------------------------------------------------

// The warpgroup has read the stage: tell both producers, as both fill it.
__device__ __forceinline__ void release(const Pipeline& pipe, int thread) {
    if (thread < kCtas)
        barrier_arrive_remote(in_cta(pipe.empty(), thread));
}

// z of 256 tokens, half of them by each warpgroup: here x is the operand with the rows. Stages go
// back to the own producer alone, so two arrivals stand for those of the other CTA.
template <typename T>
__device__ __forceinline__ void
multiply_z_tile(const Params& p, Pipeline& pipe, int token_tile, int rank, int group, int thread) {
    constexpr int kRows = kTileTokens / kConsumers;
    const Plan& plan = p.plan;
    float z[kRows / 64][32] = {};
    for (int k = 0; k < plan.steps; k++) {
        barrier_wait(pipe.full(), pipe.parity());
        const uint64_t x = operand_descriptor(pipe.x() + group * (kRows * 128));
        const uint64_t a = operand_descriptor(pipe.w());
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            wgmma(z[0], x + 2 * i, a + 2 * i, true, T{});
            wgmma(z[1], x + 2 * i + 64 * 128 / 16, a + 2 * i, true, T{});
        }
        wgmma_commit();
        wgmma_wait<0>();
        if (thread < kCtas)
            barrier_arrive_remote(in_cta(pipe.empty(), rank));
        pipe.step++;
    }
    if (token_tile >= plan.token_tiles)
        return;
    T* z_scaled = static_cast<T*>(p.z_scaled);
    T* z_out = static_cast<T*>(p.z_out);
#pragma unroll
    for (int i = 0; i < kRows / 2; i++) {
        const int column = i % 32 / 4 * 8 + thread % 4 * 2 + i % 2;
        const int64_t token = token_tile * kTileTokens + group * kRows + i / 32 * 64 +
                              thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
        if (token >= plan.M || column >= plan.rank_columns)
            continue;
        const float value = z[i / 32][i % 32];
        if (column < plan.rank && z_out != nullptr)
            z_out[token * plan.rank + column] = from_float<T>(value);
        z_scaled[token * plan.rank_columns + column] =
            from_float<T>(value * column_scale(p, column));
    }
    __threadfence();
    fence_async_proxy_global();
    named_barrier(kGroupBarrier + group, 128);
    if (thread == 0)
        increment_release(p.z_ready + token_tile);
}

// 64 rows x 256 tokens of y from the registers of a warpgroup, turned 32 tokens at a time in shared
// memory. Tensor cores idle meanwhile, so: two buffers, for one barrier per round; ordinary stores,
// as bulk stores would queue behind the loads of the next tile; whole lines of 128 bytes.
template <typename T>
__device__ __forceinline__ void store_y(
    const Params& p,
    const float (&d)[128],
    uint32_t out,
    int first_row,
    int first_token,
    int group,
    int thread) {
    const int64_t N = p.plan.N;
    const int warp = thread / 32, lane = thread % 32;
    float bias[2] = {0.0f, 0.0f};
    if (p.bias != nullptr) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = first_row + warp * 16 + lane / 4 + h * 8;
            if (row < N)
                bias[h] = to_float(__ldg(static_cast<const T*>(p.bias) + row));
        }
    }
    // Chunk c of 8 rows of token t lies at c ^ (t % 8): free of bank conflicts both ways. Into it,
    // a lane writes a row of one of four 8x8 tiles: a token, and 8 of the warp's 16 rows. Out of
    // it, 8 lanes read the rows of a token.
    const int token = lane / 16 * 8 + lane % 8;
    const uint32_t to = out + token * 128 + ((2 * warp + lane / 8 % 2) ^ lane % 8) * 16;
    const uint32_t from = out + thread / 8 * 128 + ((thread ^ thread / 8) % 8) * 16;
    const int first = first_token + thread / 8;
    const int row = first_row + thread % 8 * 8;
    T* y = static_cast<T*>(p.y) + first * N + row;
    const int tokens_left = row < N ? p.plan.M - first : 0;  // N is a multiple of 8
#pragma unroll
    for (int c = 0; c < kTileTokens / kOutTokens; c++) {
        const uint32_t buffer = c % kOutBuffers * kOutBytes;
#pragma unroll
        for (int i = 0; i < kOutTokens / 16; i++) {
            const float* v = d + 16 * c + 8 * i;
            store_matrices_transposed(
                to + buffer + i * (16 * 128), pack_pair(v[0] + bias[0], v[1] + bias[0], T{}),
                pack_pair(v[2] + bias[1], v[3] + bias[1], T{}),
                pack_pair(v[4] + bias[0], v[5] + bias[0], T{}),
                pack_pair(v[6] + bias[1], v[7] + bias[1], T{}));
        }
        named_barrier(kGroupBarrier + group, 128);
#pragma unroll
        for (int i = 0; i < kOutTokens / 16; i++) {
            const uint4 words = load_shared(from + buffer + i * (16 * 128));
            const int ahead = c * kOutTokens + i * 16;
            if (ahead < tokens_left)
                store_global(y + ahead * N, words);
        }
    }
}

template <typename T>
__device__ __forceinline__ void
multiply_tiles(const Params& p, uint32_t smem, int rank, int cluster) {
    const Plan& plan = p.plan;
    const int group = threadIdx.x / 128 - 1, thread = threadIdx.x % 128;
    const uint32_t out = smem + kOutOffset + group * (kOutBuffers * kOutBytes);
    Pipeline pipe{smem, 0};
    const int z_count = z_tiles(plan, cluster);
    for (int i = 0; i < z_count; i++)
        multiply_z_tile<T>(p, pipe, z_tile(plan, cluster, rank, i), rank, group, thread);
    if (z_count > 0 && thread < kCtas)
        barrier_arrive_remote(in_cta(pipe.z_over(), thread));
    const int lead = min(kLead, plan.steps);
    if (group == 1)
        named_barrier(kLeadBarrier, 256);
    bool leads = group == 0;
    float d[128];
    for (int wave = first_wave(plan, cluster); wave < plan.waves; wave++) {
        for (int k = 0; k < plan.steps; k++) {
            barrier_wait(pipe.full(), pipe.parity());
            const uint64_t w = operand_descriptor(pipe.w() + group * (64 * 128));
            const uint64_t x = operand_descriptor(pipe.x());
            wgmma_fence();
            wgmma(d, w, x, k > 0, T{});
            wgmma(d, w + 2, x + 2, true, T{});
            wgmma(d, w + 4, x + 4, true, T{});
            wgmma(d, w + 6, x + 6, true, T{});
            wgmma_commit();
            if (leads && k == lead - 1) {
                named_barrier_arrive(kLeadBarrier, 256);
                leads = false;
            }
            // The chunk's last columns have arrived, so all its reads are over: relaxed is enough,
            // and a release would stall the warp.
            if (threadIdx.x == 128 + 64 &&
                (k % kChunkSteps == kChunkSteps - 1 || k == plan.steps - 1))
                increment_relaxed(p.done + wave * plan.chunks + k / kChunkSteps);
            wgmma_wait<1>();
            if (k > 0)
                release({smem, pipe.step - 1}, thread);
            pipe.step++;
        }
        if (plan.rank_columns > 0) {
            barrier_wait(pipe.full(), pipe.parity());
            const uint64_t w = operand_descriptor(pipe.w() + group * (64 * 128));
            const uint64_t x = operand_descriptor(pipe.x());
            if (plan.rank_columns == 16) {
                wgmma_fence();  // in both branches: ptxas adds its own otherwise
                wgmma(d, w, x, true, T{});
                wgmma_commit();
            } else {
                wgmma_fence();
                wgmma(d, w, x, true, T{});
                wgmma(d, w + 2, x + 2, true, T{});
                wgmma(d, w + 4, x + 4, true, T{});
                wgmma(d, w + 6, x + 6, true, T{});
                wgmma_commit();
            }
            wgmma_wait<1>();
            release({smem, pipe.step - 1}, thread);
            pipe.step++;
        }
        wgmma_wait<0>();
        release({smem, pipe.step - 1}, thread);
        const Tile tile = locate(plan, wave * plan.clusters + cluster - plan.idle);
        store_y<T>(
            p, d, out, tile.panel * kPanelRows + rank * kCtaRows + group * 64,
            tile.token_tile * kTileTokens, group, thread);
    }
}

// ---- kernels ------------------------------------------------------------------------------------

template <typename T>
__global__ void __cluster_dims__(kCtas, 1, 1) __launch_bounds__(kThreads, 1)
    lora_matmul_large_kernel(
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

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// From the driver that is loaded, so that nothing links against it.
EncodeTiled encode_tiled() {
    static const EncodeTiled function = [] {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult result;
        constexpr unsigned kSince = 12000;
        if (cudaGetDriverEntryPointByVersion(
                "cuTensorMapEncodeTiled", &entry, kSince, cudaEnableDefault, &result) !=
            cudaSuccess)
            entry = nullptr;
        return reinterpret_cast<EncodeTiled>(entry);
    }();
    return function;
}

// A row-major matrix of 16-bit elements in boxes of `box_rows` x 64.
bool make_map(
    CUtensorMap& map, const void* data, Dtype dtype, int64_t rows, int64_t columns, int box_rows) {
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[1] = {static_cast<cuuint64_t>(columns) * 2};
    const cuuint32_t box[2] = {kStepColumns, static_cast<cuuint32_t>(box_rows)};
    const cuuint32_t element_strides[2] = {1, 1};
    const auto type = dtype == Dtype::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    return encode_tiled()(
               &map, type, 2, const_cast<void*>(data), sizes, strides, box, element_strides,
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

cudaLaunchConfig_t main_config(int clusters) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(kCtas * clusters);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = kSmemBytes;
    return config;
}

// How many clusters the current device holds at once; 0 if it cannot run the kernel. Asked once.
int resident_clusters() {
    constexpr int kDevices = 64;
    static std::atomic<int> known[kDevices];  // count + 1; two threads may both find out
    int device = 0, major = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices)
        return 0;
    if (known[device] == 0) {
        int clusters = 0;
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
        for (const void* kernel :
             {reinterpret_cast<const void*>(lora_matmul_large_kernel<__nv_bfloat16>),
              reinterpret_cast<const void*>(lora_matmul_large_kernel<__half>)}) {
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes);
            cudaLaunchAttribute cluster{};
            cluster.id = cudaLaunchAttributeClusterDimension;
            cluster.val.clusterDim = {kCtas, 1, 1};
            cudaLaunchConfig_t config = main_config(1);
            config.attrs = &cluster;
            config.numAttrs = 1;
            if (major != 9 ||
                cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess)
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
    const Dtype dtype = args.dtype;
    const int64_t ring_rows = int64_t{plan.slots} * plan.slot_panels * kPanelRows;
    const uint8_t* ring = base + space.ring;
    bool ok = encode_tiled() != nullptr &&
              make_map(maps.x, args.x, dtype, args.M, plan.K, kCtaTokens) &&
              make_map(maps.ring_load, ring, dtype, ring_rows, kChunkColumns, kCtaRows) &&
              make_map(maps.ring_store, ring, dtype, ring_rows, kChunkColumns, kTaskRows);
    if (plan.z_clusters > 0)
        ok = ok && make_map(maps.lora_A, args.lora_A, dtype, plan.rank, plan.K, 64);
    if (plan.rank > 0) {
        const void* b = space.pads_lora_B ? base + space.lora_B : args.lora_B;
        const int columns = space.pads_lora_B ? plan.rank_columns : plan.rank;
        ok = ok && make_map(maps.lora_B, b, dtype, plan.N, columns, kCtaRows) &&
             make_map(maps.z, p.z_scaled, dtype, args.M, plan.rank_columns, kCtaTokens);
    }
    if (!ok)
        return cudaErrorInvalidValue;

    cudaLaunchAttribute attributes[2]{};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeCooperative;
    attributes[1].val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 1;
    config.blockDim = dim3(kPrepareThreads);
    const int64_t words = int64_t{plan.slot_panels} * kPanelRows * (kChunkColumns / 8);
    config.gridDim = dim3(static_cast<unsigned>(words / kPrepareThreads));
    cudaError_t error = cudaLaunchKernelEx(
        &config, prepare_kernel<T>, p, static_cast<const T*>(args.r > 0 ? args.z_in : nullptr),
        static_cast<const T*>(space.pads_lora_B ? args.lora_B : nullptr),
        reinterpret_cast<T*>(base + space.lora_B), reinterpret_cast<uint4*>(base + space.ring));
    if (error != cudaSuccess)
        return error;
    config = main_config(plan.clusters);
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
    return cudaLaunchKernelEx(&config, lora_matmul_large_kernel<T>, maps, p);
}

bool aligned(const void* p) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

}  // namespace

bool serves_lora_matmul_large(const LoraMatmulArgs& args) {
    const WeightView& w = args.w;
    constexpr int64_t kLimit = 1 << 30;  // sizes are int on the device
    constexpr size_t kWorkspaceLimit = 32 << 20;
    return w.flat && w.K >= kStepColumns && w.K % kStepColumns == 0 && w.N % 16 == 0 && w.N > 0 &&
           w.blocksize_log2 >= 6 && args.r <= 64 && args.dtype != Dtype::kFloat32 &&
           args.M < kLimit && w.N < kLimit && w.K < kLimit &&
           ceil_div(args.M, kTileTokens) * ceil_div(w.N, kPanelRows) < kLimit && aligned(args.x) &&
           aligned(args.y) && aligned(w.qweight) && aligned(args.lora_A) && aligned(args.lora_B) &&
           resident_clusters() > 0 && encode_tiled() != nullptr &&
           workspace_lora_matmul_large_bytes(args) <= kWorkspaceLimit;
}

size_t workspace_lora_matmul_large_bytes(const LoraMatmulArgs& args) {
    const int clusters = resident_clusters();
    if (args.M == 0 || clusters == 0)
        return 0;
    return static_cast<size_t>(lay_out(make_plan(args, clusters)).end);
}

cudaError_t launch_lora_matmul_large(const LoraMatmulArgs& args, cudaStream_t stream) {
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
