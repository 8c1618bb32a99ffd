// Packing of x for nf4_lora_matmul_small_sm90.cu and, from the same loads, z = x lora_A^T. x [M, K]
// and lora_A [r, K] row-major, 16 bit; see packed_offset for the result. One short wave of CTAs:
// what limits it is the latency of two loads, two reductions and the launch, 2 to 3 us on an H100.
#pragma once

#include "common.cuh"
#include "nf4_lora_matmul.h"
#include "nf4_lora_matmul_small_tile.cuh"
#include "ptx_sm90.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kPackCluster = 8;  // CTAs
constexpr int kPackTokens = 8;   // per cluster

struct PackProblem {
    LoraMatmulArgs a;
    uint8_t* packed_x;
    float* partial_z;  // [slices][tokens][padded rank]
    uint32_t* flags;
    int flag_count;
    int tokens;  // padded
    Divisor by_rank_tiles;
    int blocks;         // of x, K / 64
    int packed_blocks;  // with zeros up to a whole number of units
};

// A warp takes one block of K for 8 tokens, a cluster one slice of K, a block for each of its
// warps; grid (8 slices, tokens / 8). The sums for z of a CTA's warps, and then those of 8 CTAs,
// each adding an eighth of them, are added in order; what is left, one value per slice, the next
// kernel adds. Shared memory: [warps + 1][padded rank][8 tokens] f32. All loads of a warp, those of
// kRankTiles times 16 rows of lora_A included, are in flight together: what limits it is their
// latency. For several tiles ptxas would spill to fit three CTAs into an SM, were it not told that
// one is enough.
template <typename T, int kRankTiles, int kPackThreads>
__global__ void __launch_bounds__(kPackThreads, kRankTiles > 1 ? 1 : 0)
    pack_tokens_kernel(const PackProblem p) {
    constexpr int kPackWarps = kPackThreads / kWarpSize;
    const LoraMatmulArgs& a = p.a;
    extern __shared__ float smem_z[];
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int g = lane / 4, t = lane % 4;
    const int first_token = blockIdx.y * kPackTokens, token = first_token + g;
    const int rank_tiles = a.lora_A == nullptr ? 0 : (a.r + 15) / 16;
    const int values = 16 * rank_tiles * kPackTokens;
    const int block = blockIdx.x * kPackWarps + warp;
    const bool inside = block < p.blocks;
    const int64_t column = static_cast<int64_t>(block) * kBlock;

    let_next_kernel_start();
    cluster_arrive();
    for (int row = lane; inside && row < 16 * rank_tiles && row < a.r; row += kWarpSize)
        prefetch_l2(static_cast<const T*>(a.lora_A) + row * a.w.K + column);
    wait_for_previous_kernel();
    if (blockIdx.x == 0 && blockIdx.y == 0) {
        for (int i = threadIdx.x; i < p.flag_count; i += kPackThreads)
            p.flags[i] = 0;
    }
    uint32_t x[8];
    load_row(
        x, static_cast<const T*>(a.x) + token * a.w.K + column + 16 * t, inside && token < a.M);
    uint32_t low[kRankTiles][8], high[kRankTiles][8];
#pragma unroll
    for (int i = 0; i < kRankTiles; i++) {
        if (i >= rank_tiles)
            break;
        const int row = 16 * i + g;
        const T* lora_A = static_cast<const T*>(a.lora_A) + row * a.w.K + column + 16 * t;
        load_row(low[i], lora_A, inside && row < a.r);
        load_row(high[i], lora_A + 8 * a.w.K, inside && row + 8 < a.r);
    }
#pragma unroll
    for (int i = 0; i < kRankTiles; i++) {
        if (i >= rank_tiles)
            break;
        const int row = 16 * i + g;
        float sums[4] = {};
#pragma unroll
        for (int s = 0; s < 8; s += 2) {
            const uint32_t rows[4] = {low[i][s], high[i][s], low[i][s + 1], high[i][s + 1]};
            mma_16x8x16(sums, rows, x[s], x[s + 1], T{});
        }
#pragma unroll
        for (int e = 0; e < 4; e++)
            smem_z[warp * values + (row + 8 * (e / 2)) * kPackTokens + 2 * t + e % 2] = sums[e];
    }
    if (block < p.packed_blocks) {
        uint8_t* out = p.packed_x + static_cast<int64_t>(block) * p.tokens * kPackRow + 4 * t;
#pragma unroll
        for (int c = 0; c < 8; c++)
            *reinterpret_cast<uint32_t*>(out + packed_offset(token, c)) = x[c];
    }
    cluster_wait();  // all CTAs of the cluster have started
    if (rank_tiles == 0)
        return;
    __syncthreads();
    const uint32_t rank = cluster_rank();
    const int share = values / kPackCluster;                // 16 rank_tiles
    float* const smem_ctas = smem_z + kPackWarps * values;  // [8 CTAs][share]
    constexpr int kRounds = (16 * kRankTiles * kPackTokens + kPackThreads - 1) / kPackThreads;
    float sums[kRounds] = {};
#pragma unroll
    for (int round = 0; round < kRounds; round++) {
        const int i = round * kPackThreads + threadIdx.x;
#pragma unroll
        for (int j = 0; j < kPackWarps; j++)
            sums[round] += i < values ? smem_z[j * values + i] : 0.0f;
    }
#pragma unroll
    for (int round = 0; round < kRounds; round++) {
        const int i = round * kPackThreads + threadIdx.x;
        const int cta = divide(i / 16, p.by_rank_tiles);  // i / share
        const uint32_t place = shared_address(smem_ctas + rank * share + i - cta * share);
        if (i < values)
            store_remote(in_cta(place, cta), sums[round]);
    }
    cluster_arrive();
    cluster_wait();
    float* out =
        p.partial_z + (static_cast<int64_t>(blockIdx.x / kPackCluster) * p.tokens + first_token) *
                          (16 * rank_tiles);
    for (int i = threadIdx.x; i < share; i += kPackThreads) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kPackCluster; j++)
            sum += smem_ctas[j * share + i];
        const int value = rank * share + i;
        out[value % kPackTokens * (16 * rank_tiles) + value / kPackTokens] = sum;
    }
}

}  // namespace
}  // namespace lowbit::cuda
