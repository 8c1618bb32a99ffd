// From codes to operands in nf4_lora_matmul_small_sm90.cu, and z.
#pragma once

#include "bulk_sm90.cuh"
#include "common.cuh"
#include "nf4_lora_matmul_small_tile.cuh"
#include "ptx.cuh"

namespace lowbit::cuda {
namespace {

// z, scaled and rounded, to shared memory as rows of 64 columns under the 128-byte swizzle, of
// which the padded rank is written. One CTA also writes z_out.
template <typename T, typename Tile>
__device__ __forceinline__ void gather_z(const Problem& p, uint32_t smem) {
    const int rank = (p.r + 15) / 16 * 16, values = Tile::kTokens * rank;
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
            const int token = divide(i, p.by_rank), j = i - token * rank;
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
            const int token = divide(i, p.by_rank), j = i - token * rank;
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

}  // namespace
}  // namespace lowbit::cuda
