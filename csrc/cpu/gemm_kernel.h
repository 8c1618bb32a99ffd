// The parts of a GEMM kernel set that do not depend on the instruction set, as templates over a
// struct that does.
//
// gemm_<isa>.cpp defines a struct Isa with
//
//     kPack, kWordMultiple, kRowMultiple   as in GemmKernels
//     kBlockRows                           rows of A kept in the L2 cache while panels pass by
//     kDirectRows                          direct_rows of GemmKernels
//     multiply_block(product)              up to kBlockRows rows
//     multiply_rows_4bit<R>(a, w, piece, c, ldc, first)           R rows, when kDirectRows is not 0
//     to_fp32(const T*, n, float*)         T: bf16_t, fp16_t
//     from_fp32(const float*, n, T*)       rounds to nearest even
//     transpose(src, stride, n, panel)     16 stored fp32 rows of n elements to [n][16]
//     pair(even, odd, words)               16 lanes of fp32 to 16 words, when kPack is 2
//     decode_transposed(w, piece, dst)     columns are rows of W
//     decode_natural(w, piece, dst)        columns are columns of W
//
// the decoders for row-aligned blocks and an even number of panels, and instantiates
// kernel_set<Isa>(). Everything here has internal linkage (isa.h says why).
#pragma once

#include "gemm.h"

// Loops over register tiles must be gone before the compiler decides what lives in registers; GCC
// otherwise stores every accumulator to the stack at each step.
#define LOWBIT_UNROLL _Pragma("GCC unroll 32")

namespace lowbit::cpu {
namespace {

constexpr int64_t kMaxColumns = 256;   // of a tile of C: bounds the scratch of pack_b
constexpr int kMaxSteps = 2 * kChunk;  // reduction steps in a chunk of bf16 pairs

// ---- rows of elements ---------------------------------------------------------------------------

template <class Isa>
void load_row(const void* src, Dtype type, int64_t n, float* dst) {
    switch (type) {
    case Dtype::kFloat32:
        std::memcpy(dst, src, n * sizeof(float));
        return;
    case Dtype::kBFloat16:
        return Isa::to_fp32(static_cast<const bf16_t*>(src), n, dst);
    case Dtype::kFloat16:
        return Isa::to_fp32(static_cast<const fp16_t*>(src), n, dst);
    }
}

// The same, with each value rounded to `rounding`. n <= max(kMaxColumns, kMaxSteps).
template <class Isa>
void load_rounded(const void* src, Dtype type, Dtype rounding, int64_t n, float* dst) {
    load_row<Isa>(src, type, n, dst);
    if (rounding == type || rounding == Dtype::kFloat32)
        return;
    uint16_t rounded[kMaxSteps];
    if (rounding == Dtype::kBFloat16) {
        auto* const values = reinterpret_cast<bf16_t*>(rounded);
        Isa::from_fp32(dst, n, values);
        Isa::to_fp32(values, n, dst);
    } else {
        auto* const values = reinterpret_cast<fp16_t*>(rounded);
        Isa::from_fp32(dst, n, values);
        Isa::to_fp32(values, n, dst);
    }
}

template <class Isa>
void pack_row(const void* src, Dtype type, int64_t n, int words, uint32_t* dst) {
    const int64_t space = int64_t{words} * Isa::kPack;
    if constexpr (Isa::kPack == 1) {
        float* const out = reinterpret_cast<float*>(dst);
        load_row<Isa>(src, type, n, out);
        std::memset(out + n, 0, (space - n) * sizeof(float));
    } else {
        bf16_t* const out = reinterpret_cast<bf16_t*>(dst);
        if (type == Dtype::kBFloat16) {
            std::memcpy(out, src, n * sizeof(bf16_t));
        } else {
            float values[kMaxSteps];
            load_row<Isa>(src, type, n, values);
            Isa::from_fp32(values, n, out);
        }
        std::memset(out + n, 0, (space - n) * sizeof(bf16_t));
    }
}

template <class Isa>
void store_row(const float* c, const float* bias, int64_t n, Dtype type, void* out) {
    float sum[kMaxColumns];
    if (bias != nullptr) {
        for (int64_t i = 0; i < n; ++i)
            sum[i] = c[i] + bias[i];
        c = sum;
    }
    switch (type) {
    case Dtype::kFloat32:
        std::memcpy(out, c, n * sizeof(float));
        return;
    case Dtype::kBFloat16:
        return Isa::from_fp32(c, n, static_cast<bf16_t*>(out));
    case Dtype::kFloat16:
        return Isa::from_fp32(c, n, static_cast<fp16_t*>(out));
    }
}

// ---- panels of B --------------------------------------------------------------------------------

// One panel of bf16 pairs from fp32 [steps][16].
template <class Isa>
void pair_panel(const float* values, int64_t steps, uint32_t* panel) {
    static const float zeros[kPanel] = {};
    for (int64_t i = 0; i < steps; i += 2) {
        const float* const even = values + i * kPanel;
        Isa::pair(even, i + 1 < steps ? even + kPanel : zeros, panel + i / 2 * kPanel);
    }
}

// Runs fill(float* values [steps][16]) and brings the result into a panel; fp32 words are values.
template <class Isa, typename Fill>
void make_panel(int64_t steps, uint32_t* panel, const Fill& fill) {
    if constexpr (Isa::kPack == 1) {
        fill(reinterpret_cast<float*>(panel));
    } else {
        alignas(64) float values[kMaxSteps * kPanel];
        fill(values);
        pair_panel<Isa>(values, steps, panel);
    }
}

// B = matrix^T for a dense matrix: columns are stored rows.
template <class Isa>
void pack_dense_transposed(const Operand& b, Piece piece, uint32_t* dst) {
    const WeightView& w = b.matrix;
    const int64_t size = element_size(w.dense_dtype), steps = piece.steps();
    int64_t column = piece.column;
    alignas(64) float rows[kPanel * kMaxSteps];
    for (int p = 0; p < piece.panels; ++p, column += kPanel, dst += kPanelStride) {
        for (int64_t j = 0; j < kPanel; ++j) {
            float* const row = rows + j * kMaxSteps;
            if (column + j < w.N) {
                const int64_t offset = ((column + j) * w.K + piece.begin) * size;
                load_rounded<Isa>(
                    static_cast<const char*>(w.dense) + offset, w.dense_dtype, b.rounding, steps,
                    row);
            } else {
                std::memset(row, 0, steps * sizeof(float));
            }
        }
        make_panel<Isa>(
            steps, dst, [&](float* values) { Isa::transpose(rows, kMaxSteps, steps, values); });
    }
}

// B = matrix for a dense matrix: a stored row holds one reduction step of all columns. One such
// row, dropped, rounded and in fp32, is either where it lies in memory or in `copy`, with zeros up
// to `width`.
template <class Isa>
const float* dense_step(
    const Operand& b, int64_t step, int64_t column, int64_t real, int64_t width, float* copy) {
    const WeightView& w = b.matrix;
    const int64_t offset = step * w.K + column;
    const void* src = static_cast<const char*>(w.dense) + offset * element_size(w.dense_dtype);
    if (b.dropout == nullptr && w.dense_dtype == Dtype::kFloat32 && b.rounding == Dtype::kFloat32 &&
        real == width) {
        return static_cast<const float*>(src);
    }
    alignas(64) char dropped[kMaxColumns * sizeof(float)];
    if (b.dropout != nullptr && real > 0) {
        dropout_range(src, w.dense_dtype, offset, real, *b.dropout, dropped);
        src = dropped;
    }
    load_rounded<Isa>(src, w.dense_dtype, b.rounding, real, copy);
    std::memset(copy + real, 0, (width - real) * sizeof(float));
    return copy;
}

template <class Isa>
void pack_dense_natural(const Operand& b, Piece piece, uint32_t* dst) {
    const int64_t column = piece.column, steps = piece.steps();
    const int64_t width = int64_t{piece.panels} * kPanel;
    const int64_t real = min64(width, b.matrix.K - column);
    alignas(64) float copies[2][kMaxColumns];
    for (int64_t i = 0; i < steps; i += Isa::kPack) {
        const float* const row =
            dense_step<Isa>(b, piece.begin + i, column, real, width, copies[0]);
        uint32_t* out = dst + i / Isa::kPack * kPanel;
        if constexpr (Isa::kPack == 1) {
            for (int64_t j = 0; j < width; j += kPanel, out += kPanelStride) {
                std::memcpy(out, row + j, kPanel * sizeof(float));
            }
        } else {
            const bool last = i + 1 == steps;
            const float* const next = dense_step<Isa>(
                b, piece.begin + i + !last, column, last ? 0 : real, width, copies[1]);
            for (int64_t j = 0; j < width; j += kPanel, out += kPanelStride) {
                Isa::pair(row + j, next + j, out);
            }
        }
    }
}

// Any 4-bit layout, element by element: blocks that cross rows (K no multiple of the blocksize in
// the flat layout).
template <class Isa>
void pack_4bit_any(const Operand& b, Piece piece, uint32_t* dst) {
    const WeightView& w = b.matrix;
    const int64_t columns = b.columns(), steps = piece.steps();
    int64_t column = piece.column;
    for (int p = 0; p < piece.panels; ++p, column += kPanel, dst += kPanelStride) {
        make_panel<Isa>(steps, dst, [&](float* values) {
            for (int64_t i = 0; i < steps; ++i) {
                for (int64_t j = 0; j < kPanel; ++j) {
                    const int64_t n = b.transposed ? column + j : piece.begin + i;
                    const int64_t k = b.transposed ? piece.begin + i : column + j;
                    values[i * kPanel + j] = column + j < columns ? element(w, n, k) : 0.0f;
                }
            }
        });
    }
}

// absmax of one block column for 32 rows from `row`: out[j] is the scale of row + j, 0 past the
// last row.
inline void load_absmax_32(const WeightView& w, int64_t row, int64_t block_in_row, float* out) {
    const int64_t real = min64(32, w.N - row);
    int64_t block = row * w.blocks_per_row + block_in_row;
    for (int64_t j = 0; j < real; ++j, block += w.blocks_per_row)
        out[j] = block_absmax(w, block);
    for (int64_t j = real; j < 32; ++j)
        out[j] = 0.0f;
}

template <class Isa>
void pack_b(const Operand& b, const Piece& piece, int words, uint32_t* dst) {
    const Piece even{piece.column, (piece.panels + 1) & ~1, piece.begin, piece.end};
    if (b.matrix.is_dense()) {
        if (b.transposed) {
            pack_dense_transposed<Isa>(b, piece, dst);
        } else {
            pack_dense_natural<Isa>(b, piece, dst);
        }
    } else if (!b.matrix.row_blocks) {
        pack_4bit_any<Isa>(b, piece, dst);
    } else if (b.transposed) {
        Isa::decode_transposed(b.matrix, even, dst);
    } else {
        Isa::decode_natural(b.matrix, even, dst);
    }
    const int64_t filled = ceil_div(piece.steps(), Isa::kPack);
    for (int p = 0; p < piece.panels; ++p) {
        std::memset(
            dst + int64_t{p} * kPanelStride + filled * kPanel, 0,
            (words - filled) * kPanel * sizeof(uint32_t));
    }
}

template <class Isa>
void multiply(const ChunkProduct& product) {
    for (int64_t row = 0; row < product.rows; row += Isa::kBlockRows) {
        ChunkProduct block = product;
        block.a += row * kChunk;
        block.c += row * product.ldc;
        block.rows = min64(Isa::kBlockRows, product.rows - row);
        Isa::multiply_block(block);
    }
}

// multiply_rows_4bit<R> for the number of rows there is, at most Isa::kDirectRows.
template <class Isa, int R = 1>
void multiply_4bit(
    const uint32_t* a,
    int64_t rows,
    const WeightView& w,
    const Piece& piece,
    float* c,
    int64_t ldc,
    bool first) {
    if constexpr (R < Isa::kDirectRows) {
        if (rows > R)
            return multiply_4bit<Isa, R + 1>(a, rows, w, piece, c, ldc, first);
    }
    Isa::template multiply_rows_4bit<R>(a, w, piece, c, ldc, first);
}

template <class Isa>
constexpr GemmKernels kernel_set() {
    GemmKernels k{};
    k.pack = Isa::kPack;
    k.word_multiple = Isa::kWordMultiple;
    k.row_multiple = Isa::kRowMultiple;
    k.pack_row = pack_row<Isa>;
    k.pack_b = pack_b<Isa>;
    k.multiply = multiply<Isa>;
    k.direct_rows = Isa::kDirectRows;
    if constexpr (Isa::kDirectRows > 0)
        k.multiply_4bit = multiply_4bit<Isa>;
    k.load_row = load_row<Isa>;
    k.store_row = store_row<Isa>;
    return k;
}

// ---- register tiles, for the instruction sets whose accumulators are vectors --------------------

// Tile::run<R, P>(a, b, words, c, ldc, first) handles R rows and P panels. Chooses the largest that
// fits, R <= MaxR. Inlined, or the struct would be copied on the way (3 % of a layer with one row).
template <class Tile, int P, int MaxR>
LOWBIT_INLINE void run_rows(ChunkProduct x) {
    if constexpr (MaxR > 0) {
        while (x.rows >= MaxR) {
            Tile::template run<MaxR, P>(x.a, x.b, x.words, x.c, x.ldc, x.first);
            x.a += MaxR * kChunk;
            x.c += MaxR * x.ldc;
            x.rows -= MaxR;
        }
        if (x.rows > 0)
            run_rows<Tile, P, MaxR - 1>(x);
    }
}

// All panels, P at a time, and the rest one by one.
template <class Tile, int P, int MaxR>
LOWBIT_INLINE void run_panels(ChunkProduct x) {
    for (; x.panels >= P; x.panels -= P, x.b += int64_t{P} * kPanelStride, x.c += P * kPanel)
        run_rows<Tile, P, MaxR>(x);
    for (; x.panels > 0; --x.panels, x.b += kPanelStride, x.c += kPanel)
        run_rows<Tile, 1, MaxR>(x);
}

}  // namespace
}  // namespace lowbit::cpu
