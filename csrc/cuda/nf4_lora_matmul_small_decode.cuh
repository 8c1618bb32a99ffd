// From codes to operands in nf4_lora_matmul_small_sm90.cu: the pair table, the scales of a warp's
// rows, z.
#pragma once

#include "common.cuh"
#include "nf4_lora_matmul_small_tile.cuh"
#include "ptx_sm90.cuh"

namespace lowbit::cuda {
namespace {

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
template <typename T>
struct PairTable {
    static constexpr int kEntries = kConsumers / 8;
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

// z, scaled and rounded, to shared memory as rows of 64 columns under the 128-byte swizzle, of
// which the padded rank is written. One CTA also writes z_out.
template <typename T, typename Tile>
__device__ __forceinline__ void gather_z(const Problem& p, uint32_t smem) {
    const int tiles = (p.r + 15) / 16, rank = 16 * tiles, values = Tile::kTokens * rank;
    const int inverse = (1024 + tiles - 1) / tiles;  // i / 16 * inverse / 1024 = i / rank
    // A thread's values are loaded four at a time, before the first is stored. Unrolled: with a
    // loop here ptxas makes the main loop 10 to 30 instructions longer.
    constexpr int kMost = Tile::kTokens * kMaxRank / kConsumers, kBatch = kMost < 4 ? kMost : 4;
    constexpr int kSlices = 8 / kBatch;
#pragma unroll
    for (int first = 0; first < kMost * kConsumers; first += kBatch * kConsumers) {
        if (first >= values)
            break;
        float z[kBatch] = {}, scale[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; b++) {
            if (first + b * kConsumers >= values)
                break;
            const int i = first + b * kConsumers + threadIdx.x;
            const int token = i / 16 * inverse / 1024, j = i - token * rank;
            scale[b] = p.scaling;
            if (p.lora_scaling != nullptr && j < p.r)
                scale[b] *= __ldg(p.lora_scaling + j);
            if (p.z_in != nullptr && token < p.M && j < p.r)
                z[b] = to_float(static_cast<const T*>(p.z_in)[token * p.r + j]);
        }
        if (p.z_in == nullptr) {
#pragma unroll kSlices
            for (int s = 0; s < p.z_slices; s++) {
                float part[kBatch];
#pragma unroll
                for (int b = 0; b < kBatch; b++) {
                    const int i = first + b * kConsumers + threadIdx.x;
                    part[b] = i < values ? __ldcg(p.partial_z + s * values + i) : 0.0f;
                }
#pragma unroll
                for (int b = 0; b < kBatch; b++)
                    z[b] += part[b];
            }
        }
#pragma unroll
        for (int b = 0; b < kBatch; b++) {
            const int i = first + b * kConsumers + threadIdx.x;
            if (i >= values)
                break;
            const int token = i / 16 * inverse / 1024, j = i - token * rank;
            const bool inside = token < p.M && j < p.r;
            if (p.z_in == nullptr && p.z_out != nullptr && inside && blockIdx.x == 0)
                static_cast<T*>(p.z_out)[token * p.r + j] = from_float<T>(z[b]);
            const T value = from_float<T>(inside ? z[b] * scale[b] : 0.0f);
            store_shared(
                smem + Tile::kZ + packed_offset(token, j / 8) + j % 8 * 2,
                *reinterpret_cast<const uint16_t*>(&value));
        }
    }
    fence_async_proxy();
}

// Eight bytes each of two rows to the operands of four products. lane_bits: 4 lane, and the upper
// half of addresses in shared memory.
__device__ __forceinline__ void
decode_block(uint32_t (&a)[16], uint2 low, uint2 high, uint32_t lane_bits) {
    const uint32_t words[4] = {low.x, high.x, low.y, high.y};
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int byte = 0; byte < 4; byte++) {
            const uint32_t address = prmt(words[i], lane_bits, 0x7604u | (byte << 4));
            a[8 * (i / 2) + 2 * byte + i % 2] = load_shared_at<kSharedStart>(address);
        }
    }
}

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
