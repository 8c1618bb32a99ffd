// Optimizer steps with AVX2 (optimizer_kernel.h has the formulas): 16 lanes in two registers.

#include "optimizer_kernel.h"
#include "vec_avx2.h"

namespace lowbit::cpu {
namespace {

struct Avx2Ops {
    struct V {
        __m256 a, b;
    };

    static V set(float x) {
        return {_mm256_set1_ps(x), _mm256_set1_ps(x)};
    }
    template <typename T>
    static V load(const T* p) {
        return {load8(p), load8(p + 8)};
    }
    template <typename T>
    static void store(T* p, V x) {
        store16(p, x.a, x.b);
    }
    static V add(V x, V y) {
        return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
    }
    static V sub(V x, V y) {
        return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
    }
    static V mul(V x, V y) {
        return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
    }
    static V div(V x, V y) {
        return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
    }
    static V sqrt(V x) {
        return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)};
    }

    static __m256 sign8(__m256 x) {
        const __m256 zero = _mm256_setzero_ps(), one = _mm256_set1_ps(1.0f);
        const __m256 positive = _mm256_and_ps(_mm256_cmp_ps(x, zero, _CMP_GT_OQ), one);
        const __m256 negative = _mm256_and_ps(_mm256_cmp_ps(x, zero, _CMP_LT_OQ), one);
        return _mm256_sub_ps(positive, negative);
    }
    static V sign(V x) {
        return {sign8(x.a), sign8(x.b)};
    }

    // |x| orders like its bits, with NaN above everything.
    static __m256 max_abs8(__m256 m, __m256 x) {
        const __m256i bits =
            _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7FFFFFFF));
        return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(m), bits));
    }
    static V max_abs(V m, V x) {
        return {max_abs8(m.a, x.a), max_abs8(m.b, x.b)};
    }
    static float largest(V m) {
        const __m256i both = _mm256_max_epu32(_mm256_castps_si256(m.a), _mm256_castps_si256(m.b));
        uint32_t lanes[8], most = 0;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), both);
        for (const uint32_t lane : lanes)
            most = lane > most ? lane : most;
        return float_from_bits(most);
    }

    static V decode(const uint8_t* codes, const float* codebook) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
        const __m256i low = _mm256_cvtepu8_epi32(bytes);
        const __m256i high = _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8));
        return {_mm256_i32gather_ps(codebook, low, 4), _mm256_i32gather_ps(codebook, high, 4)};
    }

    // The first four levels of the binary search look their threshold up in a register, the rest
    // gather it from memory.
    struct Search {
        static constexpr int kLevels = 4;
        const float* thresholds;
        __m256 level[kLevels];

        explicit Search(const float* t) : thresholds(t) {
            for (int k = 0; k < kLevels; ++k) {
                float lanes[8];
                for (int i = 0; i < 8; ++i)
                    lanes[i] = t[(i % (1 << k)) * (kCodes >> k) + (kCodes >> (k + 1)) - 1];
                level[k] = _mm256_loadu_ps(lanes);
            }
        }
    };
    static __m256i above(__m256 x, __m256 bound) {  // -1 where it is
        return _mm256_castps_si256(_mm256_cmp_ps(x, bound, _CMP_GT_OQ));
    }
    static __m256i rank8(__m256 x, const Search& search) {
        __m256i code = _mm256_setzero_si256();
        for (int k = 0; k < Search::kLevels; ++k) {
            const __m256 bound = _mm256_permutevar8x32_ps(search.level[k], code);
            code = _mm256_sub_epi32(_mm256_add_epi32(code, code), above(x, bound));
        }
        code = _mm256_slli_epi32(code, 8 - Search::kLevels);
        for (int step = kCodes >> (Search::kLevels + 1); step > 0; step /= 2) {
            const __m256 bound = _mm256_i32gather_ps(search.thresholds + step - 1, code, 4);
            code =
                _mm256_add_epi32(code, _mm256_and_si256(above(x, bound), _mm256_set1_epi32(step)));
        }
        return code;
    }
    static void encode(V x, const Search& search, uint8_t* codes) {
        const __m256i words = _mm256_packus_epi32(rank8(x.a, search), rank8(x.b, search));
        // Packing works within 128-bit lanes: a0-3 b0-3 | a4-7 b4-7.
        const __m256i sorted = _mm256_permute4x64_epi64(words, 0xD8);
        const __m128i bytes =
            _mm_packus_epi16(_mm256_castsi256_si128(sorted), _mm256_extracti128_si256(sorted, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), bytes);
    }
};

}  // namespace

void optimizer_step_avx2(const StepArgs& args) {
    optimizer_step_with<Avx2Ops>(args);
}

}  // namespace lowbit::cpu
