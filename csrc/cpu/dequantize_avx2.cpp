// Dequantize a 4-bit weight with AVX2 (dequantize_kernel.h has the formula).
//
// 16-bit outputs: the 16 results of a block become two 16-byte tables, low and high bytes, and a
// byte shuffle looks up 32 codes in each; interleaving the two gives the elements. fp32: two
// 8-entry permutes and a blend on bit 3 of the code.

#include "dequantize_kernel.h"
#include "format_avx2.h"
#include "vec_avx2.h"

namespace lowbit::cpu {
namespace {

struct Codebook {
    __m256 first, second;
    explicit Codebook(const float* p) : first(load8(p)), second(load8(p + 8)) {}
};

template <typename T>
struct Table {
    __m256i low_bytes, high_bytes;  // each 16 entries, in both 128-bit lanes

    Table(const Codebook& codebook, float scale) {
        const __m256 s = _mm256_set1_ps(scale);
        const __m256i words =
            words16(T{}, _mm256_mul_ps(codebook.first, s), _mm256_mul_ps(codebook.second, s));
        const __m256i low = _mm256_and_si256(words, _mm256_set1_epi16(0xFF));
        const __m256i high = _mm256_srli_epi16(words, 8);
        // Packing works within 128-bit lanes: bytes l0-7 h0-7 | l8-15 h8-15.
        const __m256i bytes = _mm256_packus_epi16(low, high);
        low_bytes = _mm256_permute4x64_epi64(bytes, 0x88);   // 64-bit units 0 2 0 2
        high_bytes = _mm256_permute4x64_epi64(bytes, 0xDD);  // 64-bit units 1 3 1 3
    }
};

template <>
struct Table<float> {
    __m256 first, second;

    Table(const Codebook& codebook, float scale)
        : first(_mm256_mul_ps(codebook.first, _mm256_set1_ps(scale))),
          second(_mm256_mul_ps(codebook.second, _mm256_set1_ps(scale))) {}

    __m256 look_up(__m256i index) const {
        // blendv selects by the sign bit: move bit 3 of the code there.
        const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        return _mm256_blendv_ps(
            _mm256_permutevar8x32_ps(first, index), _mm256_permutevar8x32_ps(second, index), bit3);
    }
};

struct Avx2Ops {
    using Codebook = cpu::Codebook;
    template <typename T>
    using Table = cpu::Table<T>;

    template <bool kStream>
    static void store(void* p, __m256i value) {
        if (kStream) {
            _mm256_stream_si256(static_cast<__m256i*>(p), value);
        } else {
            _mm256_storeu_si256(static_cast<__m256i*>(p), value);
        }
    }

    template <bool kStream, typename T>
    static void unit(const uint8_t* bytes, const Table<T>& table, T* out) {
        const __m256i index = unpack_codes(bytes);
        const __m256i low = _mm256_shuffle_epi8(table.low_bytes, index);
        const __m256i high = _mm256_shuffle_epi8(table.high_bytes, index);
        const __m256i a = _mm256_unpacklo_epi8(low, high);  // elements 0-7 and 16-23
        const __m256i b = _mm256_unpackhi_epi8(low, high);  // elements 8-15 and 24-31
        store<kStream>(out, _mm256_permute2x128_si256(a, b, 0x20));
        store<kStream>(out + 16, _mm256_permute2x128_si256(a, b, 0x31));
    }

    template <bool kStream>
    static void unit(const uint8_t* bytes, const Table<float>& table, float* out) {
        const __m256i index = unpack_codes(bytes);
        const __m128i halves[2] = {
            _mm256_castsi256_si128(index), _mm256_extracti128_si256(index, 1)};
        for (int i = 0; i < 2; ++i) {
            const __m256i a = _mm256_cvtepu8_epi32(halves[i]);
            const __m256i b = _mm256_cvtepu8_epi32(_mm_srli_si128(halves[i], 8));
            store<kStream>(out + 16 * i, _mm256_castps_si256(table.look_up(a)));
            store<kStream>(out + 16 * i + 8, _mm256_castps_si256(table.look_up(b)));
        }
    }

    static void fence() {
        _mm_sfence();
    }
};

}  // namespace

void dequantize_avx2(const WeightView& w, Dtype dtype, void* out) {
    dequantize_with<Avx2Ops>(w, dtype, out);
}

}  // namespace lowbit::cpu
