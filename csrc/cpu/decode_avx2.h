// 4-bit weights into panels of the product, AVX2.
//
// An fp32 codebook entry is four bytes, so four byte shuffles look up 32 codes at once (one per
// byte plane) and three levels of interleaving put the planes together: 12 shuffles for 32 exact
// fp32 values, half of what two vpermps and a blend per 8 values cost on Zen 3, where vpermps is
// two operations.
//
// Interleaving works within 128-bit lanes. Both decoders arrange the codes so that lane 0 holds
// columns 8g .. 8g + 3 and lane 1 columns 8g + 4 .. 8g + 7 in its group g of four bytes; result g
// is then columns 8g .. 8g + 7 in order.
#pragma once

#include "gemm_kernel.h"
#include "intrinsics.h"

namespace lowbit::cpu {
namespace {

struct BytePlanes {
    __m256i plane[4];  // byte i of the 16 codebook entries, in both lanes
};

inline BytePlanes load_planes(const float* codebook) {
    alignas(16) uint8_t bytes[4][16];
    for (int code = 0; code < 16; ++code) {
        const uint32_t bits = bits_from_float(codebook[code]);
        for (int i = 0; i < 4; ++i)
            bytes[i][code] = static_cast<uint8_t>(bits >> (8 * i));
    }
    BytePlanes planes;
    for (int i = 0; i < 4; ++i) {
        const __m128i plane = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes[i]));
        planes.plane[i] = _mm256_broadcastsi128_si256(plane);
    }
    return planes;
}

// out[g] = fp32 codebook entries of the codes in bytes 4g .. 4g + 3 of both lanes.
inline void look_up(const BytePlanes& planes, __m256i codes, __m256 out[4]) {
    const __m256i b0 = _mm256_shuffle_epi8(planes.plane[0], codes);
    const __m256i b1 = _mm256_shuffle_epi8(planes.plane[1], codes);
    const __m256i b2 = _mm256_shuffle_epi8(planes.plane[2], codes);
    const __m256i b3 = _mm256_shuffle_epi8(planes.plane[3], codes);
    const __m256i low_01 = _mm256_unpacklo_epi8(b0, b1), high_01 = _mm256_unpackhi_epi8(b0, b1);
    const __m256i low_23 = _mm256_unpacklo_epi8(b2, b3), high_23 = _mm256_unpackhi_epi8(b2, b3);
    out[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low_01, low_23));
    out[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low_01, low_23));
    out[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(high_01, high_23));
    out[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(high_01, high_23));
}

// columns[c] = byte c of 32 sources `stride` bytes apart, sources 0 to 15 in lane 0, 16 to 31 in
// lane 1. Each stage rotates the eight address bits (register, byte) by one, so four stages
// exchange register and byte.
inline void transpose_bytes(const uint8_t* src, int64_t stride, __m256i columns[16]) {
    __m256i a[16], b[16];
    LOWBIT_UNROLL
    for (int i = 0; i < 16; ++i) {
        const auto* const low = reinterpret_cast<const __m128i*>(src + i * stride);
        const auto* const high = reinterpret_cast<const __m128i*>(src + (16 + i) * stride);
        a[i] = _mm256_inserti128_si256(
            _mm256_castsi128_si256(_mm_load_si128(low)), _mm_load_si128(high), 1);
    }
    for (int stage = 0; stage < 2; ++stage) {
        LOWBIT_UNROLL
        for (int i = 0; i < 8; ++i) {
            b[2 * i] = _mm256_unpacklo_epi8(a[i], a[i + 8]);
            b[2 * i + 1] = _mm256_unpackhi_epi8(a[i], a[i + 8]);
        }
        __m256i* const out = stage == 0 ? a : columns;
        LOWBIT_UNROLL
        for (int i = 0; i < 8; ++i) {
            out[2 * i] = _mm256_unpacklo_epi8(b[i], b[i + 8]);
            out[2 * i + 1] = _mm256_unpackhi_epi8(b[i], b[i + 8]);
        }
    }
}

// One cache line of each of 32 rows of W, side by side: rows are often a power of two apart, and 32
// such lines do not fit the L1 cache together. Row r of W^T lies where the interleaving wants it:
// slot 4 (r / 8) + r % 4, upper half of the slots for r % 8 >= 4.
constexpr int64_t kLine = 64;

inline void gather_lines(
    const WeightView& w, int64_t row, int64_t byte, int64_t bytes, uint8_t lines[32][kLine]) {
    for (int r = 0; r < 32; ++r) {
        const int slot = (r % 8 >= 4 ? 16 : 0) + 4 * (r / 8) + r % 4;
        const uint8_t* const src = w.qweight + min64(row + r, w.N - 1) * w.row_bytes + byte;
        if (bytes == kLine) {
            const auto* const from = reinterpret_cast<const __m256i*>(src);
            auto* const to = reinterpret_cast<__m256i*>(lines[slot]);
            _mm256_store_si256(to, _mm256_loadu_si256(from));
            _mm256_store_si256(to + 1, _mm256_loadu_si256(from + 1));
        } else {
            std::memcpy(lines[slot], src, bytes);
        }
        // The next chunk's lines: columns go by before they are wanted.
        _mm_prefetch(reinterpret_cast<const char*>(src + 2 * kLine), _MM_HINT_T1);
    }
}

// W^T for 32 stored rows from `row`, reduction steps of the piece: calls emit(step, v), step
// counted from begin, with v[g] = the step's values of rows row + 8g .. row + 8g + 7. May run one
// step past the end. Rows past the last one repeat it with a scale of zero.
template <typename Emit>
LOWBIT_INLINE void
decode_rows(const WeightView& w, const BytePlanes& planes, int64_t row, Piece piece, Emit&& emit) {
    const int64_t begin = piece.begin, steps = piece.steps();
    const __m256i low_nibble = _mm256_set1_epi8(0x0F);
    alignas(64) uint8_t lines[32][kLine] = {};
    alignas(32) float scale[32];
    int64_t block = -1;
    for (int64_t done = 0; done < steps; done += 32) {
        const int64_t offset = done / 2 % kLine;
        if (offset == 0) {
            const int64_t bytes = min64(kLine, (steps - done + 1) / 2);
            gather_lines(w, row, (begin + done) / 2, bytes, lines);
        }
        if ((begin + done) >> w.blocksize_log2 != block) {  // a block has at least 32 steps
            block = (begin + done) >> w.blocksize_log2;
            load_absmax_32(w, row, block, scale);
        }
        __m256i columns[16];
        transpose_bytes(lines[0] + offset, kLine, columns);
        const __m256 s[4] = {
            _mm256_load_ps(scale), _mm256_load_ps(scale + 8), _mm256_load_ps(scale + 16),
            _mm256_load_ps(scale + 24)};
        const int64_t pairs = min64(16, (steps - done + 1) / 2);
        for (int64_t c = 0; c < pairs; ++c) {  // even step: high nibble
            __m256 v[4];
            look_up(planes, _mm256_and_si256(_mm256_srli_epi16(columns[c], 4), low_nibble), v);
            LOWBIT_UNROLL
            for (int g = 0; g < 4; ++g)
                v[g] = _mm256_mul_ps(v[g], s[g]);
            emit(done + 2 * c, v);
            look_up(planes, _mm256_and_si256(columns[c], low_nibble), v);
            LOWBIT_UNROLL
            for (int g = 0; g < 4; ++g)
                v[g] = _mm256_mul_ps(v[g], s[g]);
            emit(done + 2 * c + 1, v);
        }
    }
}

// W for one stored row, 32 columns from the 16 bytes at `bytes`: v[g] = columns 8g .. 8g + 7, not
// scaled.
inline void decode_columns(const BytePlanes& planes, const uint8_t* bytes, __m256 v[4]) {
    // Each byte twice, in the order the interleaving wants; as a word it is code << 4 | code of the
    // pair, so that shifting by 4 leaves the even column's code in the low byte while the high
    // byte's low nibble is the odd one's.
    const __m256i order = _mm256_setr_epi8(
        0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13,  //
        2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15);
    const __m256i both =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __m256i twice = _mm256_shuffle_epi8(both, order);
    const __m256i even = _mm256_and_si256(_mm256_srli_epi16(twice, 4), _mm256_set1_epi16(0x000F));
    const __m256i odd = _mm256_and_si256(twice, _mm256_set1_epi16(0x0F00));
    look_up(planes, _mm256_or_si256(even, odd), v);
}

inline void decode_natural_panels(const WeightView& w, Piece piece, float* dst) {
    const BytePlanes planes = load_planes(w.codebook);
    const int64_t column = piece.column;
    const int64_t width = min64(int64_t{piece.panels} * kPanel, w.K - column);
    for (int64_t i = 0; i < piece.steps(); ++i) {
        const int64_t n = piece.begin + i;
        const uint8_t* const bytes = w.qweight + n * w.row_bytes + column / 2;
        float* out = dst + i * kPanel;
        int64_t block = -1;
        __m256 scale{};
        for (int64_t j = 0; j < width; j += 32, out += 2 * kPanelStride) {
            if ((column + j) >> w.blocksize_log2 != block) {  // a block has at least 32 columns
                block = (column + j) >> w.blocksize_log2;
                scale = _mm256_set1_ps(block_absmax(w, n * w.blocks_per_row + block));
            }
            // Rows are far apart: the hardware does not follow, so ask for the one eight steps
            // ahead.
            const uint8_t* const ahead = bytes + j / 2 + 8 * w.row_bytes;
            _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
            __m256 v[4];
            if (width - j >= 32) {
                decode_columns(planes, bytes + j / 2, v);
            } else {
                uint8_t copy[16] = {};
                std::memcpy(copy, bytes + j / 2, (width - j + 1) / 2);
                decode_columns(planes, copy, v);
            }
            _mm256_store_ps(out, _mm256_mul_ps(v[0], scale));
            _mm256_store_ps(out + 8, _mm256_mul_ps(v[1], scale));
            _mm256_store_ps(out + kPanelStride, _mm256_mul_ps(v[2], scale));
            _mm256_store_ps(out + kPanelStride + 8, _mm256_mul_ps(v[3], scale));
        }
    }
}

}  // namespace
}  // namespace lowbit::cpu
