// y = x W^T + bias and dx = dy W, with the low-rank branch of LoRA in the same accumulators.
//
//     out [M, columns] = A [M, K] B + dropped((t * scale) L),   t [M, r] = A T
//
// Works through A in blocks of rows. For each: pack A, multiply it with the thin T, pack t * scale
// as r more reduction steps, then one product (gemm.h) over low-rank and main steps alike. The
// low-rank steps come first, so that dropout can mask their sum in the tile before the main product
// is added to it.
//
// Up to kExactRows rows of bf16 take the fp32 kernels: reading the weight then costs more than the
// multiply-adds that bf16 units save, and fp32 words need no pairing. Such rows are the more exact
// ones, their weight being the unrounded product.
//
// Bound by multiply-adds from about 16 rows on (AVX2), below by decoding the weight. Workspace:
// packed A, at most kBlockBytes for any M, and t; nothing of the weight's size.

#include "linear.h"

namespace lowbit::cpu {
namespace {

// Packed A of one row block stays in a server's L3 cache: this many bytes, at most kBlockRows (a
// multiple of 48, where decoding is below 1 %), at least kMinBlockRows however long the rows are.
constexpr int64_t kBlockBytes = int64_t{16} << 20;
constexpr int64_t kBlockRows = 1056;
constexpr int64_t kMinBlockRows = 192;
// 4096 x 4096 on 2 cores of an Emerald Rapids Xeon, 2026-11-24: 1 row 1.5 ms in fp32 and 2.6 with
// AMX, 4 rows 1.9 and 2.4, 8 rows 3.8 and 2.5.
constexpr int64_t kExactRows = 4;
constexpr int64_t kMinPackRows = 64;    // rows of one chunk (64 KiB) worth a thread
constexpr int64_t kThinRows = 48;       // rows of one step of the thin product
constexpr int64_t kThinByChunks = 192;  // below this many rows its threads share out chunks
constexpr int kThinWords = 16;          // its sums are short, for t feeds everything after it

int64_t round_up(int64_t value, int64_t multiple) {
    return ceil_div(value, multiple) * multiple;
}

// One call's constants and workspace.
class Fused {
public:
    explicit Fused(const FusedProduct& args);
    void run();

private:
    void pack_chunk(int64_t row, int64_t count, int64_t chunk, bool dropped);
    void pack_block(int64_t row, int64_t rows, bool dropped);
    void pack_thin(int64_t chunk);
    void thin_by_chunks(int64_t row, int64_t rows, bool dropped);
    void thin_by_rows(int64_t rows);
    void add_thin(int64_t chunk, int64_t row, int64_t rows, float* sum);
    void finish_row(int64_t i);
    void finish_thin(int64_t rows);
    void low_rank_factor(int64_t row, int64_t rows);
    void main_product(int64_t rows);
    void drop_tile(const ResultTile& tile) const;
    void store_tile(const ResultTile& tile) const;

    const FusedProduct& args_;
    const LowRank* const low_;
    const GemmKernels& kernels_;
    const int64_t K_, columns_, r_;
    const Chunks chunks_, low_chunks_;
    const int64_t block_rows_, row_space_;
    const int64_t thin_width_;             // r rounded up to pairs of panels
    Buffer<uint32_t> a_, low_a_, thin_b_;  // packed A, packed t * scale, packed T
    Buffer<float> t_;                      // [block rows, thin_width]
    int64_t block_start_ = 0;              // first row of the current block
};

int64_t choose_block_rows(int64_t M, int64_t chunk_count) {
    const int64_t row_bytes = max64(1, chunk_count) * kChunk * 4;
    const int64_t limit = min64(kBlockRows, max64(kMinBlockRows, kBlockBytes / row_bytes));
    const int64_t blocks = max64(1, ceil_div(M, limit));
    return min64(M, round_up(ceil_div(M, blocks), 48));
}

Fused::Fused(const FusedProduct& args)
    : args_(args), low_(args.low_rank), kernels_(gemm_kernels(args.type, args.M <= kExactRows)),
      K_(args.main.reduction()), columns_(args.main.columns()), r_(low_ != nullptr ? low_->r : 0),
      chunks_(K_, kernels_), low_chunks_(r_, kernels_),
      block_rows_(choose_block_rows(args.M, chunks_.count)),
      row_space_(round_up(block_rows_, kernels_.row_multiple)),
      thin_width_(round_up(r_, 2 * kPanel)), a_(chunks_.count * row_space_ * kChunk),
      low_a_(low_chunks_.count * row_space_ * kChunk),
      thin_b_(chunks_.count * thin_width_ * kChunk), t_(row_space_ * thin_width_) {}

// ---- packing ------------------------------------------------------------------------------------

// Rows [row, row + count) of the block, one chunk. Rows between the real ones and the row multiple
// become zeros.
void Fused::pack_chunk(int64_t row, int64_t count, int64_t chunk, bool dropped) {
    const int64_t begin = chunks_.begin(chunk), n = chunks_.end(chunk) - begin;
    const int words = chunks_.words(chunk);
    const int64_t size = element_size(args_.type);
    uint32_t* dst = a_.get() + (chunk * row_space_ + row) * kChunk;
    alignas(64) char copy[2 * kChunk * sizeof(float)];
    for (int64_t i = 0; i < count; ++i, dst += kChunk) {
        const int64_t m = block_start_ + row + i;
        if (m >= args_.M) {
            std::memset(dst, 0, words * sizeof(uint32_t));
            continue;
        }
        const int64_t first = m * K_ + begin;
        const void* src = static_cast<const char*>(args_.a) + first * size;
        if (dropped) {
            dropout_range(src, args_.type, first, n, *low_->dropout, copy);
            src = copy;
        }
        kernels_.pack_row(src, args_.type, n, words, dst);
    }
}

void Fused::pack_block(int64_t row, int64_t rows, bool dropped) {
    const int64_t padded = round_up(rows, kernels_.row_multiple);
    const int64_t row_parts = ceil_div(padded, 16);
    const int64_t grain = ceil_div(kMinPackRows, min64(padded, 16));
    parallel_for(0, chunks_.count * row_parts, grain, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t begin = i % row_parts * 16;
            pack_chunk(row + begin, min64(16, padded - begin), i / row_parts, dropped);
        }
    });
}

void Fused::pack_thin(int64_t chunk) {
    const int words = chunks_.words(chunk);
    for (int64_t column = 0; column < r_; column += 256) {
        const int panels = static_cast<int>(ceil_div(min64(256, r_ - column), kPanel));
        kernels_.pack_b(
            low_->thin, {column, panels, chunks_.begin(chunk), chunks_.end(chunk)}, words,
            thin_b_.get() + (chunk * thin_width_ + column) * kChunk);
    }
}

// ---- t = A T ------------------------------------------------------------------------------------
// Chunk sums are added in order in both forms, so a row of t has the same bits whatever M is.

// sum [rows, thin_width] = one chunk of t.
void Fused::add_thin(int64_t chunk, int64_t row, int64_t rows, float* sum) {
    const int panels = static_cast<int>(ceil_div(r_, kPanel));
    const int words = chunks_.words(chunk);
    const uint32_t* const a = a_.get() + (chunk * row_space_ + row) * kChunk;
    const uint32_t* const b = thin_b_.get() + chunk * thin_width_ * kChunk;
    for (int k = 0; k < words; k += kThinWords) {
        const int count = static_cast<int>(min64(kThinWords, words - k));
        kernels_.multiply({a + k, rows, b + k * kPanel, panels, count, sum, thin_width_, k == 0});
    }
}

// Few rows: threads take chunks, which they also pack.
void Fused::thin_by_chunks(int64_t row, int64_t rows, bool dropped) {
    const int64_t padded = round_up(rows, kernels_.row_multiple);
    const int64_t size = padded * thin_width_;
    Buffer<float> partial(chunks_.count * size);
    parallel_for(0, chunks_.count, 2, [&](int64_t first, int64_t last) {
        for (int64_t chunk = first; chunk < last; ++chunk) {
            pack_chunk(0, padded, chunk, dropped);
            if (row == 0)
                pack_thin(chunk);
            add_thin(chunk, 0, rows, partial.get() + chunk * size);
        }
    });
    std::memset(t_.get(), 0, size * sizeof(float));
    for (int64_t chunk = 0; chunk < chunks_.count; ++chunk) {
        const float* const sum = partial.get() + chunk * size;
        for (int64_t i = 0; i < rows * thin_width_; ++i)
            t_.get()[i] += sum[i];
    }
}

void Fused::thin_by_rows(int64_t rows) {
    const int64_t parts = ceil_div(rows, kThinRows), size = kThinRows * thin_width_;
    Buffer<float> sums(parts * size);
    parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
        for (int64_t part = first; part < last; ++part) {
            const int64_t row = part * kThinRows, count = min64(kThinRows, rows - row);
            float* const sum = sums.get() + first * size;  // one for each thread is enough
            float* const t = t_.get() + row * thin_width_;
            std::memset(t, 0, count * thin_width_ * sizeof(float));
            for (int64_t chunk = 0; chunk < chunks_.count; ++chunk) {
                add_thin(chunk, row, count, sum);
                for (int64_t i = 0; i < count * thin_width_; ++i)
                    t[i] += sum[i];
            }
        }
    });
}

// Row i of the block: hands t out, then packs t * scale as reduction steps of the main product.
void Fused::finish_row(int64_t i) {
    float* const t = t_.get() + i * thin_width_;
    const int64_t m = block_start_ + i;
    if (m >= args_.M) {
        std::memset(t, 0, r_ * sizeof(float));
    } else {
        if (low_->exact != nullptr)
            std::memcpy(low_->exact + m * r_, t, r_ * sizeof(float));
        if (low_->rounded != nullptr) {
            char* const out = static_cast<char*>(low_->rounded) + m * r_ * element_size(args_.type);
            kernels_.store_row(t, nullptr, r_, args_.type, out);
            kernels_.load_row(out, args_.type, r_, t);
        }
        for (int64_t j = 0; j < r_; ++j)
            t[j] *= low_->scale[j];
    }
    for (int64_t chunk = 0; chunk < low_chunks_.count; ++chunk) {
        const int64_t begin = low_chunks_.begin(chunk), n = low_chunks_.end(chunk) - begin;
        kernels_.pack_row(
            t + begin, Dtype::kFloat32, n, low_chunks_.words(chunk),
            low_a_.get() + (chunk * row_space_ + i) * kChunk);
    }
}

void Fused::finish_thin(int64_t rows) {
    parallel_for(0, round_up(rows, kernels_.row_multiple), 64, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i)
            finish_row(i);
    });
}

// Leaves A packed without dropout.
void Fused::low_rank_factor(int64_t row, int64_t rows) {
    const bool dropped = low_->dropout != nullptr && low_->dropout_on_input;
    if (rows < min64(kThinByChunks, kThinRows * num_threads())) {
        thin_by_chunks(row, rows, dropped);
    } else {
        if (row == 0) {
            parallel_for(0, chunks_.count, 1, [&](int64_t first, int64_t last) {
                for (int64_t chunk = first; chunk < last; ++chunk)
                    pack_thin(chunk);
            });
        }
        pack_block(0, rows, dropped);
        thin_by_rows(rows);
    }
    finish_thin(rows);
    if (dropped)
        pack_block(0, rows, false);
}

// ---- the product --------------------------------------------------------------------------------

void Fused::drop_tile(const ResultTile& tile) const {
    for (int64_t i = 0; i < tile.rows; ++i) {
        float* const values = tile.c + i * tile.ldc;
        const int64_t first = (block_start_ + tile.row + i) * columns_ + tile.column;
        dropout_range(values, Dtype::kFloat32, first, tile.columns, *low_->dropout, values);
    }
}

void Fused::store_tile(const ResultTile& tile) const {
    float bias[256];
    if (args_.bias != nullptr) {
        const auto* const src = static_cast<const char*>(args_.bias);
        kernels_.load_row(
            src + tile.column * element_size(args_.bias_type), args_.bias_type, tile.columns, bias);
    }
    const int64_t size = element_size(args_.type);
    for (int64_t i = 0; i < tile.rows; ++i) {
        const int64_t offset = (block_start_ + tile.row + i) * columns_ + tile.column;
        kernels_.store_row(
            tile.c + i * tile.ldc, args_.bias != nullptr ? bias : nullptr, tile.columns, args_.type,
            static_cast<char*>(args_.out) + offset * size);
    }
}

void Fused::main_product(int64_t rows) {
    const Part parts[2] = {
        {low_ != nullptr ? &low_->low : nullptr, low_chunks_, {low_a_.get(), rows, row_space_}},
        {&args_.main, chunks_, {a_.get(), rows, row_space_}}};
    const auto drop = [](const void* self, const ResultTile& tile) {
        static_cast<const Fused*>(self)->drop_tile(tile);
    };
    const auto store = [](const void* self, const ResultTile& tile) {
        static_cast<const Fused*>(self)->store_tile(tile);
    };
    const TileFunction drop_function{drop, this};
    const bool dropped = low_ != nullptr && low_->dropout != nullptr && !low_->dropout_on_input;
    Product product{};
    product.kernels = &kernels_;
    product.parts = low_ != nullptr ? parts : parts + 1;
    product.part_count = low_ != nullptr ? 2 : 1;
    product.rows = rows;
    product.columns = columns_;
    product.after_first = dropped ? &drop_function : nullptr;
    product.store = {store, this};
    run_product(product);
}

void Fused::run() {
    for (int64_t row = 0; row < args_.M; row += block_rows_) {
        const int64_t rows = min64(block_rows_, args_.M - row);
        block_start_ = row;
        if (low_ != nullptr) {
            low_rank_factor(row, rows);
        } else {
            pack_block(0, rows, false);
        }
        if (args_.out != nullptr)
            main_product(rows);
    }
}

// Same values as the view, as row-aligned blocks where the two layouts coincide: what the fast
// decoders read.
WeightView row_aligned(const WeightView& w) {
    WeightView v = w;
    if (!w.is_dense() && !w.row_blocks && w.K % w.blocksize == 0) {
        v.row_blocks = true;
        v.row_bytes = w.K / 2;
        v.blocks_per_row = w.K / w.blocksize;
    }
    return v;
}

}  // namespace

void run_fused_product(const FusedProduct& args) {
    if (args.M == 0)
        return;
    Fused(args).run();
}

FusedProduct weight_product(
    const void* a, Dtype type, int64_t M, const WeightView& w, bool transposed, void* out) {
    FusedProduct product{};
    product.a = a;
    product.type = type;
    product.M = M;
    product.main = {row_aligned(w), transposed, type};
    product.out = out;
    return product;
}

Operand dense_operand(
    const void* data, Dtype type, Dtype rounding, int64_t rows, int64_t columns, bool transposed) {
    WeightView view{};
    view.dense = data;
    view.dense_dtype = type;
    view.N = rows;
    view.K = columns;
    return {view, transposed, rounding};
}

}  // namespace lowbit::cpu
