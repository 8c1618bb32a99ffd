// AdamW and Lion over all tensors of a slab, the part that is the same for every instruction set.
//
//     g = sign * gradient / grad_scale          p = decay * parameter
//     AdamW:  m += (1 - beta1) (g - m)          v = beta2 v + (1 - beta2) g g
//             p -= step_size * m / (sqrt(v) / correction + eps)
//     Lion:   p -= step_size * sign(beta1 m + (1 - beta1) g)          m = beta2 m + (1 - beta2) g
//     8-bit:  m = codebook[code] * scale of its block of 256; then the new scale is max |m|, and
//             the new code the nearest value's, #{j : m / scale > thresholds[j]}
//
// Parameters and gradients fp32, bf16 or fp16; state in the slab at each tensor's offset, padded to
// whole blocks. All arithmetic is fp32, every operation rounded by itself and in the order of
// torch.optim.AdamW (build with -ffp-contract=off), so that results equal torch's and the GPU's;
// the parameter is rounded to its type once, at the end.
//
// Threads take chunks of 4096 elements. A block of 256 lies in fp32 on the stack between its passes
// and stays in L1. Bound by memory with fp32 state, by the gathers of the search over 255
// thresholds with 8-bit state.
//
// Ops, defined by each optimizer*.cpp for its instruction set, on vectors V of 16 fp32 lanes:
//     set, load, store (any element type), add, sub, mul, div, sqrt, sign
//     max_abs(a, x)                   lanes' larger |bits|, NaN above all; largest(a) reduces it
//     decode(codes, codebook)         16 values
//     Search(thresholds)              in the form the search wants
//     encode(x, search, codes)        16 codes
#pragma once

#include "dropout_kernel.h"
#include "optimizer.h"

namespace lowbit::cpu {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kCodes = 256;
constexpr float kScaleFloor = 1e-38f;  // ABSMAX_FLOOR of lowbit/reference.py: 1 / floor is finite

template <typename Ops>
struct AdamW {
    using V = typename Ops::V;
    static constexpr int kStates = 2;

    static void update(V g, V& p, V (&state)[kStates], const StepNumbers& n) {
        V &m = state[0], &v = state[1];
        const V w = Ops::set(n.one_minus_beta1);
        m = n.one_minus_beta1 < 0.5f  // torch.lerp: exact at both ends
                ? Ops::add(m, Ops::mul(w, Ops::sub(g, m)))
                : Ops::sub(g, Ops::mul(Ops::sub(g, m), Ops::set(n.beta1)));
        v = Ops::add(
            Ops::mul(v, Ops::set(n.beta2)), Ops::mul(Ops::mul(Ops::set(n.one_minus_beta2), g), g));
        const V root = Ops::div(Ops::sqrt(v), Ops::set(n.correction));
        const V step =
            Ops::div(Ops::mul(Ops::set(n.step_size), m), Ops::add(root, Ops::set(n.eps)));
        p = Ops::sub(Ops::mul(p, Ops::set(n.decay)), step);
    }
};

template <typename Ops>
struct Lion {
    using V = typename Ops::V;
    static constexpr int kStates = 1;

    static void update(V g, V& p, V (&state)[kStates], const StepNumbers& n) {
        V& m = state[0];
        const V u =
            Ops::add(Ops::mul(m, Ops::set(n.beta1)), Ops::mul(Ops::set(n.one_minus_beta1), g));
        p = Ops::sub(Ops::mul(p, Ops::set(n.decay)), Ops::mul(Ops::set(n.step_size), Ops::sign(u)));
        m = Ops::add(Ops::mul(m, Ops::set(n.beta2)), Ops::mul(Ops::set(n.one_minus_beta2), g));
    }
};

// ---- 8-bit state --------------------------------------------------------------------------------

template <typename Ops>
void decode_block(const uint8_t* codes, float scale, const float* codebook, float* x) {
    for (int64_t i = 0; i < kStateBlock; i += kLanes)
        Ops::store(x + i, Ops::mul(Ops::decode(codes + i, codebook), Ops::set(scale)));
}

template <typename Ops>
void encode_block(
    const float* x, const float* thresholds, bool is_square, uint8_t* codes, float* scale) {
    typename Ops::V maximum = Ops::set(0.0f);
    for (int64_t i = 0; i < kStateBlock; i += kLanes)
        maximum = Ops::max_abs(maximum, Ops::load(x + i));
    *scale = Ops::largest(maximum);
    const float inverse = 1.0f / (*scale < kScaleFloor ? kScaleFloor : *scale);
    const typename Ops::Search search(thresholds);
    for (int64_t i = 0; i < kStateBlock; i += kLanes)
        Ops::encode(Ops::mul(Ops::load(x + i), Ops::set(inverse)), search, codes + i);
    // A square that became 0 would turn the next update into m / eps.
    if (is_square) {
        for (int64_t i = 0; i < kStateBlock; ++i)
            codes[i] = codes[i] == 0 && x[i] > 0.0f ? 1 : codes[i];
    }
}

// ---- stochastic rounding ------------------------------------------------------------------------

// To a bf16 value next to x, up with the probability that makes the mean x: adds 16 random bits
// below the last place and truncates. Element i of all takes word i % 4 of counter
// (step << 40) + i / 4. NaN and Inf stay what they are.
inline void round_randomly(
    float* p, int64_t count, uint64_t first, uint64_t step, const DropoutParameters& key) {
    uint32_t words[4];
    for (int64_t i = 0; i < count; ++i) {  // a block starts at a multiple of 4
        if (i % 4 == 0)
            philox((step << 40) + (first + i) / 4, key, words);
        const uint32_t bits = bits_from_float(p[i]);
        if ((bits & 0x7F800000u) != 0x7F800000u)
            p[i] = float_from_bits((bits + (words[i % 4] >> 16)) & 0xFFFF0000u);
    }
}

// ---- the step -----------------------------------------------------------------------------------

// One block: `count` <= 256 elements of a tensor.
template <typename Ops, typename Rule, typename T>
void step_block(
    const StepArgs& a,
    const StepNumbers& n,
    T* parameter,
    const T* gradient,
    int64_t count,
    int64_t block,
    uint64_t position,
    const DropoutParameters& key) {
    using V = typename Ops::V;
    T tail_p[kStateBlock], tail_g[kStateBlock];
    T* p = parameter;
    if (count < kStateBlock) {  // the padding has gradient 0, so that its state stays 0
        std::memset(static_cast<void*>(tail_p), 0, sizeof(tail_p));
        std::memset(static_cast<void*>(tail_g), 0, sizeof(tail_g));
        std::memcpy(static_cast<void*>(tail_p), parameter, count * sizeof(T));
        std::memcpy(static_cast<void*>(tail_g), gradient, count * sizeof(T));
        p = tail_p, gradient = tail_g;
    }
    float decoded[Rule::kStates][kStateBlock];
    float* moments[Rule::kStates];
    for (int s = 0; s < Rule::kStates; ++s) {
        const int64_t at = s * a.elements + block * kStateBlock;
        const int64_t scale = s * (a.elements / kStateBlock) + block;
        moments[s] = a.scales ? decoded[s] : static_cast<float*>(a.values) + at;
        if (a.scales) {
            const uint8_t* codes = static_cast<const uint8_t*>(a.values) + at;
            decode_block<Ops>(codes, a.scales[scale], a.tables + s * 2 * kCodes, decoded[s]);
        }
    }
    float rounded[kStateBlock];
    const V sign = Ops::set(n.sign), grad_scale = Ops::set(a.grad_scale);
    for (int64_t i = 0; i < kStateBlock; i += kLanes) {
        V g = Ops::load(gradient + i), x = Ops::load(p + i), state[Rule::kStates];
        for (int s = 0; s < Rule::kStates; ++s)
            state[s] = Ops::load(moments[s] + i);
        if (a.grad_scale != 1.0f)
            g = Ops::div(g, grad_scale);
        Rule::update(Ops::mul(g, sign), x, state, n);
        for (int s = 0; s < Rule::kStates; ++s)
            Ops::store(moments[s] + i, state[s]);
        if (a.stochastic)
            Ops::store(rounded + i, x);
        else
            Ops::store(p + i, x);
    }
    if (a.stochastic) {
        round_randomly(rounded, count, position, static_cast<uint64_t>(n.step), key);
        for (int64_t i = 0; i < count; ++i)
            store_float(p + i, rounded[i]);
    }
    if (count < kStateBlock)
        std::memcpy(static_cast<void*>(parameter), tail_p, count * sizeof(T));
    for (int s = 0; a.scales && s < Rule::kStates; ++s) {
        const int64_t scale = s * (a.elements / kStateBlock) + block;
        uint8_t* codes = static_cast<uint8_t*>(a.values) + s * a.elements + block * kStateBlock;
        const float* thresholds = a.tables + (s * 2 + 1) * kCodes;
        encode_block<Ops>(decoded[s], thresholds, s == 1, codes, a.scales + scale);
    }
}

template <typename Ops, typename Rule, typename T>
void step_tensors(const StepArgs& a) {
    const DropoutParameters key(DropoutArgs{0.0, static_cast<int64_t>(a.seed)});
    parallel_for(0, a.chunks, 2, [&](int64_t first_chunk, int64_t last_chunk) {
        for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
            const int64_t t = row_of_chunk(a.rows, a.tensors, chunk);
            const TensorRow& row = a.rows[t];
            if (a.pointers[t].gradient == nullptr)
                continue;
            const int64_t begin = (chunk - row.first_chunk) * kStepChunk;
            const int64_t end = min64(begin + kStepChunk, row.count);
            for (int64_t i = begin; i < end; i += kStateBlock) {
                step_block<Ops, Rule>(
                    a, a.numbers[t], static_cast<T*>(a.pointers[t].parameter) + i,
                    static_cast<const T*>(a.pointers[t].gradient) + i, min64(kStateBlock, end - i),
                    (row.offset + i) / kStateBlock, static_cast<uint64_t>(row.position + i), key);
            }
        }
    });
}

template <typename Ops, typename T>
void step_typed(const StepArgs& args) {
    if (args.algorithm == Algorithm::kAdamW)
        step_tensors<Ops, AdamW<Ops>, T>(args);
    else
        step_tensors<Ops, Lion<Ops>, T>(args);
}

template <typename Ops>
void optimizer_step_with(const StepArgs& args) {
    with_type(args.dtype, [&](auto element) { step_typed<Ops, decltype(element)>(args); });
}

}  // namespace

#if LOWBIT_CPU_X86
void optimizer_step_avx2(const StepArgs& args);
void optimizer_step_avx512(const StepArgs& args);
#endif

}  // namespace lowbit::cpu
