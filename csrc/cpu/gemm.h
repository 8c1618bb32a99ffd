// The one matrix product behind every CPU operator: C [M, N] = sum over parts of A [M, K] B [K, N],
// with B decoded on the way.
//
// Both operands are packed as 32-bit words, in pieces of at most kChunk words along the reduction
// ("chunks"):
//
//     A  [chunk][row][kChunk]
//     B  [panel][word][kPanel]    kPanel columns side by side, panels kPanelStride words apart
//
// A word is one fp32 element, or two bf16 elements of consecutive k, the even one in the low half.
// Both word types take the same path: only the instruction that multiplies differs (fp32 FMA; bf16
// dot product; AMX tile, whose B operand is exactly such a panel). Decoding a 4-bit weight writes
// panels, once for all rows of a row block, so its cost fades from about 16 rows on; nothing larger
// than a panel block of the weight exists at any time.
//
// Order of summation, which fixes the bits of a result: products of one chunk are added in order
// from zero, chunk sums are added in order (AMX carries the sum from chunk to chunk). Chunks depend
// on the size of the reduction alone, so with one set of kernels a row of C has the same bits
// whatever M is, whatever the other rows hold, and whatever the number of threads.
#pragma once

#include <cstdint>

#include "common.h"
#include "dropout.h"

namespace lowbit::cpu {

// Words: 1 KiB of a row of A, and a panel of one chunk (16 KiB) fits the L1 cache.
constexpr int kChunk = 256;
// Columns: one AVX-512 register, two AVX2 registers, one AMX tile.
constexpr int kPanel = 16;
constexpr int kPanelStride = kChunk * kPanel;

// B [reduction, columns] read from a stored matrix: 4-bit, or dense in any of the float types.
struct Operand {
    WeightView matrix;
    bool transposed;  // B = matrix^T: columns are stored rows (forward); else B = matrix (backward)
    Dtype rounding;   // of dense elements first: fp32 adapters next to 16-bit activations
    const DropoutArgs* dropout = nullptr;  // of a dense matrix that is not transposed; null: none

    LOWBIT_INLINE int64_t columns() const {
        return transposed ? matrix.N : matrix.K;
    }
    LOWBIT_INLINE int64_t reduction() const {
        return transposed ? matrix.K : matrix.N;
    }
};

// What is decoded of B at once, within one chunk: columns [column, column + 16 * panels) and
// reduction steps [begin, end). column and begin are multiples of 32.
struct Piece {
    int64_t column;
    int panels;
    int64_t begin, end;

    LOWBIT_INLINE int64_t steps() const {
        return end - begin;
    }
};

// C [rows, 16 * panels] = (first ? 0 : C) + A B over words of one chunk. C has row stride ldc
// floats and room for an even number of panels.
struct ChunkProduct {
    const uint32_t* a;
    int64_t rows;
    const uint32_t* b;
    int panels, words;
    float* c;
    int64_t ldc;
    bool first;
};

// One instruction set's way of doing it. Everything is serial; gemm.cpp spreads it over threads.
struct GemmKernels {
    int pack;           // elements per word: 1 (fp32) or 2 (bf16 pairs)
    int word_multiple;  // a chunk's length in words is a multiple of this, filled with zeros
    int row_multiple;   // A and C have room for a multiple of this many rows
    int direct_rows;    // up to this many rows `multiply_4bit` beats packing B; 0: there is none

    // dst[0 .. words) = n elements of type `type`, then zeros.
    void (*pack_row)(const void* src, Dtype type, int64_t n, int words, uint32_t* dst);
    // Panels of the piece, then zeros up to `words`. What columns outside the matrix hold does not
    // matter: they are never stored. dst has room for an even number of panels.
    void (*pack_b)(const Operand& b, const Piece& piece, int words, uint32_t* dst);
    void (*multiply)(const ChunkProduct& product);
    // The same for a piece of the transpose of a 4-bit weight, decoding in registers: same bits as
    // pack_b + multiply. May be null.
    void (*multiply_4bit)(
        const uint32_t* a,
        int64_t rows,
        const WeightView& w,
        const Piece& piece,
        float* c,
        int64_t ldc,
        bool first);
    // dst[i] = src[i] in fp32.
    void (*load_row)(const void* src, Dtype type, int64_t n, float* dst);
    // out[i] = c[i] + bias[i], rounded to `type`; bias may be null, else n is at most 256.
    void (*store_row)(const float* c, const float* bias, int64_t n, Dtype type, void* out);
};

extern const GemmKernels kGemmGeneric;
extern const GemmKernels kGemmAvx2;
extern const GemmKernels kGemmAvx512;
extern const GemmKernels kGemmAvx512Bf16;
extern const GemmKernels kGemmAmx;

// The kernels for activations of this type on the current instruction set; `exact` asks for fp32
// arithmetic whatever the type.
const GemmKernels& gemm_kernels(Dtype type, bool exact = false);

// Uninitialized memory on a cache line boundary, freed at the end of the scope. Comes from an arena
// that the calling thread keeps (kArenaBytes, touched as needed), or from the heap when that is
// full: fresh pages cost more than many of the products here. Buffers of one thread must be
// destroyed in reverse order of construction, as scopes and members are.
constexpr int64_t kArenaBytes = 32 << 20;
void* take_workspace(int64_t bytes);
void return_workspace(void* data);

template <typename T>
class Buffer {
public:
    explicit Buffer(int64_t count)
        : data_(static_cast<T*>(take_workspace(count * static_cast<int64_t>(sizeof(T))))) {}
    ~Buffer() {
        return_workspace(data_);
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    T* get() const {
        return data_;
    }

private:
    T* data_;
};

// How a reduction of `size` elements is cut into chunks.
struct Chunks {
    int64_t size;
    int64_t step;  // elements per chunk, a multiple of 32
    int64_t count;
    int pack, word_multiple;

    Chunks(int64_t size, const GemmKernels& kernels);
    int64_t begin(int64_t i) const {
        return i * step;
    }
    int64_t end(int64_t i) const {
        return i + 1 < count ? (i + 1) * step : size;
    }
    int words(int64_t i) const {  // packed length of chunk i
        const int64_t n = (end(i) - begin(i) + pack - 1) / pack;
        return static_cast<int>((n + word_multiple - 1) / word_multiple * word_multiple);
    }
};

// Packed A of one row block.
struct PackedRows {
    const uint32_t* data;
    int64_t rows;       // real rows
    int64_t row_space;  // rows between chunks

    const uint32_t* at(int64_t chunk, int64_t row) const {
        return data + (chunk * row_space + row) * kChunk;
    }
};

// One part of the sum: packed A against an operand, chunk by chunk.
struct Part {
    const Operand* b;
    Chunks chunks;
    PackedRows a;
};

// A tile of C, row stride ldc: rows [row, row + rows) of the row block, columns [column, column +
// columns).
struct ResultTile {
    float* c;
    int64_t ldc, row, rows, column, columns;
};

// Called with a finished tile.
struct TileFunction {
    void (*call)(const void* context, const ResultTile& tile);
    const void* context;
};

// C [rows, columns] = sum of the parts, on the thread pool.
struct Product {
    const GemmKernels* kernels;
    const Part* parts;
    int part_count;
    int64_t rows, columns;
    const TileFunction* after_first;  // applied to the sum of the first part, or null
    TileFunction store;
};
void run_product(const Product& product);

}  // namespace lowbit::cpu
