// The low-rank term of nf4_lora_gemv_sm90.cu: z, by warps that do nothing else, and lora_B.
#pragma once

#include "nf4_lora_gemv_plan.cuh"
#include "nf4_lora_gemv_z_parts.cuh"
#include "ptx_sm90.cuh"

namespace lowbit::cuda {
namespace {

// s_j z[j], zero from r on, to scratch.z. By all warps for z; ends when all parts have come, which
// is when no peer writes to this CTA any more.
template <typename T, bool kManyRanks>
__device__ __forceinline__ void compute_z(
    const LoraMatmulArgs& args,
    const CUtensorMap& lora_A,
    const Plan& plan,
    unsigned char* stages,
    Scratch& scratch) {
    const uint32_t ring = shared_address(stages);
    if (plan.exchange) {
        if constexpr (kManyRanks)
            send_z_parts_wgmma<T>(args, lora_A, ring, scratch);
        else
            send_z_parts_mma<T>(args, stages, scratch);
    }
    const int j = threadIdx.x % kZThreads;
    if (j >= kMaxRank)
        return;
    float z = 0;
    if (j < args.r) {
        float scale = args.scaling;
        if (args.lora_scaling != nullptr)
            scale *= args.lora_scaling[j];
        if (plan.exchange) {
            barrier_wait_cluster<0>(shared_address(&scratch.z_arrived));
            const uint32_t size = cluster_size();
#pragma unroll 1
            for (uint32_t i = 0; i < size; i++)
                z += scratch.z_parts[i][j];
            if (args.z_out != nullptr && blockIdx.x == 0)
                static_cast<T*>(args.z_out)[j] = from_float<T>(z);
        } else {
            z = to_float(static_cast<const T*>(args.z_in)[j]);
        }
        z *= scale;
    }
    scratch.z[j] = z;
    barrier_arrive(shared_address(&scratch.z_ready));
}

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

// Adds lora_B z, the lane's part of it, to the sums of kRows rows.
template <typename T>
__device__ __forceinline__ void
add_low_rank(float (&sums)[kRows], const uint32_t (&b)[kRows], const Scratch& scratch) {
    barrier_wait(shared_address(&scratch.z_ready), 0);
    const float2 z = reinterpret_cast<const float2*>(scratch.z)[threadIdx.x % kWarpSize];
#pragma unroll
    for (int i = 0; i < kRows; i++) {
        const float2 factor = unpack_pair(b[i], T{});
        sums[i] = __fmaf_rn(z.x, factor.x, __fmaf_rn(z.y, factor.y, sums[i]));
    }
}

}  // namespace
}  // namespace lowbit::cuda
