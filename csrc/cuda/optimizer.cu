// AdamW and Lion over all tensors of a slab in one launch, with fp32 or 8-bit blockwise state.
//
//     g = sign * gradient / grad_scale          p = decay * parameter
//     AdamW:  m += (1 - beta1) (g - m)          v = beta2 v + (1 - beta2) g g
//             p -= step_size * m / (sqrt(v) / correction + eps)
//     Lion:   p -= step_size * sign(beta1 m + (1 - beta1) g)          m = beta2 m + (1 - beta2) g
//     8-bit:  m = codebook[code] * scale of its block of 256; then the new scale is max |m|, and
//             the new code the nearest value's, #{j : m / scale > thresholds[j]}
//
// Parameters and gradients fp32, bf16 or fp16, anywhere in memory; state in the slab at each
// tensor's offset, padded to whole blocks (the padding stays 0). All arithmetic is fp32, every
// operation rounded by itself and in the order of torch.optim.AdamW, so that results equal torch's
// and the CPU's bit for bit; the parameter is rounded to its type once, at the end.
//
// A CTA takes chunks of 4096 elements, a warp one block of 256 at a time, so that the 8-bit maximum
// needs no shared memory. CTAs stay for many chunks, since the 8-bit tables must be loaded first.
// Bound by bytes, 28 per element with fp32 everywhere, 10 with bf16 and 8-bit AdamW state (the
// search over 255 thresholds is 8 reads of shared memory and stays below that). State may lie in
// host memory mapped into the GPU's address space: then the link bounds it, state once each way.
// Deterministic. Checked by callers: rows, pointers and sizes agree.

#include "device.h"
#include "optimizer.h"
#include "optimizer_elements.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kCodes = 256;

// ---- the numbers of a step ----------------------------------------------------------------------

__global__ void optimizer_advance_kernel(AdvanceArgs a) {
    const int64_t t = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
    if (t >= a.tensors || a.pointers[t].gradient == nullptr)
        return;
    if (a.found_inf != nullptr && *a.found_inf != 0.0f)
        return;
    const double step = static_cast<double>(a.steps[t]) + 1.0;
    a.steps[t] = static_cast<float>(step);
    const GroupNumbers& g = a.groups[a.rows[t].group];
    StepNumbers n{};
    n.decay = static_cast<float>(1.0 - g.lr * g.weight_decay);
    n.beta1 = static_cast<float>(g.beta1);
    n.one_minus_beta1 = static_cast<float>(1.0 - g.beta1);
    n.beta2 = static_cast<float>(g.beta2);
    n.one_minus_beta2 = static_cast<float>(1.0 - g.beta2);
    const bool adam = a.algorithm == Algorithm::kAdamW;
    n.step_size = static_cast<float>(adam ? g.lr / (1.0 - pow(g.beta1, step)) : g.lr);
    n.correction = static_cast<float>(adam ? sqrt(1.0 - pow(g.beta2, step)) : 1.0);
    n.eps = static_cast<float>(g.eps);
    n.sign = static_cast<float>(g.sign);
    n.step = static_cast<float>(step);
    a.numbers[t] = n;
}

// ---- arithmetic ---------------------------------------------------------------------------------

// fp32 as written: the compiler may not contract these into fused multiply-adds.
__device__ __forceinline__ float mul(float a, float b) {
    return __fmul_rn(a, b);
}
__device__ __forceinline__ float add(float a, float b) {
    return __fadd_rn(a, b);
}
__device__ __forceinline__ float sub(float a, float b) {
    return __fsub_rn(a, b);
}

struct AdamW {
    static constexpr int kStates = 2;

    static __device__ __forceinline__ void
    update(float g, float& p, float (&state)[kStates], const StepNumbers& n) {
        float &m = state[0], &v = state[1];
        // torch.lerp: exact at both ends
        m = n.one_minus_beta1 < 0.5f ? add(m, mul(n.one_minus_beta1, sub(g, m)))
                                     : sub(g, mul(sub(g, m), n.beta1));
        v = add(mul(v, n.beta2), mul(mul(n.one_minus_beta2, g), g));
        const float denominator = add(__fdiv_rn(__fsqrt_rn(v), n.correction), n.eps);
        p = sub(mul(p, n.decay), __fdiv_rn(mul(n.step_size, m), denominator));
    }
};

struct Lion {
    static constexpr int kStates = 1;

    static __device__ __forceinline__ void
    update(float g, float& p, float (&state)[kStates], const StepNumbers& n) {
        float& m = state[0];
        const float u = add(mul(m, n.beta1), mul(n.one_minus_beta1, g));
        const float direction = static_cast<float>((u > 0.0f) - (u < 0.0f));
        p = sub(mul(p, n.decay), mul(n.step_size, direction));
        m = add(mul(m, n.beta2), mul(n.one_minus_beta2, g));
    }
};

// ---- state --------------------------------------------------------------------------------------

struct Float32State {
    static constexpr int kTableFloats = 0;
    // 80 registers: 24 warps with a block of all operands in flight each, 96 KiB per SM.
    static constexpr int kCtasPerSm = 3;
    float* values;  // of the warp's block

    __device__ __forceinline__
    Float32State(const StepArgs& a, int state, int64_t block, const float* /*tables*/)
        : values(static_cast<float*>(a.values) + state * a.elements + block * kStateBlock) {}

    __device__ __forceinline__ void load(int lane, float (&x)[kPerLane]) const {
        load_elements(values, kStateBlock, lane, x);
    }
    __device__ __forceinline__ void store(int lane, const float (&x)[kPerLane]) const {
        store_elements(values, kStateBlock, lane, x);
    }
};

struct CodedState {
    static constexpr int kTableFloats = 2 * kCodes;
    static constexpr int kCtasPerSm = 2;  // the searches want more than 80 registers
    uint32_t* words;                      // four codes each
    float* scale;
    const float *codebook, *thresholds;
    bool is_square;  // the second state of AdamW, never negative

    __device__ __forceinline__
    CodedState(const StepArgs& a, int state, int64_t block, const float* tables)
        : words(
              reinterpret_cast<uint32_t*>(
                  static_cast<uint8_t*>(a.values) + state * a.elements + block * kStateBlock)),
          scale(a.scales + state * (a.elements / kStateBlock) + block),
          codebook(tables + state * kTableFloats), thresholds(codebook + kCodes),
          is_square(state == 1) {}

    __device__ __forceinline__ void load(int lane, float (&x)[kPerLane]) const {
        const float factor = *scale;
#pragma unroll
        for (int half = 0; half < kHalves; half++) {
            const uint32_t word = words[half * kWarpSize + lane];
#pragma unroll
            for (int i = 0; i < kQuad; i++)
                x[half * kQuad + i] = mul(codebook[(word >> (8 * i)) & 0xff], factor);
        }
    }

    __device__ __forceinline__ uint32_t code_of(float x, float inverse) const {
        const float scaled = mul(x, inverse);
        uint32_t code = 0;
#pragma unroll
        for (int step = kCodes / 2; step > 0; step /= 2)
            code += scaled > thresholds[code + step - 1] ? step : 0;
        // A square that became 0 would turn the next update into m / eps.
        return is_square && code == 0 && x > 0.0f ? 1 : code;
    }

    __device__ __forceinline__ void store(int lane, const float (&x)[kPerLane]) const {
        float largest = fabsf(x[0]);
#pragma unroll
        for (int i = 1; i < kPerLane; i++)
            largest = max_nan(largest, fabsf(x[i]));
        largest = group_max(largest, kWarpSize);
        const float inverse = reciprocal(largest);
        if (lane == 0)
            *scale = largest;
#pragma unroll
        for (int half = 0; half < kHalves; half++) {
            uint32_t word = 0;
#pragma unroll
            for (int i = 0; i < kQuad; i++)
                word |= code_of(x[half * kQuad + i], inverse) << (8 * i);
            words[half * kWarpSize + lane] = word;
        }
    }
};

// ---- stochastic rounding ------------------------------------------------------------------------

// Philox4x32-10 as in lowbit/reference.py: four words for counter.
__device__ __forceinline__ uint4 philox(uint64_t seed, uint64_t counter) {
    uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
    uint32_t c2 = 0, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint32_t high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
        const uint32_t high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
        c0 = high1 ^ c1 ^ k0, c1 = low1;
        c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return {c0, c1, c2, c3};
}

// To a bf16 value next to x, up with the probability that makes the mean x: adds 16 random bits
// below the last place and truncates. NaN and Inf stay what they are.
__device__ __forceinline__ float round_randomly(float x, uint32_t random) {
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7f800000u) == 0x7f800000u)
        return x;
    return __uint_as_float((bits + (random >> 16)) & 0xffff0000u);
}

// Element i of all takes word i % 4 of counter (step << 40) + i / 4. Tensors start at multiples of
// 256, so the four elements of a lane share a counter.
__device__ __forceinline__ void
round_randomly(float (&p)[kPerLane], uint64_t seed, uint64_t step, int64_t position, int lane) {
#pragma unroll
    for (int half = 0; half < kHalves; half++) {
        const uint64_t i = static_cast<uint64_t>(position + element_of(half, 0, lane));
        const uint4 random = philox(seed, (step << 40) + i / kQuad);
        float* x = p + half * kQuad;
        x[0] = round_randomly(x[0], random.x), x[1] = round_randomly(x[1], random.y);
        x[2] = round_randomly(x[2], random.z), x[3] = round_randomly(x[3], random.w);
    }
}

// ---- the step -----------------------------------------------------------------------------------

template <typename T, typename Rule, typename State>
__global__ void __launch_bounds__(kThreads, State::kCtasPerSm) optimizer_step_kernel(StepArgs a) {
    constexpr int kTable = Rule::kStates * State::kTableFloats;
    __shared__ float tables[kTable > 0 ? kTable : 1];  // 4 KiB at most
    if (a.found_inf != nullptr && *a.found_inf != 0.0f)
        return;
    for (int i = threadIdx.x; i < kTable; i += kThreads)
        tables[i] = a.tables[i];
    __syncthreads();

    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const float grad_scale = a.grad_scale == nullptr ? 1.0f : *a.grad_scale;
    for (int64_t chunk = blockIdx.x; chunk < a.chunks; chunk += gridDim.x) {
        const int64_t t = row_of_chunk(a.rows, a.tensors, chunk);
        const TensorPointers where = a.pointers[t];
        if (where.gradient == nullptr)
            continue;
        const TensorRow& row = a.rows[t];
        const StepNumbers& numbers = a.numbers[t];
        const int64_t begin = (chunk - row.first_chunk) * kStepChunk;
#pragma unroll 1
        for (int unit = warp; unit < kStepChunk / kStateBlock; unit += kWarps) {
            const int64_t first = begin + unit * kStateBlock;
            const int left = elements_left(row.count, first);
            if (left <= 0)
                break;
            T* parameter = static_cast<T*>(where.parameter) + first;
            float p[kPerLane], g[kPerLane], state[Rule::kStates][kPerLane];
            load_elements(parameter, left, lane, p);
            load_elements(static_cast<const T*>(where.gradient) + first, left, lane, g);
            const int64_t block = (row.offset + first) / kStateBlock;
#pragma unroll
            for (int s = 0; s < Rule::kStates; s++)
                State(a, s, block, tables).load(lane, state[s]);
#pragma unroll
            for (int i = 0; i < kPerLane; i++) {
                float moments[Rule::kStates];
#pragma unroll
                for (int s = 0; s < Rule::kStates; s++)
                    moments[s] = state[s][i];
                const float gradient = a.grad_scale == nullptr ? g[i] : __fdiv_rn(g[i], grad_scale);
                Rule::update(mul(gradient, numbers.sign), p[i], moments, numbers);
#pragma unroll
                for (int s = 0; s < Rule::kStates; s++)
                    state[s][i] = moments[s];
            }
            if constexpr (sizeof(T) == 2) {
                if (a.stochastic)
                    round_randomly(p, a.seed, numbers.step, row.position + first, lane);
            }
            store_elements(parameter, left, lane, p);
#pragma unroll
            for (int s = 0; s < Rule::kStates; s++)
                State(a, s, block, tables).store(lane, state[s]);
        }
    }
}

template <typename T, typename Rule, typename State>
void launch_with(const StepArgs& a, cudaStream_t stream) {
    const int64_t resident = static_cast<int64_t>(sm_count()) * State::kCtasPerSm;
    const auto grid = static_cast<unsigned>(a.chunks < resident ? a.chunks : resident);
    optimizer_step_kernel<T, Rule, State><<<grid, kThreads, 0, stream>>>(a);
}

template <typename T, typename Rule>
void launch_for(const StepArgs& a, cudaStream_t stream) {
    if (a.scales != nullptr)
        launch_with<T, Rule, CodedState>(a, stream);
    else
        launch_with<T, Rule, Float32State>(a, stream);
}

template <typename T>
void launch_for(const StepArgs& a, cudaStream_t stream) {
    if (a.algorithm == Algorithm::kAdamW)
        launch_for<T, AdamW>(a, stream);
    else
        launch_for<T, Lion>(a, stream);
}

}  // namespace

cudaError_t launch_optimizer_advance(const AdvanceArgs& args, cudaStream_t stream) {
    if (args.tensors == 0)
        return cudaSuccess;
    const auto grid = static_cast<unsigned>(ceil_div(args.tensors, int64_t{kThreads}));
    optimizer_advance_kernel<<<grid, kThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

cudaError_t launch_optimizer_step(const StepArgs& args, cudaStream_t stream) {
    if (args.chunks == 0)
        return cudaSuccess;
    switch (args.dtype) {
    case Dtype::kFloat32:
        launch_for<float>(args, stream);
        break;
    case Dtype::kBFloat16:
        launch_for<__nv_bfloat16>(args, stream);
        break;
    case Dtype::kFloat16:
        launch_for<__half>(args, stream);
        break;
    }
    return cudaGetLastError();
}

}  // namespace lowbit::cuda
