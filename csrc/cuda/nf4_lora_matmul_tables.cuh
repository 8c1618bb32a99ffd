// From codes to values of a weight by lookups in shared memory: the pair table and the scales of a
// warp's rows.
#pragma once

#include "common.cuh"
#include "nf4_lora_matmul_shares.cuh"

namespace lowbit::cuda {
namespace {

// A lookup gives the two values of a byte. The table has a copy of them for each lane, so that no
// lookups of a warp collide, in the first half of 256 bytes: then address = base + 256 byte + 4
// lane is one PRMT.
constexpr int kTableStride = 256;
constexpr int kTableBytes = 256 * kTableStride;

constexpr int kChunkBlocks = 8;                     // scales of a row decoded at a time
constexpr int kScaleBytes = kChunkBlocks * 16 * 4;  // of 16 rows

// The scales of a warp's 16 rows, 8 blocks of K at a time, one such chunk ahead in registers. Lane
// l brings four of row l / 2. In shared memory [8 blocks][16], the two rows of a lane side by side.
struct ScaleStream {
    const WeightView& w;
    uint32_t smem;             // of the warp
    uint32_t nested_codebook;  // in shared memory
    float offset;
    int blocks;  // per row
    bool fast;   // four scales lie side by side and aligned
    uint32_t raw[4];

    __device__ __forceinline__
    ScaleStream(const WeightView& weight, uint32_t smem, uint32_t codebook)
        : w(weight), smem(smem), nested_codebook(codebook), offset(0.0f) {
        blocks = static_cast<int>(w.K / kBlock);
        fast = w.blocksize_log2 == 6 && blocks % 4 == 0 &&
               (w.absmax != nullptr || w.nested_blocksize_log2 >= 2);
    }

    __device__ __forceinline__ uint32_t index(int row0, int chunk) const {
        const int lane = threadIdx.x % kWarpSize;
        const int row = min(row0 + lane / 2, static_cast<int>(w.N) - 1);
        return static_cast<uint32_t>(row) * blocks +
               min(chunk * kChunkBlocks + lane % 2 * 4, blocks - 4);
    }

    __device__ __forceinline__ void prefetch(int row0, int chunk) const {
        if (!fast)
            return;
        const uint32_t i = index(row0, chunk);
        if (w.absmax == nullptr)
            prefetch_l2(w.absmax_8bit + i),
                prefetch_l2(w.nested_absmax + (i >> w.nested_blocksize_log2));
        else
            prefetch_l2(w.absmax + i);
    }

    // Blocks past the end of a row get any finite scale: x is zero there.
    __device__ __forceinline__ void fetch(int row0, int chunk) {
        if (fast) {
            const uint32_t i = index(row0, chunk);
            if (w.absmax == nullptr) {
                raw[0] = __ldg(reinterpret_cast<const uint32_t*>(w.absmax_8bit + i));
                raw[1] = __float_as_uint(__ldg(w.nested_absmax + (i >> w.nested_blocksize_log2)));
            } else {
                const uint4 v = __ldg(reinterpret_cast<const uint4*>(w.absmax + i));
                raw[0] = v.x, raw[1] = v.y, raw[2] = v.z, raw[3] = v.w;
            }
            return;
        }
        const int lane = threadIdx.x % kWarpSize;
        const int64_t row = min(row0 + lane / 2, static_cast<int>(w.N) - 1);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int block = min(chunk * kChunkBlocks + lane % 2 * 4 + i, blocks - 1);
            const int64_t scale = (row * w.K + block * kBlock) >> w.blocksize_log2;
            raw[i] = __float_as_uint(
                w.absmax == nullptr ? block_scale<true>(w, scale) : block_scale<false>(w, scale));
        }
    }

    __device__ __forceinline__ void publish() const {
        const int lane = threadIdx.x % kWarpSize, row = lane / 2;
        const int place = 4 * (row >> 2) + 2 * (row & 1) + ((row >> 1) & 1);
        const uint32_t out = smem + (lane % 2 * 64 + place) * 4;
        const bool decode = fast && w.absmax == nullptr;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t scale = raw[i];
            if (decode) {
                const uint32_t code = (raw[0] >> (8 * i)) & 0xff;
                const float value = __uint_as_float(load_shared_at<0>(nested_codebook + 4 * code));
                scale =
                    __float_as_uint(__fadd_rn(__fmul_rn(value, __uint_as_float(raw[1])), offset));
            }
            store_shared(out + i * 64, scale);
        }
        __syncwarp();
    }

    // Of this lane's rows row_of(g) and row_of(g) + 2.
    __device__ __forceinline__ float2 pair(int block) const {
        const int g = threadIdx.x % kWarpSize / 4;
        const uint2 v = load_shared_pair(smem + (block % kChunkBlocks) * 64 + g * 8);
        return {__uint_as_float(v.x), __uint_as_float(v.y)};
    }
};

// Eight threads fill the 128 bytes of an entry: no bank is written twice at a time.
template <typename T, int kThreads>
struct PairTable {
    static constexpr int kEntries = kThreads / 8;
    uint32_t pairs[256 / kEntries];

    __device__ __forceinline__ void load(const float* codebook) {
#pragma unroll
        for (int i = 0; i < 256 / kEntries; i++) {
            const int byte = threadIdx.x / 8 + i * kEntries;
            pairs[i] = pack_pair(__ldg(codebook + byte / 16), __ldg(codebook + byte % 16), T{});
        }
    }

    __device__ __forceinline__ void store(uint32_t smem) const {
#pragma unroll
        for (int i = 0; i < 256 / kEntries; i++) {
            const uint32_t entry =
                smem + (threadIdx.x / 8 + i * kEntries) * kTableStride + threadIdx.x % 8 * 16;
            store_shared_four(entry, pairs[i]);
        }
    }
};

template <int kSums>
__device__ __forceinline__ void
add_scaled(float (&sums)[kSums], const float (&block)[kSums], float2 scale) {
#pragma unroll
    for (int i = 0; i < kSums; i += 4) {
        sums[i] = fmaf(block[i], scale.x, sums[i]);
        sums[i + 1] = fmaf(block[i + 1], scale.x, sums[i + 1]);
        sums[i + 2] = fmaf(block[i + 2], scale.y, sums[i + 2]);
        sums[i + 3] = fmaf(block[i + 3], scale.y, sums[i + 3]);
    }
}

}  // namespace
}  // namespace lowbit::cuda
