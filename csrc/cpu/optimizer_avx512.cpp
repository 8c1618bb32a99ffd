// Optimizer steps with AVX-512 (optimizer_kernel.h has the formulas).

#include "optimizer_kernel.h"
#include "vec_avx512.h"

namespace lowbit::cpu {
namespace {

struct Avx512Ops {
    using V = __m512;

    static V set(float x) {
        return _mm512_set1_ps(x);
    }
    template <typename T>
    static V load(const T* p) {
        return load16(p);
    }
    template <typename T>
    static void store(T* p, V x) {
        store16(p, x);
    }
    static V add(V x, V y) {
        return _mm512_add_ps(x, y);
    }
    static V sub(V x, V y) {
        return _mm512_sub_ps(x, y);
    }
    static V mul(V x, V y) {
        return _mm512_mul_ps(x, y);
    }
    static V div(V x, V y) {
        return _mm512_div_ps(x, y);
    }
    static V sqrt(V x) {
        return _mm512_sqrt_ps(x);
    }
    static V sign(V x) {
        const V zero = _mm512_setzero_ps(), one = _mm512_set1_ps(1.0f);
        const V positive = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, zero, _CMP_GT_OQ), one);
        return _mm512_mask_sub_ps(positive, _mm512_cmp_ps_mask(x, zero, _CMP_LT_OQ), positive, one);
    }

    // |x| orders like its bits, with NaN above everything.
    static V max_abs(V m, V x) {
        const __m512i bits =
            _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFFFFFF));
        return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(m), bits));
    }
    static float largest(V m) {
        return float_from_bits(_mm512_reduce_max_epu32(_mm512_castps_si512(m)));
    }

    static V decode(const uint8_t* codes, const float* codebook) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
        return _mm512_i32gather_ps(_mm512_cvtepu8_epi32(bytes), codebook, 4);
    }
    // The first five levels of the binary search look their threshold up in a register, the rest
    // gather it from memory.
    struct Search {
        static constexpr int kLevels = 5;
        const float* thresholds;
        __m512 level[kLevels];

        explicit Search(const float* t) : thresholds(t) {
            for (int k = 0; k < kLevels; ++k) {
                float lanes[16];
                for (int i = 0; i < 16; ++i)
                    lanes[i] = t[(i % (1 << k)) * (kCodes >> k) + (kCodes >> (k + 1)) - 1];
                level[k] = _mm512_loadu_ps(lanes);
            }
        }
    };
    static void encode(V x, const Search& search, uint8_t* codes) {
        __m512i code = _mm512_setzero_si512();
        const __m512i one = _mm512_set1_epi32(1);
        for (int k = 0; k < Search::kLevels; ++k) {
            const V bound = _mm512_permutexvar_ps(code, search.level[k]);
            code = _mm512_add_epi32(code, code);
            code = _mm512_mask_add_epi32(code, _mm512_cmp_ps_mask(x, bound, _CMP_GT_OQ), code, one);
        }
        code = _mm512_slli_epi32(code, 8 - Search::kLevels);
        for (int step = kCodes >> (Search::kLevels + 1); step > 0; step /= 2) {
            const V bound = _mm512_i32gather_ps(code, search.thresholds + step - 1, 4);
            code = _mm512_mask_add_epi32(
                code, _mm512_cmp_ps_mask(x, bound, _CMP_GT_OQ), code, _mm512_set1_epi32(step));
        }
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(code));
    }
};

}  // namespace

void optimizer_step_avx512(const StepArgs& args) {
    optimizer_step_with<Avx512Ops>(args);
}

}  // namespace lowbit::cpu
