// What the roles of nf4_lora_matmul_large_kernel.cuh share: shared memory, registers and barriers
// of a CTA, the ring of stages, the tensors that TMA reads.
#pragma once

#include <cuda.h>

#include "nf4_lora_matmul_large_plan.h"
#include "ptx_sm90.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kDecoderWarps = kTaskLanes / 32;
constexpr uint32_t kReadyPollNs = 64;
constexpr uint32_t kSlotPollNs = 500;  // a full ring lasts for tens of microseconds
constexpr int kConsumers = 2;
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kRegistersAside = 120, kRegistersConsumer = 192;  // sum as at launch: 3 * 168

// Shared memory, 225 KiB: stages of x [256][64] and W [128 lines], the decoder's output, y on its
// way out, and the codebook of double-quantized scales: waiting for stores empties L1.
constexpr int kXBytes = kTileTokens * kLineBytes;
constexpr int kWBytes = kCtaRows * kLineBytes;
constexpr int kTaskBytes = kTaskLanes * kTaskBlocks * kLineBytes;
constexpr int kNestedBytes = 256 * 4;
constexpr int kOutTokens = 32;  // that a warpgroup turns at a time: 64 rows, 128 bytes per token
constexpr int kOutBuffers = 2;
constexpr int kOutBytes = kOutTokens * 128;
constexpr int kWOffset = kStages * kXBytes;
constexpr int kTaskOffset = kWOffset + kStages * kWBytes;
constexpr int kOutOffset = kTaskOffset + kTaskBytes;
constexpr int kNestedOffset = kOutOffset + kConsumers * kOutBuffers * kOutBytes;
constexpr int kBarrierOffset = kNestedOffset + kNestedBytes;
constexpr int kNoteOffset = kBarrierOffset + (2 * kStages + 2) * 8;
constexpr int kSmemBytes = kNoteOffset + kStages * 16;

// Steps by which the first warpgroup of consumers runs ahead of the second, so that one multiplies
// while the other stores y. With 1 the median at M = 4096 was up to 5 % slower (H100, 2026-11), not
// much more than the noise of a card at its power limit.
constexpr int kLead = 2;

constexpr int kGroupBarrier = 1;  // and the next
constexpr int kLeadBarrier = 3;
constexpr int kRiderBarrier = 4;
constexpr int kDecoderBarrier = 5;

// All with rows of 128 swizzled bytes in shared memory; outside of a tensor they read zeros.
struct TensorMaps {
    CUtensorMap x;             // or dy; box [128 tokens][64]
    CUtensorMap z;             // or u; box [128 tokens][64]
    CUtensorMap lora_A;        // box [16 or 64 ranks][64]
    CUtensorMap lora_B;        // box [128 rows][64]; for dx transposed, [16 ranks][64]
    CUtensorMap layer_x;       // for d_lora_A; box [128 tokens][64]
    CUtensorMap u_transposed;  // box [16 ranks][64 tokens]
    CUtensorMap ring_load;     // box [128 lines]
    CUtensorMap ring_store;    // box [64 lines]
};

// s_j, 0 in the padding.
__device__ __forceinline__ float column_scale(const Params& p, int column) {
    if (column >= p.plan.rank)
        return 0.0f;
    return p.lora_scaling ? p.scaling * __ldg(p.lora_scaling + column) : p.scaling;
}

// Until the counter has reached `count`.
__device__ __forceinline__ void
wait_for_count(const uint32_t* counter, uint32_t count, uint32_t poll_ns) {
    while (load_acquire(counter) < count)
        __nanosleep(poll_ns);
}

// A job as the consumers need it.
struct JobNote {
    bool is_z;
    int token_tile;
    int limit;  // the panel of a tile of y; the last token tile of z
    int other;  // with a tile the index of its rider, with z the first token tile of the group
    int rider_steps;

    __device__ __forceinline__ uint4 words() const {
        return {
            is_z | static_cast<uint32_t>(rider_steps) << 1, static_cast<uint32_t>(token_tile),
            static_cast<uint32_t>(limit), static_cast<uint32_t>(other)};
    }
};

// Stages in the order of use, the same for producer and consumers.
struct Pipeline {
    uint32_t smem;
    uint32_t step;

    __device__ __forceinline__ uint32_t stage() const {
        return step % kStages;
    }
    __device__ __forceinline__ uint32_t parity() const {
        return step / kStages % 2;
    }
    __device__ __forceinline__ uint32_t x() const {
        return smem + stage() * kXBytes;
    }
    __device__ __forceinline__ uint32_t w() const {
        return smem + kWOffset + stage() * kWBytes;
    }
    __device__ __forceinline__ uint32_t full() const {
        return smem + kBarrierOffset + stage() * 8;
    }
    __device__ __forceinline__ uint32_t empty() const {
        return full() + kStages * 8;
    }
    __device__ __forceinline__ uint32_t note() const {
        return smem + kNoteOffset + stage() * 16;
    }
    // Both CTAs have finished a job of z, and may load into each other's stages.
    __device__ __forceinline__ uint32_t z_over() const {
        return smem + kBarrierOffset + 2 * kStages * 8;
    }
};

// The warpgroup has read the stage: tell both producers, as both fill it.
__device__ __forceinline__ void release(const Pipeline& pipe, int thread) {
    if (thread < kCtas)
        barrier_arrive_remote(in_cta(pipe.empty(), thread));
}

}  // namespace
}  // namespace lowbit::cuda
