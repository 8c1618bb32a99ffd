// Inverted dropout, the part that is the same for every instruction set.
//
//     y[i] = keep(i) ? RN_dtype(x[i] * fp32(1 / (1 - p))) : 0
//     keep(i) = (word(i) >> 8) * 2^-24 >= fp32(p)
//
// word(i) is word i % 4 of Philox4x32-10 with key (low32(seed), high32(seed)) and counter
// (low32(c), high32(c), 0, 0), c = i / 4, where i is the flat index. The mask is never stored:
// backward computes it again. Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1,
// 2, 3".
//
// keep is decided in integers: (word >> 8) >= ceil(p * 2^24), the same set of words. Bound by the
// multiplies of Philox (20 per counter), not by memory.
//
// Ops, defined by each dropout*.cpp for its instruction set:
//     Ops::kUnit                               elements per step, a multiple of 4
//     Ops::unit(x, out, counter, parameters)   kUnit elements from flat index 4 * counter on
#pragma once

#include <cmath>

#include "dropout.h"

namespace lowbit::cpu {
namespace {

constexpr int kRounds = 10;
constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

struct DropoutParameters {
    uint32_t key0[kRounds], key1[kRounds];
    int32_t threshold;  // keep iff (word >> 8) >= threshold, 1 .. 2^24
    float scale;

    explicit DropoutParameters(const DropoutArgs& args)
        : scale(static_cast<float>(1.0 / (1.0 - args.p))) {
        const double p = static_cast<float>(args.p);  // times 2^24 exact in double
        threshold = static_cast<int32_t>(std::ceil(p * 0x1p24));
        const uint64_t seed = static_cast<uint64_t>(args.seed);
        for (uint32_t round = 0; round < kRounds; ++round) {
            key0[round] = static_cast<uint32_t>(seed) + round * kWeyl0;
            key1[round] = static_cast<uint32_t>(seed >> 32) + round * kWeyl1;
        }
    }
};

inline void philox(uint64_t counter, const DropoutParameters& parameters, uint32_t words[4]) {
    uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
    uint32_t c2 = 0, c3 = 0;
    for (int round = 0; round < kRounds; ++round) {
        const uint64_t product0 = uint64_t{c0} * kMultiplier0;
        const uint64_t product1 = uint64_t{c2} * kMultiplier1;
        c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ parameters.key0[round];
        c1 = static_cast<uint32_t>(product1);
        c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ parameters.key1[round];
        c3 = static_cast<uint32_t>(product0);
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
}

// Any `count` elements from flat index `first` on, one counter at a time: ends of ranges, and the
// whole portable kernel.
template <typename T>
void dropout_scalar(
    const T* x, T* out, uint64_t first, int64_t count, const DropoutParameters& parameters) {
    int64_t i = 0;
    while (i < count) {
        uint32_t words[4];
        philox((first + i) / 4, parameters, words);
        for (uint64_t j = (first + i) % 4; j < 4 && i < count; ++j, ++i) {
            const bool keep = static_cast<int32_t>(words[j] >> 8) >= parameters.threshold;
            store_float(out + i, keep ? to_float(x[i]) * parameters.scale : 0.0f);
        }
    }
}

template <typename Ops, typename T>
void dropout_typed(
    const void* in, uint64_t first, int64_t count, const DropoutArgs& args, void* result) {
    const DropoutParameters parameters(args);
    const T* x = static_cast<const T*>(in);
    T* out = static_cast<T*>(result);
    const int64_t to_counter = static_cast<int64_t>((4 - first % 4) % 4);
    int64_t i = min64(to_counter, count);
    dropout_scalar(x, out, first, i, parameters);
    for (; i + Ops::kUnit <= count; i += Ops::kUnit) {
        Ops::unit(x + i, out + i, (first + i) / 4, parameters);
    }
    dropout_scalar(x + i, out + i, first + i, count - i, parameters);
}

template <typename Ops>
void dropout_with(
    const void* x, Dtype dtype, uint64_t first, int64_t count, const DropoutArgs& args, void* out) {
    with_type(dtype, [&](auto element) {
        dropout_typed<Ops, decltype(element)>(x, first, count, args, out);
    });
}

}  // namespace

#if LOWBIT_CPU_X86
void dropout_avx2(
    const void* x, Dtype dtype, uint64_t first, int64_t count, const DropoutArgs& args, void* out);
void dropout_avx512(
    const void* x, Dtype dtype, uint64_t first, int64_t count, const DropoutArgs& args, void* out);
#endif

}  // namespace lowbit::cpu
