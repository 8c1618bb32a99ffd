// The product of gemm.h in fp32 with AVX-512; 16-bit activations are converted while A is packed.

#include "decode_avx512.h"

namespace lowbit::cpu {
namespace {

// R rows of A against a 4-bit weight, 32 of its rows at a time, without a panel in between: decoding is the cost here, and the 2 R sums
// hide behind it.
template <int R>
void multiply_rows_4bit(const uint32_t* a_words, const WeightView& w, int64_t column, int panels,
                        int64_t begin, int64_t end, float* c, int64_t ldc, bool first) {
    const float* const a = reinterpret_cast<const float*>(a_words);
    const int64_t steps = end - begin;
    for (int p = 0; p < panels; p += 2, column += 32, c += 32) {
        __m512 sum[R][2];
        LOWBIT_UNROLL
        for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
        decode_rows(w, column, begin, steps,
                    [&](int64_t step, const __m512* even, const __m512* odd) {
                        LOWBIT_UNROLL
                        for (int r = 0; r < R; ++r) {
                            const float* const x = a + r * kChunk + step;
                            // Past the end there is no element of A, so nothing may be added.
                            const bool has_even = step < steps, has_odd = step + 1 < steps;
                            LOWBIT_UNROLL
                            for (int h = 0; h < 2; ++h) {
                                if (has_even) {
                                    sum[r][h] =
                                        _mm512_fmadd_ps(_mm512_set1_ps(x[0]), even[h], sum[r][h]);
                                }
                                if (has_odd) {
                                    sum[r][h] =
                                        _mm512_fmadd_ps(_mm512_set1_ps(x[1]), odd[h], sum[r][h]);
                                }
                            }
                        }
                    });
        LOWBIT_UNROLL
        for (int r = 0; r < R; ++r) {
            LOWBIT_UNROLL
            for (int h = 0; h < 2; ++h) {
                float* const out = c + r * ldc + h * kPanel;
                _mm512_store_ps(out, first ? sum[r][h] : _mm512_add_ps(_mm512_load_ps(out), sum[r][h]));
            }
        }
    }
}

void multiply_4bit(const uint32_t* a, int64_t rows, const WeightView& w, int64_t column, int panels,
                   int64_t begin, int64_t end, float* c, int64_t ldc, bool first) {
    switch (rows) {
        case 1:
            return multiply_rows_4bit<1>(a, w, column, panels, begin, end, c, ldc, first);
        case 2:
            return multiply_rows_4bit<2>(a, w, column, panels, begin, end, c, ldc, first);
        case 3:
            return multiply_rows_4bit<3>(a, w, column, panels, begin, end, c, ldc, first);
        default:
            return multiply_rows_4bit<4>(a, w, column, panels, begin, end, c, ldc, first);
    }
}

constexpr GemmKernels make_set() {
    GemmKernels k = kernel_set<VectorIsa<Fp32Words>>();
    k.direct_rows = 4;
    k.multiply_4bit = multiply_4bit;
    return k;
}

}  // namespace

constexpr GemmKernels kGemmAvx512 = make_set();

}  // namespace lowbit::cpu
