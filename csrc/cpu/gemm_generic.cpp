// The product of gemm.h in plain C++ for any processor: fp32 arithmetic in 4 x 16 register tiles
// that compilers vectorize.

#include "gemm_kernel.h"

namespace lowbit::cpu {
namespace {

struct PlainTile {
    template <int R, int P>
    static void
    run(const uint32_t* a_words,
        const uint32_t* b_words,
        int words,
        float* c,
        int64_t ldc,
        bool first) {
        static_assert(P == 1, "one panel at a time");
        const float* const a = reinterpret_cast<const float*>(a_words);
        const float* const b = reinterpret_cast<const float*>(b_words);
        float sum[R][kPanel] = {};
        for (int k = 0; k < words; ++k) {
            for (int r = 0; r < R; ++r) {
                const float x = a[r * kChunk + k];
                for (int j = 0; j < kPanel; ++j)
                    sum[r][j] += x * b[k * kPanel + j];
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int j = 0; j < kPanel; ++j) {
                c[r * ldc + j] = first ? sum[r][j] : c[r * ldc + j] + sum[r][j];
            }
        }
    }
};

struct Generic {
    static constexpr int kPack = 1, kWordMultiple = 1, kRowMultiple = 1, kDirectRows = 0;
    static constexpr int64_t kBlockRows = 128;
    static constexpr int kShortSum = 64;

    static void multiply_block(const ChunkProduct& product) {
        // Without FMA every product is rounded too; short sums make up for it.
        for (int k = 0; k < product.words; k += kShortSum) {
            ChunkProduct part = product;
            part.a += k;
            part.b += k * kPanel;
            part.words = static_cast<int>(min64(kShortSum, product.words - k));
            part.first = product.first && k == 0;
            run_panels<PlainTile, 1, 4>(part);
        }
    }

    template <typename T>
    static void to_fp32(const T* src, int64_t n, float* dst) {
        for (int64_t i = 0; i < n; ++i)
            dst[i] = to_float(src[i]);
    }
    template <typename T>
    static void from_fp32(const float* src, int64_t n, T* dst) {
        for (int64_t i = 0; i < n; ++i)
            store_float(dst + i, src[i]);
    }
    static void transpose(const float* src, int64_t stride, int64_t n, float* panel) {
        for (int64_t k = 0; k < n; ++k) {
            for (int j = 0; j < kPanel; ++j)
                panel[k * kPanel + j] = src[j * stride + k];
        }
    }

    static void decode_transposed(const WeightView& w, Piece piece, uint32_t* dst) {
        float* const values = reinterpret_cast<float*>(dst);
        for (int64_t j = 0; j < int64_t{piece.panels} * kPanel; ++j) {
            float* const out = values + j / kPanel * kPanelStride + j % kPanel;
            // Past the end: repeated, never stored.
            const int64_t n = min64(piece.column + j, w.N - 1);
            for (int64_t i = 0; i < piece.steps(); ++i)
                out[i * kPanel] = element(w, n, piece.begin + i);
        }
    }

    static void decode_natural(const WeightView& w, Piece piece, uint32_t* dst) {
        float* const values = reinterpret_cast<float*>(dst);
        const int64_t width = int64_t{piece.panels} * kPanel;
        for (int64_t i = 0; i < piece.steps(); ++i) {
            for (int64_t j = 0; j < width; ++j) {
                const int64_t k = min64(piece.column + j, w.K - 1);
                values[j / kPanel * kPanelStride + i * kPanel + j % kPanel] =
                    element(w, piece.begin + i, k);
            }
        }
    }
};

}  // namespace

constexpr GemmKernels kGemmGeneric = kernel_set<Generic>();

}  // namespace lowbit::cpu
