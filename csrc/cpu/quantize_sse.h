// Two 16-byte steps that the AVX2 and the AVX-512 quantizer have in common.
#pragma once

#include "intrinsics.h"

namespace lowbit::cpu {
namespace {

// 16 bytes of two ranks each to two codes each: order is a 16-entry table, which one byte shuffle
// looks up.
inline __m128i ranks_to_codes(__m128i ranks, __m128i order) {
    const __m128i low_mask = _mm_set1_epi8(0x0F);
    const __m128i high = _mm_shuffle_epi8(order, _mm_and_si128(_mm_srli_epi16(ranks, 4), low_mask));
    const __m128i low = _mm_shuffle_epi8(order, _mm_and_si128(ranks, low_mask));
    return _mm_or_si128(
        _mm_slli_epi16(high, 4), low);  // codes are < 16: no bit crosses into the next byte
}

inline uint16_t largest_word(__m128i words) {
    // The one horizontal reduction of SSE is an unsigned minimum.
    const __m128i all = _mm_set1_epi16(-1);
    const __m128i smallest = _mm_minpos_epu16(_mm_xor_si128(words, all));
    return static_cast<uint16_t>(~_mm_cvtsi128_si32(smallest));
}

inline uint32_t largest_dword(__m128i dwords) {
    __m128i m = _mm_max_epu32(dwords, _mm_shuffle_epi32(dwords, 0x4E));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xB1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}

}  // namespace
}  // namespace lowbit::cpu
