// What surrounds the main loop of nf4_lora_gemv_sm90.cu: prefetches, the table of code pairs, x and
// the other small operands on their way to shared memory.
#pragma once

#include "bulk_sm90.cuh"
#include "nf4_lora_gemv_plan.cuh"
#include "ptx.cuh"

namespace lowbit::cuda {
namespace {

// Whole 16-byte units of [begin, begin + bytes).
__device__ __forceinline__ void prefetch_range(const void* begin, uint64_t bytes) {
    const uint64_t at = reinterpret_cast<uint64_t>(begin), first = at & ~uint64_t{15};
    const uint32_t size = static_cast<uint32_t>((at + bytes - first) & ~uint64_t{15});
    if (size > 0)
        prefetch_bulk_l2(first, size);
}

// What this warp reads first, and small operands of the CTA. Single lanes with few requests: the
// bulk engine takes about 30 ns for each.
template <typename T, bool kNested>
__device__ __forceinline__ void prefetch_inputs(
    const LoraMatmulArgs& args, const Share& share, uint32_t row, uint32_t step, bool has_steps) {
    const WeightView& w = args.w;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    if (warp == 1 && lane == 16)
        prefetch_l2(w.codebook);
    if (kNested && warp == 1 && lane == 17)
        prefetch_l2(w.nested_offset);
    if (kNested && warp == 1 && lane < 8)
        prefetch_l2(w.nested_codebook + lane * 32);
    if (!elect_lane())
        return;
    if (kNested && warp == 0 && share.rows > 0) {
        const int shift = w.blocksize_log2 + w.nested_blocksize_log2;
        const int64_t first = (share.first_row * w.K) >> shift;
        const int64_t last = ((share.first_row + share.rows) * w.K - 1) >> shift;
        prefetch_range(w.nested_absmax + first, sizeof(float) * (last - first + 1));
    }
    if (has_steps) {
        const uint64_t block = (row * w.K) >> w.blocksize_log2;
        const uint64_t blocks = (kRows * w.K) >> w.blocksize_log2;
        if (kNested)
            prefetch_range(w.absmax_8bit + block, blocks);
        else
            prefetch_range(w.absmax + block, sizeof(float) * blocks);
    }
    if (args.r > 0 && warp == 2) {
        const T* b = static_cast<const T*>(args.lora_B);
        prefetch_range(
            b + static_cast<int64_t>(share.first_row) * args.r, sizeof(T) * share.rows * args.r);
    }
    if (args.bias != nullptr && warp == 3)
        prefetch_range(static_cast<const T*>(args.bias) + share.first_row, sizeof(T) * share.rows);
    if (has_steps) {
        const int64_t row_bytes = w.K / 2, at = step * (kStep / 2);
#pragma unroll
        for (int i = 0; i < kRows; i++)
            prefetch_range(
                w.qweight + (row + i) * row_bytes + at, min(int64_t{kStep / 2}, row_bytes - at));
    }
}

// ---- x
// -------------------------------------------------------------------------------------------

__device__ __forceinline__ float power_of_two(int exponent) {
    return __uint_as_float(static_cast<uint32_t>(exponent + 127) << 23);
}

// Of |v|, within what power_of_two can express, less kXExponent, and its inverse.
__device__ __forceinline__ int exponent_of(float v) {
    return min(max(static_cast<int>(__float_as_uint(v) >> 23 & 255) - 127, kXExponent - 126), 126);
}

// Every 16 columns of this thread: use(the first, where eight lie; the others lie kXWord behind).
// Those that meet word i of lane l's codes lie at 2048 * step + kXWord * i + 16 * l.
constexpr int kXWord = 16 * kWarpSize;

template <typename Use>
__device__ __forceinline__ void
for_own_columns(unsigned char* smem_x, const Plan& plan, const Use& use) {
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < plan.steps * (kStep / 16); i += kThreads) {
        const uint32_t word = i % 2 * 2, lane = i / 2 % kWarpSize, step = i / 64;
        use(16 * i, smem_x + step * (2 * kStep) + word * kXWord + lane * 16);
    }
}

// As it is, in the background: in registers it would share a scoreboard with codes, which come
// later. Each thread sees its own copies.
template <typename T>
__device__ __forceinline__ void
copy_x(unsigned char* smem_x, const LoraMatmulArgs& args, const Plan& plan) {
    for_own_columns(smem_x, plan, [&](uint32_t k, unsigned char* to) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (k < args.w.K)
                copy_shared_async_16(to + i * kXWord, static_cast<const T*>(args.x) + k + 8 * i);
            else
                *reinterpret_cast<uint4*>(to + i * kXWord) = make_uint4(0, 0, 0, 0);
        }
    });
    commit_async();
}

// Of eight elements, as their bits.
__device__ __forceinline__ uint32_t max_magnitude(const uint4& v) {
    const auto magnitudes = [](uint32_t pair) { return pair & 0x7fff7fffu; };
    const uint32_t two = __vmaxu2(
        __vmaxu2(magnitudes(v.x), magnitudes(v.y)), __vmaxu2(magnitudes(v.z), magnitudes(v.w)));
    return max(two >> 16, two & 0xffffu);
}

template <typename T>
__device__ __forceinline__ uint4 scale_to_f16(const uint4& v, float scale) {
    const uint32_t in[4] = {v.x, v.y, v.z, v.w};
    uint32_t out[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float2 pair = unpack_pair(in[j], T{});
        out[j] = pack_pair(pair.x * scale, pair.y * scale, __half{});
    }
    return make_uint4(out[0], out[1], out[2], out[3]);
}

// ---- small operands -----------------------------------------------------------------------------

// All that is read before the first product, loaded in one batch: a store between the loads would
// wait for its own and hold up the rest.
struct Operands {
    float first_value, second_value;  // of table entry threadIdx.x % 256
    float offset, absmax_value, nested_value;
    uint32_t nested_first, nested_count;  // of nested_absmax, for the rows of the CTA
};

template <bool kNested>
__device__ __forceinline__ void
load_operands(Operands& o, const LoraMatmulArgs& args, const Share& share) {
    const WeightView& w = args.w;
    const int tid = threadIdx.x;
    o.first_value = w.codebook[tid / 16 % 16], o.second_value = w.codebook[tid % 16];
    o.offset = o.absmax_value = o.nested_value = 0;
    o.nested_first = o.nested_count = 0;
    if (kNested) {
        const int shift = w.blocksize_log2 + w.nested_blocksize_log2;
        const int64_t end = (share.first_row + share.rows) * w.K - 1;
        o.nested_first = static_cast<uint32_t>((share.first_row * w.K) >> shift);
        if (share.rows > 0)
            o.nested_count = static_cast<uint32_t>(end >> shift) - o.nested_first + 1;
        o.offset = *w.nested_offset;
        if (tid < 256)
            o.absmax_value = w.nested_codebook[tid];
        if (tid < o.nested_count)
            o.nested_value = w.nested_absmax[o.nested_first + tid];
    }
}

// Builds the table and everything else in shared memory. Returns the factor that undoes the powers
// of two in it. A barrier of the warps of the weight.
template <typename T, bool kNested>
__device__ __forceinline__ float store_operands(
    const Operands& o,
    const LoraMatmulArgs& args,
    const Plan& plan,
    unsigned char* table,
    Scratch& scratch,
    float* x_scales,
    float* nested) {
    const int tid = threadIdx.x, lane = tid % kWarpSize;
    // Each warp has all 16 values. Thread t writes half of pair t % 256's copies; lanes start at
    // different ones, since the pairs of 8 neighbours share banks.
    const uint32_t magnitude = __float_as_uint(o.second_value) & 0x7fffffffu;
    const int value_exponent =
        exponent_of(__uint_as_float(__reduce_max_sync(kFullWarp, magnitude)));
    const float value_scale = power_of_two(-value_exponent);
    const uint32_t pair =
        pack_pair(o.first_value * value_scale, o.second_value * value_scale, __half{});
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int copy = (tid / 256 * 4 + i + tid) % 8;
        *reinterpret_cast<uint4*>(table + tid % 256 * 256 + copy * 16) =
            make_uint4(pair, pair, pair, pair);
    }
    if (kNested && tid < 256)
        scratch.absmax_codebook[tid] = o.absmax_value;
    if (tid < o.nested_count)
        nested[tid] = o.nested_value;
#pragma unroll 1
    for (uint32_t i = tid + kThreads; i < o.nested_count; i += kThreads)
        nested[i] = args.w.nested_absmax[o.nested_first + i];

    wait_async<0>();
    for_own_columns(table + kTableBytes, plan, [&](uint32_t k, unsigned char* at) {
        uint4* const v[2] = {reinterpret_cast<uint4*>(at), reinterpret_cast<uint4*>(at + kXWord)};
        uint32_t x_max = max(max_magnitude(*v[0]), max_magnitude(*v[1]));
        x_max = max(x_max, __shfl_xor_sync(kFullWarp, x_max, 1));
        const int exponent = exponent_of(unpack_pair(x_max, T{}).x) - kXExponent;
#pragma unroll
        for (int i = 0; i < 2; i++)
            *v[i] = scale_to_f16<T>(*v[i], power_of_two(-exponent));
        if (lane % 2 == 0)
            x_scales[k / kColumnsPerLane] = power_of_two(exponent);
    });
    named_barrier(kBarrier, kThreads);
    return power_of_two(value_exponent);
}

}  // namespace
}  // namespace lowbit::cuda
