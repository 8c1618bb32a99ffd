// The low-rank term of nf4_lora_gemv_sm90.cu, lora_B z, by warps that do nothing else.
#pragma once

#include "nf4_lora_gemv_plan.cuh"
#include "nf4_lora_gemv_project.cuh"
#include "nf4_lora_gemv_rows.cuh"
#include "ptx_sm90.cuh"

namespace lowbit::cuda {
namespace {

// A warp's groups of rows of lora_B on their way at a time. No more than a warp has at N = 4096:
// code for others would be fetched in vain, between z and y.
constexpr int kLoraGroups = 2;

// Elements 2 lane and 2 lane + 1 of the rows of every kGatherWarps-th group from `first` on.
__device__ __forceinline__ void load_lora_b(
    uint32_t (&b)[kLoraGroups * kRows],
    const LoraMatmulArgs& args,
    const Share& share,
    uint32_t first) {
    const int j = threadIdx.x % kWarpSize * 2, r = args.r;
    const auto* const lora_B = static_cast<const uint16_t*>(args.lora_B);
    const auto wanted = [&](int i) { return first + i / kRows * kGatherWarps < share.groups; };
    const auto at = [&](int i) {
        const uint32_t group = first + i / kRows * kGatherWarps;
        return (share.row_of(group, static_cast<uint32_t>(args.w.N)) + i % kRows) * r + j;
    };
    if (r % 2 == 0) {  // rows are 4-byte aligned
#pragma unroll
        for (int i = 0; i < kLoraGroups * kRows; i++)
            b[i] = 0, load_if(wanted(i) && j < r, b[i], static_cast<const void*>(lora_B + at(i)));
        return;
    }
#pragma unroll
    for (int i = 0; i < kLoraGroups * kRows; i++) {
        const uint32_t low = wanted(i) && j < r ? lora_B[at(i)] : 0;
        const uint32_t high = wanted(i) && j + 1 < r ? lora_B[at(i) + 1] : 0;
        b[i] = low | high << 16;
    }
}

// s_j z[j] for j = 2 lane and 2 lane + 1, zero from r on. By each warp for itself.
template <typename T>
__device__ __forceinline__ float2 finish_z(
    const LoraMatmulArgs& args,
    const Plan& plan,
    uint32_t cta,
    const float2& scale,
    Scratch& scratch) {
    const int j = threadIdx.x % kWarpSize * 2;
    const bool low = j < args.r, high = j + 1 < args.r;
    float2 z;
    if (plan.projectors > 0) {
        z = gather_z(args, plan, cta, scratch);
        if (args.z_out != nullptr && cta == 0 && threadIdx.x < kThreads + kWarpSize) {
            T* out = static_cast<T*>(args.z_out) + j;
            if (low)
                out[0] = from_float<T>(z.x);
            if (high)
                out[1] = from_float<T>(z.y);
        }
    } else {
        const T* in = static_cast<const T*>(args.z_in) + j;
        z.x = low ? to_float(in[0]) : 0.0f;
        z.y = high ? to_float(in[1]) : 0.0f;
    }
    return {low ? z.x * scale.x : 0.0f, high ? z.y * scale.y : 0.0f};
}

// lora_B z of the CTA's rows, to low_rank, by the warps that gather z.
template <typename T>
__device__ __forceinline__ void low_rank_term(
    const LoraMatmulArgs& args,
    const Plan& plan,
    const Share& share,
    uint32_t cta,
    Scratch& scratch,
    float* low_rank) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize % kGatherWarps;
    uint32_t b[kLoraGroups * kRows];
    load_lora_b(b, args, share, warp);
    float2 scale = {args.scaling, args.scaling};
    if (args.lora_scaling != nullptr) {
        const int j = 2 * lane;
        scale.x *= j < args.r ? args.lora_scaling[j] : 0.0f;
        scale.y *= j + 1 < args.r ? args.lora_scaling[j + 1] : 0.0f;
    }
    const float2 z = finish_z<T>(args, plan, cta, scale, scratch);
#pragma unroll 1
    for (uint32_t first = warp; first < share.groups; first += kLoraGroups * kGatherWarps) {
        float sums[kLoraGroups * kRows];
#pragma unroll
        for (int i = 0; i < kLoraGroups * kRows; i++) {
            const float2 factor = unpack_pair(b[i], T{});
            sums[i] = __fmaf_rn(z.x, factor.x, z.y * factor.y);
        }
        if (first + kLoraGroups * kGatherWarps < share.groups)
            load_lora_b(b, args, share, first + kLoraGroups * kGatherWarps);
        constexpr int kLanes = kWarpSize / (kLoraGroups * kRows);  // for each row
        const float sum = sum_rows(sums);
        const uint32_t group = first + lane / (kLanes * kRows) * kGatherWarps;
        if (lane % kLanes == 0 && group < share.groups)
            low_rank[group * kRows + lane / kLanes % kRows] = sum;
    }
    __syncwarp();
}

}  // namespace
}  // namespace lowbit::cuda
