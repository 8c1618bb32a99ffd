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
// threshold search, four compare-and-select steps per vector: 4096 x 4096 bf16 takes 9 ms on one
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
constexpr float kFloor = 1e-38f;   // ABSMAX_FLOOR of lowbit/reference.py: 1 / floor is finite
constexpr int64_t kGrain = 16384;  // elements worth waking a thread for, about 10 us

template <typename Ops, typename T>
void quantize_block(
    const T* in, int64_t count, const typename Ops::Ladder& ladder, uint8_t* out, float* absmax) {
    const int64_t full = count & ~(kUnit - 1), rest = count - full;
    // Zeros do not raise the maximum, and give an odd row the code of 0 as its last nibble.
    T tail[kUnit] = {};
    uint32_t bits = Ops::abs_max_bits(in, full);
    if (rest != 0) {
        std::memcpy(tail, in + full, rest * sizeof(T));
        const uint32_t tail_bits = Ops::abs_max_bits(tail, kUnit);
        if (tail_bits > bits)
            bits = tail_bits;
    }
    *absmax = float_from_bits(bits);
    const float inverse = 1.0f / (*absmax > kFloor ? *absmax : kFloor);
    for (int64_t i = 0; i < full; i += kUnit)
        Ops::unit(in + i, inverse, ladder, out + i / 2);
    if (rest != 0) {
        uint8_t bytes[kUnit / 2];
        Ops::unit(tail, inverse, ladder, bytes);
        std::memcpy(out + full / 2, bytes, (rest + 1) / 2);
    }
}

template <typename Ops, typename T>
void quantize_typed(const QuantizeArgs& args) {
    const int64_t blocks_per_row = ceil_div(args.columns, args.blocksize);
    const int64_t row_bytes = ceil_div(args.columns, 2);
    const typename Ops::Ladder ladder(args.thresholds, args.order);
    const T* weight = static_cast<const T*>(args.weight);
    const int64_t grain = kGrain / args.blocksize;
    parallel_for(0, args.rows * blocks_per_row, grain, [&](int64_t first, int64_t last) {
        int64_t row = first / blocks_per_row, block = first % blocks_per_row;
        for (int64_t i = first; i < last; ++i) {
            const int64_t k = block * args.blocksize, left = args.columns - k;
            const int64_t count = left < args.blocksize ? left : args.blocksize;
            quantize_block<Ops>(
                weight + row * args.columns + k, count, ladder,
                args.qweight + row * row_bytes + k / 2, args.absmax + i);
            if (++block == blocks_per_row) {
                block = 0;
                ++row;
            }
        }
    });
}

template <typename Ops>
void quantize_with(const QuantizeArgs& args) {
    switch (args.dtype) {
    case Dtype::kFloat32:
        return quantize_typed<Ops, float>(args);
    case Dtype::kBFloat16:
        return quantize_typed<Ops, bf16_t>(args);
    case Dtype::kFloat16:
        return quantize_typed<Ops, fp16_t>(args);
    }
}

}  // namespace

#if LOWBIT_CPU_X86
void quantize_avx2(const QuantizeArgs& args);
void quantize_avx512(const QuantizeArgs& args);
#endif

}  // namespace lowbit::cpu
