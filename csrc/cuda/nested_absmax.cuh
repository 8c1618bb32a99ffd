// The second quantization of a double-quantized weight: absmax fp32 to 8-bit codes. Device code of
// nf4_quantize.cu, which runs it behind a grid barrier, when the sums of all CTAs are known.
//
//     offset = mean(absmax);  c = absmax - offset;  nested_absmax = max |c| over a nested block
//     x = RN(c * RN(1 / max(nested_absmax, 1e-38)));  code = nearest codebook entry, ties to even
//
// The mean is summed in fp64, in an order fixed by the grid: deterministic on a card, and rounded
// to fp32 from a value whose error is far below the last bit. Everything else is fp32 as written,
// the same bits as lowbit/reference.py from the same offset.
#pragma once

#include "common.cuh"
#include "nf4_quantize.h"

namespace lowbit::cuda {

constexpr int kNestedThresholds = 255;

// Shared memory of a CTA.
template <int kThreads>
struct NestedTables {
    float thresholds[kNestedThresholds];
    double sums[kThreads / kWarpSize];
};

// The largest float below a finite x.
__device__ __forceinline__ float next_below(float x) {
    const uint32_t bits = __float_as_uint(x);
    if (x == 0.0f)
        return __uint_as_float(0x80000001u);
    return __uint_as_float(x > 0.0f ? bits - 1 : bits + 1);
}

// Midpoints, those after an odd code one step lower so that a tie goes to the even code.
template <int kThreads>
__device__ __forceinline__ void
build_nested_tables(NestedTables<kThreads>& smem, const float* codebook) {
    // From the last warp on: the first one builds the other table.
    for (int j = kThreads - 1 - threadIdx.x; j < kNestedThresholds; j += kThreads) {
        const float middle = __fmul_rn(__fadd_rn(codebook[j], codebook[j + 1]), 0.5f);
        smem.thresholds[j] = j % 2 == 1 ? next_below(middle) : middle;
    }
}

// The binary search of torch.bucketize, so that repeated codebook entries give its code.
__device__ __forceinline__ uint32_t nested_code(const float* thresholds, float x) {
    uint32_t code = 0;
#pragma unroll
    for (uint32_t step = 128; step > 0; step /= 2) {
        if (!(thresholds[code + step - 1] >= x))
            code += step;
    }
    return code;
}

// Sum over the CTA in a fixed order; valid in thread 0.
template <int kThreads>
__device__ __forceinline__ double cta_sum(double value, NestedTables<kThreads>& smem) {
    value = warp_sum(value);
    if (threadIdx.x % kWarpSize == 0)
        smem.sums[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    double sum = 0.0;
    if (threadIdx.x == 0) {
        for (const double part : smem.sums)
            sum += part;
    }
    return sum;
}

// The mean of absmax from the partial sums of all CTAs. Every warp adds them up for itself, in the
// same order: no barrier.
__device__ __forceinline__ float mean_absmax(const QuantizeArgs& a, int64_t blocks) {
    double part = 0.0;
#pragma unroll 4
    for (int i = threadIdx.x % kWarpSize; i < gridDim.x; i += kWarpSize)
        part += a.partial_sums[i];
    const float offset = static_cast<float>(warp_sum(part) / static_cast<double>(blocks));
    if (blockIdx.x == 0 && threadIdx.x == 0)
        *a.nested_offset = offset;
    return offset;
}

// 256 scales of a warp, the usual nested block: `first` + 32 i + lane, none from `end` on.
struct Chunk {
    static constexpr int kPerLane = 8;
    static constexpr int kScales = kPerLane * kWarpSize;
    float scale[kPerLane];

    __device__ __forceinline__ void load(const float* absmax, int64_t first, int64_t end) {
#pragma unroll
        for (int i = 0; i < kPerLane; i++) {
            const int64_t index = first + i * kWarpSize + threadIdx.x % kWarpSize;
            scale[i] = index < end ? absmax[index] : 0.0f;
        }
    }

    __device__ __forceinline__ float
    largest_distance(float offset, int64_t first, int64_t end) const {
        float largest = 0.0f;
#pragma unroll
        for (int i = 0; i < kPerLane; i++) {
            const bool inside = first + i * kWarpSize + threadIdx.x % kWarpSize < end;
            if (inside)
                largest = max_nan(largest, fabsf(__fsub_rn(scale[i], offset)));
        }
        return largest;
    }

    __device__ __forceinline__ void store(
        uint8_t* codes,
        const float* thresholds,
        float offset,
        float inverse,
        int64_t first,
        int64_t end) const {
#pragma unroll
        for (int i = 0; i < kPerLane; i++) {
            const int64_t index = first + i * kWarpSize + threadIdx.x % kWarpSize;
            const float x = __fmul_rn(__fsub_rn(scale[i], offset), inverse);
            const uint32_t code = nested_code(thresholds, x);
            if (index < end)
                codes[index] = static_cast<uint8_t>(code);
        }
    }
};

// After the grid barrier; a warp per nested block. The scales of its next block are loaded before
// it needs them, those of the first one before the offset is known, which hides a trip to L2.
template <int kThreads>
__device__ __forceinline__ void
quantize_absmax(const QuantizeArgs& a, int64_t blocks, NestedTables<kThreads>& smem) {
    const int log2 = a.nested_blocksize_log2;
    const int64_t nested_blocks = (blocks + (int64_t{1} << log2) - 1) >> log2;
    const auto end_of = [&](int64_t nested) { return min((nested + 1) << log2, blocks); };
    const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / kWarpSize);
    // Neighbouring blocks go to different CTAs: with fewer blocks than warps, every SM has some.
    int64_t nested = static_cast<int64_t>(threadIdx.x / kWarpSize) * gridDim.x + blockIdx.x;
    Chunk chunk;
    chunk.load(a.absmax, nested << log2, end_of(nested));
    const float offset = mean_absmax(a, blocks);
    for (; nested < nested_blocks; nested += step) {
        const int64_t begin = nested << log2, end = end_of(nested);
        float absmax = chunk.largest_distance(offset, begin, end);
        for (int64_t first = begin + Chunk::kScales; first < end; first += Chunk::kScales) {
            chunk.load(a.absmax, first, end);
            absmax = max_nan(absmax, chunk.largest_distance(offset, first, end));
        }
        absmax = group_max(absmax, kWarpSize);
        const float inverse = reciprocal(absmax);
        for (int64_t first = begin; first < end; first += Chunk::kScales) {
            if (end - begin > Chunk::kScales)
                chunk.load(a.absmax, first, end);
            chunk.store(a.absmax_8bit, smem.thresholds, offset, inverse, first, end);
        }
        if (threadIdx.x % kWarpSize == 0)
            a.nested_absmax[nested] = absmax;
        chunk.load(a.absmax, (nested + step) << log2, end_of(nested + step));
    }
}

// The same for a CTA that keeps its `own` scales, whole nested blocks from number `first_block` on,
// in shared memory.
template <int kThreads>
__device__ __forceinline__ void quantize_own_absmax(
    const QuantizeArgs& a,
    const float* scales,
    int64_t first_block,
    uint32_t own,
    int64_t blocks,
    NestedTables<kThreads>& smem) {
    const int log2 = a.nested_blocksize_log2;
    const float offset = mean_absmax(a, blocks);
    uint8_t* codes = a.absmax_8bit + first_block;
    float* nested_absmax = a.nested_absmax + (first_block >> log2);
    for (uint32_t nested = threadIdx.x / kWarpSize; nested << log2 < own;
         nested += kThreads / kWarpSize) {
        const uint32_t begin = nested << log2, end = min((nested + 1) << log2, own);
        Chunk chunk;
        float absmax = 0.0f;
        for (uint32_t first = begin; first < end; first += Chunk::kScales) {
            chunk.load(scales, first, end);
            absmax = max_nan(absmax, chunk.largest_distance(offset, first, end));
        }
        absmax = group_max(absmax, kWarpSize);
        const float inverse = reciprocal(absmax);
        for (uint32_t first = begin; first < end; first += Chunk::kScales) {
            if (end - begin > Chunk::kScales)
                chunk.load(scales, first, end);
            chunk.store(codes, smem.thresholds, offset, inverse, first, end);
        }
        if (threadIdx.x % kWarpSize == 0)
            nested_absmax[nested] = absmax;
    }
}

}  // namespace lowbit::cuda
