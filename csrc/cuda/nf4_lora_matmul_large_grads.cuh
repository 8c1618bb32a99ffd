// The gradients of the low-rank factors beside dx in nf4_lora_matmul_large_kernel.cuh, for up to 16
// ranks, in fp32 and a fixed order.
//
//     d_lora_B[n, j] = s_j sum_m dy[m, n] z[m, j]      d_lora_A[j, k] = sum_m u[m, j] x[m, k]
//
// dy and x [M, N] and [M, K], z and u [M, r]. Few multiply-adds: what limits is reading x, and dy
// in front of the first tiles. Half as long as passes of their own (bench/NOTES.md).
//
// The jobs that make u have dy in shared memory, 256 tokens by a depth of 64, and wgmma reads it
// transposed as well: no other pass over dy. Each token tile of a group has sums of its own in
// the workspace; the next group's tile adds to them when the one before is over.
//
// x comes in strips of 64 columns through the same stages as dy, some steps of it among those of
// some tiles of dx, when u is there; the sums of a strip are in registers beside those of the tile.
// What a warpgroup has summed up goes to the workspace, and a warp of each CTA that does nothing
// else adds it up. (Such a warp cannot do the product as well: beside wgmma it gets about an
// instruction in four clocks.)
#pragma once

#include "bulk_sm90.cuh"
#include "lora_parts.cuh"
#include "nf4_lora_matmul_large_products.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kGradRanks = 16;

// ---- d_lora_B -----------------------------------------------------------------------------------

constexpr int kZBoxBytes = kGradRanks * kLineBytes;  // of 64 tokens
static_assert(kTileTokens / kLine * kZBoxBytes <= kOutBuffers * kOutBytes);

// z of a tile, transposed, as an operand of wgmma; and until the sums of the group before are
// there.
__device__ __forceinline__ void begin_token_sums(
    const Params& p, uint32_t z, int token_tile, int first_tile, int group, int thread) {
    const Plan& plan = p.plan;
    const auto* from = static_cast<const uint16_t*>(p.gradients.z);
    named_barrier(kGroupBarrier + group, 128);  // the last tile's output has left the same memory
    for (int i = thread; i < kTileTokens; i += 128) {
        const int64_t token = int64_t{token_tile} * kTileTokens + i;
        const uint32_t to = z + i / kLine * kZBoxBytes + i % 8 * 2;
#pragma unroll
        for (int j = 0; j < kGradRanks; j++) {
            const bool there = token < plan.M && j < plan.rank;
            const uint16_t value = there ? __ldg(from + token * plan.rank + j) : uint16_t{0};
            store_shared(to + j * kLineBytes + ((i % kLine / 8 ^ j % 8) << 4), value);
        }
    }
    if (first_tile > 0 && thread == 0) {
        const int larger = plan.larger_groups * (plan.group + 1);
        const int before = plan.group + (first_tile <= larger ? 1 : 0);  // tiles of that group
        wait_for_count(p.z_ready + token_tile - before, kConsumers, kReadyPollNs);
    }
    fence_async_proxy();
    named_barrier(kGroupBarrier + group, 128);
}

// 64 columns of an activation by 16 ranks, over kTokens of a tile. z: boxes of 64 tokens.
template <int kTokens, typename T>
__device__ __forceinline__ void
sum_tokens(float (&sums)[8], uint32_t activation, uint32_t z, bool accumulate, T type) {
    const uint64_t a = transposed_operand_descriptor(activation), b = operand_descriptor(z);
#pragma unroll
    for (int i = 0; i < kTokens / 16; i++)
        wgmma_transposed(
            sums, a + 128 * i, b + i / 4 * (kZBoxBytes / 16) + i % 4 * 2, accumulate || i > 0,
            type);
    wgmma_commit();
}

// The i-th pair of those sums: its place in [64, 16].
__device__ __forceinline__ int sum_row(int i, int thread) {
    return thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8;
}
__device__ __forceinline__ int sum_rank(int i, int thread) {
    return i / 2 * 8 + thread % 4 * 2;
}

__device__ __forceinline__ void
put_d_lora_B(const Params& p, const float (&sums)[8], int step, int slot, bool adds, int thread) {
    float* to = p.gradients.d_B_parts + int64_t{slot} * p.plan.depth * kGradRanks;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = step * kStepDepth + sum_row(i, thread);
        if (row >= p.plan.depth)
            continue;
        float* pair = to + row * kGradRanks + sum_rank(i, thread);
        if (adds)
            add_to_memory(pair, sums[2 * i], sums[2 * i + 1]);
        else
            *reinterpret_cast<float2*>(pair) = {sums[2 * i], sums[2 * i + 1]};
    }
}

template <typename T>
__device__ __forceinline__ void store_gradient(void* to, bool is_float, int64_t at, float value) {
    if (is_float)
        static_cast<float*>(to)[at] = value;
    else
        static_cast<T*>(to)[at] = from_float<T>(value);
}

// s_j times the sums over the token tiles, when all of them are over.
template <typename T>
__device__ __forceinline__ void finish_d_lora_B(const Params& p, int worker, int workers) {
    const Plan& plan = p.plan;
    const FactorGradients& g = p.gradients;
    const int lane = threadIdx.x % kWarpSize;
    for (int tile = lane; tile < plan.token_tiles; tile += kWarpSize)
        wait_for_count(p.z_ready + tile, kConsumers, kSlotPollNs);
    __syncwarp();
    const int64_t floats = int64_t{plan.depth} * kGradRanks;
    for (int64_t i = (worker * kWarpSize + lane) * 4; i < floats; i += workers * kWarpSize * 4) {
        const float4 sum = add_parts(g.d_B_parts + i, largest_group(plan), floats);
        const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int j = static_cast<int>(i % kGradRanks) + e;
            if (j >= plan.rank)
                continue;
            const int64_t at = i / kGradRanks * plan.rank + j;
            store_gradient<T>(g.d_lora_B, g.d_B_is_float, at, values[e] * column_scale(p, j));
        }
    }
}

// ---- d_lora_A -----------------------------------------------------------------------------------

constexpr int kStripFloats = kLine * kGradRanks;
constexpr int kStripSums = kCtas * kConsumers;  // of a strip and a part, by a warpgroup each

// The producer: a CTA's i-th step. Both CTAs fill the stage, each its own, and release it as in a
// tile. Behind the group come zeros.
__device__ __forceinline__ void load_rider_step(
    const Params& p,
    const TensorMaps& maps,
    const Pipeline& pipe,
    const Rider& rider,
    int rank,
    int i) {
    constexpr int kBoxes = kTileTokens / kLine;
    int tile = rider.first_tile + rank * rider.steps + i;
    if (tile <= rider.last_tile)
        wait_for_count(p.z_ready + tile, kConsumers, kReadyPollNs);
    else
        tile = p.plan.token_tiles;
    fence_async_proxy_global();
    barrier_wait(pipe.empty(), pipe.parity() ^ 1);
    barrier_arrive_expect(pipe.full(), kXBytes + kBoxes * kZBoxBytes);
    const int token = tile * kTileTokens;
    for (int half = 0; half < kCtas; half++)
        load_tile_once(
            pipe.x() + half * (kXBytes / kCtas), maps.layer_x, rider.strip * kLine,
            token + half * kCtaTokens, pipe.full());
    for (int box = 0; box < kBoxes; box++)
        load_tile(
            pipe.w() + box * kZBoxBytes, maps.u_transposed, token + box * kLine, 0, pipe.full());
}

// A warpgroup of consumers: half of the tokens of a step.
template <typename T>
__device__ __forceinline__ void
multiply_rider_step(float (&sums)[8], const Pipeline& pipe, int group, bool adds, T type) {
    constexpr int kTokens = kTileTokens / kConsumers;
    sum_tokens<kTokens>(
        sums, pipe.x() + group * (kTokens * kLineBytes),
        pipe.w() + group * (kTokens / kLine * kZBoxBytes), adds, type);
}

__device__ __forceinline__ void
put_d_lora_A(const Params& p, const float (&sums)[8], int index, int rank, int group, int thread) {
    float* to = p.gradients.d_A_parts +
                (int64_t{index} * kStripSums + rank * kConsumers + group) * kStripFloats;
#pragma unroll
    for (int i = 0; i < 4; i++)
        *reinterpret_cast<float2*>(to + sum_row(i, thread) * kGradRanks + sum_rank(i, thread)) = {
            sums[2 * i], sums[2 * i + 1]};
}

// The sums of groups and parts, and of the four warpgroups, an eighth of a strip at a time.
template <typename T>
__device__ __forceinline__ void finish_d_lora_A(const Params& p, int worker, int workers) {
    constexpr int kPieces = kStripFloats / (4 * kWarpSize);
    const Plan& plan = p.plan;
    const FactorGradients& g = p.gradients;
    const int parts = groups(plan) * plan.strip_parts;
    const int64_t stride = int64_t{plan.strips} * kStripSums * kStripFloats;
    for (int task = worker; task < plan.strips * kPieces; task += workers) {
        const int strip = task / kPieces;
        const int at = (task % kPieces * kWarpSize + threadIdx.x % kWarpSize) * 4;
        const float* first = g.d_A_parts + int64_t{strip} * kStripSums * kStripFloats + at;
        float values[4] = {};
#pragma unroll
        for (int i = 0; i < kStripSums; i++) {
            const float4 sum = add_parts<4>(first + i * kStripFloats, parts, stride);
            values[0] += sum.x, values[1] += sum.y, values[2] += sum.z, values[3] += sum.w;
        }
        const int64_t column = strip * kLine + at / kGradRanks;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int j = at % kGradRanks + e;
            if (j < plan.rank)
                store_gradient<T>(
                    g.d_lora_A, g.d_A_is_float, j * int64_t{plan.rows} + column, values[e]);
        }
    }
}

// One warp of each CTA.
template <typename T>
__device__ __forceinline__ void finish_gradients(const Params& p, int worker, int workers) {
    const FactorGradients& g = p.gradients;
    wait_for_previous_kernel();
    if (g.z != nullptr)
        finish_d_lora_B<T>(p, worker, workers);
    if (p.plan.strips == 0)
        return;
    named_barrier(kRiderBarrier, 256 + kWarpSize);
    if (threadIdx.x % kWarpSize == 0) {
        __threadfence();
        increment_release(g.finished);
    }
    wait_for_count(g.finished, workers, kSlotPollNs);
    finish_d_lora_A<T>(p, worker, workers);
}

}  // namespace
}  // namespace lowbit::cuda
