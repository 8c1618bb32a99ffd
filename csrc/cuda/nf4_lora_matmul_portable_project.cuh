// z = x lora_A^T for nf4_lora_matmul_portable_sm80.cu, as partial sums over slices of K. x [M, K]
// and lora_A [r, K] row-major, 16 bit. One short wave of CTAs, bound by latency.
#pragma once

#include "common.cuh"
#include "launch_config.h"
#include "nf4_lora_matmul.h"
#include "nf4_lora_matmul_portable_tile.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kProjectThreads = 256;
constexpr int kProjectWarps = kProjectThreads / kWarpSize;
constexpr int kProjectTokens = 8;  // of a CTA
constexpr int kMaxSlices = 16;     // of K; each is read by every CTA of the product

struct Projection {
    const void* x;
    const void* lora_A;  // null: only flags are cleared
    float* partial_z;    // [slices][padded M][padded rank]
    uint32_t* flags;
    int flag_count;
    int64_t K;
    int M;
    int r;
    int slices;
};

// 16 elements of a row of x or lora_A from `row` on, or zeros.
__device__ __forceinline__ void load_row(uint32_t (&words)[8], const void* row, bool inside) {
    const uint4* p = static_cast<const uint4*>(row);
    const uint4 zero = {0, 0, 0, 0};
    const uint4 a = inside ? __ldg(p) : zero, b = inside ? __ldg(p + 1) : zero;
    words[0] = a.x, words[1] = a.y, words[2] = a.z, words[3] = a.w;
    words[4] = b.x, words[5] = b.y, words[6] = b.z, words[7] = b.w;
}

// Grid (slices, tokens / 8). A warp takes every blocks of K for 8 tokens, lane t of a quad 16
// neighbouring columns of it; the sums of 8 warps are added in order.
template <typename T, int kRankTiles>
__global__ void __launch_bounds__(kProjectThreads, 1) project_tokens_kernel(const Projection p) {
    constexpr int kRank = 16 * kRankTiles, kValues = kRank * kProjectTokens;
    __shared__ float smem_z[kProjectWarps][kProjectTokens][kRank + 1];
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int g = lane / 4, t = lane % 4;
    const int first_token = blockIdx.y * kProjectTokens, token = first_token + g;
    if (blockIdx.x == 0 && blockIdx.y == 0) {
        for (int i = threadIdx.x; i < p.flag_count; i += kProjectThreads)
            p.flags[i] = 0;
    }
    if (p.lora_A == nullptr)
        return;
    const int blocks = static_cast<int>(p.K / kBlock);
    float sums[kRankTiles][4] = {};
#pragma unroll 1
    for (int block = blockIdx.x * kProjectWarps + warp; block < blocks;
         block += p.slices * kProjectWarps) {
        const int64_t column = static_cast<int64_t>(block) * kBlock + 16 * t;
        uint32_t x[8], low[kRankTiles][8], high[kRankTiles][8];
        load_row(x, static_cast<const T*>(p.x) + token * p.K + column, token < p.M);
#pragma unroll
        for (int i = 0; i < kRankTiles; i++) {
            const int row = 16 * i + g;
            const T* lora_A = static_cast<const T*>(p.lora_A) + row * p.K + column;
            load_row(low[i], lora_A, row < p.r);
            load_row(high[i], lora_A + 8 * p.K, row + 8 < p.r);
        }
#pragma unroll
        for (int i = 0; i < kRankTiles; i++) {
#pragma unroll
            for (int s = 0; s < 8; s += 2)
                mma_16x8x16(
                    sums[i], {low[i][s], high[i][s], low[i][s + 1], high[i][s + 1]}, x[s], x[s + 1],
                    T{});
        }
    }
#pragma unroll
    for (int i = 0; i < kRankTiles; i++) {
#pragma unroll
        for (int e = 0; e < 4; e++)
            smem_z[warp][2 * t + e % 2][16 * i + g + 8 * (e / 2)] = sums[i][e];
    }
    __syncthreads();
    float* out =
        p.partial_z + (static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y) * kValues;
    for (int i = threadIdx.x; i < kValues; i += kProjectThreads) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kProjectWarps; j++)
            sum += smem_z[j][i / kRank][i % kRank];
        out[i] = sum;
    }
}

template <typename T>
cudaError_t launch_projection(const Projection& p, int tokens, cudaStream_t stream) {
    const auto launch = [&](auto kernel, dim3 grid) {
        return launch_in_order(kernel, grid, kProjectThreads, 0, stream, p);
    };
    const dim3 grid(p.slices, tokens / kProjectTokens);
    switch (p.lora_A == nullptr ? 0 : (p.r + 15) / 16) {
    case 0:
        return launch(project_tokens_kernel<T, 1>, dim3(1));
    case 1:
        return launch(project_tokens_kernel<T, 1>, grid);
    case 2:
        return launch(project_tokens_kernel<T, 2>, grid);
    case 3:
        return launch(project_tokens_kernel<T, 3>, grid);
    }
    return launch(project_tokens_kernel<T, 4>, grid);
}

}  // namespace
}  // namespace lowbit::cuda
