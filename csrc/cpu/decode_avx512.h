// 4-bit weights into panels of the product, AVX-512; as fp32 words, or as words of two bf16 (then W
// is rounded once, to the value that dequantize returns in bf16).
//
// vpermps of a whole register is an exact lookup in 16 fp32 entries by the low four bits of each
// lane, so the only work is to bring a code's bits down to bit 0 of its lane: transposing 32-bit
// words puts 8 codes of one stored row into a lane, and each is one shift away. 64 shuffles
// transpose 2048 codes.
#pragma once

#include "gemm_kernel.h"
#include "intrinsics.h"

namespace lowbit::cpu {
namespace {

// columns[c] = word c of the 16 rows.
inline void transpose_words(const __m512i rows[16], __m512i columns[16]) {
    __m512i a[16], b[16];
    LOWBIT_UNROLL
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    LOWBIT_UNROLL
    for (int g = 0; g < 16; g += 4) {  // b[g + c], lane L: word 4L + c of rows g .. g + 3
        b[g] = _mm512_unpacklo_epi64(a[g], a[g + 2]);
        b[g + 1] = _mm512_unpackhi_epi64(a[g], a[g + 2]);
        b[g + 2] = _mm512_unpacklo_epi64(a[g + 1], a[g + 3]);
        b[g + 3] = _mm512_unpackhi_epi64(a[g + 1], a[g + 3]);
    }
    LOWBIT_UNROLL
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

// W^T for 32 stored rows from `row`: calls emit(step, even, odd) for each pair of reduction steps
// (step, step + 1), step counted from begin; even[h] and odd[h] hold rows row + 16h .. row + 16h
// + 15. May run up to 7 steps past the end. Rows past the last one repeat it with a scale of zero.
template <typename Emit>
LOWBIT_INLINE void decode_rows(const WeightView& w, int64_t row, Piece piece, Emit&& emit) {
    const int64_t begin = piece.begin, steps = piece.steps();
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
            LOWBIT_UNROLL
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
            LOWBIT_UNROLL
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

// W for one stored row, 32 columns from the 16 bytes at `bytes`: v[h] = columns 16h .. 16h + 15.
// Lane j takes the word of its 8 columns, shifted so that its code is lowest; the even column of a
// byte is the high nibble.
inline void decode_columns(__m512 codebook, __m512 scale, const uint8_t* bytes, __m512 v[2]) {
    const __m512i words =
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __m512i shifts =
        _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
    const __m512i first = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512i second = _mm512_setr_epi32(2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m512i low = _mm512_srlv_epi32(_mm512_permutexvar_epi32(first, words), shifts);
    const __m512i high = _mm512_srlv_epi32(_mm512_permutexvar_epi32(second, words), shifts);
    v[0] = _mm512_mul_ps(look_up(codebook, low), scale);
    v[1] = _mm512_mul_ps(look_up(codebook, high), scale);
}

// One row or two of W (rows n and n + 1 make a word of bf16): store(offset, v) gets v[i][h], row i,
// half h of 32 columns.
template <int Rows, typename Store>
inline void decode_row_columns(
    const WeightView& w,
    int64_t n,
    int64_t column,
    int64_t width,
    bool second_exists,
    Store&& store) {
    const __m512 codebook = _mm512_loadu_ps(w.codebook);
    for (int64_t j = 0; j < width; j += 32) {
        __m512 v[Rows][2];
        for (int i = 0; i < Rows; ++i) {
            if (i == 1 && !second_exists) {
                v[i][0] = v[i][1] = _mm512_setzero_ps();
                continue;
            }
            const uint8_t* const bytes = w.qweight + (n + i) * w.row_bytes + (column + j) / 2;
            const int64_t block = (n + i) * w.blocks_per_row + ((column + j) >> w.blocksize_log2);
            const __m512 scale = _mm512_set1_ps(block_absmax(w, block));
            // Rows are far apart: the hardware does not follow, so ask for one eight steps ahead.
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

}  // namespace
}  // namespace lowbit::cpu
