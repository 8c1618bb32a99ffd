// The low-rank term of nf4_lora_gemv_sm90.cu, lora_B z, by warps that do nothing else.
#pragma once

#include "nf4_lora_gemv_plan.cuh"
#include "nf4_lora_gemv_rows.cuh"
#include "nf4_lora_gemv_z_parts.cuh"
#include "ptx_sm90.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kLoraGroups = 4;  // a warp's groups of rows of lora_B on their way at a time

// Elements 2 lane and 2 lane + 1 of kRows rows of lora_B. Rows are 4-byte aligned if r is even.
__device__ __forceinline__ void
load_lora_b(uint32_t (&b)[kRows], bool wanted, const LoraMatmulArgs& args, uint32_t row) {
    const int j = threadIdx.x % kWarpSize * 2, r = args.r;
    const uint16_t* p = static_cast<const uint16_t*>(args.lora_B) + static_cast<uint64_t>(row) * r;
    if (r % 2 == 0) {
#pragma unroll
        for (int i = 0; i < kRows; i++)
            b[i] = 0, load_if(wanted && j < r, b[i], static_cast<const void*>(p + i * r + j));
    } else if (wanted) {
#pragma unroll
        for (int i = 0; i < kRows; i++) {
            const uint32_t first = j < r ? p[i * r + j] : 0;
            b[i] = j + 1 < r ? first | static_cast<uint32_t>(p[i * r + j + 1]) << 16 : first;
        }
    }
}

// s_j z[j] for j = 2 lane and 2 lane + 1, zero from r on. By each warp for itself.
template <typename T>
__device__ __forceinline__ float2
finish_z(const LoraMatmulArgs& args, const Plan& plan, const float2& scale, Scratch& scratch) {
    const int j = threadIdx.x % kWarpSize * 2;
    const bool low = j < args.r, high = j + 1 < args.r;
    float2 z = {};
    if (plan.exchange) {
        barrier_wait_cluster<0>(shared_address(&scratch.z_arrived));
        const uint32_t size = cluster_size();
        float2 parts[kMaxCluster];
#pragma unroll
        for (int i = 0; i < kMaxCluster; i++)
            parts[i] = *reinterpret_cast<const float2*>(&scratch.z_parts[i][j]);
#pragma unroll
        for (int i = 0; i < kMaxCluster; i++) {
            if (i < size)
                z.x += parts[i].x, z.y += parts[i].y;
        }
        if (args.z_out != nullptr && blockIdx.x == 0 && threadIdx.x < kThreads + kWarpSize) {
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

// lora_B z of the CTA's rows, to low_rank. By all warps for it; ends when all parts of z have come,
// which is when no peer writes to this CTA any more.
template <typename T, bool kManyRanks>
__device__ __forceinline__ void low_rank_term(
    const LoraMatmulArgs& args,
    const CUtensorMap& lora_A,
    const Plan& plan,
    const Share& share,
    unsigned char* stages,
    Scratch& scratch,
    float* low_rank) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize % kZWarps;
    const uint32_t N = static_cast<uint32_t>(args.w.N);
    uint32_t b[kLoraGroups][kRows];
    const auto load = [&](uint32_t first) {
#pragma unroll
        for (int i = 0; i < kLoraGroups; i++) {
            const uint32_t group = first + i * kZWarps;
            load_lora_b(b[i], group < share.groups, args, share.row_of(group, N));
        }
    };
    float2 scale = {args.scaling, args.scaling};
    const auto meanwhile = [&] {
        load(warp);
        if (args.lora_scaling != nullptr) {
            const int j = 2 * lane;
            scale.x *= j < args.r ? args.lora_scaling[j] : 0.0f;
            scale.y *= j + 1 < args.r ? args.lora_scaling[j + 1] : 0.0f;
        }
    };
    if (!plan.exchange) {
        meanwhile();
    } else if constexpr (kManyRanks) {
        send_z_parts_wgmma<T>(args, plan, lora_A, shared_address(stages), scratch, meanwhile);
    } else {
        send_z_parts_mma<T>(args, plan, stages, scratch, meanwhile);
    }
    __syncwarp();
    const float2 z = finish_z<T>(args, plan, scale, scratch);
#pragma unroll 1
    for (uint32_t first = warp; first < share.groups; first += kLoraGroups * kZWarps) {
        float sums[kLoraGroups][kRows];
#pragma unroll
        for (int i = 0; i < kLoraGroups; i++) {
#pragma unroll
            for (int k = 0; k < kRows; k++) {
                const float2 factor = unpack_pair(b[i][k], T{});
                sums[i][k] = __fmaf_rn(z.x, factor.x, z.y * factor.y);
            }
        }
        load(first + kLoraGroups * kZWarps);
#pragma unroll
        for (int i = 0; i < kLoraGroups; i++) {
            const uint32_t group = first + i * kZWarps;
            if (group >= share.groups)
                break;
            const float sum = sum_rows(sums[i]);
            if (lane % (kWarpSize / kRows) == 0)
                low_rank[group * kRows + lane / (kWarpSize / kRows)] = sum;
        }
    }
    __syncwarp();
}

}  // namespace
}  // namespace lowbit::cuda
