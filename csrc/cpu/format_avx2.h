// Steps that the AVX2 and the AVX-512 kernels of the 4-bit format have in common.
#pragma once

#include <cstdint>

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

// 16 bytes of two codes each to 32 codes, one per byte, in element order.
inline __m256i unpack_codes(const uint8_t* bytes) {
    const __m256i words =
        _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __m256i second = _mm256_and_si256(_mm256_slli_epi16(words, 8), _mm256_set1_epi16(0x0F00));
    return _mm256_or_si256(_mm256_srli_epi16(words, 4), second);
}

inline uint16_t largest_word(__m256i words) {
    const __m128i half =
        _mm_max_epu16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    // The one horizontal reduction of SSE is an unsigned minimum.
    const __m128i smallest = _mm_minpos_epu16(_mm_xor_si128(half, _mm_set1_epi16(-1)));
    return static_cast<uint16_t>(~_mm_cvtsi128_si32(smallest));
}

inline uint32_t largest_dword(__m256i dwords) {
    __m128i m = _mm_max_epu32(_mm256_castsi256_si128(dwords), _mm256_extracti128_si256(dwords, 1));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4E));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xB1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}

}  // namespace
}  // namespace lowbit::cpu
