// From a scaled value to its 4-bit code, for any 15 thresholds and any order of codes.
//
//     rank = #{j : x > thresholds[j]},  code = order[rank]
//
// A ladder of 15 compares takes 30 instructions. Here a rank takes one compare: [-1, 1] is cut into
// 32 cells, and tables in shared memory say how many thresholds lie in lower cells and which one
// lies inside. 32 words are 32 banks, so no lookup of a warp conflicts with another. That is exact
// if no cell holds two different thresholds, which build_code_table checks for the thresholds at
// hand: true for NF4, NF3 and NF2; FP4 has three around zero that are too close, and climbs the
// ladder.
#pragma once

#include <cstddef>

#include "common.cuh"

namespace lowbit::cuda {

constexpr int kThresholds = 15;
constexpr int kCells = 32;

struct alignas(kCells * 4) CodeTable {
    float threshold[kCells];  // the one inside the cell, or infinity
    uint32_t rank[kCells];    // thresholds in lower cells
    float ladder[kThresholds + 1];
    uint32_t order[4];  // codes of ranks 0..15, a byte each
    bool one_per_cell;  // the two tables are exact
    bool ordered;       // order is the identity
};

// Byte offset of x's cell in a table of words: round(62 x + 62) without its two low bits. Monotone
// in x, which is all that exactness needs. The sum with 1.5 * 2^23 leaves the integer in the low
// mantissa bits; NaN lands in cell 31.
__device__ __forceinline__ uint32_t cell_offset(float x) {
    return __float_as_uint(__fmaf_rn(x, 62.0f, 62.0f + 12582912.0f)) & 0x7cu;
}

// Cell of a threshold. Values have |x| <= 1 (but for rounding of subnormal reciprocals), so what
// lies outside is below or above all of them.
__device__ __forceinline__ int threshold_cell(float t) {
    if (!(t <= 1.02f))
        return kCells;
    if (t < -1.02f)
        return -1;
    return static_cast<int>(cell_offset(t) / 4);
}

// By one warp; lane c fills cell c and brings threshold c (c < 15) and the code of rank c % 16.
// Several equal thresholds may share a cell if all the ranks they skip have one code, as in
// codebooks filled up with repeated values.
__device__ __forceinline__ void build_code_table(CodeTable& table, float own, uint32_t own_code) {
    const int lane = threadIdx.x % kWarpSize;
    const int own_cell = threshold_cell(own);
    uint32_t rank = 0, inside = 0;
    float threshold = INFINITY;
    bool exact = true;
#pragma unroll
    for (int j = 0; j < kThresholds; j++) {
        const int cell = __shfl_sync(kFullWarp, own_cell, j);
        const float t = __shfl_sync(kFullWarp, own, j);
        if (cell < lane)
            rank++;
        if (cell != lane)
            continue;
        exact = exact && (inside == 0 || t == threshold);
        threshold = t;
        inside++;
    }
    const uint32_t next = min(rank + 1, 15u), last = min(rank + inside, 15u);
    const uint32_t next_code = __shfl_sync(kFullWarp, own_code, next);
    const uint32_t last_code = __shfl_sync(kFullWarp, own_code, last);
    exact = exact && (inside < 2 || next_code == last_code);
    table.threshold[lane] = threshold;
    table.rank[lane] = rank;
    if (lane < 16) {
        table.ladder[lane] = own;
        reinterpret_cast<uint8_t*>(table.order)[lane] = static_cast<uint8_t>(own_code);
    }
    const bool all_exact = __all_sync(kFullWarp, exact);
    const bool all_ordered = __all_sync(kFullWarp, own_code == lane % 16);
    if (lane == 0) {
        table.one_per_cell = all_exact;
        table.ordered = all_ordered;
    }
}

// The cells' address in shared memory, as a value that the compiler keeps in a register: it would
// compute it again in every loop.
__device__ __forceinline__ uint32_t cells_of(const CodeTable& table) {
    uint32_t cells = static_cast<uint32_t>(__cvta_generic_to_shared(table.threshold));
    asm volatile("" : "+r"(cells));
    return cells;
}

// Appends the rank of x to a word of nibbles. NaN is above everything, as for torch.bucketize. The
// table is aligned, so that its address and a cell's offset join in the instruction that masks the
// offset.
__device__ __forceinline__ uint32_t append_by_cell(uint32_t cells, uint32_t ranks, float x) {
    static_assert(offsetof(CodeTable, rank) == 128);
    const uint32_t address = cell_offset(x) | cells;
    float threshold;
    uint32_t rank;
    asm("ld.shared.f32 %0, [%1];" : "=f"(threshold) : "r"(address));
    asm("ld.shared.u32 %0, [%1+128];" : "=r"(rank) : "r"(address));
    return add_if_above(ranks * 16 + rank, x, threshold);
}

// Replaces each nibble of a word, a rank, by its code.
__device__ __forceinline__ uint32_t reorder(const CodeTable& table, uint32_t ranks) {
    uint32_t select = ranks & 0x77777777u;
    uint32_t half = ((ranks & 0x88888888u) | 0x64206420u) >> 1;
    uint32_t pairs[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t codes = prmt(
            prmt(table.order[0], table.order[1], select),
            prmt(table.order[2], table.order[3], select), half);
        pairs[i] = codes | (codes >> 4);  // bytes 0 and 2: two codes each
        select >>= 16;
        half >>= 16;
    }
    return prmt(pairs[0], pairs[1], 0x6420);
}

// kWidth scaled values to packed codes, the first value in the highest nibble of the lowest byte.
// cells: cells_of(table).
template <int kWidth>
__device__ __forceinline__ uint32_t encode(
    const CodeTable& table,
    uint32_t cells,
    bool one_per_cell,
    bool ordered,
    const float (&x)[kWidth]) {
    uint32_t ranks = 0;
    if (one_per_cell) {
#pragma unroll
        for (int i = kWidth - 2; i >= 0; i -= 2) {
            ranks = append_by_cell(cells, ranks, x[i]);
            ranks = append_by_cell(cells, ranks, x[i + 1]);
        }
    } else {
#pragma unroll 1
        for (int j = 0; j < kThresholds; j++) {
            const float threshold = table.ladder[j];
#pragma unroll
            for (int i = 0; i < kWidth; i++) {
                if (!(x[i] <= threshold))
                    ranks += 1u << (4 * (i ^ 1));
            }
        }
    }
    return ordered ? ranks : reorder(table, ranks);
}

}  // namespace lowbit::cuda
