// The consumer warpgroups of nf4_lora_matmul_large_kernel.cuh: tiles of z, and tiles of y or dx,
// which _output.cuh stores.
#pragma once

#include "bulk_sm90.cuh"
#include "nf4_lora_matmul_large_grads.cuh"
#include "nf4_lora_matmul_large_output.cuh"

namespace lowbit::cuda {
namespace {

// This CTA reads no chunk of the wave.
__device__ __forceinline__ void skip_chunks(const Params& p, int wave) {
    if (wave < p.plan.start)
        return;
    for (int chunk = 0; chunk < p.plan.chunks; chunk++)
        increment_relaxed(p.done + chunk_index(p.plan, wave, chunk));
}

// 128 tokens by the first kColumns columns.
template <int kColumns, int kSums, typename T>
__device__ __forceinline__ void
multiply_z_step(float (&z)[2][kSums], uint64_t x, uint64_t a, T type) {
    using Sums = float (&)[kColumns / 2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        wgmma(reinterpret_cast<Sums>(z[0]), x + 2 * i, a + 2 * i, true, type);
        wgmma(reinterpret_cast<Sums>(z[1]), x + 2 * i + 64 * 128 / 16, a + 2 * i, true, type);
    }
    wgmma_commit();
}

// z of 256 tokens, half of them by each warpgroup: here x is the operand with the rows. Stages go
// back to the own producer alone, so two arrivals stand for those of the other CTA. With dx, of at
// most 16 columns, and the warpgroups take turns at d_lora_B; `out` is a warpgroup's own.
template <typename T, class Product>
__device__ __forceinline__ void multiply_z_tile(
    const Params& p,
    Pipeline& pipe,
    uint32_t out,
    int token_tile,
    int last_tile,
    int first_tile,
    int rank,
    int group,
    int thread) {
    constexpr int kRows = kTileTokens / kConsumers;
    constexpr int kSums = Product::kIsForward ? 32 : 8;
    const Plan& plan = p.plan;
    const bool sums_tokens =
        !Product::kIsForward && p.gradients.z != nullptr && token_tile <= last_tile;
    if (sums_tokens)
        begin_token_sums(p, out, token_tile, first_tile, group, thread);
    float z[2][kSums] = {};
    for (int k = 0; k < plan.steps; k++) {
        barrier_wait(pipe.full(), pipe.parity());
        const uint64_t x = operand_descriptor(pipe.x() + group * (kRows * 128));
        const uint64_t a = operand_descriptor(pipe.w());
        if (!Product::kIsForward || plan.rank_columns == 16) {
            wgmma_fence();  // in both branches, as below
            multiply_z_step<16>(z, x, a, T{});
        } else {
            wgmma_fence();
            multiply_z_step<2 * kSums>(z, x, a, T{});
        }
        float sums[8];
        const bool own_step = sums_tokens && k % kConsumers == group;
        if (own_step) {
            wgmma_fence();
            sum_tokens<kTileTokens>(sums, pipe.x(), out, false, T{});
        }
        wgmma_wait<0>();
        if (thread < kCtas)
            barrier_arrive_remote(in_cta(pipe.empty(), rank));
        if (own_step)
            put_d_lora_B(p, sums, k, token_tile - first_tile, first_tile > 0, thread);
        pipe.step++;
    }
    if (token_tile > last_tile)
        return;
    T* z_scaled = static_cast<T*>(p.z_scaled);
    T* z_out = static_cast<T*>(p.z_out);
#pragma unroll
    for (int i = 0; i < 2 * kSums; i++) {
        const int block = i / kSums, j = i % kSums;
        const int column = j / 4 * 8 + thread % 4 * 2 + j % 2;
        const int64_t token = token_tile * kTileTokens + group * kRows + block * 64 +
                              thread / 32 * 16 + thread % 32 / 4 + j / 2 % 2 * 8;
        if (!Product::kIsForward && plan.strips > 0)
            static_cast<T*>(
                p.gradients.u_transposed)[column * plan.token_tiles * kTileTokens + token] =
                from_float<T>(z[block][j] * column_scale(p, column));
        if (token >= plan.M || column >= plan.rank_columns)
            continue;
        const float value = z[block][j];
        if (column < plan.rank && z_out != nullptr)
            z_out[token * plan.rank + column] = from_float<T>(value);
        z_scaled[token * plan.rank_columns + column] =
            from_float<T>(value * column_scale(p, column));
    }
    __threadfence();
    fence_async_proxy_global();
    named_barrier(kGroupBarrier + group, 128);
    if (thread == 0)
        increment_release(p.z_ready + token_tile);
}

template <typename T, class Product>
__device__ __forceinline__ void
multiply_tiles(const Params& p, uint32_t smem, int rank, int cluster) {
    const Plan& plan = p.plan;
    // The same in all lanes, as ptxas sees, so that descriptors are made in uniform registers.
    const int group = __shfl_sync(kFullWarp, threadIdx.x / 128 - 1, 0);
    const int thread = threadIdx.x % 128;
    const uint32_t out = smem + kOutOffset + group * (kOutBuffers * kOutBytes);
    Output<T, Product> output(out, group, thread);
    Pipeline pipe{smem, 0};
    const int lead = min(kLead, plan.steps);
    bool first = true;  // tile of y: here the lead begins
    if (first_wave(plan, cluster) > 0 && threadIdx.x == 128)
        skip_chunks(p, 0);
    for (int wave = first_wave(plan, cluster); wave < plan.waves; wave++) {
        barrier_wait(pipe.full(), pipe.parity());
        const uint4 note = load_shared(pipe.note());  // JobNote
        const int token_tile = static_cast<int>(note.y), limit = static_cast<int>(note.z);
        if (note.x % 2 != 0) {
            output.store_held(p, 1);
            if (threadIdx.x == 128)
                skip_chunks(p, wave);
            for (int i = 0; i < plan.z_depth; i++)
                multiply_z_tile<T, Product>(
                    p, pipe, out, token_tile + i, limit, static_cast<int>(note.w), rank, group,
                    thread);
            if (thread < kCtas)
                barrier_arrive_remote(in_cta(pipe.z_over(), thread));
            if (!Product::kIsForward && wave == plan.last_rider_wave)
                named_barrier_arrive(kRiderBarrier, 256 + kWarpSize);
            continue;
        }
        if (first && group == 1)
            named_barrier(kLeadBarrier, 256);
        float d[128];
        auto multiply_step = [&](int k, bool accumulate) {
            barrier_wait(pipe.full(), pipe.parity());
            const uint64_t w = Product::descriptor(pipe.w() + group * (64 * kLineBytes));
            const uint64_t x = operand_descriptor(pipe.x());
            wgmma_fence();
            Product::multiply(d, w, x, 0, accumulate, T{});
            Product::multiply(d, w, x, 1, true, T{});
            Product::multiply(d, w, x, 2, true, T{});
            Product::multiply(d, w, x, 3, true, T{});
            wgmma_commit();
            if (first && group == 0 && k == lead - 1)
                named_barrier_arrive(kLeadBarrier, 256);
            // The chunk's last step has arrived, so all its reads are over: relaxed is enough,
            // and a release would stall the warp.
            if (threadIdx.x == 128 + 64 &&
                (k % kChunkSteps == kChunkSteps - 1 || k == plan.steps - 1))
                increment_relaxed(p.done + chunk_index(plan, wave, k / kChunkSteps));
            wgmma_wait<1>();
            if (accumulate)
                release({smem, pipe.step - 1}, thread);
            pipe.step++;
        };
        float sums[8];
        bool adds = false;
        RiderSteps riding(plan, static_cast<int>(note.x / 2));
        auto ride = [&](int k) {
            if (Product::kIsForward || !riding.take(plan, k))
                return;
            barrier_wait(pipe.full(), pipe.parity());
            wgmma_fence();
            multiply_rider_step(sums, pipe, group, adds, T{});
            adds = true;
            wgmma_wait<1>();
            release({smem, pipe.step - 1}, thread);
            pipe.step++;
        };
        multiply_step(0, false);  // by itself: ptxas would keep sums alive through jobs of z
        for (int k = 1; k < plan.steps; k++) {
            ride(k);
            multiply_step(k, true);
            output.store_between_steps(p, k);
        }
        if (plan.rank_columns > 0) {
            barrier_wait(pipe.full(), pipe.parity());
            const uint64_t w = Product::descriptor(pipe.w() + group * (64 * kLineBytes));
            const uint64_t x = operand_descriptor(pipe.x());
            if (plan.rank_columns == 16) {
                wgmma_fence();  // in both branches: ptxas adds its own otherwise
                Product::multiply(d, w, x, 0, true, T{});
                wgmma_commit();
            } else {
                wgmma_fence();
                Product::multiply(d, w, x, 0, true, T{});
                Product::multiply(d, w, x, 1, true, T{});
                Product::multiply(d, w, x, 2, true, T{});
                Product::multiply(d, w, x, 3, true, T{});
                wgmma_commit();
            }
            wgmma_wait<1>();
            release({smem, pipe.step - 1}, thread);
            pipe.step++;
        }
        wgmma_wait<0>();
        release({smem, pipe.step - 1}, thread);
        first = false;
        if (!Product::kIsForward) {
            if (note.x > 0)
                put_d_lora_A(p, sums, static_cast<int>(note.w), rank, group, thread);
            if (wave == plan.last_rider_wave)
                named_barrier_arrive(kRiderBarrier, 256 + kWarpSize);
        }
        output.store_held(p, plan.steps);  // of a tile before it, where steps are few
        output.take(
            p, d, limit * kPanelRows + rank * kCtaRows + group * 64, token_tile * kTileTokens);
    }
    output.store_held(p, 1);
}

}  // namespace
}  // namespace lowbit::cuda
