// The product of gemm.h in fp32 with AVX2 and FMA; 16-bit activations are converted while A is
// packed.
//
// A register tile is 6 rows x 16 columns: 12 accumulators, 2 registers of B, 1 broadcast element of
// A. It reads 8 vectors for 12 FMAs, so the two FMA units are what limits it. Fewer rows take more
// panels, to keep enough independent sums in flight.

#include "decode_avx2.h"
#include "gemm_kernel.h"
#include "vec_avx2.h"

namespace lowbit::cpu {
namespace {

inline void add_to_c(float* c, __m256 sum, bool first) {
    _mm256_store_ps(c, first ? sum : _mm256_add_ps(_mm256_load_ps(c), sum));
}

struct FmaTile {
    template <int R, int P>
    static void
    run(const uint32_t* a_words,
        const uint32_t* b_words,
        int words,
        float* c,
        int64_t ldc,
        bool first) {
        const float* const a = reinterpret_cast<const float*>(a_words);
        const float* const b = reinterpret_cast<const float*>(b_words);
        __m256 sum[R][2 * P];
        LOWBIT_UNROLL
        for (int r = 0; r < R; ++r) {
            LOWBIT_UNROLL
            for (int p = 0; p < 2 * P; ++p)
                sum[r][p] = _mm256_setzero_ps();
        }
        for (int k = 0; k < words; ++k) {
            if (k % 16 == 0) {  // a cache line of each of the rows that come next
                LOWBIT_UNROLL
                for (int r = 0; r < R; ++r) {
                    _mm_prefetch(
                        reinterpret_cast<const char*>(a + (R + r) * kChunk + k), _MM_HINT_T0);
                }
            }
            __m256 column[2 * P];
            LOWBIT_UNROLL
            for (int p = 0; p < 2 * P; ++p) {
                column[p] = _mm256_load_ps(b + (p / 2) * kPanelStride + k * kPanel + (p % 2) * 8);
            }
            LOWBIT_UNROLL
            for (int r = 0; r < R; ++r) {
                const __m256 x = _mm256_broadcast_ss(a + r * kChunk + k);
                LOWBIT_UNROLL
                for (int p = 0; p < 2 * P; ++p)
                    sum[r][p] = _mm256_fmadd_ps(x, column[p], sum[r][p]);
            }
        }
        LOWBIT_UNROLL
        for (int r = 0; r < R; ++r) {
            LOWBIT_UNROLL
            for (int p = 0; p < 2 * P; ++p)
                add_to_c(c + r * ldc + p * 8, sum[r][p], first);
        }
    }
};

// 8 stored rows x 8 elements, transposed, as half a panel.
inline void transpose_8x8(const float* src, int64_t stride, float* panel) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; ++i)
        a[i] = _mm256_loadu_ps(src + i * stride);
    for (int i = 0; i < 4; ++i) {
        b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
    }
    for (int h = 0; h < 8; h += 4) {
        a[h] = _mm256_shuffle_ps(b[h], b[h + 2], 0x44);
        a[h + 1] = _mm256_shuffle_ps(b[h], b[h + 2], 0xEE);
        a[h + 2] = _mm256_shuffle_ps(b[h + 1], b[h + 3], 0x44);
        a[h + 3] = _mm256_shuffle_ps(b[h + 1], b[h + 3], 0xEE);
    }
    for (int i = 0; i < 4; ++i) {
        _mm256_store_ps(panel + i * kPanel, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        _mm256_store_ps(panel + (i + 4) * kPanel, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
}

struct Avx2 {
    static constexpr int kPack = 1, kRowMultiple = 1, kDirectRows = 2;
    static constexpr int kWordMultiple = 2;     // decode_rows runs to an even number of steps
    static constexpr int64_t kBlockRows = 144;  // 144 KiB of A: fits the 256 KiB L2 of old cores

    static void multiply_block(const ChunkProduct& product) {
        if (product.rows == 1) {
            run_panels<FmaTile, 4, 1>(product);
        } else if (product.rows <= 3) {
            run_panels<FmaTile, 2, 3>(product);
        } else {
            run_panels<FmaTile, 1, 6>(product);
        }
    }

    template <typename T>
    static void to_fp32(const T* src, int64_t n, float* dst) {
        int64_t i = 0;
        for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(dst + i, load8(src + i));
        for (; i < n; ++i)
            dst[i] = to_float(src[i]);
    }

    template <typename T>
    static void from_fp32(const float* src, int64_t n, T* dst) {
        int64_t i = 0;
        for (; i + 16 <= n; i += 16)
            store16(dst + i, load8(src + i), load8(src + i + 8));
        for (; i < n; ++i)
            store_float(dst + i, src[i]);
    }

    static void transpose(const float* src, int64_t stride, int64_t n, float* panel) {
        int64_t k = 0;
        for (; k + 8 <= n; k += 8) {
            transpose_8x8(src + k, stride, panel + k * kPanel);
            transpose_8x8(src + 8 * stride + k, stride, panel + k * kPanel + 8);
        }
        for (; k < n; ++k) {
            for (int j = 0; j < kPanel; ++j)
                panel[k * kPanel + j] = src[j * stride + k];
        }
    }

    static void decode_transposed(const WeightView& w, Piece piece, uint32_t* dst) {
        const BytePlanes planes = load_planes(w.codebook);
        for (int p = 0; p < piece.panels; p += 2) {
            float* const out = reinterpret_cast<float*>(dst + int64_t{p} * kPanelStride);
            const int64_t row = piece.column + p * kPanel;
            decode_rows(w, planes, row, piece, [&](int64_t step, const __m256* v) {
                _mm256_store_ps(out + step * kPanel, v[0]);
                _mm256_store_ps(out + step * kPanel + 8, v[1]);
                _mm256_store_ps(out + kPanelStride + step * kPanel, v[2]);
                _mm256_store_ps(out + kPanelStride + step * kPanel + 8, v[3]);
            });
        }
    }

    static void decode_natural(const WeightView& w, Piece piece, uint32_t* dst) {
        decode_natural_panels(w, piece, reinterpret_cast<float*>(dst));
    }

    // R rows of A against a 4-bit weight, 32 of its rows at a time, without a panel in between:
    // decoding is the cost here, and the sums (4 R registers) hide behind it.
    template <int R>
    static void multiply_rows_4bit(
        const uint32_t* a_words,
        const WeightView& w,
        Piece piece,
        float* c,
        int64_t ldc,
        bool first) {
        const BytePlanes planes = load_planes(w.codebook);
        const float* const a = reinterpret_cast<const float*>(a_words);
        for (int p = 0; p < piece.panels; p += 2, c += 32) {
            __m256 sum[R][4];
            LOWBIT_UNROLL
            for (int r = 0; r < R; ++r) {
                LOWBIT_UNROLL
                for (int g = 0; g < 4; ++g)
                    sum[r][g] = _mm256_setzero_ps();
            }
            const int64_t row = piece.column + p * kPanel;
            decode_rows(w, planes, row, piece, [&](int64_t step, const __m256* v) {
                LOWBIT_UNROLL
                for (int r = 0; r < R; ++r) {
                    const __m256 x = _mm256_broadcast_ss(a + r * kChunk + step);
                    LOWBIT_UNROLL
                    for (int g = 0; g < 4; ++g)
                        sum[r][g] = _mm256_fmadd_ps(x, v[g], sum[r][g]);
                }
            });
            LOWBIT_UNROLL
            for (int r = 0; r < R; ++r) {
                LOWBIT_UNROLL
                for (int g = 0; g < 4; ++g)
                    add_to_c(c + r * ldc + g * 8, sum[r][g], first);
            }
        }
    }
};

}  // namespace

constexpr GemmKernels kGemmAvx2 = kernel_set<Avx2>();

}  // namespace lowbit::cpu
