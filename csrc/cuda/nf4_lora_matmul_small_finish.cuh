// From a CTA's sums to y in nf4_lora_matmul_small_sm90.cu: the low-rank term, the sums of other K
// groups and of other CTAs, bias and stores.
#pragma once

#include "common.cuh"
#include "nf4_lora_matmul_small_tile.cuh"
#include "wgmma_sm90.cuh"

namespace lowbit::cuda {
namespace {

// lora_B[row, j], lora_B[row, j + 1], zero past the rank.
template <typename T>
__device__ __forceinline__ uint32_t load_lora_pair(const T* row, int j, int r) {
    const uint16_t* p = reinterpret_cast<const uint16_t*>(row) + j;
    if (j + 1 < r && r % 2 == 0)
        return __ldg(reinterpret_cast<const uint32_t*>(p));
    const uint32_t low = j < r ? __ldg(p) : 0, high = j + 1 < r ? __ldg(p + 1) : 0;
    return low | high << 16;
}

// sums += lora_B z, by a whole warpgroup.
template <typename T, typename Tile>
__device__ __forceinline__ void
add_low_rank(float (&sums)[Tile::kSums], const Problem& p, int row0, uint32_t z) {
    const int lane = threadIdx.x % kWarpSize, t = lane % 4;
    const int last = static_cast<int>(p.w.N) - 1, row = row0 + row_of(lane / 4);
    const T* low = static_cast<const T*>(p.lora_B) + static_cast<int64_t>(min(row, last)) * p.r;
    const T* high =
        static_cast<const T*>(p.lora_B) + static_cast<int64_t>(min(row + 2, last)) * p.r;
    uint32_t a[kMaxRank / 16][4];
    const auto load = [&](int i) {
        const int j = 16 * i + 2 * t;
        a[i][0] = load_lora_pair(low, j, p.r), a[i][1] = load_lora_pair(high, j, p.r);
        a[i][2] = load_lora_pair(low, j + 8, p.r), a[i][3] = load_lora_pair(high, j + 8, p.r);
    };
    const auto multiply = [&](int i) {
        wgmma_fence();
        wgmma(sums, a[i], own_operand_descriptor(z + 32 * i), true, T{});
        wgmma_commit();
        wgmma_wait<0>();
    };
    load(0);
    if (p.r <= 16) {
        multiply(0);
        return;
    }
#pragma unroll
    for (int i = 1; i < kMaxRank / 16; i++)
        load(i);
    multiply(0);
#pragma unroll
    for (int i = 1; i < kMaxRank / 16; i++) {
        if (16 * i < p.r)
            multiply(i);
    }
}

// Sums of the other K groups, in their order, into those of group 0.
template <typename Tile>
__device__ __forceinline__ void
add_groups(float (&sums)[Tile::kSums], int group, int row_group, uint32_t table) {
    const int lane = threadIdx.x % kWarpSize;
    const int warp = row_group * 4 + threadIdx.x / kWarpSize % 4;
    const auto place = [&](int from, int i) {
        const int slot = ((from - 1) * Tile::kSums + i) * (4 * Tile::kRowGroups) + warp;
        return table + slot * kTableStride + kTableStride / 2 + lane * 4;
    };
    if (group > 0) {
#pragma unroll
        for (int i = 0; i < Tile::kSums; i++)
            store_shared(place(group, i), sums[i]);
    }
    named_barrier(1 + row_group, Tile::kGroups * kWarpgroup);
    if (group == 0) {
#pragma unroll
        for (int from = 1; from < Tile::kGroups; from++) {
#pragma unroll
            for (int i = 0; i < Tile::kSums; i++)
                sums[i] += __uint_as_float(load_shared_at<0>(place(from, i)));
        }
    }
    named_barrier(1 + row_group, Tile::kGroups * kWarpgroup);
}

constexpr int kFinishBarrier = 6;  // of the threads of K group 0

template <typename Tile>
__device__ __forceinline__ float4* partial_of(const Problem& p, int cta) {
    return reinterpret_cast<float4*>(p.partials) +
           static_cast<int64_t>(cta) * (Tile::kRows * Tile::kTokens / 4) + threadIdx.x;
}

template <typename Tile>
__device__ __forceinline__ void store_partial(const float (&sums)[Tile::kSums], const Problem& p) {
    float4* out = partial_of<Tile>(p, blockIdx.x);
#pragma unroll
    for (int i = 0; i < Tile::kSums; i += 4)
        __stcg(
            out + i / 4 * Tile::kFinishers,
            make_float4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]));
    named_barrier(kFinishBarrier, Tile::kFinishers);
    if (threadIdx.x == 0)
        store_release(p.flags + blockIdx.x, 1);
}

// What earlier CTAs have of this tile, from its first unit on. They wait for nothing.
template <typename Tile>
__device__ __forceinline__ void
add_partials(float (&sums)[Tile::kSums], const Problem& p, int tile_begin) {
    int first = blockIdx.x;
    while (piece_of(first, p.total_units).begin > tile_begin)
        first--;
    for (int cta = first + static_cast<int>(threadIdx.x); cta < blockIdx.x;
         cta += Tile::kFinishers) {
        while (load_acquire(p.flags + cta) == 0) {
        }
    }
    named_barrier(kFinishBarrier, Tile::kFinishers);
    for (int cta = first; cta < blockIdx.x; cta++) {
        const float4* in = partial_of<Tile>(p, cta);
#pragma unroll
        for (int i = 0; i < Tile::kSums; i += 4) {
            const float4 v = __ldcg(in + i / 4 * Tile::kFinishers);
            sums[i] += v.x, sums[i + 1] += v.y, sums[i + 2] += v.z, sums[i + 3] += v.w;
        }
    }
}

// A warp's 16 rows are whole 32-byte sectors of y: transposing within the warp is enough.
template <typename T, typename Tile>
__device__ __forceinline__ void
store_y(const float (&sums)[Tile::kSums], const Problem& p, int row0) {
    if (row0 >= p.w.N)
        return;
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
    float low = 0.0f, high = 0.0f;
    if (p.bias != nullptr) {
        const T* bias = static_cast<const T*>(p.bias) + row0 + row_of(g);
        low = to_float(bias[0]), high = to_float(bias[2]);
    }
#pragma unroll
    for (int i = 0; i < Tile::kSums; i += 4) {
        uint2 out;
        out.x = transpose_8x8(pack_pair(sums[i] + low, sums[i + 1] + low, T{}));
        out.y = transpose_8x8(pack_pair(sums[i + 2] + high, sums[i + 3] + high, T{}));
        const int token = 2 * i + g;
        if (token < p.M)
            *reinterpret_cast<uint2*>(static_cast<T*>(p.y) + token * p.w.N + row0 + 4 * t) = out;
    }
}

}  // namespace
}  // namespace lowbit::cuda
