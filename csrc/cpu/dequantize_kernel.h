// Dequantize a 4-bit weight, the part that is the same for every instruction set.
//
//     W[n, k] = RN_dtype(codebook[q[n, k]] * absmax(block(n, k)))    one fp32 product, one rounding
//
// qweight and absmax as in WeightView (common.h), flat or by rows, absmax fp32 or double-quantized;
// out [N, K] fp32, bf16 or fp16, row-major. A block has one scale and 16 codes, hence only 16
// different results: the kernel multiplies and rounds those once per block and then only looks them
// up, which is exact by construction.
//
// Bound by memory: 0.5 bytes read and 2 (or 4) written per element. Outputs too large for the
// caches are written with streaming stores, which spare the read of each line before it is
// overwritten.
//
// Ops, defined by each dequantize*.cpp for its instruction set:
//     Ops::Codebook(codebook)                the 16 values in registers
//     Ops::Table<T>(codebook, scale)         the 16 results in the form the lookup wants
//     Ops::unit<kStream>(bytes, table, out)  16 bytes to 32 elements; kStream: past the caches, out
//                                            is 64-byte aligned
//     Ops::fence()                           makes streamed stores visible to other threads
#pragma once

#include "dequantize.h"

namespace lowbit::cpu {
namespace {

constexpr int64_t kUnit = 32;
constexpr int64_t kGrain = 16384;  // elements worth waking a thread for
// From this output size on, stores bypass the caches. About the L3 share of a few cores on current
// servers; below, the consumer (a matmul over the same panel) finds the result in cache.
constexpr int64_t kStreamBytes = int64_t{16} << 20;

template <typename Ops, typename T, bool kStream>
void dequantize_block(
    const uint8_t* bytes,
    int64_t count,
    const typename Ops::Codebook& codebook,
    float scale,
    T* out) {
    const typename Ops::template Table<T> table(codebook, scale);
    const int64_t full = count & ~(kUnit - 1), rest = count - full;
    for (int64_t i = 0; i < full; i += kUnit) {
        Ops::template unit<kStream>(bytes + i / 2, table, out + i);
    }
    if (rest != 0) {
        uint8_t tail_bytes[kUnit / 2] = {};
        T tail[kUnit];
        std::memcpy(tail_bytes, bytes + full / 2, (rest + 1) / 2);
        Ops::template unit<false>(tail_bytes, table, tail);
        std::memcpy(out + full, tail, rest * sizeof(T));
    }
}

template <typename Ops, typename T, bool kStream>
void dequantize_typed(const WeightView& w, T* out) {
    const int64_t rows = w.row_blocks ? w.N : 1, columns = w.row_blocks ? w.K : w.N * w.K;
    const int64_t blocks_per_row = ceil_div(columns, w.blocksize), row_bytes = ceil_div(columns, 2);
    const typename Ops::Codebook codebook(w.codebook);
    const int64_t grain = ceil_div(kGrain, w.blocksize);
    parallel_for(0, rows * blocks_per_row, grain, [&](int64_t first, int64_t last) {
        int64_t row = first / blocks_per_row, block = first % blocks_per_row;
        for (int64_t i = first; i < last; ++i) {
            const int64_t k = block * w.blocksize, count = min64(w.blocksize, columns - k);
            dequantize_block<Ops, T, kStream>(
                w.qweight + row * row_bytes + k / 2, count, codebook, block_absmax(w, i),
                out + row * columns + k);
            if (++block == blocks_per_row) {
                block = 0;
                ++row;
            }
        }
        if (kStream)
            Ops::fence();
    });
}

template <typename Ops, typename T>
void dequantize_to(const WeightView& w, T* out) {
    constexpr int64_t kLine = 64;
    // The flat layout is one row: only its start must be aligned.
    const int64_t row_elements = w.row_blocks ? w.K : 0;
    const bool aligned = reinterpret_cast<uintptr_t>(out) % kLine == 0 &&
                         row_elements * static_cast<int64_t>(sizeof(T)) % kLine == 0;
    const int64_t out_bytes = w.N * w.K * static_cast<int64_t>(sizeof(T));
    if (aligned && out_bytes >= kStreamBytes)
        return dequantize_typed<Ops, T, true>(w, out);
    dequantize_typed<Ops, T, false>(w, out);
}

template <typename Ops>
void dequantize_with(const WeightView& w, Dtype dtype, void* out) {
    with_type(
        dtype, [&](auto element) { dequantize_to<Ops>(w, static_cast<decltype(element)*>(out)); });
}

}  // namespace

#if LOWBIT_CPU_X86
void dequantize_avx2(const WeightView& w, Dtype dtype, void* out);
void dequantize_avx512(const WeightView& w, Dtype dtype, void* out);
#endif

}  // namespace lowbit::cpu
