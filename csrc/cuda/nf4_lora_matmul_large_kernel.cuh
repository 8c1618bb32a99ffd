// Many tokens times a 4-bit weight, at the speed of a dense product: the kernel of
// nf4_lora_matmul_large_sm90.cu (y) and nf4_lora_matmul_dx_large_sm90.cu (dx).
//
// One persistent launch after a short one (counters, first chunks; _prepare.cuh): every SM holds
// one CTA, pairs of CTAs (clusters) walk over tiles of 256 weight rows (a panel; for dx columns) x
// 256 tokens. Each CTA multiplies 128 rows by the pair's 256 tokens and loads half of the tokens
// for both. The roles of a CTA's warps:
//   warp 0      producer: TMA loads of a depth of 64 at a time into 4 stages
//   warps 1, 2  decoder: they turn the 4-bit weight into T, for all CTAs together
//   warp 3      with dx: last sums of d_lora_A and d_lora_B (nf4_lora_matmul_large_grads.cuh)
//   warps 4-11  two warpgroups of consumers: 64 rows each, m64n256k16
// Each panel is decoded once for the whole wave of tiles that the grid works on, chunk by chunk,
// through a ring in the workspace that is read from L2 (nf4_lora_matmul_large_decode.cuh): the
// kernel that decodes in its main loop (mid) takes 2 to 6 % longer at 4096 tokens, 11 to 39 % at
// 16384 (H100, 2026-11).
// The low-rank term is one more step of the contraction.
//
// Bound by the tensor cores, that is by the power limit: an H100 multiplies 128 x 256 x 64 in 1024
// clocks but not at its highest clock. So bytes moved cost speed as well; hence the order of tiles:
// groups of about 16 token tiles (the x of a group is read from HBM once per wave), panels inside.
//
// CTAs wait for each other in both directions, so all of them must be resident: the grid is no
// larger than the device holds and is launched cooperatively. In parts:
// nf4_lora_matmul_large_plan.h (who computes what), _products.cuh (how y and dx differ),
// _pipeline.cuh (shared memory), _decode.cuh, _consume.cuh, _output.cuh; the producer is below;
// _launch.cuh is for the host.
#pragma once

#include "bulk_sm90.cuh"
#include "nf4_lora_matmul_large_consume.cuh"
#include "nf4_lora_matmul_large_decode.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kLookAhead = kChunkSteps / 2;  // steps into a chunk

// x of 256 tokens and the factor, by one thread into its own CTA.
__device__ __forceinline__ void load_z_tile(
    const Params& p,
    const CUtensorMap& x,
    const CUtensorMap& factor,
    Pipeline& pipe,
    int token_tile) {
    const int factor_bytes = p.plan.rank_columns * kLineBytes;
    for (int k = 0; k < p.plan.steps; k++, pipe.step++) {
        barrier_wait(pipe.empty(), pipe.parity() ^ 1);
        barrier_arrive_expect(pipe.full(), kXBytes + factor_bytes);
        for (int half = 0; half < kCtas; half++)
            load_tile(
                pipe.x() + half * (kXBytes / kCtas), x, k * kStepDepth,
                token_tile * kTileTokens + half * kCtaTokens, pipe.full());
        load_tile(pipe.w(), factor, k * kStepDepth, 0, pipe.full());
    }
}

// A cluster's job in a wave, and the wave.
struct Upcoming {
    Job job;
    Wave range;

    __device__ __forceinline__ void look_up(const Plan& plan, int cluster, int wave) {
        if (wave == plan.waves)
            return;
        job = locate(plan, wave * plan.clusters + cluster - plan.idle);
        range = locate_wave(plan, wave);
    }
};

// The producer, one thread. Each CTA loads its half of the tokens into both. `next`: the first.
template <class Product>
__device__ __forceinline__ void load_operands(
    const Params& p, const TensorMaps& maps, uint32_t smem, int rank, int cluster, Upcoming next) {
    constexpr uint16_t kAll = (1 << kCtas) - 1;
    const Plan& plan = p.plan;
    Pipeline pipe{smem, 0};
    auto load_x = [&](const CUtensorMap& map, int column, int token_tile, int other_bytes) {
        barrier_wait(pipe.empty(), pipe.parity() ^ 1);
        barrier_arrive_expect(pipe.full(), kXBytes + other_bytes);
        load_tile_multicast(
            pipe.x() + rank * (kXBytes / kCtas), map, column,
            token_tile * kTileTokens + rank * kCtaTokens, pipe.full(), kAll);
    };
    // The first stage of a job tells the consumers what it is. Its barrier counts the note like the
    // tiles; with an ordinary store racecheck, which does not follow arrivals from the other CTA,
    // reports a hazard.
    auto announce = [&](const JobNote& note) {
        barrier_wait(pipe.empty(), pipe.parity() ^ 1);
        barrier_expect(pipe.full(), sizeof(uint4));
        store_remote_async(in_cta(pipe.note(), rank), note.words(), in_cta(pipe.full(), rank));
    };
    int z_jobs_done = 0;
    bool known_ready = first_wave(plan, cluster) == plan.start;  // made by the launch before
    for (int wave = first_wave(plan, cluster); wave < plan.waves; wave++) {
        const Job job = next.job;
        const Wave range = next.range;
        if (job.z_job >= 0) {
            const int token_tile = z_tile(plan, job, rank);
            announce({true, token_tile, job.last_tile, job.token_tile, 0});
            for (int i = 0; i < plan.z_depth; i++)
                load_z_tile(p, maps.x, Product::z_factor(maps), pipe, token_tile + i);
            next.look_up(plan, cluster, wave + 1);
            known_ready = false;
            barrier_wait(pipe.z_over(), z_jobs_done % 2);
            z_jobs_done++;
            continue;
        }
        const Rider rider = Product::kIsForward ? Rider{-1, 0, 0, 0, 0} : locate_rider(plan, job);
        RiderSteps riding(plan, rider.steps);
        announce({false, job.token_tile, job.panel, rider.index, rider.steps});
        const uint32_t tasks = range.panels * kTasksPerPanel;
        const int line = (job.sequence - range.first_sequence) * kPanelRows + rank * kCtaRows;
        bool known_z = false;
        const int first_index = chunk_index(plan, wave, 0), step_lines = ring_line(plan, 0, 1);
        int slot = first_index % plan.slots;
        for (int chunk = 0; chunk < plan.chunks; chunk++) {
            const int index = first_index + chunk;
            if (!known_ready)
                wait_for_count(p.ready + index, tasks, kReadyPollNs);
            known_ready = false;
            fence_async_proxy_global();
            const int begin = chunk * kChunkSteps, end = min(begin + kChunkSteps, plan.steps);
            int step_line = ring_line(plan, slot, 0) + line;
            slot = slot + 1 == plan.slots ? 0 : slot + 1;
            for (int k = begin; k < end; k++, pipe.step++, step_line += step_lines) {
                if (k == min(kLookAhead - 1, plan.steps - 1))
                    next.look_up(plan, cluster, wave + 1);
                // A look ahead while stages are full, so that what is ready costs no wait.
                if (k == begin + kLookAhead) {
                    const bool last = chunk == plan.chunks - 1;
                    if (!last || wave + 1 < plan.waves)
                        known_ready = load_acquire(p.ready + index + 1) >=
                                      (last ? next.range.panels * kTasksPerPanel : tasks);
                    if (last && plan.z_depth > 0)
                        known_z = load_acquire(p.z_ready + job.token_tile) >= kConsumers;
                }
                if (!Product::kIsForward && riding.take(plan, k)) {
                    load_rider_step(p, maps, pipe, rider, rank, rider.steps - riding.left - 1);
                    pipe.step++;
                }
                load_x(maps.x, k * kStepDepth, job.token_tile, kWBytes);
                load_tile_kept(pipe.w(), maps.ring_load, 0, step_line, pipe.full());
            }
        }
        if (plan.rank_columns > 0) {
            if (plan.z_depth > 0) {
                if (!known_z)
                    wait_for_count(p.z_ready + job.token_tile, kConsumers, kReadyPollNs);
                fence_async_proxy_global();
            }
            load_x(maps.z, 0, job.token_tile, kWBytes);
            Product::load_factor(
                maps, pipe.w(), job.panel * kPanelRows + rank * kCtaRows, pipe.full());
            pipe.step++;
        }
    }
}

template <typename T, class Product>
__global__ void __cluster_dims__(kCtas, 1, 1) __launch_bounds__(kThreads, 1)
    nf4_lora_matmul_large_kernel(
        const __grid_constant__ TensorMaps maps, const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) uint8_t smem[];
    const uint32_t smem_address = shared_address(smem);
    const int rank = static_cast<int>(cluster_rank());
    const int cluster = blockIdx.x / kCtas;
    const int warp = threadIdx.x / kWarpSize;
    // Nothing multiplies before the first stages are full, so other warps make the barriers and
    // fetch the maps, and the producer looks up its job while the CTAs meet.
    if (threadIdx.x == 128) {
        for (uint32_t stage = 0; stage < kStages; stage++) {
            const Pipeline pipe{smem_address, stage};
            barrier_init(pipe.full(), 1);
            barrier_init(pipe.empty(), kCtas * kConsumers);
        }
        barrier_init(Pipeline{smem_address, 0}.z_over(), kCtas * kConsumers);
        barrier_init_fence();
    }
    cluster_arrive_relaxed();  // a release would wait for all of memory
    Upcoming first{};
    if (warp == 0)
        first.look_up(p.plan, cluster, first_wave(p.plan, cluster));
    if (threadIdx.x == kWarpSize) {
        prefetch_map(maps.x);
        prefetch_map(maps.ring_load);
        if (p.plan.z_depth > 0)
            prefetch_map(Product::z_factor(maps));
    }
    cluster_wait();
    if (warp < 4) {
        shrink_registers<kRegistersAside>();
        if (warp == 0) {
            wait_for_previous_kernel();
            let_next_kernel_start();
            if (elect_lane())
                load_operands<Product>(p, maps, smem_address, rank, cluster, first);
            __syncwarp();
        } else if (warp <= kDecoderWarps) {
            decode_weight<T, Product>(
                p, maps.ring_store, smem + kTaskOffset,
                reinterpret_cast<float*>(smem + kNestedOffset), threadIdx.x - kWarpSize);
        } else if (!Product::kIsForward) {
            finish_gradients<T>(p, blockIdx.x, gridDim.x);
        }
    } else {
        grow_registers<kRegistersConsumer>();
        wait_for_previous_kernel();
        multiply_tiles<T, Product>(p, smem_address, rank, cluster);
    }
    __syncthreads();
    cluster_sync();  // no CTA may end while the other one still signals into it
}

}  // namespace
}  // namespace lowbit::cuda
