// AdamW and Lion over all tensors of a slab in one launch, with fp32 or 8-bit blockwise state.
//
//     g = sign * gradient / grad_scale, then the rules of optimizer_update.cuh, on state that
//     optimizer_state.cuh decodes and encodes
//
// Parameters and gradients fp32, bf16 or fp16, anywhere in memory; state in the slab at each
// tensor's offset, padded to whole blocks (the padding stays 0). All arithmetic is fp32, every
// operation rounded by itself and in the order of torch.optim.AdamW, so that results equal torch's
// and the CPU's bit for bit; the parameter is rounded to its type once, at the end.
//
// A CTA takes a range of chunks of 4096 elements, a warp one block of 256 at a time, so that the
// 8-bit maximum needs no shared memory. The launches for neighbouring slabs overlap (follows_step):
// the end of one and the start of the next cost 10 % of a slab of 128 MiB otherwise.
// Bound by bytes with fp32 state, 28 per element with fp32 everywhere, 22 with bf16: 2.8 of 3.0
// TB/s; with 8-bit AdamW state (10 bytes) by instructions, about 100 per element: 2.1 TB/s (H100,
// 2026-11). State may lie in host memory mapped into the GPU's address space: then the link bounds
// it, state once each way. Deterministic. Checked by callers: rows, pointers and sizes agree.

#include "device.h"
#include "launch_config.h"
#include "optimizer.h"
#include "optimizer_elements.cuh"
#include "optimizer_state.cuh"
#include "optimizer_update.cuh"
#include "ptx_sm90.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

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

__device__ __forceinline__ StepNumbers load_numbers(const StepNumbers* from) {
    StepNumbers numbers;
#pragma unroll
    for (int i = 0; i < kStepNumbers / kQuad; i++)
        reinterpret_cast<float4*>(&numbers)[i] = reinterpret_cast<const float4*>(from)[i];
    return numbers;
}

// A block of 256 elements at p and g, whose state is the slab's block of that number.
template <typename T, typename Rule, typename State>
__device__ __forceinline__ void update_block(
    const StepArgs& a,
    int64_t tensor,
    T* parameter,
    const T* gradient,
    int left,  // elements from here to the end of the tensor, at most 256
    int64_t block,
    const StateTables* tables,
    float grad_scale,
    int lane) {
    const Raw<T> raw_p = load_raw(parameter, left, lane), raw_g = load_raw(gradient, left, lane);
    typename State::template Block<0> first;
    typename State::template Block<1> second;
    first.load(a, block, lane);
    if constexpr (Rule::kStates == 2)
        second.load(a, block, lane);
    const StepNumbers numbers = load_numbers(a.numbers + tensor);

    float p[kPerLane], g[kPerLane], state[Rule::kStates][kPerLane];
    raw_p.to_floats(p);
    raw_g.to_floats(g);
    first.decode(tables, state[0]);
    if constexpr (Rule::kStates == 2)
        second.decode(tables, state[1]);
    if (a.grad_scale != nullptr) {
#pragma unroll
        for (int i = 0; i < kPerLane; i++)
            g[i] = __fdiv_rn(g[i], grad_scale);
    }
#pragma unroll
    for (int i = 0; i < kPerLane; i++)
        g[i] = mul(g[i], numbers.sign);
    Rule::update(g, p, state, numbers);
    if constexpr (sizeof(T) == 2) {
        if (a.stochastic) {
            const TensorRow& row = a.rows[tensor];
            const int64_t position = row.position + block * kStateBlock - row.offset;
            round_randomly(p, a.seed, numbers.step, position, lane);
        }
    }
    store_elements(parameter, left, lane, p);
    State::template Block<0>::store(a, block, lane, tables, state[0]);
    if constexpr (Rule::kStates == 2)
        State::template Block<1>::store(a, block, lane, tables, state[1]);
}

template <typename T, typename Rule, typename State>
__global__ void __launch_bounds__(kThreads, State::kCtasPerSm)
    optimizer_step_kernel(const __grid_constant__ StepArgs a) {
    __shared__ StateTables tables[State::kCoded ? Rule::kStates : 1];  // 10 KiB at most
#if __CUDA_ARCH__ >= 900
    let_next_kernel_start();  // which touches nothing that this one does
#endif
    const bool skips = a.found_inf != nullptr && *a.found_inf != 0.0f;
    if constexpr (State::kCoded) {
        fill_tables<0>(tables[0], a.tables);
        if constexpr (Rule::kStates == 2)
            fill_tables<1>(tables[1], a.tables + 2 * kCodes);
        __syncthreads();
    }
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const float grad_scale = a.grad_scale == nullptr ? 1.0f : *a.grad_scale;
    // Neighbouring chunks: a search finds the tensor of the first, counting those of the others.
    const int64_t end = skips ? 0 : a.chunks * (blockIdx.x + 1) / gridDim.x;
    int64_t chunk = a.chunks * blockIdx.x / gridDim.x, t = row_of_chunk(a.rows, a.tensors, chunk);
    for (; chunk < end; chunk++) {
        while (t + 1 < a.tensors && a.rows[t + 1].first_chunk <= chunk)
            t++;
        const TensorPointers where = a.pointers[t];
        if (where.gradient == nullptr)
            continue;
        const TensorRow& row = a.rows[t];
        const int64_t begin = (chunk - row.first_chunk) * kStepChunk;
        const int64_t left = row.count - begin, block = (row.offset + begin) / kStateBlock;
        T* parameter = static_cast<T*>(where.parameter) + begin;
        const T* gradient = static_cast<const T*>(where.gradient) + begin;
#pragma unroll 1
        for (int unit = warp; unit < kStepChunk / kStateBlock; unit += kWarps) {
            const int at = unit * kStateBlock;
            if (at >= left)
                break;
            update_block<T, Rule, State>(
                a, t, parameter + at, gradient + at, elements_left(left, at), block + unit, tables,
                grad_scale, lane);
        }
    }
#if __CUDA_ARCH__ >= 900
    wait_for_previous_kernel();  // so that whoever waits for this one waits for all before it
#endif
}

template <typename T, typename Rule, typename State>
cudaError_t launch_with(const StepArgs& a, cudaStream_t stream) {
    const int64_t resident = static_cast<int64_t>(sm_count()) * State::kCtasPerSm;
    const auto grid = static_cast<unsigned>(a.chunks < resident ? a.chunks : resident);
    constexpr auto kKernel = optimizer_step_kernel<T, Rule, State>;
    if (a.follows_step && device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9) {
        const LaunchConfig config(grid, kThreads, 0, stream);
        return cudaLaunchKernelEx(config.get(), kKernel, a);
    }
    return launch_in_order(kKernel, grid, kThreads, 0, stream, a);
}

template <typename T, typename Rule>
cudaError_t launch_for(const StepArgs& a, cudaStream_t stream) {
    return a.scales != nullptr ? launch_with<T, Rule, CodedState>(a, stream)
                               : launch_with<T, Rule, Float32State>(a, stream);
}

template <typename T>
cudaError_t launch_for(const StepArgs& a, cudaStream_t stream) {
    return a.algorithm == Algorithm::kAdamW ? launch_for<T, AdamW>(a, stream)
                                            : launch_for<T, Lion>(a, stream);
}

}  // namespace

cudaError_t launch_optimizer_advance(const AdvanceArgs& args, cudaStream_t stream) {
    if (args.tensors == 0)
        return cudaSuccess;
    const auto grid = static_cast<unsigned>(ceil_div(args.tensors, int64_t{kThreads}));
    return launch_in_order(optimizer_advance_kernel, grid, kThreads, 0, stream, args);
}

cudaError_t launch_optimizer_step(const StepArgs& args, cudaStream_t stream) {
    if (args.chunks == 0)
        return cudaSuccess;
    switch (args.dtype) {
    case Dtype::kFloat32:
        return launch_for<float>(args, stream);
    case Dtype::kBFloat16:
        return launch_for<__nv_bfloat16>(args, stream);
    case Dtype::kFloat16:
        return launch_for<__half>(args, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace lowbit::cuda
