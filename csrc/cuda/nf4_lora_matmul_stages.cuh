// What the tiled products nf4_lora_matmul_mid_sm90.cu and nf4_lora_matmul_dx_sm90.cu share: pairs
// of CTAs, warps that decode 32 blocks at a time into a ring of swizzled stages, the tables that
// they look up, and two consumer warpgroups that multiply from it, pass on the sums of a divided
// tile, and stage results. P is the plan of the kernel, see its *_tile.cuh.
#pragma once

#include "block_decode.cuh"
#include "bulk_sm90.cuh"
#include "ptx_sm90.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2 * kWarpgroup;
constexpr int kConsumerWarps = kConsumers / kWarpSize;
constexpr int kCluster = 2;
constexpr int kLineBytes = 128;       // a swizzled line: 64 elements
constexpr int kUnitRows = kWarpSize;  // what a warp decodes at a time: 32 blocks below each other
constexpr int kChunkTokens = 32;      // of the output, staged for one TMA store
constexpr int kChunkBytes = kChunkTokens * kLineBytes;
constexpr int kSmemAlignment = 1024;  // of swizzled tiles
constexpr int kNestedCodes = 256;
constexpr int kTableFloats = 16 + kNestedCodes;

// A stage of the ring and the parity of its use.
template <class P>
struct Position {
    int slot;
    uint32_t parity;

    __device__ __forceinline__ void advance(int by) {
        slot += by;
        if (slot >= P::kStages) {
            slot -= P::kStages;
            parity ^= 1;
        }
    }
};

// By one thread: those of the ring, and of the two buffers of packed weights.
template <class P>
__device__ __forceinline__ void init_barriers(uint32_t smem) {
    for (int i = 0; i < P::kStages; i++) {
        barrier_init(smem + P::kFull + i * 8, 1 + P::kUnits);
        barrier_init(smem + P::kEmpty + i * 8, kCluster * kConsumers / kWarpgroup);
    }
    for (int i = 0; i < 2; i++) {
        barrier_init(smem + P::kPackedFull + i * 8, 1);
        barrier_init(smem + P::kPackedEmpty + i * 8, P::kProducerWarps);
    }
}

// What decoding looks up: the codebook, then that of the scales, ones if there is none. The
// producers call it, and meet afterwards. All loads stand in front of the first store, which waits
// for its own, so that they come at the same time, and the first packed weights and scales with
// them.
template <class P>
__device__ __forceinline__ void load_tables(const WeightView& w, bool nested, float* tables) {
    static_assert(kNestedCodes % P::kProducers == 0);
    constexpr int kEach = kNestedCodes / P::kProducers;
    const int thread = threadIdx.x;
    const float own = thread < 16 ? __ldg(w.codebook + thread) : 0.0f;
    float of_scales[kEach];
#pragma unroll
    for (int i = 0; i < kEach; i++)
        of_scales[i] = nested ? __ldg(w.nested_codebook + i * P::kProducers + thread) : 1.0f;
    if (thread < 16)
        tables[thread] = own;
#pragma unroll
    for (int i = 0; i < kEach; i++)
        tables[16 + i * P::kProducers + thread] = of_scales[i];
}

// Of a block with this scale. The codebook is read anew each time: registers are scarce here.
template <typename T>
__device__ __forceinline__ ScaledTable<true> table_of(uint32_t smem_codebook, float scale) {
    Codebook codebook;
#pragma unroll
    for (int i = 0; i < 16; i += 4) {
        const uint4 v = load_shared(smem_codebook + i * 4);
        codebook.value[i] = __uint_as_float(v.x), codebook.value[i + 1] = __uint_as_float(v.y);
        codebook.value[i + 2] = __uint_as_float(v.z), codebook.value[i + 3] = __uint_as_float(v.w);
    }
    return scale_codebook<T, true>(codebook, scale);
}

// By one thread: a tile's tokens, for this CTA `alone` or each CTA of the pair a half for both.
template <class P>
__device__ __forceinline__ void load_tokens(
    bool alone, uint32_t stage, const CUtensorMap& map, int column, int token0, uint32_t full) {
    if (!alone) {
        const int part = blockIdx.x % kCluster;
        load_tile_multicast(
            stage + part * P::kBoxBytes, map, column, token0 + part * P::kBoxTokens, full, 0b11);
        return;
    }
#pragma unroll 1
    for (int part = 0; part < P::kTokens / P::kBoxTokens; part++)
        load_tile(stage + part * P::kBoxBytes, map, column, token0 + part * P::kBoxTokens, full);
}

// After a warp's stores: tells the consumers here, and gives the peer its copy.
template <class P>
__device__ __forceinline__ void publish(uint32_t smem_peer, uint32_t piece, uint32_t full) {
    fence_async_proxy();
    __syncwarp();
    const int lane = threadIdx.x % kWarpSize;
    if (lane == 0)
        barrier_arrive(full);
    if (P::kSharesW && lane == 1)
        copy_to_cta(smem_peer + piece, piece, kUnitRows * kLineBytes, smem_peer + full);
}

// Adds what store_sums has stored. All loads are under way at a time.
template <int kSums>
__device__ __forceinline__ void add_sums(float* d, const float4* from, int stride) {
    float4 v[kSums / 4];
#pragma unroll
    for (int i = 0; i < kSums / 4; i++)
        v[i] = __ldcg(from + i * stride);
#pragma unroll
    for (int i = 0; i < kSums / 4; i++) {
        float* own = d + 4 * i;
        own[0] += v[i].x, own[1] += v[i].y, own[2] += v[i].z, own[3] += v[i].w;
    }
}

// Rounds a warp's sums of kChunkTokens tokens, 16 a thread, into its lines of a staged chunk.
// `bias`: of a thread's two features, or null. With warp and lane worked out here, not by the
// caller, dx spills (CUDA 13.0).
template <typename T>
__device__ __forceinline__ void
stage_chunk(const float* d, const float* bias, uint32_t buffer, int warp, int lane) {
#pragma unroll
    for (int j = 0; j < kChunkTokens / 8; j += 2) {
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float low = d[4 * j + 2 * i], high = d[4 * j + 2 * i + 1];
            if (bias != nullptr)
                low += bias[i % 2], high += bias[i % 2];
            pairs[i] = pack_pair(low, high, T{});
        }
        const int matrix = lane / 8, line = lane % 8;
        const int token = 8 * (j + matrix / 2) + line;
        const int chunk = (2 * warp + matrix % 2) ^ line;
        store_matrices_transposed(
            buffer + token * kLineBytes + chunk * 16, pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}

}  // namespace
}  // namespace lowbit::cuda
