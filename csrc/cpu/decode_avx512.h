// 4-bit weights into panels of the product, AVX-512; as fp32 words, or as words of two bf16 (then W is rounded once, to the value that
// dequantize returns in bf16).
//
// vpermps of a whole register is an exact lookup in 16 fp32 entries by the low four bits of each lane, so the only work is to bring a
// code's bits down to bit 0 of its lane: transposing 32-bit words puts 8 codes of one stored row into a lane, and each
// is one shift away. 64 shuffles transpose 2048 codes.
#pragma once

#include "gemm_kernel.h"
#include "intrinsics.h"
#include "vec_avx512.h"

namespace lowbit::cpu {
namespace {

// columns[c] = word c of the 16 rows.
inline void transpose_words(const __m512i rows[16], __m512i columns[16]) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int g = 0; g < 16; g += 4) {  // b[g + c], lane L: word 4L + c of rows g .. g + 3
        b[g] = _mm512_unpacklo_epi64(a[g], a[g + 2]);
        b[g + 1] = _mm512_unpackhi_epi64(a[g], a[g + 2]);
        b[g + 2] = _mm512_unpacklo_epi64(a[g + 1], a[g + 3]);
        b[g + 3] = _mm512_unpackhi_epi64(a[g + 1], a[g + 3]);
    }
    for (int c = 0; c < 4; ++c) {
        const __m512i even_0 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88);  // lanes 0 and 2
        const __m512i even_1 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88);
        const __m512i odd_0 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xDD);  // lanes 1 and 3
        const __m512i odd_1 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xDD);
        columns[c] = _mm512_shuffle_i32x4(even_0, even_1, 0x88);
        columns[8 + c] = _mm512_shuffle_i32x4(even_0, even_1, 0xDD);
        columns[4 + c] = _mm512_shuffle_i32x4(odd_0, odd_1, 0x88);
        columns[12 + c] = _mm512_shuffle_i32x4(odd_0, odd_1, 0xDD);
    }
}

// The lookup takes the low four bits of each lane and ignores the others.
inline __m512 look_up(__m512 codebook, __m512i codes) {
    return _mm512_permutexvar_ps(codes, codebook);
}

// W^T for 32 stored rows from `row`: calls emit(step, even, odd) for each pair of reduction steps (step, step + 1), step counted from
// begin; even[h] and odd[h] hold rows row + 16h .. row + 16h + 15. May run up to 7 steps past the end. Rows past the
// last one repeat it with a scale of zero.
template <typename Emit>
inline void decode_rows(const WeightView& w, int64_t row, int64_t begin, int64_t steps,
                        Emit&& emit) {
    const __m512 codebook = _mm512_loadu_ps(w.codebook);
    const uint8_t* rows[32];
    for (int i = 0; i < 32; ++i) {
        rows[i] = w.qweight + min64(row + i, w.N - 1) * w.row_bytes + begin / 2;
    }
    alignas(64) float scale[32];
    int64_t block = -1;
    constexpr int64_t kUnit = 128;  // steps: 64 bytes, one cache line of each row
    for (int64_t done = 0; done < steps; done += kUnit) {
        const int64_t bytes = min64(kUnit / 2, (steps - done + 1) / 2);
        // Masked, since the tensor may end with the row.
        const __mmask64 mask = bytes == 64 ? ~uint64_t{0} : (uint64_t{1} << bytes) - 1;
        __m512i columns[2][16];
        LOWBIT_UNROLL
        for (int h = 0; h < 2; ++h) {
            __m512i words[16];
            for (int i = 0; i < 16; ++i) {
                const uint8_t* const src = rows[16 * h + i] + done / 2;
                words[i] = _mm512_maskz_loadu_epi8(mask, src);
                _mm_prefetch(reinterpret_cast<const char*>(src + 128), _MM_HINT_T1);
            }
            transpose_words(words, columns[h]);
        }
        for (int64_t c = 0; 4 * c < bytes; ++c) {
            const int64_t step = done + 8 * c;
            if ((begin + step) >> w.blocksize_log2 != block) {
                block = (begin + step) >> w.blocksize_log2;
                load_absmax_32(w, row, block, scale);
            }
            const __m512 s[2] = {_mm512_load_ps(scale), _mm512_load_ps(scale + 16)};
            __m512i codes[2] = {columns[0][c], columns[1][c]};
            for (int i = 0; i < 8; i += 2) {  // byte i / 2: even step in the high nibble
                __m512 even[2], odd[2];
                LOWBIT_UNROLL
                for (int h = 0; h < 2; ++h) {
                    const __m512i high = _mm512_srli_epi32(codes[h], 4);
                    even[h] = _mm512_mul_ps(look_up(codebook, high), s[h]);
                    odd[h] = _mm512_mul_ps(look_up(codebook, codes[h]), s[h]);
                    codes[h] = _mm512_srli_epi32(codes[h], 8);
                }
                emit(step + i, even, odd);
            }
        }
    }
}

// W for one stored row, 32 columns from the 16 bytes at `bytes`: v[h] = columns 16h .. 16h + 15. Lane j takes the word of its
// 8 columns, shifted so that its code is lowest; the even column of a byte is the high nibble.
inline void decode_columns(__m512 codebook, __m512 scale, const uint8_t* bytes, __m512 v[2]) {
    const __m512i words =
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __m512i shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
    const __m512i first = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512i second = _mm512_setr_epi32(2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m512i low = _mm512_srlv_epi32(_mm512_permutexvar_epi32(first, words), shifts);
    const __m512i high = _mm512_srlv_epi32(_mm512_permutexvar_epi32(second, words), shifts);
    v[0] = _mm512_mul_ps(look_up(codebook, low), scale);
    v[1] = _mm512_mul_ps(look_up(codebook, high), scale);
}

// One row or two of W (rows n and n + 1 make a word of bf16): store(offset, v) gets v[i][h], row i, half h of 32 columns.
template <int Rows, typename Store>
inline void decode_row_columns(const WeightView& w, int64_t n, int64_t column, int64_t width,
                               bool second_exists, Store&& store) {
    const __m512 codebook = _mm512_loadu_ps(w.codebook);
    for (int64_t j = 0; j < width; j += 32) {
        __m512 v[Rows][2];
        for (int i = 0; i < Rows; ++i) {
            if (i == 1 && !second_exists) {
                v[i][0] = v[i][1] = _mm512_setzero_ps();
                continue;
            }
            const uint8_t* const bytes = w.qweight + (n + i) * w.row_bytes + (column + j) / 2;
            const int64_t block =
                (n + i) * w.blocks_per_row + ((column + j) >> w.blocksize_log2);
            const __m512 scale = _mm512_set1_ps(block_absmax(w, block));
            // Rows are far apart: the hardware does not follow, so ask for the one eight steps ahead.
            _mm_prefetch(reinterpret_cast<const char*>(bytes + 8 * w.row_bytes), _MM_HINT_T0);
            if (width - j >= 32) {
                decode_columns(codebook, scale, bytes, v[i]);
            } else {
                uint8_t copy[16] = {};
                std::memcpy(copy, bytes, (width - j + 1) / 2);
                decode_columns(codebook, scale, copy, v[i]);
            }
        }
        store(j / 16, v);
    }
}

// ---- what all three AVX-512 kernel sets share ------------------------------------------------------------------------

struct Avx512Rows {
    template <typename T>
    static void to_fp32(const T* src, int64_t n, float* dst) {
        int64_t i = 0;
        for (; i + 16 <= n; i += 16) _mm512_storeu_ps(dst + i, load16(src + i));
        for (; i < n; ++i) dst[i] = to_float(src[i]);
    }

    template <typename T>
    static void from_fp32(const float* src, int64_t n, T* dst) {
        int64_t i = 0;
        for (; i + 16 <= n; i += 16) store16(dst + i, _mm512_loadu_ps(src + i));
        for (; i < n; ++i) store_float(dst + i, src[i]);
    }

    static void transpose(const float* src, int64_t stride, int64_t n, float* panel) {
        int64_t k = 0;
        for (; k + 16 <= n; k += 16) {
            __m512i rows[16], columns[16];
            for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(src + i * stride + k);
            transpose_words(rows, columns);
            for (int i = 0; i < 16; ++i) _mm512_store_si512(panel + (k + i) * kPanel, columns[i]);
        }
        for (; k < n; ++k) {
            for (int j = 0; j < kPanel; ++j) panel[k * kPanel + j] = src[j * stride + k];
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

    static void decode_transposed(const WeightView& w, int64_t column, int panels, int64_t begin,
                                  int64_t steps, uint32_t* dst) {
        for (int p = 0; p < panels; p += 2, column += 32, dst += 2 * kPanelStride) {
            decode_rows(w, column, begin, steps,
                        [&](int64_t step, const __m512* even, const __m512* odd) {
                            LOWBIT_UNROLL
                            for (int h = 0; h < 2; ++h) {
                                uint32_t* const out = dst + h * kPanelStride + step * kPanel;
                                _mm512_store_ps(out, even[h]);
                                _mm512_store_ps(out + kPanel, odd[h]);
                            }
                        });
        }
    }

    static void decode_natural(const WeightView& w, int64_t column, int panels, int64_t begin,
                               int64_t steps, uint32_t* dst) {
        const int64_t width = min64(int64_t{panels} * kPanel, w.K - column);
        for (int64_t i = 0; i < steps; ++i) {
            uint32_t* const out = dst + i * kPanel;
            decode_row_columns<1>(w, begin + i, column, width, false,
                                  [&](int64_t panel, const __m512(*v)[2]) {
                                      _mm512_store_ps(out + panel * kPanelStride, v[0][0]);
                                      _mm512_store_ps(out + (panel + 1) * kPanelStride, v[0][1]);
                                  });
        }
    }
};

#if defined(__AVX512BF16__)

// Words of two bf16 elements, consecutive reduction steps, the even one in the low half.
struct Bf16Words : Avx512Rows {
    static constexpr int kPack = 2;

    // cvtne2ps puts its second argument into the lower 16 results; then lane j takes words j and 16 + j.
    static __m512i pair_words(__m512 even, __m512 odd) {
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9,
                                               24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
                                               16, 0);
        const __m512bh both = _mm512_cvtne2ps_pbh(odd, even);
        return _mm512_permutexvar_epi16(order, (__m512i)both);
    }

    static void pair(const float* even, const float* odd, uint32_t* words) {
        _mm512_store_si512(words, pair_words(_mm512_loadu_ps(even), _mm512_loadu_ps(odd)));
    }

    static __m512 multiply_add(__m512 sum, const uint32_t* a, const uint32_t* b) {
        const __m512i x = _mm512_set1_epi32(static_cast<int>(*a));
        return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)_mm512_load_si512(b));
    }

    static void decode_transposed(const WeightView& w, int64_t column, int panels, int64_t begin,
                                  int64_t steps, uint32_t* dst) {
        for (int p = 0; p < panels; p += 2, column += 32, dst += 2 * kPanelStride) {
            decode_rows(w, column, begin, steps,
                        [&](int64_t step, const __m512* even, const __m512* odd) {
                            LOWBIT_UNROLL
                            for (int h = 0; h < 2; ++h) {
                                uint32_t* const out = dst + h * kPanelStride + step / 2 * kPanel;
                                _mm512_store_si512(out, pair_words(even[h], odd[h]));
                            }
                        });
        }
    }

    static void decode_natural(const WeightView& w, int64_t column, int panels, int64_t begin,
                               int64_t steps, uint32_t* dst) {
        const int64_t width = min64(int64_t{panels} * kPanel, w.K - column);
        for (int64_t i = 0; i < steps; i += 2) {
            uint32_t* const out = dst + i / 2 * kPanel;
            decode_row_columns<2>(
                w, begin + i, column, width, i + 1 < steps,
                [&](int64_t panel, const __m512(*v)[2]) {
                    LOWBIT_UNROLL
                    for (int h = 0; h < 2; ++h) {
                        _mm512_store_si512(out + (panel + h) * kPanelStride,
                                           pair_words(v[0][h], v[1][h]));
                    }
                });
        }
    }
};

#endif

// ---- register tiles --------------------------------------------------------------------------------------------------
// 14 rows x 2 panels: 28 accumulators, 2 registers of B, 1 broadcast word of A; 16 loads for 28 multiply-adds.

template <class Words>
struct VectorTile {
    template <int R, int P>
    static void run(const uint32_t* a, const uint32_t* b, int words, float* c, int64_t ldc,
                    bool first) {
        __m512 sum[R][P];
        LOWBIT_UNROLL
        for (int r = 0; r < R; ++r) {
            LOWBIT_UNROLL
            for (int p = 0; p < P; ++p) sum[r][p] = _mm512_setzero_ps();
        }
        for (int k = 0; k < words; ++k) {
            LOWBIT_UNROLL
            for (int r = 0; r < R; ++r) {
                LOWBIT_UNROLL
                for (int p = 0; p < P; ++p) {
                    sum[r][p] = Words::multiply_add(sum[r][p], a + r * kChunk + k,
                                                    b + p * kPanelStride + k * kPanel);
                }
            }
        }
        LOWBIT_UNROLL
        for (int r = 0; r < R; ++r) {
            LOWBIT_UNROLL
            for (int p = 0; p < P; ++p) {
                float* const out = c + r * ldc + p * kPanel;
                _mm512_store_ps(out, first ? sum[r][p] : _mm512_add_ps(_mm512_load_ps(out), sum[r][p]));
            }
        }
    }
};

template <class Words>
struct VectorIsa : Words {
    static constexpr int kWordMultiple = 1, kRowMultiple = 1;
    static constexpr int64_t kBlockRows = 14 * 24;

    static void multiply_block(const uint32_t* a, int64_t rows, const uint32_t* b, int panels,
                               int words, float* c, int64_t ldc, bool first) {
        if (rows <= 4) {
            run_panels<VectorTile<Words>, 4, 4>(a, rows, b, panels, words, c, ldc, first);
        } else {
            run_panels<VectorTile<Words>, 2, 14>(a, rows, b, panels, words, c, ldc, first);
        }
    }
};

}  // namespace
}  // namespace lowbit::cpu
