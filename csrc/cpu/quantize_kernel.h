// Blockwise 4-bit quantization, the part that is the same for every instruction set.
//
//     absmax = max |w| over the block             x = w * (1 / max(absmax, floor))
//     rank = #{j : x > thresholds[j]}             code = order[rank]
//
// weight [rows, columns] fp32, bf16 or fp16, row-major; qweight [rows, ceil(columns / 2)], element
// 2i of a row in the high nibble; absmax [rows, ceil(columns / blocksize)] fp32. One fp32
// reciprocal and one fp32 product per element, as in lowbit/reference.py, so the bytes equal the
// reference's. The maximum is taken over the bits of |w|, where NaN is above Inf and Inf above
// every number: both reach absmax, and the codes of such a block mean nothing.
//
// A block is read twice, the second time from L1 (4096 fp32 elements are 16 KiB). Bound by the
// threshold search, four compare-and-select steps per vector: 4096 x 4096 bf16 takes 7 ms on one
// core with AVX2, of which reading the weight from memory would be 2 (AMD EPYC 7xx3, 2026-11).
//
// Ops, defined by each quantize*.cpp for its instruction set:
//     Ops::Ladder(thresholds, order)       both in the form the search wants
//     Ops::abs_max_bits(p, count)          fp32 bits of the largest |p[i]|, count a multiple of 32
//     Ops::unit(p, inverse, ladder, out)   32 elements to 16 bytes
#pragma once

#include "quantize.h"

namespace lowbit::cpu {
namespace {

// Elements per step: 16 bytes of codes. Every full block is a multiple of it.
constexpr int64_t kUnit = 32;
// Blocks whose maxima are taken ahead: at most kGroup, and no more than stay in L1.
constexpr int64_t kGroup = 8, kGroupElements = 4096;
constexpr int64_t kGrain = 16384;  // elements worth waking a thread for, about 10 us

// The thresholds as a binary tree in heap order: children of node i at 2i and 2i + 1, [0] unused.
struct Tree {
    float node[16];

    explicit Tree(const float* t)
        : node{0,    t[7], t[3], t[11], t[1], t[5],  t[9],  t[13],
               t[0], t[2], t[4], t[6],  t[8], t[10], t[12], t[14]} {}
};

// Whole blocks that follow each other. The maxima of a group come first, then its codes: maximum,
// reciprocal and first product of one block are a chain of 50 cycles that would hold up the search.
template <typename Ops, typename T>
void quantize_full(
    const T* in,
    int64_t blocks,
    int64_t blocksize,
    const typename Ops::Ladder& ladder,
    uint8_t* out,
    float* absmax) {
    const int64_t step = max64(1, min64(kGroup, kGroupElements / blocksize));
    for (int64_t group = 0; group < blocks; group += step) {
        const int64_t end = min64(group + step, blocks);
        float inverse[kGroup];
        for (int64_t b = group; b < end; ++b) {
            absmax[b] = float_from_bits(Ops::abs_max_bits(in + b * blocksize, blocksize));
            inverse[b - group] = reciprocal(absmax[b]);
        }
        for (int64_t b = group; b < end; ++b) {
            for (int64_t i = b * blocksize; i < (b + 1) * blocksize; i += kUnit)
                Ops::unit(in + i, inverse[b - group], ladder, out + i / 2);
        }
    }
}

// The short last block of a row.
template <typename Ops, typename T>
void quantize_short(
    const T* in, int64_t count, const typename Ops::Ladder& ladder, uint8_t* out, float* absmax) {
    const int64_t full = count & ~(kUnit - 1), rest = count - full;
    // Zeros do not raise the maximum, and give an odd row the code of 0 as its last nibble.
    T tail[kUnit] = {};
    std::memcpy(tail, in + full, rest * sizeof(T));
    const uint32_t bits = Ops::abs_max_bits(in, full), tail_bits = Ops::abs_max_bits(tail, kUnit);
    *absmax = float_from_bits(tail_bits > bits ? tail_bits : bits);
    const float inverse = reciprocal(*absmax);
    for (int64_t i = 0; i < full; i += kUnit)
        Ops::unit(in + i, inverse, ladder, out + i / 2);
    uint8_t bytes[kUnit / 2];
    Ops::unit(tail, inverse, ladder, bytes);
    std::memcpy(out + full / 2, bytes, (rest + 1) / 2);
}

template <typename Ops, typename T>
void quantize_typed(const QuantizeArgs& args) {
    const int64_t full_blocks = args.columns / args.blocksize;
    const int64_t blocks_per_row = ceil_div(args.columns, args.blocksize);
    const int64_t row_bytes = ceil_div(args.columns, 2);
    const typename Ops::Ladder ladder(args.thresholds, args.order);
    const T* weight = static_cast<const T*>(args.weight);
    const int64_t grain = kGrain / args.blocksize;
    parallel_for(0, args.rows * blocks_per_row, grain, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last;) {
            const int64_t row = i / blocks_per_row, block = i % blocks_per_row;
            const int64_t k = block * args.blocksize;
            const T* in = weight + row * args.columns + k;
            uint8_t* out = args.qweight + row * row_bytes + k / 2;
            if (block == full_blocks) {
                quantize_short<Ops>(in, args.columns - k, ladder, out, args.absmax + i);
                ++i;
                continue;
            }
            const int64_t blocks = min64(full_blocks - block, last - i);
            quantize_full<Ops>(in, blocks, args.blocksize, ladder, out, args.absmax + i);
            i += blocks;
        }
    });
}

template <typename Ops>
void quantize_with(const QuantizeArgs& args) {
    with_type(args.dtype, [&](auto element) { quantize_typed<Ops, decltype(element)>(args); });
}

}  // namespace

#if LOWBIT_CPU_X86
void quantize_avx2(const QuantizeArgs& args);
void quantize_avx512(const QuantizeArgs& args);
#endif

}  // namespace lowbit::cpu
