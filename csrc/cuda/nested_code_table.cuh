// From a scaled absmax to its 8-bit code, for any ascending codebook of 256 values.
//
//     code = #{j : x > thresholds[j]}
//
// A binary search takes 8 dependent lookups, and lanes of a warp collide in the banks of shared
// memory. Here a code takes one lookup: x falls into a cell given by its sign, exponent and upper 6
// bits of mantissa, and the cell's word is the number of thresholds in lower cells, shifted left by
// kLowBits, plus what makes the lower bits of x carry into it if x is above the threshold inside
// the cell. Cells with several thresholds and x near zero, below all cells, say kSearch: exact for
// every codebook, and rare for those in use, whose values lie at least a cell apart.
#pragma once

#include "common.cuh"

namespace lowbit::cuda {

constexpr int kNestedThresholds = 255;
constexpr int kLowBits = 17;
constexpr uint32_t kLowMask = (1u << kLowBits) - 1;
constexpr uint32_t kCellsPerSign = 1024;  // the last begins at 1.0, the first near 2^-16
constexpr uint32_t kFirstCell = (0x3f800000u >> kLowBits) - (kCellsPerSign - 1);
constexpr uint32_t kSearch = 0x80000000u;

struct NestedTable {
    float thresholds[kNestedThresholds + 2];  // two times infinity at the end
    uint32_t cell[2 * kCellsPerSign];         // of values above zero, then below
};

// The largest float below a finite x.
__device__ __forceinline__ float next_below(float x) {
    const uint32_t bits = __float_as_uint(x);
    if (x == 0.0f)
        return __uint_as_float(0x80000001u);
    return __uint_as_float(x > 0.0f ? bits - 1 : bits + 1);
}

// Threshold j, between codebook entries j and j + 1: their midpoint, after an odd code one step
// lower so that a tie goes to the even code.
__device__ __forceinline__ float nested_threshold(int j, float lower, float upper) {
    const float middle = __fmul_rn(__fadd_rn(lower, upper), 0.5f);
    return j % 2 == 1 ? next_below(middle) : middle;
}

// The binary search of torch.bucketize, so that repeated codebook entries give its code.
__device__ __forceinline__ uint32_t search_code(const NestedTable& table, float x) {
    uint32_t code = 0;
#pragma unroll
    for (uint32_t step = 128; step > 0; step /= 2) {
        if (!(table.thresholds[code + step - 1] >= x))
            code += step;
    }
    return code;
}

// By a CTA that sees the thresholds.
template <int kThreads>
__device__ __forceinline__ void build_cells(NestedTable& table) {
    static_assert(2 * kCellsPerSign % kThreads == 0, "every thread builds as many cells");
#pragma unroll
    for (uint32_t i = 0; i < 2 * kCellsPerSign / kThreads; i++) {
        const uint32_t index = i * kThreads + threadIdx.x;
        const uint32_t below_zero = index / kCellsPerSign;
        const uint32_t bits = (kFirstCell + index % kCellsPerSign) << kLowBits;
        // The lowest values of this cell and of the next one.
        const float begin = __uint_as_float(below_zero ? bits | kLowMask | 0x80000000u : bits);
        const float end =
            __uint_as_float(below_zero ? (bits - 1) | 0x80000000u : bits + kLowMask + 1);
        const uint32_t lower = search_code(table, begin);
        const float inside = table.thresholds[lower];
        uint32_t word = lower << kLowBits;
        if (inside < end)
            word += kLowMask - ((__float_as_uint(inside) ^ (0u - below_zero)) & kLowMask);
        if (table.thresholds[lower + 1] < end || index % kCellsPerSign == 0)
            word = kSearch;
        table.cell[index] = word;
    }
}

// Codes of four values, |x| <= 1 but for rounding, the first one in the lowest byte.
__device__ __forceinline__ uint32_t nested_codes(const NestedTable& table, const float (&x)[4]) {
    constexpr float kNearZero = 0x1.04p-16f;  // in the first cell; NaN becomes it, too
    uint32_t code[4], search = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t bits = __float_as_uint(x[i]);
        const uint32_t sign = static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31);
        const uint32_t cell = __float_as_uint(fmaxf(fabsf(x[i]), kNearZero)) >> kLowBits;
        const uint32_t word = table.cell[cell - kFirstCell + (sign & kCellsPerSign)];
        code[i] = (word + ((bits ^ sign) & kLowMask)) >> kLowBits;
        search |= word;
    }
    if (search & kSearch) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            code[i] = search_code(table, x[i]);
    }
    return code[0] | code[1] << 8 | code[2] << 16 | code[3] << 24;
}

}  // namespace lowbit::cuda
