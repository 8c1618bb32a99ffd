// What the three AVX-512 kernel sets share: the two kinds of words (fp32; pairs of bf16) and the
// register tiles over them. gemm_amx.cpp takes the bf16 words and has tiles of its own.
#pragma once

#include "decode_avx512.h"
#include "vec_avx512.h"

namespace lowbit::cpu {
namespace {

struct Avx512Rows {
    template <typename T>
    static void to_fp32(const T* src, int64_t n, float* dst) {
        int64_t i = 0;
        for (; i + 16 <= n; i += 16)
            _mm512_storeu_ps(dst + i, load16(src + i));
        for (; i < n; ++i)
            dst[i] = to_float(src[i]);
    }

    template <typename T>
    static void from_fp32(const float* src, int64_t n, T* dst) {
        int64_t i = 0;
        for (; i + 16 <= n; i += 16)
            store16(dst + i, _mm512_loadu_ps(src + i));
        for (; i < n; ++i)
            store_float(dst + i, src[i]);
    }

    static void transpose(const float* src, int64_t stride, int64_t n, float* panel) {
        int64_t k = 0;
        for (; k + 16 <= n; k += 16) {
            __m512i rows[16], columns[16];
            LOWBIT_UNROLL
            for (int i = 0; i < 16; ++i)
                rows[i] = _mm512_loadu_si512(src + i * stride + k);
            transpose_words(rows, columns);
            LOWBIT_UNROLL
            for (int i = 0; i < 16; ++i)
                _mm512_store_si512(panel + (k + i) * kPanel, columns[i]);
        }
        for (; k < n; ++k) {
            for (int j = 0; j < kPanel; ++j)
                panel[k * kPanel + j] = src[j * stride + k];
        }
    }
};

// Words of one fp32 element.
struct Fp32Words : Avx512Rows {
    static constexpr int kPack = 1;

    static __m512 multiply_add(__m512 sum, const uint32_t* a, const uint32_t* b) {
        const __m512 x = _mm512_set1_ps(*reinterpret_cast<const float*>(a));
        return _mm512_fmadd_ps(x, _mm512_load_ps(b), sum);
    }

    // Two reduction steps of one row of A.
    static __m512 accumulate(__m512 sum, const uint32_t* a, int64_t step, __m512 even, __m512 odd) {
        const float* const x = reinterpret_cast<const float*>(a) + step;
        sum = _mm512_fmadd_ps(_mm512_set1_ps(x[0]), even, sum);
        return _mm512_fmadd_ps(_mm512_set1_ps(x[1]), odd, sum);
    }

    // Two reduction steps of a panel's columns to their words.
    static void store(uint32_t* words, __m512 even, __m512 odd) {
        _mm512_store_ps(words, even);
        _mm512_store_ps(words + kPanel, odd);
    }
};

#if defined(__AVX512BF16__)

// Words of two bf16 elements, consecutive reduction steps, the even one in the low half.
struct Bf16Words : Avx512Rows {
    static constexpr int kPack = 2;

    // cvtne2ps puts its second argument into the lower half; then lane j takes results j and 16 +
    // j.
    static __m512i pair_words(__m512 even, __m512 odd) {
        const __m512i order = _mm512_set_epi16(
            31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20,
            4, 19, 3, 18, 2, 17, 1, 16, 0);
        const __m512bh both = _mm512_cvtne2ps_pbh(odd, even);
        return _mm512_permutexvar_epi16(order, (__m512i)both);
    }

    static void pair(const float* even, const float* odd, uint32_t* words) {
        store(words, _mm512_loadu_ps(even), _mm512_loadu_ps(odd));
    }

    static __m512 multiply_add(__m512 sum, const uint32_t* a, const uint32_t* b) {
        const __m512i x = _mm512_set1_epi32(static_cast<int>(*a));
        return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)_mm512_load_si512(b));
    }

    static __m512 accumulate(__m512 sum, const uint32_t* a, int64_t step, __m512 even, __m512 odd) {
        const __m512i x = _mm512_set1_epi32(static_cast<int>(a[step / 2]));
        return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)pair_words(even, odd));
    }

    static void store(uint32_t* words, __m512 even, __m512 odd) {
        _mm512_store_si512(words, pair_words(even, odd));
    }
};

#endif

// One kind of words, and a 4-bit weight decoded into panels of them.
template <class Words>
struct Decoders : Words {
    static void decode_transposed(const WeightView& w, Piece piece, uint32_t* dst) {
        for (int p = 0; p < piece.panels; p += 2, dst += 2 * kPanelStride) {
            decode_rows(
                w, piece.column + p * kPanel, piece,
                [&](int64_t step, const __m512* even, const __m512* odd) {
                    LOWBIT_UNROLL
                    for (int h = 0; h < 2; ++h) {
                        uint32_t* const out = dst + h * kPanelStride;
                        Words::store(out + step / Words::kPack * kPanel, even[h], odd[h]);
                    }
                });
        }
    }

    static void decode_natural(const WeightView& w, Piece piece, uint32_t* dst) {
        constexpr int kPack = Words::kPack;
        const int64_t width = min64(int64_t{piece.panels} * kPanel, w.K - piece.column);
        for (int64_t i = 0; i < piece.steps(); i += kPack) {
            uint32_t* const out = dst + i / kPack * kPanel;
            decode_row_columns<kPack>(
                w, piece.begin + i, piece.column, width, i + 1 < piece.steps(),
                [&](int64_t panel, const __m512(*v)[2]) {
                    LOWBIT_UNROLL
                    for (int h = 0; h < 2; ++h) {
                        uint32_t* const words = out + (panel + h) * kPanelStride;
                        if constexpr (kPack == 1) {
                            _mm512_store_ps(words, v[0][h]);
                        } else {
                            Words::store(words, v[0][h], v[1][h]);
                        }
                    }
                });
        }
    }
};

// ---- register tiles -----------------------------------------------------------------------------

inline void add_to_c(float* c, __m512 sum, bool first) {
    _mm512_store_ps(c, first ? sum : _mm512_add_ps(_mm512_load_ps(c), sum));
}

// 14 rows x 2 panels: 28 accumulators, 2 registers of B, 1 broadcast word of A; 16 loads for 28
// multiply-adds.
template <class Words>
struct VectorTile {
    template <int R, int P>
    static void
    run(const uint32_t* a, const uint32_t* b, int words, float* c, int64_t ldc, bool first) {
        __m512 sum[R][P];
        LOWBIT_UNROLL
        for (int r = 0; r < R; ++r) {
            LOWBIT_UNROLL
            for (int p = 0; p < P; ++p)
                sum[r][p] = _mm512_setzero_ps();
        }
        for (int k = 0; k < words; ++k) {
            if (k % 16 == 0) {  // a cache line of each of the rows that come next
                LOWBIT_UNROLL
                for (int r = 0; r < R; ++r) {
                    const uint32_t* const next = a + (R + r) * kChunk + k;
                    _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T0);
                }
            }
            LOWBIT_UNROLL
            for (int r = 0; r < R; ++r) {
                LOWBIT_UNROLL
                for (int p = 0; p < P; ++p) {
                    sum[r][p] = Words::multiply_add(
                        sum[r][p], a + r * kChunk + k, b + p * kPanelStride + k * kPanel);
                }
            }
        }
        LOWBIT_UNROLL
        for (int r = 0; r < R; ++r) {
            LOWBIT_UNROLL
            for (int p = 0; p < P; ++p)
                add_to_c(c + r * ldc + p * kPanel, sum[r][p], first);
        }
    }
};

template <class Words>
struct VectorIsa : Decoders<Words> {
    static constexpr int kWordMultiple = 8 / Words::kPack;  // decode_rows runs in eights
    static constexpr int kRowMultiple = 1, kDirectRows = 4;
    static constexpr int64_t kBlockRows = 14 * 24;  // 336 KiB of A in an L2 cache of 1 or 2 MiB

    static void multiply_block(const ChunkProduct& product) {
        if (product.rows <= 4) {
            run_panels<VectorTile<Words>, 4, 4>(product);
        } else {
            run_panels<VectorTile<Words>, 2, 14>(product);
        }
    }

    // R rows of A against a 4-bit weight, 32 of its rows at a time, without a panel in between:
    // decoding is the cost here, and the 2 R sums hide behind it.
    template <int R>
    static void multiply_rows_4bit(
        const uint32_t* a, const WeightView& w, Piece piece, float* c, int64_t ldc, bool first) {
        for (int p = 0; p < piece.panels; p += 2, c += 32) {
            __m512 sum[R][2];
            LOWBIT_UNROLL
            for (int r = 0; r < R; ++r)
                sum[r][0] = sum[r][1] = _mm512_setzero_ps();
            decode_rows(
                w, piece.column + p * kPanel, piece,
                [&](int64_t step, const __m512* even, const __m512* odd) {
                    LOWBIT_UNROLL
                    for (int r = 0; r < R; ++r) {
                        const uint32_t* const x = a + r * kChunk;
                        sum[r][0] = Words::accumulate(sum[r][0], x, step, even[0], odd[0]);
                        sum[r][1] = Words::accumulate(sum[r][1], x, step, even[1], odd[1]);
                    }
                });
            LOWBIT_UNROLL
            for (int r = 0; r < R; ++r) {
                add_to_c(c + r * ldc, sum[r][0], first);
                add_to_c(c + r * ldc + kPanel, sum[r][1], first);
            }
        }
    }
};

}  // namespace
}  // namespace lowbit::cpu
