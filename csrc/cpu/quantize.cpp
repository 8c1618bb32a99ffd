// Blockwise 4-bit quantization: dispatch, and the portable kernel (quantize_kernel.h has the
// formula).
//
// The search walks the 15 thresholds as a binary tree: four compares without a branch, and the path
// read as a binary number is the rank.

#include "quantize_kernel.h"

namespace lowbit::cpu {
namespace {

struct GenericOps {
    struct Ladder {
        Tree tree;
        uint8_t order[16];

        Ladder(const float* thresholds, const uint8_t* codes) : tree(thresholds) {
            std::memcpy(order, codes, sizeof(order));
        }

        uint8_t code(float x) const {
            int node = 1;
            for (int level = 0; level < 4; ++level)
                node = 2 * node + (x > tree.node[node]);
            return order[node - 16];
        }
    };

    static uint32_t abs_max_bits(const float* p, int64_t count) {
        int32_t largest = 0;  // signed compares are what SSE2 has; the sign bit is masked off
        for (int64_t i = 0; i < count; ++i) {
            const int32_t bits = static_cast<int32_t>(bits_from_float(p[i]) & 0x7FFFFFFFu);
            largest = bits > largest ? bits : largest;
        }
        return static_cast<uint32_t>(largest);
    }
    template <typename T>
    static uint32_t abs_max_bits(const T* p, int64_t count) {
        int16_t largest = 0;
        for (int64_t i = 0; i < count; ++i) {
            const int16_t bits = static_cast<int16_t>(p[i].bits & 0x7FFF);
            largest = bits > largest ? bits : largest;
        }
        return bits_from_float(to_float(T{static_cast<uint16_t>(largest)}));
    }

    template <typename T>
    static void unit(const T* in, float inverse, const Ladder& ladder, uint8_t* out) {
        for (int64_t i = 0; i < kUnit / 2; ++i) {
            const uint8_t high = ladder.code(to_float(in[2 * i]) * inverse);
            const uint8_t low = ladder.code(to_float(in[2 * i + 1]) * inverse);
            out[i] = static_cast<uint8_t>(high << 4 | low);
        }
    }
};

}  // namespace

void launch_quantize(const QuantizeArgs& args) {
#if LOWBIT_CPU_X86
    const Isa isa = current_isa();
    if (isa >= Isa::kAvx512)
        return quantize_avx512(args);
    if (isa >= Isa::kAvx2)
        return quantize_avx2(args);
#endif
    quantize_with<GenericOps>(args);
}

}  // namespace lowbit::cpu
