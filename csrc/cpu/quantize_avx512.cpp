// Blockwise 4-bit quantization for AVX-512 (quantize_kernel.h has the formula).
//
// The 15 thresholds sit in one register as a binary tree. Each of the four search steps is a
// permute, a compare into a mask, and node = 2 * node + mask. The permute reads the low four bits
// of its index, so the last node, 16 + rank, needs no table: rank = node & 15.

#include "format_avx2.h"
#include "quantize_kernel.h"
#include "vec_avx512.h"

namespace lowbit::cpu {
namespace {

struct Avx512Ops {
    struct Ladder {
        __m512 tree;
        __m128i order;

        Ladder(const float* thresholds, const uint8_t* codes)
            : tree(_mm512_loadu_ps(Tree(thresholds).node)),
              order(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))) {}

        __m512i rank(__m512 x) const {
            const __m512i one = _mm512_set1_epi32(1);
            __m512i node = one;
            for (int level = 0; level < 4; ++level) {
                const __m512 threshold = _mm512_permutexvar_ps(node, tree);
                const __mmask16 above = _mm512_cmp_ps_mask(x, threshold, _CMP_GT_OQ);
                node = _mm512_add_epi32(node, node);
                node = _mm512_mask_add_epi32(node, above, node, one);
            }
            return _mm512_and_si512(node, _mm512_set1_epi32(15));
        }
    };

    static uint32_t abs_max_bits(const float* p, int64_t count) {
        const __m512i mask = _mm512_set1_epi32(0x7FFFFFFF);
        __m512i largest = _mm512_setzero_si512();
        for (int64_t i = 0; i < count; i += 16) {
            const __m512i bits = _mm512_loadu_si512(p + i);
            largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, mask));
        }
        return largest_dword(_mm256_max_epu32(
            _mm512_castsi512_si256(largest), _mm512_extracti64x4_epi64(largest, 1)));
    }
    template <typename T>  // both 16-bit formats order like their bits
    static uint32_t abs_max_bits(const T* p, int64_t count) {
        const __m512i mask = _mm512_set1_epi16(0x7FFF);
        __m512i largest = _mm512_setzero_si512();
        for (int64_t i = 0; i < count; i += 32) {
            const __m512i bits = _mm512_loadu_si512(p + i);
            largest = _mm512_max_epu16(largest, _mm512_and_si512(bits, mask));
        }
        const __m256i half = _mm256_max_epu16(
            _mm512_castsi512_si256(largest), _mm512_extracti64x4_epi64(largest, 1));
        return bits_from_float(to_float(T{largest_word(half)}));
    }

    template <typename T>
    static void unit(const T* in, float inverse, const Ladder& ladder, uint8_t* out) {
        const __m512 scale = _mm512_set1_ps(inverse);
        __m512 even, odd;
        load_pairs(in, even, odd);
        const __m512i high = ladder.rank(_mm512_mul_ps(even, scale));
        const __m512i low = ladder.rank(_mm512_mul_ps(odd, scale));
        const __m512i pairs = _mm512_or_si512(_mm512_slli_epi32(high, 4), low);
        const __m128i codes = ranks_to_codes(_mm512_cvtepi32_epi8(pairs), ladder.order);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), codes);
    }
};

}  // namespace

void quantize_avx512(const QuantizeArgs& args) {
    quantize_with<Avx512Ops>(args);
}

}  // namespace lowbit::cpu
