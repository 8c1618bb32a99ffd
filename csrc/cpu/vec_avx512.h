// Loads, stores and conversions of 16 fp32 lanes (AVX-512 F, BW, DQ, VL), shared by the
// *_avx512.cpp kernels.
#pragma once

#include "intrinsics.h"

#include "common.h"

namespace lowbit::cpu {
namespace {

inline __m512 load16(const float* p) {
    return _mm512_loadu_ps(p);
}
inline __m512 load16(const bf16_t* p) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}
inline __m512 load16(const fp16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// The even and the odd elements of 32 consecutive ones, each in order: what packing two codes per
// byte wants.
inline void load_pairs(const bf16_t* p, __m512& even, __m512& odd) {
    const __m512i words = _mm512_loadu_si512(p);  // a bf16 is the upper half of an fp32
    even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(0xFFFF0000))));
}

template <typename T>
inline void load_pairs(const T* p, __m512& even, __m512& odd) {
    const __m512 a = load16(p), b = load16(p + 16);
    const __m512i evens =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    even = _mm512_permutex2var_ps(a, evens, b);
    odd = _mm512_permutex2var_ps(a, odds, b);
}

// 16 fp32 values as 16 words: to_bf16 of common.h, lane by lane. The avx512_bf16 instruction is no
// substitute: it flushes subnormals.
inline __m256i words16(bf16_t, __m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(last, _mm512_set1_epi32(0x7FFF));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(
        _mm512_mask_blend_epi32(is_nan, rounded, _mm512_set1_epi32(0x7FC0)));
}
inline __m256i words16(fp16_t, __m512 value) {
    return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

template <typename T>
inline void store16(T* p, __m512 value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words16(T{}, value));
}
inline void store16(float* p, __m512 value) {
    _mm512_storeu_ps(p, value);
}

}  // namespace
}  // namespace lowbit::cpu
