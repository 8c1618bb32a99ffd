// Dequantize a 4-bit weight with AVX-512 (dequantize_kernel.h has the formula).
//
// A 512-bit permute looks 16 fp32 or 32 sixteen-bit entries up at once, so the 16 results of a
// block are one table register.

#include "dequantize_kernel.h"
#include "format_avx2.h"
#include "vec_avx512.h"

namespace lowbit::cpu {
namespace {

struct Codebook {
    __m512 values;
    explicit Codebook(const float* p) : values(_mm512_loadu_ps(p)) {}
};

template <typename T>
struct Table {
    __m512i words;  // 16 entries, twice
    Table(const Codebook& codebook, float scale) {
        const __m512 products = _mm512_mul_ps(codebook.values, _mm512_set1_ps(scale));
        words = _mm512_broadcast_i64x4(words16(T{}, products));
    }
};

template <>
struct Table<float> {
    __m512 values;
    Table(const Codebook& codebook, float scale)
        : values(_mm512_mul_ps(codebook.values, _mm512_set1_ps(scale))) {}
};

struct Avx512Ops {
    using Codebook = cpu::Codebook;
    template <typename T>
    using Table = cpu::Table<T>;

    template <bool kStream>
    static void store(void* p, __m512i value) {
        if (kStream) {
            _mm512_stream_si512(static_cast<__m512i*>(p), value);
        } else {
            _mm512_storeu_si512(p, value);
        }
    }

    template <bool kStream, typename T>
    static void unit(const uint8_t* bytes, const Table<T>& table, T* out) {
        const __m512i index = _mm512_cvtepu8_epi16(unpack_codes(bytes));
        store<kStream>(out, _mm512_permutexvar_epi16(index, table.words));
    }

    template <bool kStream>
    static void unit(const uint8_t* bytes, const Table<float>& table, float* out) {
        const __m256i index = unpack_codes(bytes);
        const __m512i a = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(index));
        const __m512i b = _mm512_cvtepu8_epi32(_mm256_extracti128_si256(index, 1));
        store<kStream>(out, _mm512_castps_si512(_mm512_permutexvar_ps(a, table.values)));
        store<kStream>(out + 16, _mm512_castps_si512(_mm512_permutexvar_ps(b, table.values)));
    }

    static void fence() {
        _mm_sfence();
    }
};

}  // namespace

void dequantize_avx512(const WeightView& w, Dtype dtype, void* out) {
    dequantize_with<Avx512Ops>(w, dtype, out);
}

}  // namespace lowbit::cpu
