// The product kernels of lora_grads_sm90.cu: a pass over an activation [M, C], which is dy or x, or
// one over each.
//
//     sums[c, j] = sum_m g[m, c] t[m, j]           over the CTA's tokens
//     projection[m, j] = sum_c g[m, c] f[c, j]     over the CTA's columns (dy only)
//
// A CTA owns a rectangle of g. It walks over it in chunks of kColumns columns, and in a chunk 64
// tokens at a time, through a ring of stages that one thread fills by TMA. Half of the warps, or
// without a projection all of them, keep the chunk's sums in registers, the other half adds up the
// projection of all tokens in shared memory. Both go to the workspace as fp32 partial sums, or sums
// over all tokens to their results; then the CTAs wait for each other and share the rest of the
// work (lora_grads_finish.cuh).
#pragma once

#include <cooperative_groups.h>
#include <cuda.h>

#include "bulk_sm90.cuh"
#include "common.cuh"
#include "lora_grads_finish.cuh"
#include "lora_grads_products.cuh"
#include "marks.h"
#include "ptx_sm90.cuh"

namespace lowbit::cuda {
namespace {

struct GradMaps {
    CUtensorMap g;  // box [64 tokens][64 columns]
    CUtensorMap t;  // box [64 tokens][kRank]
    CUtensorMap f;  // box [kColumns][kRank]
};

struct GradParams {
    int C;
    int first_token, end_token;  // of the pass
    int cta_columns, cta_tokens;
    int column_parts;
    bool wants_projection, wants_sums, wants_column_sums;
    bool finishes;       // all CTAs are resident
    float* projection;   // [column parts, tokens of the pass, kRank]
    float* sums;         // [token parts, C, kRank]
    float* column_sums;  // [token parts, C]
};

// The rectangle of a CTA; where there are more CTAs than parts, the last have no chunks.
struct Part {
    int column_part, token_part;
    int column0, chunks;
    int token0, blocks;
};

template <class P>
__device__ __forceinline__ Part own_part(const GradParams& p) {
    const int token_part = blockIdx.x / p.column_parts;
    const int column_part = blockIdx.x - token_part * p.column_parts;
    const int column0 = column_part * p.cta_columns;
    const int token0 = p.first_token + token_part * p.cta_tokens;
    const int tokens = max(0, min(p.cta_tokens, p.end_token - token0));
    const int columns = tokens > 0 ? min(p.cta_columns, p.C - column0) : 0;
    return {column_part, token_part,
            column0,     (columns + P::kColumns - 1) / P::kColumns,
            token0,      (tokens + kStageTokens - 1) / kStageTokens};
}

// One thread.
template <class P>
__device__ __forceinline__ void
load_part(const GradMaps& maps, const GradParams& p, uint32_t smem) {
    const Part part = own_part<P>(p);
    Ring ring;
    for (int chunk = 0; chunk < part.chunks; chunk++) {
        const int column = part.column0 + chunk * P::kColumns;
        if (P::kProjects && p.wants_projection) {
            const int buffer = chunk % 2;
            const uint32_t full = smem + P::kFFull + buffer * 8;
            barrier_wait(smem + P::kFEmpty + buffer * 8, chunk / 2 % 2 ^ 1);
            barrier_arrive_expect(full, P::kFBytes);
            load_tile(smem + P::kF + buffer * P::kFBytes, maps.f, 0, column, full);
        }
        for (int block = 0; block < part.blocks; block++, ring.advance(P::kStages)) {
            const int token = part.token0 + block * kStageTokens;
            const uint32_t full = smem + P::kFull + ring.slot * 8;
            const uint32_t stage = smem + ring.slot * P::kStageBytes;
            barrier_wait(smem + P::kEmpty + ring.slot * 8, ring.parity ^ 1);
            barrier_arrive_expect(full, P::kGBytes + (p.wants_sums ? P::kTBytes : 0));
#pragma unroll
            for (int box = 0; box < P::kColumns / kBoxColumns; box++) {
                const uint32_t to = stage + box * kBoxBytes;
                const int from = column + box * kBoxColumns;
                if (P::kProjects)  // dy is read again, for dx
                    load_tile(to, maps.g, from, token, full);
                else
                    load_tile_once(to, maps.g, from, token, full);
            }
            if (p.wants_sums)
                load_tile(stage + P::kGBytes, maps.t, 0, token, full);
        }
    }
}

// Frees a stage behind the products of the next: an arrival does not wait for loads under way, but
// those of the stage before have gone into products by then. So at least two stages. The last one
// is never freed, and nobody waits for it.
struct StageBefore {
    uint32_t empty = 0;

    __device__ __forceinline__ void follow(uint32_t next_empty) {
        if (empty != 0)
            barrier_arrive(empty);
        empty = next_empty;
    }
};

// A warp's 16 tokens of each block.
template <typename T, class P>
__device__ __forceinline__ void
project(const GradParams& p, uint32_t smem, float* smem_projection, int warp) {
    const int lane = threadIdx.x % kWarpSize;
    const Part part = own_part<P>(p);
    Ring ring;
    StageBefore freed;
    for (int chunk = 0; chunk < part.chunks; chunk++) {
        const int buffer = chunk % 2;
        const uint32_t f = smem + P::kF + buffer * P::kFBytes;
        HeldFactors<P> factors;
        if (p.wants_projection) {
            barrier_wait(smem + P::kFFull + buffer * 8, chunk / 2 % 2);
            factors.load(f);
        }
        for (int block = 0; block < part.blocks; block++, ring.advance(P::kStages)) {
            float d[P::kRank / 8][4] = {};
            barrier_wait(smem + P::kFull + ring.slot * 8, ring.parity);
            if (p.wants_projection)
                project_stage<T, P>(d, factors, f, smem + ring.slot * P::kStageBytes, warp);
            __syncwarp();
            if (lane == 0)
                freed.follow(smem + P::kEmpty + ring.slot * 8);
            if (!p.wants_projection)
                continue;
            // A thread's own words: in whatever order, without conflicts.
            float* sums = smem_projection + (block * 4 + warp) * (P::kRank / 2 * kWarpSize) + lane;
#pragma unroll
            for (int i = 0; i < P::kRank / 2; i++) {
                float& value = d[i / 4][i % 4];
                if (chunk > 0)
                    value += sums[i * kWarpSize];
                if (chunk + 1 < part.chunks)
                    sums[i * kWarpSize] = value;
            }
            if (chunk + 1 < part.chunks)
                continue;
            const int first = part.token0 - p.first_token + block * kStageTokens + warp * 16;
            const int tokens = p.end_token - p.first_token;
            float* out = p.projection +
                         (part.column_part * int64_t{tokens} + first + lane / 4) * P::kRank +
                         lane % 4 * 2;
#pragma unroll
            for (int i = 0; i < P::kRank / 4; i++) {
                const int row = i % 2 * 8;
                const float* v = &d[i / 2][i % 2 * 2];
                if (first + lane / 4 + row < tokens)
                    *reinterpret_cast<float2*>(out + row * P::kRank + i / 2 * 8) = {v[0], v[1]};
            }
        }
        __syncwarp();
        if (p.wants_projection && lane == 0)
            barrier_arrive(smem + P::kFEmpty + buffer * 8);
    }
}

// A warp's kTiles x 16 columns of each chunk.
template <typename T, class P>
__device__ __forceinline__ void
add_tokens(const GradParams& p, const FinishParams& f, uint32_t smem, int warp) {
    const int lane = threadIdx.x % kWarpSize;
    const Part part = own_part<P>(p);
    float* out = p.sums + static_cast<int64_t>(part.token_part) * p.C * P::kRank;
    float* out_columns = p.column_sums + static_cast<int64_t>(part.token_part) * p.C;
    const Scales<P> scales(f);
    Ring ring;
    StageBefore freed;
    for (int chunk = 0; chunk < part.chunks; chunk++) {
        ColumnSums<P> d = {};
        float column_sums[P::kTiles][4] = {};
#pragma unroll 1
        for (int block = 0; block < part.blocks; block++, ring.advance(P::kStages)) {
            const uint32_t stage = smem + ring.slot * P::kStageBytes;
            barrier_wait(smem + P::kFull + ring.slot * 8, ring.parity);
            add_stage<T, P>(
                d, column_sums, stage, warp, block == 0, p.wants_sums,
                P::kProjects && p.wants_column_sums);
            __syncwarp();
            if (lane == 0)
                freed.follow(smem + P::kEmpty + ring.slot * 8);
        }
        const int column0 = part.column0 + chunk * P::kColumns + warp * 16;
        if (f.whole)
            store_whole<T, P>(f, d, scales, column0);
        else if (p.wants_sums)
            store_part<P>(out, d, column0, p.C);
        if (P::kProjects && p.wants_column_sums && lane % 4 == 0) {
#pragma unroll
            for (int i = 0; i < P::kTiles * 2; i++) {
                const int column = column0 + tile_column<P>(i) + lane / 4;
                const float sum = column_sums[i / 2][i % 2 * 2];
                if (column < p.C && f.whole)
                    static_cast<T*>(f.d_bias)[column] = from_float<T>(sum);
                else if (column < p.C)
                    out_columns[column] = sum;
            }
        }
    }
}

struct GradPass {
    GradMaps maps;
    GradParams params;
    FinishParams finish;
    Marks u_marks;  // that say that u is there, set by the pass over x
    int ctas;
};

// Behind the grid barrier that follows u; by the warps that wait for the first stage anyway.
__device__ __forceinline__ void set_marks(const Marks& marks) {
    const int first = blockIdx.x + gridDim.x * threadIdx.x;
    if (marks.words == nullptr || first >= marks.count)
        return;
    __threadfence();
    for (int i = first; i < marks.count; i += gridDim.x * kComputeWarps * kWarpSize)
        store_relaxed(marks.words + i, marks.mark);
}

template <typename T, class P>
__device__ __forceinline__ void run_pass(const GradPass& pass, uint8_t* smem_raw) {
    const GradMaps& maps = pass.maps;
    const GradParams& p = pass.params;
    const FinishParams& f = pass.finish;
    const uint32_t raw = shared_address(smem_raw);
    const uint32_t smem = (raw + 1023) / 1024 * 1024;
    const int warp = threadIdx.x / kWarpSize;
    if (threadIdx.x == 0) {
        for (int i = 0; i < P::kStages; i++) {
            barrier_init(smem + P::kFull + i * 8, 1);
            barrier_init(smem + P::kEmpty + i * 8, kComputeWarps);
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(smem + P::kFFull + i * 8, 1);
            barrier_init(smem + P::kFEmpty + i * 8, kComputeWarps - P::kSumWarps);
        }
        barrier_init_fence();
    }
    __syncthreads();
    wait_for_previous_kernel();
    let_next_kernel_start();
    if (!P::kProjects && warp < kComputeWarps)
        set_marks(pass.u_marks);
    if (warp == kComputeWarps) {
        if (elect_lane())
            load_part<P>(maps, p, smem);
    } else if (P::kProjects && warp < kComputeWarps - P::kSumWarps) {
        float* projection = reinterpret_cast<float*>(smem_raw + (smem - raw) + P::kProjection);
        project<T, P>(p, smem, projection, warp);
    } else {
        add_tokens<T, P>(p, f, smem, warp - (kComputeWarps - P::kSumWarps));
    }
    if (!p.finishes || f.units == 0)
        return;
    __syncwarp();
    cooperative_groups::this_grid().sync();
    if (threadIdx.x >= kFinishThreads)
        return;
    float4* smem_products = reinterpret_cast<float4*>(smem_raw);  // stages nobody needs any more
    for (int unit = blockIdx.x; unit < f.units; unit += gridDim.x)
        finish_unit<T, P>(f, unit, smem_products);
}

template <typename T, class P>
__global__ void __launch_bounds__(kGradThreads, 1)
    lora_grads_kernel(const __grid_constant__ GradPass pass) {
    extern __shared__ uint8_t smem[];
    run_pass<T, P>(pass, smem);
}

// Both passes by the same CTAs, as many as the greater of the two has. What waits for other kernels
// does so once; the second time it is over at once.
template <typename T, class PassOverDy, class PassOverX>
__global__ void __launch_bounds__(kGradThreads, 1) lora_grads_both_kernel(
    const __grid_constant__ GradPass dy, const __grid_constant__ GradPass x) {
    static_assert(PassOverX::kSmemBytes <= PassOverDy::kSmemBytes);
    // Its barriers lie where there have been none.
    static_assert(PassOverX::kProjection <= PassOverDy::kFull);
    extern __shared__ uint8_t smem[];
    run_pass<T, PassOverDy>(dy, smem);
    // TMA reads u, which this kernel has written, and writes where its threads have read.
    fence_async_proxy();
    fence_async_proxy_global();
    cooperative_groups::this_grid().sync();
    fence_async_proxy_global();
    run_pass<T, PassOverX>(x, smem);
}

}  // namespace
}  // namespace lowbit::cuda
