// How CTAs make z = x lora_A^T for the low-rank term, in a kernel of their own
// (lora_project_sm90.cu) or as the first ones of a product's grid (nf4_lora_matmul_mid_sm90.cu).
//
//     z[m, j] = sum_k x[m, k] lora_A[j, k]
//     z_out[m, j] = RN(z[m, j]),  z_scaled[m, j] = RN(scaling * lora_scaling[j] * z[m, j])
//
// x [M, K], lora_A [r, K], z_out [M, r], z_scaled [M, r rounded up to 16, zeros behind r]: one
// 16-bit dtype, row-major, x and lora_A 16-byte aligned, K % 64 == 0, r <= 64. Sums in fp32 in an
// order fixed by the shapes and the cluster's size.
//
// A CTA takes 64 to 256 tokens at a time and all of K or a part of it; those that divide K are
// neighbours in a cluster. A producer thread brings steps of 64 along K into a ring by TMA; each
// warpgroup multiplies its 64 or 128 tokens of a step with the 16 or 64 columns that r fits in
// (rows behind lora_A's last one arrive as zeros). Then each CTA adds up its share of the sums.
//
// Bound by what an SM takes in: see lora_project_sm90.cu. In a product's grid, four CTAs and 256
// tokens of K 4096: 9.6 us at rank 16, 11.9 at 64, and 0.25 until the others know (H200, 2026-11).
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "bulk_sm90.cuh"
#include "common.cuh"
#include "divisor.h"
#include "lora_project.h"
#include "tensor_map.h"
#include "wgmma_sm90.cuh"

namespace lowbit::cuda {
namespace {
namespace projection {

constexpr int kWarpgroup = 128;
constexpr int kBoxTokens = 64;  // of a product
constexpr int kMostTokens = 256;
constexpr int kStepK = 64;
constexpr int kLineBytes = 128;  // a swizzled line: 64 elements

// Shared memory in this order: stages (x, then lora_A), sums, two barriers per stage. A stage has
// as many tokens as a group. 230 592 bytes at most.
template <int kColumns>
struct Layout {
    static constexpr int kABytes = kColumns * kLineBytes;
    static constexpr int kMostStages = 12;
    static constexpr int kRing = (kColumns == 16 ? 204 : 160) * 1024;
    static constexpr int kSums = kRing;  // [tokens][kColumns] f32
    static constexpr int kFull = kSums + kMostTokens * kColumns * 4;
    static constexpr int kEmpty = kFull + kMostStages * 8;
    static constexpr int kAlignment = 1024;
    static constexpr int kSmemBytes = kEmpty + kMostStages * 8 + kAlignment;
    static_assert(kSmemBytes <= 227 * 1024);
};

struct Params {
    CUtensorMap x, lora_A;
    const float* lora_scaling;  // [r] or null
    float scaling;
    int M;
    int steps;   // K / 64
    int r;       // at most kColumns
    int tokens;  // of a group, a multiple of 64
    int ctas;    // that project
    // Of K, each of a CTA; those of a group are neighbours in a cluster. Like the cluster's size a
    // power of two.
    int parts_log2;
    int cluster_log2;
    int stages;
    void* z_out;     // [M, r] or null
    void* z_scaled;  // [M, z_columns]
    int z_columns;   // r rounded up to 16
};

// s_j of the formula.
__device__ __forceinline__ float column_scale(const float* lora_scaling, float scaling, int j) {
    return lora_scaling == nullptr ? scaling : __fmul_rn(scaling, __ldg(lora_scaling + j));
}

// Steps of K that this CTA takes.
struct Steps {
    int first, end;
};

// By one thread, behind the consumers by a ring's length.
template <int kColumns>
__device__ __forceinline__ void
load(const Params& p, Steps steps, int token0, uint32_t smem, Ring& ring) {
    using L = Layout<kColumns>;
    const int x_bytes = p.tokens * kLineBytes, bytes = x_bytes + L::kABytes;
    for (int step = steps.first; step < steps.end; step++, ring.advance(p.stages)) {
        const uint32_t stage = smem + ring.slot * bytes, full = smem + L::kFull + ring.slot * 8;
        barrier_wait(smem + L::kEmpty + ring.slot * 8, ring.parity ^ 1);
        barrier_arrive_expect(full, bytes);
        load_tile(stage, p.x, step * kStepK, token0, full);
        load_tile(stage + x_bytes, p.lora_A, step * kStepK, 0, full);
    }
}

// Where a sum lies. The swizzle spreads the four rows of half a warp over all banks.
template <int kColumns>
__device__ __forceinline__ uint32_t sum_offset(int row, int column) {
    return (row * kColumns + (column ^ (row * 8 & (kColumns - 1)))) * 4;
}

template <int kColumns>
__device__ __forceinline__ void store_sums(uint8_t* sums, int box, const float* d) {
    const int lane = opaque(threadIdx.x) % kWarpSize;
    const int row0 = box * kBoxTokens + threadIdx.x % kWarpgroup / kWarpSize * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < kColumns / 2; i += 2) {
        const int row = row0 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2;
        float* at = reinterpret_cast<float*>(sums + sum_offset<kColumns>(row, column));
        *reinterpret_cast<float2*>(at) = make_float2(d[i], d[i + 1]);
    }
}

// A warpgroup's tokens, kBoxes times 64. Of the last warpgroup's there may be fewer: it has the
// last 64 twice then.
template <typename T, int kColumns, int kBoxes>
__device__ __forceinline__ void
multiply(const Params& p, Steps steps, uint32_t smem, uint8_t* sums, Ring& ring) {
    using L = Layout<kColumns>;
    const uint32_t x_bytes = p.tokens * kLineBytes;
    const int last = p.tokens / kBoxTokens - 1, first = threadIdx.x / kWarpgroup * kBoxes;
    uint32_t own_tokens[kBoxes];
#pragma unroll
    for (int b = 0; b < kBoxes; b++)
        own_tokens[b] = min(first + b, last) * kBoxTokens * kLineBytes;
    float d[kBoxes][kColumns / 2] = {};
#pragma unroll 1
    for (int step = steps.first; step < steps.end; step++, ring.advance(p.stages)) {
        const uint32_t stage = smem + ring.slot * (x_bytes + L::kABytes);
        const uint64_t a = operand_descriptor(stage + x_bytes);
        barrier_wait(smem + L::kFull + ring.slot * 8, ring.parity);
        wgmma_fence();
#pragma unroll
        for (int b = 0; b < kBoxes; b++) {
            const uint64_t x = operand_descriptor(stage + own_tokens[b]);
#pragma unroll
            for (int i = 0; i < kStepK / 16; i++)
                wgmma(d[b], x + 2 * i, a + 2 * i, true, T{});
        }
        wgmma_commit();
        wgmma_wait<0>();
        if (threadIdx.x % kWarpSize == 0)
            barrier_arrive(smem + L::kEmpty + ring.slot * 8);
    }
#pragma unroll
    for (int b = 0; b < kBoxes; b++) {
        if (first + b <= last)
            store_sums<kColumns>(sums, first + b, d[b]);
    }
}

// What is stored of z: z_scaled, z_out if wanted, or both.
enum Results { kScaled = 1, kUnscaled = 2, kBoth = 3 };

// Four columns of z from `column` on, of token m.
template <typename T, int kResults>
__device__ __forceinline__ void
store_z(const Params& p, const float (&z)[4], int64_t m, int column) {
    float scaled[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int j = column + i;
        if constexpr ((kResults & kScaled) != 0)
            scaled[i] =
                j < p.r ? __fmul_rn(z[i], column_scale(p.lora_scaling, p.scaling, j)) : 0.0f;
        if constexpr ((kResults & kUnscaled) != 0) {
            if (p.z_out != nullptr && j < p.r)
                static_cast<T*>(p.z_out)[m * p.r + j] = from_float<T>(z[i]);
        }
    }
    if constexpr ((kResults & kScaled) != 0) {
        if (column < p.z_columns) {
            T* out = static_cast<T*>(p.z_scaled) + m * p.z_columns + column;
            *reinterpret_cast<uint2*>(out) = make_uint2(
                pack_pair(scaled[0], scaled[1], T{}), pack_pair(scaled[2], scaled[3], T{}));
        }
    }
}

// Share number `part` of a group's sums, from the CTAs that divide K, in its order.
template <typename T, int kColumns, int kResults>
__device__ __forceinline__ void add_up(const Params& p, int part, int token0, uint32_t smem_sums) {
    const int parts = 1 << p.parts_log2;
    const int share = p.tokens * kColumns / 4 >> p.parts_log2;  // in fours
    const int first_cta = cluster_rank() - part;
    for (int i = part * share + threadIdx.x; i < (part + 1) * share; i += blockDim.x) {
        const int row = i / (kColumns / 4), column = i % (kColumns / 4) * 4;
        const uint32_t at = smem_sums + sum_offset<kColumns>(row, column);
        float z[4] = {};
#pragma unroll 4
        for (int from = 0; from < parts; from++) {
            const float4 v = load_remote(in_cta(at, first_cta + from));
            z[0] += v.x, z[1] += v.y, z[2] += v.z, z[3] += v.w;
        }
        if (token0 + row < p.M)
            store_z<T, kResults>(p, z, token0 + row, column);
    }
}

// By all threads of the grid's first p.ctas CTAs, whole clusters: a warpgroup for each 64 tokens of
// a group, but at most kWarpgroups, and a warp. Everything before is complete.
//
// `told` is null or called by all threads when this CTA's z_scaled is stored, before its z_out is,
// for which nobody waits in this kernel.
template <typename T, int kColumns, int kWarpgroups, typename Told>
__device__ __forceinline__ void project(const Params& p, uint8_t* smem_raw, const Told& told) {
    using L = Layout<kColumns>;
    const uint32_t raw = shared_address(smem_raw);
    const uint32_t smem = (raw + L::kAlignment - 1) / L::kAlignment * L::kAlignment;
    constexpr int kBoxes = kMostTokens / kBoxTokens / kWarpgroups;
    constexpr bool kTells = !std::is_same_v<Told, std::nullptr_t>;
    const int boxes = p.tokens / kBoxTokens;
    const int consumers = min(boxes, kWarpgroups) * kWarpgroup;
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.stages; i++) {
            barrier_init(smem + L::kFull + i * 8, 1);
            barrier_init(smem + L::kEmpty + i * 8, consumers / kWarpSize);
        }
        barrier_init_fence();
    }
    __syncthreads();

    const int group = cluster_rank() >> p.parts_log2;
    const int part = cluster_rank() - (group << p.parts_log2);
    const int cluster_tokens = p.tokens << (p.cluster_log2 - p.parts_log2);
    const int pass_tokens = (p.ctas >> p.cluster_log2) * cluster_tokens;
    const int offset = group * p.tokens;
    const Steps steps{p.steps * part >> p.parts_log2, p.steps * (part + 1) >> p.parts_log2};
    uint8_t* sums = smem_raw + (smem - raw) + L::kSums;
    Ring ring;
    for (int first = (blockIdx.x >> p.cluster_log2) * cluster_tokens; first < p.M;
         first += pass_tokens) {
        if (threadIdx.x < consumers) {
            if (kBoxes == 1 || boxes <= kWarpgroups)
                multiply<T, kColumns, 1>(p, steps, smem, sums, ring);
            else
                multiply<T, kColumns, kBoxes>(p, steps, smem, sums, ring);
        } else if (threadIdx.x < consumers + kWarpSize && elect_lane()) {
            load<kColumns>(p, steps, first + offset, smem, ring);
        }
        __syncwarp();
        cluster_sync_unaligned();  // by all threads: it waits for each that has not left
        if constexpr (kTells) {
            add_up<T, kColumns, kScaled>(p, part, first + offset, smem + L::kSums);
            if (first + pass_tokens >= p.M) {
                __syncthreads();
                told();
            }
            if (p.z_out != nullptr)
                add_up<T, kColumns, kUnscaled>(p, part, first + offset, smem + L::kSums);
        } else {
            add_up<T, kColumns, kBoth>(p, part, first + offset, smem + L::kSums);
        }
        cluster_sync_unaligned();  // nobody stores the next sums or leaves while these are read
    }
}

// ---- host ---------------------------------------------------------------------------------------

// Of clusters of this many CTAs. a.lora_A is not null.
template <int kColumns>
cudaError_t make_params(
    Params& p,
    const LoraMatmulArgs& a,
    int cluster,
    const ProjectionTiling& tiling,
    void* z_scaled) {
    using L = Layout<kColumns>;
    const CUtensorMapDataType type = tensor_map_type(a.dtype);
    cudaError_t error = make_tensor_map(p.x, type, a.x, a.M, a.w.K, {tiling.tokens, kStepK});
    if (error == cudaSuccess)
        error = make_tensor_map(p.lora_A, type, a.lora_A, a.r, a.w.K, {kColumns, kStepK});
    p.lora_scaling = a.lora_scaling;
    p.scaling = a.scaling;
    p.M = static_cast<int>(a.M);
    p.steps = static_cast<int>(a.w.K / kStepK);
    p.r = a.r;
    p.tokens = tiling.tokens;
    p.ctas = tiling.clusters * cluster;
    // Both are powers of two: see room_for_clusters and tile_projection.
    p.parts_log2 = log2_of(tiling.parts);
    p.cluster_log2 = log2_of(cluster);
    p.stages = std::min(L::kMostStages, L::kRing / (tiling.tokens * kLineBytes + L::kABytes));
    p.z_out = a.z_out;
    p.z_scaled = z_scaled;
    p.z_columns = padded_rank(a.r);
    return error;
}

}  // namespace projection
}  // namespace
}  // namespace lowbit::cuda
