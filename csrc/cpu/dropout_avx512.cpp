// Inverted dropout with AVX-512 (dropout_kernel.h has the formula).
//
// Eight counters, one per 64-bit lane, each of the four words of a counter in its own register. The
// 32x32 -> 64 multiply reads only the low half of a lane, so the high halves may hold leftovers: no
// masking between rounds, 8 instructions a round.

#include "dropout_kernel.h"
#include "vec_avx512.h"

namespace lowbit::cpu {
namespace {

// Independent Philox chains in flight: a round is a chain of multiply, shift and xor.
constexpr int kGroups = 2;

struct Avx512Ops {
    static constexpr int64_t kUnit = 32 * kGroups;

    // Words of 8 * kGroups counters from `counter` on, in element order: out[g][0], out[g][1] are
    // elements 32 g + 0-15, 16-31.
    static void
    words(uint64_t counter, const DropoutParameters& parameters, __m512i out[kGroups][2]) {
        const __m512i m0 = _mm512_set1_epi64(kMultiplier0), m1 = _mm512_set1_epi64(kMultiplier1);
        __m512i c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
        for (int g = 0; g < kGroups; ++g) {
            c0[g] = _mm512_add_epi64(
                _mm512_set1_epi64(static_cast<int64_t>(counter) + 8 * g),
                _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
            c1[g] = _mm512_srli_epi64(c0[g], 32);
            c2[g] = c3[g] = _mm512_setzero_si512();
        }
        for (int round = 0; round < kRounds; ++round) {
            const __m512i k0 = _mm512_set1_epi32(static_cast<int>(parameters.key0[round]));
            const __m512i k1 = _mm512_set1_epi32(static_cast<int>(parameters.key1[round]));
            for (int g = 0; g < kGroups; ++g) {
                const __m512i product0 = _mm512_mul_epu32(c0[g], m0);
                const __m512i product1 = _mm512_mul_epu32(c2[g], m1);
                c0[g] =
                    _mm512_xor_si512(_mm512_srli_epi64(product1, 32), _mm512_xor_si512(c1[g], k0));
                c1[g] = product1;
                c2[g] =
                    _mm512_xor_si512(_mm512_srli_epi64(product0, 32), _mm512_xor_si512(c3[g], k1));
                c3[g] = product0;
            }
        }
        for (int g = 0; g < kGroups; ++g)
            interleave(c0[g], c1[g], c2[g], c3[g], out[g]);
    }

    // One word of eight counters per register, in the low halves of its lanes, to element order.
    static void interleave(__m512i c0, __m512i c1, __m512i c2, __m512i c3, __m512i out[2]) {
        const __mmask16 odd_words = 0xAAAA;
        const __m512i w01 = _mm512_mask_blend_epi32(odd_words, c0, _mm512_slli_epi64(c1, 32));
        const __m512i w23 = _mm512_mask_blend_epi32(odd_words, c2, _mm512_slli_epi64(c3, 32));
        // Two 64-bit units per counter, in even those of counters 0 2 4 6, in odd those of 1 3 5 7.
        const __m512i even = _mm512_unpacklo_epi64(w01, w23);
        const __m512i odd = _mm512_unpackhi_epi64(w01, w23);
        const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
        const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        out[0] = _mm512_permutex2var_epi64(even, first, odd);
        out[1] = _mm512_permutex2var_epi64(even, second, odd);
    }

    static __m512 drop(__m512 x, __m512i words, const DropoutParameters& parameters) {
        const __m512i threshold = _mm512_set1_epi32(parameters.threshold);
        const __mmask16 keep = _mm512_cmpge_epi32_mask(_mm512_srli_epi32(words, 8), threshold);
        return _mm512_maskz_mul_ps(keep, x, _mm512_set1_ps(parameters.scale));
    }

    template <typename T>
    static void unit(const T* x, T* out, uint64_t counter, const DropoutParameters& parameters) {
        __m512i word[kGroups][2];
        words(counter, parameters, word);
        for (int g = 0; g < kGroups; ++g) {
            store16(out + 32 * g, drop(load16(x + 32 * g), word[g][0], parameters));
            store16(out + 32 * g + 16, drop(load16(x + 32 * g + 16), word[g][1], parameters));
        }
    }
};

}  // namespace

void dropout_avx512(
    const void* x, Dtype dtype, uint64_t first, int64_t count, const DropoutArgs& args, void* out) {
    dropout_with<Avx512Ops>(x, dtype, first, count, args, out);
}

}  // namespace lowbit::cpu
