// The gradient of lora_A in nf4_lora_matmul_dx_sm90.cu, where a pass over x beside it or in front
// of it would take longer:
//
//     d_lora_A[j, k] = sum_m u[m, j] x[m, k]
//
// x [M, K] and u [M, 16, 32 or 64] in T, d_lora_A [r, K] in T or fp32, row-major, 16-byte aligned;
// sums in fp32. u is what lora_grads stores, scaled and rounded. Bound by the latency of a warp's
// loads, of which a part is hidden behind the consumers.
//
// The producer warps make it when they have filled their last stage: until the consumers have
// multiplied the stages and stored dx they have nothing to do. A CTA takes 32 columns at a time,
// its warps 64 tokens each in turn, from memory to registers. The contraction runs along the
// tokens, and pairs of tokens are made of the pairs of columns that memory holds by one permutation
// each. Sums over warps, in their order, through shared memory. 16 ranks at a time, of the same x
// where a warp has all of its tokens at once.
#pragma once

#include "common.cuh"
#include "nf4_lora_matmul_dx_tile.cuh"
#include "ptx_sm90.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kGradSteps = kGradTokens / 16;

// What a lane multiplies: of each 16 tokens four, 4 (lane % 4) and the next, of x four columns from
// 4 (lane / 4) on, of u two.
struct GradOperands {
    uint2 x[kGradSteps][4];
    uint32_t u[kGradSteps][4];

    __device__ __forceinline__ void load_x(const GradOfA& p, int64_t K, int column0, int token0) {
        const int lane = threadIdx.x % kWarpSize;
        const int first = token0 + lane % 4 * 4;
        const uint8_t* row = p.x + (first * K + column0 + lane / 4 * 4) * 2;
#pragma unroll
        for (int i = 0; i < kGradSteps * 4; i++) {
            const int token = i / 4 * 16 + i % 4;
            uint2& v = x[i / 4][i % 4];
            v = {0, 0};
            load_if(first + token < p.tokens, v, row + token * K * 2);
        }
    }

    __device__ __forceinline__ void load_u(const GradOfA& p, int rank0, int token0) {
        if (p.u_columns == 16)
            load_u<16>(p, rank0, token0);
        else if (p.u_columns == 32)
            load_u<32>(p, rank0, token0);
        else
            load_u<64>(p, rank0, token0);
    }

    template <int kColumns>
    __device__ __forceinline__ void load_u(const GradOfA& p, int rank0, int token0) {
        const int lane = threadIdx.x % kWarpSize;
        const int first = token0 + lane % 4 * 4;
        const uint8_t* row = p.u + (first * kColumns + rank0 + lane / 4 * 2) * int64_t{2};
#pragma unroll
        for (int i = 0; i < kGradSteps * 4; i++) {
            const int token = i / 4 * 16 + i % 4;
            uint32_t& v = u[i / 4][i % 4];
            v = 0;
            load_if(
                first + token < p.tokens, v, static_cast<const void*>(row + token * kColumns * 2));
        }
    }

    // d[t]: columns 8 (lane % 4) + t and 4 further on, of j = 2 (lane / 4) and of the next.
    template <typename T>
    __device__ __forceinline__ void multiply(float (&d)[4][4]) const {
        constexpr uint32_t kPairs[2] = {0x5410, 0x7632};  // of the lower halves, of the upper ones
#pragma unroll
        for (int step = 0; step < kGradSteps; step++) {
            uint32_t a[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[i] = __byte_perm(u[step][i / 2 * 2], u[step][i / 2 * 2 + 1], kPairs[i % 2]);
#pragma unroll
            for (int t = 0; t < 4; t++) {
                uint32_t b[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const uint2 &first = x[step][2 * i], &second = x[step][2 * i + 1];
                    b[i] = t < 2 ? __byte_perm(first.x, second.x, kPairs[t % 2])
                                 : __byte_perm(first.y, second.y, kPairs[t % 2]);
                }
                mma_16x8x16(d[t], a, b[0], b[1], T{});
            }
        }
    }
};

// By the producer warps, behind their last read of packed weights, whose place the sums take.
template <typename T, class P>
__device__ __forceinline__ void make_d_lora_A(const Params& params, uint8_t* smem_generic) {
    const GradOfA& p = params.grad;
    const int64_t K = params.w.K;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    constexpr int kBatch = P::kProducerWarps * kGradTokens;
    float4* sums = reinterpret_cast<float4*>(smem_generic + P::kPacked);
    static_assert(P::kProducerWarps * 4 * kWarpSize * sizeof(float4) <= 2 * P::kPackedBytes);
    static_assert(P::kProducers >= 4 * kWarpSize);
    const bool keeps_x = p.tokens <= kBatch;
    bool has_waited = false;
    __syncwarp();
#pragma unroll 1
    for (int column0 = blockIdx.x * kGradColumns; column0 < K;
         column0 += gridDim.x * kGradColumns) {
        GradOperands operands;
#pragma unroll 1
        for (int rank0 = 0; rank0 < params.r; rank0 += kGradRank) {
            float d[4][4] = {};
#pragma unroll 1
            for (int token0 = warp * kGradTokens; token0 < p.tokens; token0 += kBatch) {
                if (rank0 == 0 || !keeps_x)
                    operands.load_x(p, K, column0, token0);
                if (!has_waited)
                    wait_for_previous_kernel();  // for u
                has_waited = true;
                operands.load_u(p, rank0, token0);
                operands.multiply<T>(d);
            }
            named_barrier(kProducersBarrier, P::kProducers);
#pragma unroll
            for (int i = 0; i < 4; i++)
                sums[(warp * 4 + i) * kWarpSize + lane] = {d[0][i], d[1][i], d[2][i], d[3][i]};
            named_barrier(kProducersBarrier, P::kProducers);
            const int j = rank0 + lane / 4 * 2 + warp / 2;
            if (warp < 4 && j < params.r) {
                float4 sum = sums[threadIdx.x];
#pragma unroll
                for (int i = 1; i < P::kProducerWarps; i++) {
                    const float4 v = sums[i * 4 * kWarpSize + threadIdx.x];
                    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
                }
                const int64_t at = j * K + column0 + lane % 4 * 8 + warp % 2 * 4;
                if (p.out_is_float)
                    *reinterpret_cast<float4*>(static_cast<float*>(p.out) + at) = sum;
                else
                    *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + at) = {
                        pack_pair(sum.x, sum.y, T{}), pack_pair(sum.z, sum.w, T{})};
            }
            __syncwarp();
        }
    }
}

}  // namespace
}  // namespace lowbit::cuda
