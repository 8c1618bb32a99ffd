// z = x lora_A^T in nf4_lora_matmul_small_sm90.cu: x [M, K], M = 2..64, lora_A [r, K], r <= 64. It
// is computed by kProjectors CTAs that do nothing else, a slice of K each, and brought to the
// others by three warps that have nothing else to do.
//
// Bound by latencies, one behind the other: the first loads, the sum over warpgroups, the release
// of a mark, its acquisition, the loads of what it stands for. At 4096 x 4096, 16 tokens and rank
// 16 z has arrived 4.7 us after the end of the kernel before, and is wanted at 5.0 (H200, 2026-11).
#pragma once

#include "bulk_sm90.cuh"
#include "common.cuh"
#include "nf4_lora_matmul_small_tile.cuh"
#include "wgmma_sm90.cuh"

namespace lowbit::cuda {
namespace {

template <typename Tile>
__device__ __forceinline__ bool projectors_add(const Problem& p) {
    return Tile::kTokens * kMaxRank > kSharedValues &&
           Tile::kTokens * padded_rank(p.r) > kSharedValues;
}

// Four columns of a token's z as the low-rank product takes them, zero outside. If asked to, also
// stores them to z_out.
template <typename T>
__device__ __forceinline__ void
finish_z(const Problem& p, int token, int j, float (&z)[4], bool writes) {
    const int columns = token < p.M ? p.r - j : 0;
    if (writes) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            if (e < columns)
                static_cast<T*>(p.z_out)[token * p.r + j + e] = from_float<T>(z[e]);
        }
    }
    float scale[4] = {p.scaling, p.scaling, p.scaling, p.scaling};
    if (p.lora_scaling != nullptr) {
#pragma unroll
        for (int e = 0; e < 4; e++)
            scale[e] *= __ldg(p.lora_scaling + min(j + e, p.r - 1));
    }
#pragma unroll
    for (int e = 0; e < 4; e++)
        z[e] = e < columns ? z[e] * scale[e] : 0.0f;
}

__device__ __forceinline__ void add_part(float (&z)[4], const float4& part) {
    z[0] += part.x, z[1] += part.y, z[2] += part.z, z[3] += part.w;
}

__device__ __forceinline__ float4 load_shared_floats(uint32_t address) {
    const uint4 v = load_shared(address);
    return reinterpret_cast<const float4&>(v);
}

// A projector takes a slice of K, and each of its four warpgroups every fourth step of two blocks
// in it, through a ring of its own. Products have 64 rows of lora_A; those past the padded rank are
// whatever lies behind it.
template <typename T, typename Tile>
__device__ __forceinline__ void
multiply_slice(float (&sums)[Tile::kSums], const Problem& p, const Maps& maps, uint32_t smem) {
    constexpr int kStep = kUnitBlocks * kBlock;
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0);
    const int group = warp / 4, slice = blockIdx.x;
    const int rank = padded_rank(p.r), stages = p.project_stages;
    const int steps = static_cast<int>((p.w.K + kStep - 1) / kStep);
    const int first = steps * slice / kProjectors + group, end = steps * (slice + 1) / kProjectors;
    const int count = first < end ? (end - first + 3) / 4 : 0;
    const uint32_t stage_bytes = project_stage_bytes<Tile>(p.r);
    const uint32_t full = smem + group * (8 * kMostProjectStages);
    const uint32_t ring = smem + kProjectRing + group * stages * stage_bytes;
    const auto block_of = [&](int i) { return (first + 4 * i) * kUnitBlocks; };
    const auto copy = [&](int i, int stage) {
        const uint32_t to = ring + stage * stage_bytes, barrier = full + 8 * stage;
        barrier_arrive_expect(barrier, stage_bytes);
        load_tile(to + Tile::kTokenBytes, maps.lora_A, 0, 0, block_of(i), barrier);
        load_tile(to, maps.x, 0, 0, block_of(i), barrier);
    };
    const bool leader = warp % 4 == 0 && elect_lane();
    if (leader) {
        prefetch_map(maps.x);
        for (int i = 0; i < stages; i++)
            barrier_init(full + 8 * i, 1);
        barrier_init_fence();
        for (int i = 0; i < min(count, stages); i++)
            prefetch_tile_l2(maps.lora_A, 0, 0, block_of(i));
    }
    wait_for_previous_kernel();
    if (leader) {
        for (int i = 0; i < min(count, stages); i++)
            copy(i, i);
    }
    __syncwarp();
    named_barrier(1 + group, kWarpgroup);

    int stage = 0, phase = 0;
#pragma unroll 1
    for (int i = 0; i < count; i++) {
        const uint32_t x = ring + stage * stage_bytes, lora_A = x + Tile::kTokenBytes;
        barrier_wait(full + 8 * stage, phase);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4 * kUnitBlocks; k++)
            wgmma(
                sums, own_operand_descriptor(lora_A + k / 4 * rank * kTokenRow + k % 4 * 32),
                own_operand_descriptor(x + k / 4 * Tile::kTokens * kTokenRow + k % 4 * 32), true,
                T{});
        wgmma_commit();
        wgmma_wait<0>();
        if (i + stages < count) {
            named_barrier(1 + group, kWarpgroup);
            if (leader)
                copy(i + stages, stage);
            __syncwarp();
        }
        if (++stage == stages)
            stage = 0, phase ^= 1;
    }
#pragma unroll
    for (int i = 0; i < Tile::kSums; i++)
        asm volatile("" : "+f"(sums[i])::"memory");
}

// Where a warpgroup's sums of a token lie, from column j on, in the place of the rings.
template <typename Tile>
__device__ __forceinline__ uint32_t sums_of(uint32_t smem, int group, int token, int j) {
    return smem + kProjectRing + ((group * Tile::kTokens + token) * kSumsRow + j) * 4;
}

// Sums of all warpgroups to where all see them.
template <typename Tile>
__device__ __forceinline__ void
share_sums(const float (&sums)[Tile::kSums], int rank, uint32_t smem) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize % 4;
    named_barrier(kTablesBarrier, kConsumers);  // the rings are read
    if (warp * 16 < rank) {
        const uint32_t own =
            sums_of<Tile>(smem, threadIdx.x / kWarpgroup, lane % 4 * 2, warp * 16 + lane / 4);
#pragma unroll
        for (int i = 0; i < Tile::kSums; i++)
            store_shared(own + ((i / 4 * 8 + i % 2) * kSumsRow + i / 2 % 2 * 8) * 4, sums[i]);
    }
    named_barrier(kTablesBarrier, kConsumers);
}

// What the four warpgroups have, added in their order, to the workspace; by the last of projectors
// that add, with what those before it have there, scaled and rounded [kTokens][padded rank].
template <typename T, typename Tile>
__device__ __forceinline__ void
store_slice(const Problem& p, int slice, int rank, bool last, uint32_t smem) {
    const int values = Tile::kTokens * rank;
    float* const out = p.partial_z + slice * values;
    const auto place_of = [&](int s, int i) {  // behind the sums
        return sums_of<Tile>(smem, 4, 0, 0) + (s * values + i) * 4;
    };
    if (last) {
#pragma unroll 1
        for (int i = 4 * threadIdx.x; i < values; i += 4 * kConsumers) {
#pragma unroll
            for (int s = 0; s < kProjectors - 1; s++)
                copy_async_16(place_of(s, i), p.partial_z + s * values + i);
        }
        commit_async();
        wait_async<0>();
    }
#pragma unroll 1
    for (int i = 4 * threadIdx.x; i < values; i += 4 * kConsumers) {
        const int token = divide(i, p.by_rank), j = i - token * rank;
        float sum[4] = {};
#pragma unroll
        for (int group = 0; group < 4; group++)
            add_part(sum, load_shared_floats(sums_of<Tile>(smem, group, token, j)));
        if (!last) {
            __stcg(reinterpret_cast<float4*>(out + i), make_float4(sum[0], sum[1], sum[2], sum[3]));
            continue;
        }
        float z[4] = {};
#pragma unroll
        for (int s = 0; s < kProjectors - 1; s++)
            add_part(z, load_shared_floats(place_of(s, i)));
        add_part(z, make_float4(sum[0], sum[1], sum[2], sum[3]));
        finish_z<T>(p, token, j, z, p.z_out != nullptr);
        reinterpret_cast<uint2*>(out)[i / 4] = {
            pack_pair(z[0], z[1], T{}), pack_pair(z[2], z[3], T{})};
    }
}

// To every CTA that will ask: each has a flag of its own, which it resets. One for each thread: a
// second release would wait for the first.
__device__ __forceinline__ void hand_over_z(const Problem& p, int slice) {
    for (int cta = threadIdx.x; cta < p.ctas; cta += kConsumers) {
        if (finishes_tiles(p.shares, cta))
            store_release(p.z_flags + cta * kProjectors + slice, p.mark);
    }
}

// A CTA's slice of z for all others. Or for the last projector, through the flags of CTA 0, which
// adds z up for all; that lies where a slice of its own would.
template <typename T, typename Tile>
__device__ __forceinline__ void project(const Problem& p, const Maps& maps, uint32_t smem) {
    const int slice = blockIdx.x, rank = padded_rank(p.r);
    const bool together = projectors_add<Tile>(p), last = together && slice == kProjectors - 1;
    float sums[Tile::kSums] = {};
    multiply_slice<T, Tile>(sums, p, maps, smem);
    share_sums<Tile>(sums, rank, smem);
    if (last) {
        if (threadIdx.x < kProjectors - 1)
            wait_for_mark(p.z_flags + threadIdx.x, p.mark);
        named_barrier(kTablesBarrier, kConsumers);
    }
    store_slice<T, Tile>(p, slice, rank, last, smem);
    named_barrier(kTablesBarrier, kConsumers);
    if (!together || last)
        hand_over_z(p, slice);
    else if (threadIdx.x == 0)
        store_release(p.z_flags + slice, p.mark);
}

// z, scaled and rounded, to shared memory as rows of 64 columns under the 128-byte swizzle, of
// which the padded rank is written, by the last three warps of a CTA that finishes tiles. One CTA
// also writes z_out, where no projector does.
template <typename T, typename Tile>
__device__ __forceinline__ void gather_z(const Problem& p, int cta, uint32_t smem) {
    const int thread = threadIdx.x - (kThreads - kGatherers);
    if (!finishes_tiles(p.shares, cta))
        return;
    wait_for_previous_kernel();
    const bool together = p.z_in == nullptr && projectors_add<Tile>(p);
    if (p.z_in == nullptr) {
        if (thread < kProjectors && (!together || thread == kProjectors - 1))
            wait_for_mark(p.z_flags + cta * kProjectors + thread, p.mark);
        named_barrier(kGatherBarrier, kGatherers);
    }
    const int rank = padded_rank(p.r), values = Tile::kTokens * rank;
    const auto place_of = [&](int token, int j) {
        return smem + Tile::kZ + swizzled_offset(token, j / 8) + j % 8 * 2;
    };
    // All copies of a thread are under way at once, without registers. It reads only its own.
    const auto slice_of = [&](int s, int i) {
        constexpr int kHalf = kTableStride / 2;
        const uint32_t at = 4 * i;
        return smem + (Tile::kGroupSlots + at / kHalf) * kTableStride + kHalf + at % kHalf +
               s * Tile::kSliceSlots * kTableStride;
    };
    if (together) {
        const auto* const z =
            reinterpret_cast<const uint4*>(p.partial_z + (kProjectors - 1) * values);
#pragma unroll 1
        for (int i = thread; i < values / 8; i += kGatherers) {
            const int token = divide(8 * i, p.by_rank);
            copy_async_16(place_of(token, 8 * i - token * rank), z + i);
        }
    } else if (Tile::kSlicesFit && p.z_in == nullptr) {
#pragma unroll 1
        for (int i = 4 * thread; i < values; i += 4 * kGatherers) {
#pragma unroll
            for (int s = 0; s < kProjectors; s++)
                copy_async_16(slice_of(s, i), p.partial_z + s * values + i);
        }
    }
    commit_async();
    wait_async<0>();
    const bool writes = p.z_in == nullptr && p.z_out != nullptr && cta == p.ctas - 1;
#pragma unroll 1
    for (int i = 4 * thread; i < values && !together; i += 4 * kGatherers) {
        const int token = divide(i, p.by_rank), j = i - token * rank;
        float z[4] = {};
        if (p.z_in == nullptr) {
            float4 parts[kProjectors];
#pragma unroll
            for (int s = 0; s < kProjectors; s++)
                parts[s] =
                    Tile::kSlicesFit
                        ? load_shared_floats(slice_of(s, i))
                        : __ldcg(reinterpret_cast<const float4*>(p.partial_z + s * values + i));
#pragma unroll
            for (const float4& part : parts)
                add_part(z, part);
        } else {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                if (token < p.M && j + e < p.r)
                    z[e] = to_float(static_cast<const T*>(p.z_in)[token * p.r + j + e]);
            }
        }
        finish_z<T>(p, token, j, z, writes);
        store_shared_pair(
            place_of(token, j), pack_pair(z[0], z[1], T{}), pack_pair(z[2], z[3], T{}));
    }
    fence_async_proxy();
    named_barrier_arrive(kZBarrier, kGatherers + Tile::kFinishers);
}

}  // namespace
}  // namespace lowbit::cuda
