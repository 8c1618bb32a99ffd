// Optimizer steps: the numbers of a step, dispatch, the portable kernel (optimizer_kernel.h has the
// formulas), and the norm and scaling of gradients.

#include <cmath>

#include "optimizer_kernel.h"

namespace lowbit::cpu {
namespace {

struct GenericOps {
    struct V {
        float lane[kLanes];
    };

    template <typename F>
    static V each(const F& fn) {
        V out;
        for (int64_t i = 0; i < kLanes; ++i)
            out.lane[i] = fn(i);
        return out;
    }
    static V set(float x) {
        return each([&](int64_t) { return x; });
    }
    template <typename T>
    static V load(const T* p) {
        return each([&](int64_t i) { return to_float(p[i]); });
    }
    template <typename T>
    static void store(T* p, const V& x) {
        for (int64_t i = 0; i < kLanes; ++i)
            store_float(p + i, x.lane[i]);
    }
    static V add(const V& x, const V& y) {
        return each([&](int64_t i) { return x.lane[i] + y.lane[i]; });
    }
    static V sub(const V& x, const V& y) {
        return each([&](int64_t i) { return x.lane[i] - y.lane[i]; });
    }
    static V mul(const V& x, const V& y) {
        return each([&](int64_t i) { return x.lane[i] * y.lane[i]; });
    }
    static V div(const V& x, const V& y) {
        return each([&](int64_t i) { return x.lane[i] / y.lane[i]; });
    }
    static V sqrt(const V& x) {
        return each([&](int64_t i) { return std::sqrt(x.lane[i]); });
    }
    static V sign(const V& x) {
        return each(
            [&](int64_t i) { return static_cast<float>((x.lane[i] > 0.0f) - (x.lane[i] < 0.0f)); });
    }
    static V max_abs(const V& m, const V& x) {
        return each([&](int64_t i) {
            const uint32_t most = bits_from_float(m.lane[i]);
            const uint32_t bits = bits_from_float(x.lane[i]) & 0x7FFFFFFFu;
            return float_from_bits(bits > most ? bits : most);
        });
    }
    static float largest(const V& m) {
        uint32_t most = 0;
        for (const float lane : m.lane)
            most = bits_from_float(lane) > most ? bits_from_float(lane) : most;
        return float_from_bits(most);
    }
    static V decode(const uint8_t* codes, const float* codebook) {
        return each([&](int64_t i) { return codebook[codes[i]]; });
    }
    struct Search {
        const float* thresholds;
        explicit Search(const float* t) : thresholds(t) {}
    };
    static void encode(const V& x, const Search& search, uint8_t* codes) {
        for (int64_t i = 0; i < kLanes; ++i) {
            int code = 0;
            for (int step = kCodes / 2; step > 0; step /= 2)
                code += x.lane[i] > search.thresholds[code + step - 1] ? step : 0;
            codes[i] = static_cast<uint8_t>(code);
        }
    }
};

// fn(data, count) for the part of a gradient that chunk covers, in its own type.
template <typename F>
void with_chunk(const GradientRow* rows, int64_t tensors, int64_t chunk, const F& fn) {
    const GradientRow& row = rows[row_of_chunk(rows, tensors, chunk)];
    const int64_t begin = (chunk - row.first_chunk) * kStepChunk;
    const int64_t count = min64(kStepChunk, row.count - begin);
    with_type(static_cast<Dtype>(row.dtype), [&](auto element) {
        fn(static_cast<decltype(element)*>(row.data) + begin, count);
    });
}

}  // namespace

StepNumbers step_numbers(const GroupNumbers& g, Algorithm algorithm, double step) {
    const bool adam = algorithm == Algorithm::kAdamW;
    StepNumbers n{};
    n.decay = static_cast<float>(1.0 - g.lr * g.weight_decay);
    n.beta1 = static_cast<float>(g.beta1);
    n.one_minus_beta1 = static_cast<float>(1.0 - g.beta1);
    n.beta2 = static_cast<float>(g.beta2);
    n.one_minus_beta2 = static_cast<float>(1.0 - g.beta2);
    n.step_size = static_cast<float>(adam ? g.lr / (1.0 - std::pow(g.beta1, step)) : g.lr);
    n.correction = static_cast<float>(adam ? std::sqrt(1.0 - std::pow(g.beta2, step)) : 1.0);
    n.eps = static_cast<float>(g.eps);
    n.sign = static_cast<float>(g.sign);
    n.step = static_cast<float>(step);
    return n;
}

void launch_optimizer_step(const StepArgs& args) {
#if LOWBIT_CPU_X86
    const Isa isa = current_isa();
    if (isa >= Isa::kAvx512)
        return optimizer_step_avx512(args);
    if (isa >= Isa::kAvx2)
        return optimizer_step_avx2(args);
#endif
    optimizer_step_with<GenericOps>(args);
}

double launch_gradient_squares(
    const GradientRow* rows, int64_t tensors, int64_t chunks, double* partial_sums) {
    parallel_for(0, chunks, 8, [&](int64_t first, int64_t last) {
        for (int64_t chunk = first; chunk < last; ++chunk) {
            with_chunk(rows, tensors, chunk, [&](const auto* data, int64_t count) {
                double sums[8] = {};  // so many that the additions of one do not wait
                int64_t i = 0;
                for (; i + 8 <= count; i += 8) {
                    for (int64_t j = 0; j < 8; ++j) {
                        const double x = to_float(data[i + j]);
                        sums[j] += x * x;
                    }
                }
                for (; i < count; ++i) {
                    const double x = to_float(data[i]);
                    sums[0] += x * x;
                }
                partial_sums[chunk] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) +
                                      ((sums[4] + sums[5]) + (sums[6] + sums[7]));
            });
        }
    });
    double total = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
        total += partial_sums[chunk];
    return total;
}

void launch_scale_gradients(
    const GradientRow* rows, int64_t tensors, int64_t chunks, float factor) {
    parallel_for(0, chunks, 8, [&](int64_t first, int64_t last) {
        for (int64_t chunk = first; chunk < last; ++chunk) {
            with_chunk(rows, tensors, chunk, [&](auto* data, int64_t count) {
                for (int64_t i = 0; i < count; ++i)
                    store_float(data + i, to_float(data[i]) * factor);
            });
        }
    });
}

}  // namespace lowbit::cpu
