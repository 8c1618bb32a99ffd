// Choice of kernels, and the product of gemm.h spread over threads and cache blocks.

#include "gemm.h"

#include "isa.h"

namespace lowbit::cpu {
namespace {

// Columns of a tile of C, and of the piece of B that is decoded before it is multiplied. Many rows:
// the piece is used again and again from the L2 cache while blocks of A pass by. Few rows: it is
// used once, so it must still be in the L1 cache.
constexpr int64_t kTileColumns = 256;
constexpr int64_t kFewRows = 144;
constexpr int64_t kColumnUnit = 2 * kPanel;  // decoders work on pairs of panels
constexpr int64_t kRowUnit = 48;       // multiple of every register tile's height that matters
constexpr int64_t kMinWork = 1 << 17;  // multiply-adds worth a thread (about 2 us)
// fp32 reductions up to kShortReduction elements are summed in chunks of kShortChunk, up to twice
// as many in chunks twice as long.
constexpr int64_t kShortReduction = 256, kShortChunk = 32;
// Decoding a panel column costs about as much as multiplying it with this many rows.
constexpr int64_t kDecodeRows = 8;

// How C is cut: row_parts x column_parts tasks, one per thread.
struct Grid {
    int64_t row_parts, column_parts;
    int64_t tasks() const {
        return row_parts * column_parts;
    }
};

Grid choose_grid(const Product& p) {
    int64_t work = 0;
    for (int i = 0; i < p.part_count; ++i)
        work += p.parts[i].chunks.size;
    work *= p.rows * p.columns;
    const int64_t threads = min64(num_threads(), 1 + work / kMinWork);
    const int64_t row_units = ceil_div(p.rows, kRowUnit);
    const int64_t column_units = ceil_div(p.columns, kColumnUnit);
    Grid best{1, 1};
    int64_t best_cost = INT64_MAX;
    for (int64_t c = min64(threads, column_units); c >= 1; --c) {
        const int64_t r = min64(threads / c, row_units);
        const int64_t task_rows = min64(p.rows, ceil_div(row_units, r) * kRowUnit);
        const int64_t cost = ceil_div(column_units, c) * (task_rows + kDecodeRows);
        if (cost < best_cost) {
            best_cost = cost;
            best = {r, c};
        }
    }
    return best;
}

int64_t piece_columns(int64_t rows) {
    return rows <= kFewRows ? kColumnUnit : kTileColumns;
}

// W^T is read along its rows, so a few rows at a time; W across them, so at least a cache line (128
// columns) of each.
int64_t tile_columns(const Product& p, int64_t rows) {
    return rows <= kFewRows && p.parts[p.part_count - 1].b->transposed ? kColumnUnit : kTileColumns;
}

// One tile of C, at most kTileColumns wide, all chunks of all parts.
void run_tile(const Product& p, const ResultTile& tile, uint32_t* panels_b) {
    const GemmKernels& kernels = *p.kernels;
    const auto [c, ldc, row, rows, column, columns] = tile;
    const int64_t width = piece_columns(rows);
    bool first = true;
    for (int i = 0; i < p.part_count; ++i) {
        const Part& part = p.parts[i];
        const WeightView& w = part.b->matrix;
        const bool direct =
            rows <= kernels.direct_rows && part.b->transposed && !w.is_dense() && w.row_blocks;
        for (int64_t chunk = 0; chunk < part.chunks.count; ++chunk) {
            const int words = part.chunks.words(chunk);
            const uint32_t* const a = part.a.at(chunk, row);
            for (int64_t j = 0; j < columns; j += width) {
                const int panels = static_cast<int>(ceil_div(min64(width, columns - j), kPanel));
                const Piece piece{
                    column + j, panels, part.chunks.begin(chunk), part.chunks.end(chunk)};
                if (direct) {
                    kernels.multiply_4bit(a, rows, w, piece, c + j, ldc, first);
                    continue;
                }
                kernels.pack_b(*part.b, piece, words, panels_b);
                kernels.multiply({a, rows, panels_b, panels, words, c + j, ldc, first});
            }
            first = false;
        }
        if (i == 0 && p.after_first != nullptr)
            p.after_first->call(p.after_first->context, tile);
    }
    if (first)
        std::memset(c, 0, rows * ldc * sizeof(float));  // an empty reduction
    p.store.call(p.store.context, tile);
}

}  // namespace

const GemmKernels& gemm_kernels(Dtype type, bool exact) {
#if LOWBIT_CPU_X86
    const Isa isa = current_isa();
    if (type == Dtype::kBFloat16 && !exact) {
        if (isa >= Isa::kAmx)
            return kGemmAmx;
        if (isa >= Isa::kAvx512Bf16)
            return kGemmAvx512Bf16;
    }
    if (isa >= Isa::kAvx512)
        return kGemmAvx512;
    if (isa >= Isa::kAvx2)
        return kGemmAvx2;
#else
    (void)type, (void)exact;
#endif
    return kGemmGeneric;
}

Chunks::Chunks(int64_t size, const GemmKernels& kernels)
    : size(size), pack(kernels.pack), word_multiple(kernels.word_multiple) {
    // A short fp32 reduction is cheap: short sums keep its error as small as that of a dot product
    // in vector lanes. A long one takes even pieces. All start on a multiple of 32, that is with a
    // whole byte, and never inside a run of 32 elements of one block.
    const bool is_short = pack == 1 && size <= 2 * kShortReduction;
    const int64_t short_chunk = size <= kShortReduction ? kShortChunk : 2 * kShortChunk;
    const int64_t limit = is_short ? short_chunk : int64_t{kChunk} * pack;
    count = ceil_div(size, limit);
    step = is_short || count == 0 ? limit : ceil_div(ceil_div(size, count), 64) * 64;
    count = ceil_div(size, step);
}

void run_product(const Product& p) {
    if (p.rows == 0 || p.columns == 0)
        return;
    const Grid grid = choose_grid(p);
    const int64_t row_units = ceil_div(p.rows, kRowUnit);
    const int64_t column_units = ceil_div(p.columns, kColumnUnit);
    const int64_t task_rows = min64(
        ceil_div(row_units, grid.row_parts) * kRowUnit,
        ceil_div(p.rows, p.kernels->row_multiple) * p.kernels->row_multiple);
    const int64_t ldc = tile_columns(p, task_rows);
    const int64_t b_size = piece_columns(task_rows) * kChunk, c_size = ldc * task_rows;
    Buffer<uint32_t> panels_b(grid.tasks() * b_size);
    Buffer<float> c(grid.tasks() * c_size);
    parallel_for(0, grid.tasks(), 1, [&](int64_t first, int64_t last) {
        for (int64_t task = first; task < last; ++task) {
            const int64_t part_r = task / grid.column_parts, part_c = task % grid.column_parts;
            const int64_t row = row_units * part_r / grid.row_parts * kRowUnit;
            const int64_t row_end =
                min64(p.rows, row_units * (part_r + 1) / grid.row_parts * kRowUnit);
            const int64_t begin = column_units * part_c / grid.column_parts * kColumnUnit;
            const int64_t end =
                min64(p.columns, column_units * (part_c + 1) / grid.column_parts * kColumnUnit);
            for (int64_t column = begin; column < end; column += ldc) {
                const int64_t width = min64(ldc, end - column);
                run_tile(
                    p, {c.get() + task * c_size, ldc, row, row_end - row, column, width},
                    panels_b.get() + task * b_size);
            }
        }
    });
}

}  // namespace lowbit::cpu
