// Dequantize a 4-bit weight: dispatch, and the portable kernel (dequantize_kernel.h has the
// formula).

#include "dequantize_kernel.h"

namespace lowbit::cpu {
namespace {

struct GenericOps {
    struct Codebook {
        const float* values;
        explicit Codebook(const float* codebook) : values(codebook) {}
    };

    template <typename T>
    struct Table {
        T values[16];
        Table(const Codebook& codebook, float scale) {
            for (int i = 0; i < 16; ++i)
                store_float(values + i, codebook.values[i] * scale);
        }
    };

    template <bool kStream, typename T>
    static void unit(const uint8_t* bytes, const Table<T>& table, T* out) {
        for (int64_t i = 0; i < kUnit / 2; ++i) {
            out[2 * i] = table.values[bytes[i] >> 4];
            out[2 * i + 1] = table.values[bytes[i] & 0x0F];
        }
    }

    static void fence() {}
};

}  // namespace

void launch_dequantize(const WeightView& weight, Dtype dtype, void* out) {
#if LOWBIT_CPU_X86
    const Isa isa = current_isa();
    if (isa >= Isa::kAvx512)
        return dequantize_avx512(weight, dtype, out);
    if (isa >= Isa::kAvx2)
        return dequantize_avx2(weight, dtype, out);
#endif
    dequantize_with<GenericOps>(weight, dtype, out);
}

}  // namespace lowbit::cpu
