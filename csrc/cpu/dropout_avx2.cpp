// Inverted dropout with AVX2 (dropout_kernel.h has the formula).
//
// Four counters, one per 64-bit lane, each of the four words of a counter in its own register. The
// 32x32 -> 64 multiply reads only the low half of a lane, so the high halves may hold leftovers: no
// masking between rounds, 8 instructions a round.

#include "dropout_kernel.h"
#include "vec_avx2.h"

namespace lowbit::cpu {
namespace {

// Independent Philox chains in flight: a round is a chain of multiply, shift and xor.
constexpr int kGroups = 2;

struct Avx2Ops {
    static constexpr int64_t kUnit = 16 * kGroups;

    // Words of 4 * kGroups counters from `counter` on, in element order: out[g][0], out[g][1] are
    // elements 16 g + 0-7, 8-15.
    static void
    words(uint64_t counter, const DropoutParameters& parameters, __m256i out[kGroups][2]) {
        const __m256i m0 = _mm256_set1_epi64x(kMultiplier0), m1 = _mm256_set1_epi64x(kMultiplier1);
        __m256i c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
        for (int g = 0; g < kGroups; ++g) {
            c0[g] = _mm256_add_epi64(
                _mm256_set1_epi64x(static_cast<int64_t>(counter) + 4 * g),
                _mm256_setr_epi64x(0, 1, 2, 3));
            c1[g] = _mm256_srli_epi64(c0[g], 32);
            c2[g] = c3[g] = _mm256_setzero_si256();
        }
        for (int round = 0; round < kRounds; ++round) {
            const __m256i k0 = _mm256_set1_epi32(static_cast<int>(parameters.key0[round]));
            const __m256i k1 = _mm256_set1_epi32(static_cast<int>(parameters.key1[round]));
            for (int g = 0; g < kGroups; ++g) {
                const __m256i product0 = _mm256_mul_epu32(c0[g], m0);
                const __m256i product1 = _mm256_mul_epu32(c2[g], m1);
                c0[g] =
                    _mm256_xor_si256(_mm256_srli_epi64(product1, 32), _mm256_xor_si256(c1[g], k0));
                c1[g] = product1;
                c2[g] =
                    _mm256_xor_si256(_mm256_srli_epi64(product0, 32), _mm256_xor_si256(c3[g], k1));
                c3[g] = product0;
            }
        }
        for (int g = 0; g < kGroups; ++g)
            interleave(c0[g], c1[g], c2[g], c3[g], out[g]);
    }

    // One word of four counters per register, in the low halves of its lanes, to element order.
    static void interleave(__m256i c0, __m256i c1, __m256i c2, __m256i c3, __m256i out[2]) {
        const __m256i w01 = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
        const __m256i w23 = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
        const __m256i even = _mm256_unpacklo_epi64(w01, w23);  // counters 0 and 2
        const __m256i odd = _mm256_unpackhi_epi64(w01, w23);   // counters 1 and 3
        out[0] = _mm256_permute2x128_si256(even, odd, 0x20);
        out[1] = _mm256_permute2x128_si256(even, odd, 0x31);
    }

    static __m256 drop(__m256 x, __m256i words, const DropoutParameters& parameters) {
        const __m256i below = _mm256_set1_epi32(parameters.threshold - 1);
        const __m256i keep = _mm256_cmpgt_epi32(_mm256_srli_epi32(words, 8), below);
        const __m256 scaled = _mm256_mul_ps(x, _mm256_set1_ps(parameters.scale));
        return _mm256_and_ps(scaled, _mm256_castsi256_ps(keep));
    }

    template <typename T>
    static void unit(const T* x, T* out, uint64_t counter, const DropoutParameters& parameters) {
        __m256i word[kGroups][2];
        words(counter, parameters, word);
        for (int g = 0; g < kGroups; ++g) {
            const __m256 a = drop(load8(x + 16 * g), word[g][0], parameters);
            const __m256 b = drop(load8(x + 16 * g + 8), word[g][1], parameters);
            store16(out + 16 * g, a, b);
        }
    }
};

}  // namespace

void dropout_avx2(
    const void* x, Dtype dtype, uint64_t first, int64_t count, const DropoutArgs& args, void* out) {
    dropout_with<Avx2Ops>(x, dtype, first, count, args, out);
}

}  // namespace lowbit::cpu
