// Loads, stores and conversions of 8 fp32 lanes (AVX2 + F16C), shared by the *_avx2.cpp kernels.
#pragma once

#include "intrinsics.h"

#include "common.h"

namespace lowbit::cpu {
namespace {

inline __m256i load_bits(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

inline __m256 load8(const float* p) {
    return _mm256_loadu_ps(p);
}
inline __m256 load8(const bf16_t* p) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}
inline __m256 load8(const fp16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// The even and the odd elements of 16 consecutive ones, each in order: what packing two codes per
// byte wants.
inline void load_pairs(const bf16_t* p, __m256& even, __m256& odd) {
    const __m256i words = load_bits(p);  // a bf16 is the upper half of an fp32
    even = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(int(0xFFFF0000))));
}

inline void split_pairs(__m256 a, __m256 b, __m256& even, __m256& odd) {
    // shuffle_ps works within 128-bit lanes: a0 a2 b0 b2 | a4 a6 b4 b6, so 64-bit units 1 and 2
    // must swap.
    const __m256d e = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88));
    const __m256d o = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xDD));
    even = _mm256_castpd_ps(_mm256_permute4x64_pd(e, 0xD8));
    odd = _mm256_castpd_ps(_mm256_permute4x64_pd(o, 0xD8));
}
inline void load_pairs(const float* p, __m256& even, __m256& odd) {
    split_pairs(load8(p), load8(p + 8), even, odd);
}
inline void load_pairs(const fp16_t* p, __m256& even, __m256& odd) {
    split_pairs(load8(p), load8(p + 8), even, odd);
}

// fp32 to bf16 in the low half of each 32-bit lane: to_bf16 of common.h, lane by lane.
inline __m256i bf16_bits(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(last, _mm256_set1_epi32(0x7FFF));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), is_nan);
}

// 16 fp32 values, in order, as 16 words.
inline __m256i words16(bf16_t, __m256 a, __m256 b) {
    const __m256i mixed = _mm256_packus_epi32(bf16_bits(a), bf16_bits(b));
    return _mm256_permute4x64_epi64(mixed, 0xD8);  // packus works within 128-bit lanes
}
inline __m256i words16(fp16_t, __m256 a, __m256 b) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return _mm256_set_m128i(_mm256_cvtps_ph(b, kNearest), _mm256_cvtps_ph(a, kNearest));
}

template <typename T>
inline void store16(T* p, __m256 a, __m256 b) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words16(T{}, a, b));
}
inline void store16(float* p, __m256 a, __m256 b) {
    _mm256_storeu_ps(p, a);
    _mm256_storeu_ps(p + 8, b);
}

}  // namespace
}  // namespace lowbit::cpu
