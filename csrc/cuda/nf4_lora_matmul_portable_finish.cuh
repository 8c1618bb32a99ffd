// From a warp's sums to those of its CTA in nf4_lora_matmul_portable_sm80.cu, and the low-rank
// term.
#pragma once

#include "nf4_lora_matmul.h"
#include "nf4_lora_matmul_portable_tile.cuh"

namespace lowbit::cuda {
namespace {

__device__ __forceinline__ float (&quad(float* sums, int i))[4] {
    return *reinterpret_cast<float (*)[4]>(sums + 4 * i);
}

// z, scaled and rounded, to shared memory as rows of 64 columns, 16-byte chunk c of token m at c ^
// (m % 8), for the tokens from token0 on, by the first `threads` threads. `writes`: also z_out.
template <typename T, typename Tile>
__device__ __forceinline__ void
gather_z(const Problem& p, uint32_t smem, int token0, bool writes, int threads) {
    constexpr int kBatch = 8;  // loads under way
    const int rank = padded_rank(p.r), tokens = token_tiles<Tile>(p) * Tile::kTokens;
    for (int i = threadIdx.x; i < Tile::kTokens * rank; i += threads) {
        const int token = divide(i, p.by_rank), j = i - token * rank, m = token0 + token;
        const bool inside = m < p.M && j < p.r;
        float z = 0.0f;
        if (p.z_in != nullptr && inside)
            z = to_float(static_cast<const T*>(p.z_in)[m * p.r + j]);
        if (p.z_in == nullptr) {
            for (int first = 0; first < p.z_slices; first += kBatch) {
                float part[kBatch];
#pragma unroll
                for (int b = 0; b < kBatch; b++)
                    part[b] = first + b < p.z_slices
                                  ? __ldcg(p.partial_z + ((first + b) * tokens + m) * rank + j)
                                  : 0.0f;
#pragma unroll
                for (int b = 0; b < kBatch; b++)
                    z += part[b];
            }
            if (writes && p.z_out != nullptr && inside)
                static_cast<T*>(p.z_out)[m * p.r + j] = from_float<T>(z);
        }
        float scale = p.scaling;
        if (p.lora_scaling != nullptr && inside)
            scale *= __ldg(p.lora_scaling + j);
        const T value = from_float<T>(inside ? z * scale : 0.0f);
        store_shared(
            smem + Tile::kZ + token * (kMaxRank * 2) + (((j / 8) ^ (token & 7)) << 4) + j % 8 * 2,
            *reinterpret_cast<const uint16_t*>(&value));
    }
}

// sums += lora_B z, by the warps of K group 0.
template <typename T, typename Tile>
__device__ __forceinline__ void
add_low_rank(float (&sums)[Tile::kSums], const Problem& p, int row0, uint32_t smem) {
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
    const int last = static_cast<int>(p.w.N) - 16;
    const T* lora_B[kRowTiles];
#pragma unroll
    for (int j = 0; j < kRowTiles; j++)
        lora_B[j] = static_cast<const T*>(p.lora_B) +
                    static_cast<int64_t>(min(row0 + 16 * j, last) + row_of(g)) * p.r;
    uint32_t a[kRowTiles][4], next[kRowTiles][4];
    const auto load = [&](uint32_t (&to)[kRowTiles][4], int column) {
#pragma unroll
        for (int e = 0; e < 4 * kRowTiles; e++)
            to[e / 4][e % 4] = load_lora_pair(
                lora_B[e / 4] + e % 2 * 2 * p.r, column + 2 * t + e % 4 / 2 * 8, p.r);
    };
    load(next, 0);
#pragma unroll 1
    for (int column = 0; column < p.r; column += 16) {
#pragma unroll
        for (int e = 0; e < 4 * kRowTiles; e++)
            a[e / 4][e % 4] = next[e / 4][e % 4];
        if (column + 16 < p.r)
            load(next, column + 16);
#pragma unroll
        for (int n = 0; n < Tile::kColumns; n++) {
            const uint32_t z = smem + Tile::kZ + (8 * n + g) * (kMaxRank * 2) + 4 * t;
            const uint32_t b0 = load_shared_at<0>(z + ((column / 8 ^ g) << 4));
            const uint32_t b1 = load_shared_at<0>(z + (((column / 8 + 1) ^ g) << 4));
#pragma unroll
            for (int j = 0; j < kRowTiles; j++)
                mma_16x8x16(quad(sums, j * Tile::kColumns + n), a[j], b0, b1, T{});
        }
    }
}

// Sums of the other K groups, in their order, into those of group 0. They go through the scales of
// their warps, which have been used, 8 sums of a thread at a time. scales: of this warp.
template <typename Tile>
__device__ __forceinline__ void add_groups(float (&sums)[Tile::kSums], int group, uint32_t scales) {
    constexpr int kRound = Tile::kWarpScales / (4 * kWarpSize);
    static_assert(Tile::kSums % kRound == 0);
    const uint32_t own = scales + threadIdx.x % kWarpSize * 4;
    const int barrier = kFinishBarrier + 1 + threadIdx.x / kWarpSize % Tile::kRowGroups;
    __syncwarp();
#pragma unroll
    for (int first = 0; first < Tile::kSums; first += kRound) {
        if (group > 0) {
#pragma unroll
            for (int i = 0; i < kRound; i++)
                store_shared(own + i * (kWarpSize * 4), sums[first + i]);
        }
        named_barrier(barrier, Tile::kGroups * kWarpSize);
        if (group == 0) {
#pragma unroll
            for (int from = 1; from < Tile::kGroups; from++) {
                const uint32_t in = own + from * (Tile::kRowGroups * Tile::kWarpScales);
#pragma unroll
                for (int i = 0; i < kRound; i++)
                    sums[first + i] += __uint_as_float(load_shared_at<0>(in + i * kWarpSize * 4));
            }
        }
        named_barrier(barrier, Tile::kGroups * kWarpSize);
    }
}

}  // namespace
}  // namespace lowbit::cuda
