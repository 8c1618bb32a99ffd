// Blockwise 4-bit quantization for AVX2 (quantize_kernel.h has the formula).
//
// The rank is found by a four-step binary search whose tables live in registers: after l steps the
// partial rank selects one of 2^l thresholds by a permute, at most 8 of them. A compare yields 0 or
// -1 per lane, so the search carries the *negative* partial rank, rank = 2 * rank + compare without
// a sign fix, and tables are laid out for index (-rank) mod size.

#include "format_avx2.h"
#include "quantize_kernel.h"
#include "vec_avx2.h"

namespace lowbit::cpu {
namespace {

struct Avx2Ops {
    struct Ladder {
        __m256 level1, level2_low, level2_high, level3, level4;
        __m128i order;

        Ladder(const float* t, const uint8_t* codes)
            : level1(_mm256_set1_ps(t[7])), level2_low(_mm256_set1_ps(t[3])),
              level2_high(_mm256_set1_ps(t[11])),
              level3(_mm256_setr_ps(t[1], t[13], t[9], t[5], t[1], t[13], t[9], t[5])),
              level4(_mm256_setr_ps(t[0], t[14], t[12], t[10], t[8], t[6], t[4], t[2])),
              order(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))) {}

        static __m256i above(__m256 x, __m256 threshold) {
            return _mm256_castps_si256(_mm256_cmp_ps(x, threshold, _CMP_GT_OQ));
        }

        __m256i negative_rank(__m256 x) const {
            __m256i bit = above(x, level1);
            __m256i rank = bit;
            const __m256 level2 =
                _mm256_blendv_ps(level2_low, level2_high, _mm256_castsi256_ps(bit));
            bit = above(x, level2);
            rank = _mm256_add_epi32(_mm256_add_epi32(rank, rank), bit);
            bit = above(x, _mm256_permutevar_ps(level3, rank));
            rank = _mm256_add_epi32(_mm256_add_epi32(rank, rank), bit);
            bit = above(x, _mm256_permutevar8x32_ps(level4, rank));
            return _mm256_add_epi32(_mm256_add_epi32(rank, rank), bit);
        }
    };

    static uint32_t abs_max_bits(const float* p, int64_t count) {
        const __m256i mask = _mm256_set1_epi32(0x7FFFFFFF);
        __m256i largest = _mm256_setzero_si256();
        for (int64_t i = 0; i < count; i += 8) {
            largest = _mm256_max_epu32(largest, _mm256_and_si256(load_bits(p + i), mask));
        }
        return largest_dword(largest);
    }
    template <typename T>  // both 16-bit formats order like their bits
    static uint32_t abs_max_bits(const T* p, int64_t count) {
        const __m256i mask = _mm256_set1_epi16(0x7FFF);
        __m256i largest = _mm256_setzero_si256();
        for (int64_t i = 0; i < count; i += 16) {
            largest = _mm256_max_epu16(largest, _mm256_and_si256(load_bits(p + i), mask));
        }
        return bits_from_float(to_float(T{largest_word(largest)}));
    }

    // 16 elements to 8 bytes of rank pairs, one per 32-bit lane.
    template <typename T>
    static __m256i rank_pairs(const T* in, __m256 inverse, const Ladder& ladder) {
        __m256 even, odd;
        load_pairs(in, even, odd);
        const __m256i high = ladder.negative_rank(_mm256_mul_ps(even, inverse));
        const __m256i low = ladder.negative_rank(_mm256_mul_ps(odd, inverse));
        const __m256i negative = _mm256_add_epi32(_mm256_slli_epi32(high, 4), low);
        return _mm256_sub_epi32(_mm256_setzero_si256(), negative);
    }

    template <typename T>
    static void unit(const T* in, float inverse, const Ladder& ladder, uint8_t* out) {
        const __m256 scale = _mm256_set1_ps(inverse);
        const __m256i a = rank_pairs(in, scale, ladder);
        const __m256i b = rank_pairs(in + 16, scale, ladder);
        // Packing works within 128-bit lanes: dwords become a0-3 b0-3 .. .. | a4-7 b4-7 .. ..
        const __m256i words = _mm256_packus_epi32(a, b);
        const __m256i bytes = _mm256_packus_epi16(words, words);
        const __m256i sorted =
            _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
        const __m128i codes = ranks_to_codes(_mm256_castsi256_si128(sorted), ladder.order);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), codes);
    }
};

}  // namespace

void quantize_avx2(const QuantizeArgs& args) {
    quantize_with<Avx2Ops>(args);
}

}  // namespace lowbit::cpu
