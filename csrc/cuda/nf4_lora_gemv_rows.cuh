// The main loop's parts of nf4_lora_gemv_sm90.cu: loads of weights, products, sums over warps.
#pragma once

#include "nf4_lora_gemv_plan.cuh"
#include "ptx_sm90.cuh"

namespace lowbit::cuda {
namespace {

__device__ __forceinline__ __half2 as_half2(uint32_t pair) {
    return *reinterpret_cast<const __half2*>(&pair);
}

struct Rows {
    uint4 codes[kRows];
    uint32_t scale[kRows];  // absmax, or its 8-bit code
};

// `element` is that of row 0; the others follow at a distance of K.
template <bool kNested>
__device__ __forceinline__ void
load_row(Rows& rows, int i, bool wanted, const WeightView& w, uint32_t element) {
    element += i * static_cast<uint32_t>(w.K);
    const uint32_t block = element >> w.blocksize_log2;
    load_if(wanted, rows.codes[i], w.qweight + (element >> 1));
    if constexpr (kNested)
        load_if(wanted, rows.scale[i], w.absmax_8bit + block);
    else
        load_if(wanted, rows.scale[i], static_cast<const void*>(w.absmax + block));
}

// Weights of a warp's steps `unit` and the next: 4 rows of 4 lines each.
__device__ __forceinline__ void prefetch_steps(
    const uint8_t* qweight,
    uint32_t N,
    uint32_t K,
    const Plan& plan,
    const Share& share,
    uint32_t unit,
    uint32_t end) {
    const uint32_t lane = threadIdx.x % kWarpSize;
    unit += lane / 16;
    const uint32_t group = divide(unit, plan.by_steps);
    const uint32_t row = share.row_of(group, N) + lane / 4 % kRows;
    const uint32_t k = (unit - group * plan.steps) * kStep + lane % 4 * (kStep / 4);
    if (unit < end && k < K)
        prefetch_l2(qweight + (row * K + k) / 2);
}

// 32 weights of a row times x: two runs of 8 pairs are added up in fp16. A longer run would lose
// accuracy, a shorter one spends more conversions.
__device__ __forceinline__ float
dot(const unsigned char* table, const uint4& codes, const uint4 (&x)[4]) {
    const uint32_t lane_offset = threadIdx.x % kWarpSize * 4;
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
    float sum = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        __half2 run;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint4& eight = x[2 * half + i / 4];
            const uint32_t columns[4] = {eight.x, eight.y, eight.z, eight.w};
            const __half2 factor = as_half2(columns[i % 4]);
            // Byte 1 of the address is the code pair, byte 0 the lane.
            const uint32_t at = prmt(words[2 * half + i / 4], lane_offset, 0x7604u | i % 4 << 4);
            const __half2 pair = as_half2(*reinterpret_cast<const uint32_t*>(table + at));
            run = i == 0 ? __hmul2(pair, factor) : __hfma2(pair, factor, run);
        }
        sum += __low2float(run) + __high2float(run);
    }
    return sum;
}

// Sums over the warp; lane i * 32 / kCount ends up with row i. Halving the rows held with each
// exchange takes 6 shuffles for 4 rows where one row after the other takes 20.
template <int kCount>
__device__ __forceinline__ float sum_rows(float (&sums)[kCount]) {
    const uint32_t lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int rows = kCount / 2, step = kWarpSize / 2; rows > 0; rows /= 2, step /= 2) {
        const bool upper = lane & step;
#pragma unroll
        for (int i = 0; i < rows; i++) {
            const float keep = upper ? sums[i + rows] : sums[i];
            const float give = upper ? sums[i] : sums[i + rows];
            sums[i] = keep + __shfl_xor_sync(kFullWarp, give, step);
        }
    }
    float sum = sums[0];
#pragma unroll
    for (int step = kWarpSize / kCount / 2; step > 0; step /= 2)
        sum += __shfl_xor_sync(kFullWarp, sum, step);
    return sum;
}

// The first and the last warp that have sums of each group, to spans, by the gatherers. Behind the
// sums every instruction counts, as nobody has run it before.
__device__ __forceinline__ void store_spans(uint8_t* spans, const Plan& plan, const Share& share) {
    for (uint32_t group = threadIdx.x % kGatherers; group < share.groups; group += kGatherers) {
        const uint32_t first = share.warp_of(plan, group * plan.steps);
        const uint32_t last = share.warp_of(plan, (group + 1) * plan.steps - 1);
        spans[group] = static_cast<uint8_t>(first | last << 4);
    }
}

// Adds the warps' sums of each row, the low-rank term and the bias.
template <typename T>
__device__ __forceinline__ void store_y(
    const LoraMatmulArgs& args,
    const Share& share,
    const float* sums,
    const float* low_rank,
    const uint8_t* spans) {
    for (uint32_t i = threadIdx.x; i < share.groups * kRows; i += kThreads) {
        const uint32_t group = i / kRows;
        const uint32_t row = share.row_of(group, static_cast<uint32_t>(args.w.N)) + i % kRows;
        if (row < (share.first_group + group) * kRows)
            continue;  // stored by the group before
        float bias = 0.0f;
        if (args.bias != nullptr)
            bias = to_float(static_cast<const T*>(args.bias)[row]);
        const uint32_t span = spans[group];
        float y = 0;
#pragma unroll 1
        for (uint32_t warp = span % 16; warp <= span / 16; warp++)
            y += sums[warp * kRows + i];
        if (args.r > 0)
            y += low_rank[i];
        if (args.bias != nullptr)
            y += bias;
        static_cast<T*>(args.y)[row] = from_float<T>(y);
    }
}

}  // namespace
}  // namespace lowbit::cuda
