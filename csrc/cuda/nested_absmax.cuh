// The second quantization of a double-quantized weight: absmax fp32 to 8-bit codes. Device code of
// nf4_quantize.cu.
//
//     offset = mean(absmax);  c = absmax - offset;  nested_absmax = max |c| over a nested block
//     x = RN(c * RN(1 / max(nested_absmax, 1e-38)));  code = nearest codebook entry, ties to even
//
// A warp per nested block. What does not need the mean comes before the barrier that carries it:
// absmax is read and its extremes are found, and as subtraction rounds monotonically, the largest
// |c| is that of one of the two.
//
// The mean is summed in fp64, in an order fixed by the grid: deterministic on a card, and rounded
// to fp32 from a value whose error is far below the last bit. Everything else is fp32 as written,
// the same bits as lowbit/reference.py from the same offset.
#pragma once

#include "grid_sum.cuh"
#include "nested_code_table.cuh"
#include "nf4_quantize.h"

namespace lowbit::cuda {

// Shared memory of a CTA.
template <int kThreads>
struct NestedSmem {
    NestedTable table;
    double sums[kThreads / kWarpSize];
    float offset;
};

// 256 scales of a warp, the usual nested block: from `first` on, four neighbours per lane twice;
// beyond `end` the last one again.
struct Chunk {
    static constexpr int kQuads = 2;
    static constexpr int kScales = kQuads * 4 * kWarpSize;
    float scale[kQuads][4];

    static __device__ __forceinline__ int64_t index(int64_t first, int quad) {
        return first + (quad * kWarpSize + threadIdx.x % kWarpSize) * 4;
    }

    __device__ __forceinline__ void load(const float* scales, int64_t first, int64_t end) {
#pragma unroll
        for (int q = 0; q < kQuads; q++) {
            const int64_t at = index(first, q);
            if (at + 4 <= end) {
                const float4 v = *reinterpret_cast<const float4*>(scales + at);
                scale[q][0] = v.x, scale[q][1] = v.y, scale[q][2] = v.z, scale[q][3] = v.w;
            } else {
#pragma unroll
                for (int i = 0; i < 4; i++)
                    scale[q][i] = scales[min(at + i, end - 1)];
            }
        }
    }

    __device__ __forceinline__ void store(
        uint8_t* codes,
        const NestedTable& table,
        float offset,
        float inverse,
        int64_t first,
        int64_t end) const {
#pragma unroll
        for (int q = 0; q < kQuads; q++) {
            float x[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                x[i] = __fmul_rn(__fsub_rn(scale[q][i], offset), inverse);
            const int64_t at = index(first, q);
            const uint32_t four = nested_codes(table, x);
            if (at + 4 <= end) {
                *reinterpret_cast<uint32_t*>(codes + at) = four;
            } else {
                for (int i = 0; at + i < end; i++)
                    codes[at + i] = static_cast<uint8_t>(four >> (8 * i));
            }
        }
    }
};

// Least and largest absmax of a nested block. absmax has no sign, so its bits order as integers,
// NaN last.
struct Extremes {
    uint32_t low = 0x7fffffff, high = 0;

    __device__ __forceinline__ void add(const Chunk& chunk) {
#pragma unroll
        for (int q = 0; q < Chunk::kQuads; q++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                low = min(low, __float_as_uint(chunk.scale[q][i]));
                high = max(high, __float_as_uint(chunk.scale[q][i]));
            }
        }
    }

    __device__ __forceinline__ void reduce() {
        low = __reduce_min_sync(kFullWarp, low);
        high = __reduce_max_sync(kFullWarp, high);
    }

    __device__ __forceinline__ float largest_distance(float offset) const {
        return max_nan(
            fabsf(__fsub_rn(__uint_as_float(low), offset)),
            fabsf(__fsub_rn(__uint_as_float(high), offset)));
    }
};

// A warp's nested block under way: its extremes and, of a block of up to 256 scales, the scales.
struct NestedBlock {
    int64_t begin, end;
    Chunk chunk;
    Extremes extremes;

    __device__ __forceinline__ void
    read(const float* scales, int64_t number, int log2, int64_t blocks) {
        begin = number << log2, end = min((number + 1) << log2, blocks);
        extremes = Extremes{};
        for (int64_t first = begin; first < end; first += Chunk::kScales) {
            chunk.load(scales, first, end);
            extremes.add(chunk);
        }
        extremes.reduce();
    }

    // Returns its nested_absmax.
    __device__ __forceinline__ float
    store(const float* scales, uint8_t* codes, const NestedTable& table, float offset) {
        const float absmax = extremes.largest_distance(offset);
        const float inverse = reciprocal(absmax);
        for (int64_t first = begin; first < end; first += Chunk::kScales) {
            if (end - begin > Chunk::kScales)
                chunk.load(scales, first, end);
            chunk.store(codes, table, offset, inverse, first, end);
        }
        return absmax;
    }
};

// The mean of absmax over the weight. `sum`: of the thread's absmax. `meanwhile` is run by every
// warp between the CTA's sum and the others'.
template <bool kMemory, int kThreads, typename Meanwhile>
__device__ __forceinline__ float mean_absmax(
    double sum,
    int64_t blocks,
    const GridSum& grid,
    NestedSmem<kThreads>& smem,
    const Meanwhile& meanwhile) {
    constexpr int kWarps = kThreads / kWarpSize;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    sum = warp_sum(sum);
    if (lane == 0)
        smem.sums[warp] = sum;
    __syncthreads();
    // The last warp: with few nested blocks it has none.
    const bool meets = warp == kWarps - 1;
    if (meets) {
        const double total = warp_sum(lane < kWarps ? smem.sums[lane] : 0.0);
        if (lane == 0)
            grid.publish<kMemory>(total);
    }
    build_cells<kThreads>(smem.table);
    meanwhile();
    if (meets) {
        const double total = grid.collect<kMemory>();
        smem.offset = static_cast<float>(total / static_cast<double>(blocks));
    }
    __syncthreads();
    return smem.offset;
}

// Nested blocks of a CTA whose scales are in its shared memory, whole nested blocks from block
// number `first` of the weight on.
template <int kThreads>
__device__ __forceinline__ void quantize_own_absmax(
    const QuantizeArgs& a,
    const float* scales,
    int64_t first,
    int64_t own,
    double sum,
    int64_t blocks,
    const GridSum& grid,
    NestedSmem<kThreads>& smem) {
    const int log2 = a.nested_blocksize_log2;
    uint8_t* codes = a.absmax_8bit + first;
    float* nested_absmax = a.nested_absmax + (first >> log2);
    int64_t number = threadIdx.x / kWarpSize;
    NestedBlock block;
    const auto read = [&] {
        if (number << log2 < own)
            block.read(scales, number, log2, own);
    };
    const float offset = mean_absmax<false>(sum, blocks, grid, smem, read);
    if (blockIdx.x == 0 && threadIdx.x == 0)
        *a.nested_offset = offset;
    while (number << log2 < own) {
        const float absmax = block.store(scales, codes, smem.table, offset);
        if (threadIdx.x % kWarpSize == 0)
            nested_absmax[number] = absmax;
        number += kThreads / kWarpSize;
        read();
    }
}

// Nested blocks of scales in memory, whichever CTA wrote them. Neighbouring blocks go to different
// CTAs: with fewer blocks than warps, every SM has some.
template <int kThreads>
__device__ __forceinline__ void quantize_absmax(
    const QuantizeArgs& a,
    double sum,
    int64_t blocks,
    const GridSum& grid,
    NestedSmem<kThreads>& smem) {
    const int log2 = a.nested_blocksize_log2;
    const float offset = mean_absmax<true>(sum, blocks, grid, smem, [] {});
    if (blockIdx.x == 0 && threadIdx.x == 0)
        *a.nested_offset = offset;
    constexpr int kWarps = kThreads / kWarpSize;
    for (int64_t number = int64_t{threadIdx.x / kWarpSize} * gridDim.x + blockIdx.x;
         number << log2 < blocks; number += int64_t{kWarps} * gridDim.x) {
        NestedBlock block;
        block.read(a.absmax, number, log2, blocks);
        const float absmax = block.store(a.absmax, a.absmax_8bit, smem.table, offset);
        if (threadIdx.x % kWarpSize == 0)
            a.nested_absmax[number] = absmax;
    }
}

}  // namespace lowbit::cuda
