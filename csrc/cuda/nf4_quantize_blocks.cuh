// Rows of blocks as they come, for nf4_quantize.cu: neighbouring lanes have a block, or a warp a
// long one. Device code. Each returns the thread's share of the sum of absmax.
#pragma once

#include "nf4_quantize.h"
#include "nf4_quantize_groups.cuh"

namespace lowbit::cuda {
namespace {

template <int kWidth>
__device__ __forceinline__ void store_codes(uint8_t* target, uint32_t codes) {
    if constexpr (kWidth == 8) {
        *reinterpret_cast<uint32_t*>(target) = codes;
    } else if constexpr (kWidth == 4) {
        *reinterpret_cast<uint16_t*>(target) = static_cast<uint16_t>(codes);
    } else {
        *target = static_cast<uint8_t>(codes);
    }
}

// Blocks of up to kWidth elements per lane of a warp. A warp takes kPieces times as many neighbours
// of a row at a time, so that the loads are in flight together.
template <typename T, int kWidth, int kWarps>
__device__ __forceinline__ double
quantize_short_blocks(const QuantizeArgs& a, const CodeTable& table) {
    constexpr int kPieces = kWidth == 2 ? 8 : sizeof(T) * kWidth > 16 ? 2 : 4;
    constexpr int kPiece = kWarpSize * kWidth, kSpan = kPieces * kPiece;
    const int lane = threadIdx.x % kWarpSize;
    const int block_lanes = (1 << a.blocksize_log2) / kWidth;
    const int64_t blocks_per_row = (a.columns + (1 << a.blocksize_log2) - 1) >> a.blocksize_log2;
    const auto spans_per_row = static_cast<uint32_t>((a.columns + kSpan - 1) / kSpan);
    const uint32_t spans = static_cast<uint32_t>(a.rows) * spans_per_row;
    const uint32_t cells = cells_of(table);
    double sum = 0.0;
    for (uint32_t span = blockIdx.x * kWarps + threadIdx.x / kWarpSize; span < spans;
         span += gridDim.x * kWarps) {
        const uint32_t row = span / spans_per_row;
        const int64_t first = int64_t{span - row * spans_per_row} * kSpan + lane * kWidth;
        const int64_t left = a.columns - first;
        const T* source = static_cast<const T*>(a.weight) + row * a.columns + first;
        uint8_t* target = a.qweight + row * ((a.columns + 1) / 2) + first / 2;
        float* scales = a.absmax + row * blocks_per_row + (first >> a.blocksize_log2);
        Elements<T, kWidth> e[kPieces] = {};
#pragma unroll
        for (int i = 0; i < kPieces; i++) {
            if (i * kPiece < left)
                e[i].load(source + i * kPiece, left - i * kPiece);
        }
        float absmax[kPieces], inverse[kPieces];
#pragma unroll
        for (int i = 0; i < kPieces; i++) {
            absmax[i] = group_max(e[i].absmax(), block_lanes);
            if (i * kPiece >= left)
                absmax[i] = 1.0f;  // zero would take the long way to a reciprocal
        }
        reciprocals(absmax, inverse);
#pragma unroll
        for (int i = 0; i < kPieces; i++) {
            if (i * kPiece >= left)
                continue;
            float x[kWidth];
            scale_elements(e[i], inverse[i], x);
            const uint32_t codes = encode(table, cells, table.one_per_cell, table.ordered, x);
            store_codes<kWidth>(target + i * (kPiece / 2), codes);
            if (lane % block_lanes == 0) {
                scales[i * kPiece >> a.blocksize_log2] = absmax[i];
                sum += absmax[i];
            }
        }
    }
    return sum;
}

// A longer block per warp, kWidth elements per lane and step, twice: for the maximum and for the
// codes.
template <typename T, int kWidth, int kWarps>
__device__ __forceinline__ double
quantize_long_blocks(const QuantizeArgs& a, const CodeTable& table) {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t blocksize = int64_t{1} << a.blocksize_log2;
    const int64_t blocks_per_row = (a.columns + blocksize - 1) >> a.blocksize_log2;
    const int64_t blocks = a.rows * blocks_per_row;
    const uint32_t cells = cells_of(table);
    double sum = 0.0;
    for (int64_t block = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
         block < blocks; block += static_cast<int64_t>(gridDim.x) * kWarps) {
        const int64_t row = block / blocks_per_row;
        const int64_t begin = (block - row * blocks_per_row) << a.blocksize_log2;
        const int count = static_cast<int>(min(blocksize, a.columns - begin));
        const T* source = static_cast<const T*>(a.weight) + row * a.columns + begin;
        uint8_t* target = a.qweight + row * ((a.columns + 1) / 2) + begin / 2;
        float absmax = 0.0f;
#pragma unroll 4
        for (int i = lane * kWidth; i < count; i += kWarpSize * kWidth) {
            Elements<T, kWidth> e;
            e.load(source + i, count - i);
            absmax = max_nan(absmax, e.absmax());
        }
        absmax = group_max(absmax, kWarpSize);
        const float inverse = reciprocal(absmax);
#pragma unroll 4
        for (int i = lane * kWidth; i < count; i += kWarpSize * kWidth) {
            Elements<T, kWidth> e;
            e.load(source + i, count - i);
            float x[kWidth];
            scale_elements(e, inverse, x);
            const uint32_t codes = encode(table, cells, table.one_per_cell, table.ordered, x);
            store_codes<kWidth>(target + i / 2, codes);
        }
        if (lane == 0) {
            a.absmax[block] = absmax;
            sum += absmax;
        }
    }
    return sum;
}

}  // namespace
}  // namespace lowbit::cuda
