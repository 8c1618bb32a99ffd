// The decoders of nf4_lora_matmul_large_kernel.cuh, in each CTA two warps on one task: they turn
// the 4-bit weight into bf16 or fp16 for all CTAs, once per wave of tiles, through a ring of chunks
// in global memory.
//
// A chunk is a depth of 512 of all panels of a wave. Its tasks, two blocks of each of 64 rows of W,
// are dealt to the decoders of the whole grid in turn. One counter per chunk says how many of its
// tasks are written (`ready`), another how many CTAs have read it or need not (`done`); a slot is
// written again when all have.
// A tile waits for z when it has read all its chunks; jobs of z read none and come before it.
// No tile waits for a chunk beyond the one that it reads, and no decoder before it has published
// what it wrote, so the ring cannot lock up.
#pragma once

#include "block_decode.cuh"
#include "bulk_sm90.cuh"
#include "nf4_lora_matmul_large_products.cuh"
#include "ptx_sm90.cuh"

namespace lowbit::cuda {
namespace {

// Tasks in the order in which the tiles need them: waves, chunks, then panels and columns. Each CTA
// takes one of them in turn.
struct TaskCursor {
    int wave, chunk, task, tasks;
    int slot, index;  // of the chunk
    Wave range;

    // The launch before has written the first chunks (_prepare.cuh).
    __device__ __forceinline__ TaskCursor(const Plan& plan, int cta)
        : wave(plan.start), chunk(0), slot(0), index(0), range(locate_wave(plan, plan.start)) {
        tasks = range.panels * kTasksPerPanel;
        task = first_chunks(plan) * tasks + cta;
    }

    // Carries what goes beyond the chunk into the next ones; false at the end.
    __device__ __forceinline__ bool settle(const Plan& plan) {
        while (task >= tasks) {
            task -= tasks;
            index++;
            if (++slot == plan.slots)
                slot = 0;
            if (++chunk == plan.chunks) {
                chunk = 0;
                if (++wave == plan.waves)
                    return false;
                range = locate_wave(plan, wave);
                tasks = range.panels * kTasksPerPanel;
            }
        }
        return true;
    }

    template <class Product>
    __device__ __forceinline__ Place place(const Plan& plan) const {
        return Product::of_task(plan, range, chunk, slot, task);
    }
};

// What a lane needs of its row, as loaded.
struct Packed {
    uint4 codes[2 * kTaskBlocks];
    uint32_t absmax[kTaskBlocks];  // 8-bit code, or the bits of the fp32 value
    float nested[kTaskBlocks];
};

// Beyond the weight's edges anything finite will do: what it is multiplied with is zero, or what
// comes of it is not stored.
__device__ __forceinline__ int64_t element_at(const WeightView& w, int row, int column, int width) {
    const int K = static_cast<int>(w.K);
    return static_cast<int64_t>(min(row, static_cast<int>(w.N) - 1)) * K + min(column, K - width);
}

__device__ __forceinline__ int64_t
first_element(const WeightView& w, const Place& place, int lane, int block) {
    return element_at(w, place.row + lane, place.column + block * kLine, kLine);
}

__device__ __forceinline__ void
load_packed(const Params& p, const Place& place, int lane, Packed& packed) {
#pragma unroll
    for (int b = 0; b < kTaskBlocks; b++) {
        const int64_t element = first_element(p.w, place, lane, b);
        const uint4* codes = reinterpret_cast<const uint4*>(p.w.qweight + element / 2);
        packed.codes[2 * b] = load_streaming(codes);
        packed.codes[2 * b + 1] = load_streaming(codes + 1);
        const int64_t block = element >> p.w.blocksize_log2;
        if (p.w.absmax == nullptr) {
            packed.absmax[b] = p.w.absmax_8bit[block];
            packed.nested[b] = p.w.nested_absmax[block >> p.w.nested_blocksize_log2];
        } else {
            packed.absmax[b] = __float_as_uint(p.w.absmax[block]);
        }
    }
}

// Rows of 128 bytes, swizzled as TMA and wgmma expect it; without bank conflicts.
template <typename T>
__device__ __forceinline__ void decode_block(
    uint4* row, int lane, const ScaledTable<>& table, const uint4& first, const uint4& second) {
    const int swizzle = lane % 8;
    row[0 ^ swizzle] = decode_word(table, first.x);
    row[1 ^ swizzle] = decode_word(table, first.y);
    row[2 ^ swizzle] = decode_word(table, first.z);
    row[3 ^ swizzle] = decode_word(table, first.w);
    row[4 ^ swizzle] = decode_word(table, second.x);
    row[5 ^ swizzle] = decode_word(table, second.y);
    row[6 ^ swizzle] = decode_word(table, second.z);
    row[7 ^ swizzle] = decode_word(table, second.w);
}

// Two warps, `lane` counted through both. A task is published as soon as its stores have ended. y
// takes 0.3 to 0.5 % less time than with tasks of 32 rows for each warp, published one task late
// (H200, M = 4096 and 16384, 2026-11).
template <typename T, class Product>
__device__ __forceinline__ void decode_weight(
    const Params& p, const CUtensorMap& ring, uint8_t* staging, float* nested_codebook, int lane) {
    const Plan& plan = p.plan;
    TaskCursor at(plan, blockIdx.x);
    bool more = at.settle(plan);
    Place place = at.place<Product>(plan);
    if (more)
        prefetch_l2(p.w.qweight + first_element(p.w, place, lane, 0) / 2);
    wait_for_previous_kernel();

    Packed packed;
    if (more)
        load_packed(p, place, lane, packed);
    const Codebook codebook = load_codebook(p.w.codebook);
    float offset = 0.0f;
    if (p.w.absmax == nullptr) {
        offset = *p.w.nested_offset;
#pragma unroll
        for (int i = 0; i < 256; i += kTaskLanes)
            nested_codebook[i + lane] = p.w.nested_codebook[i + lane];
    }
    uint4* row = reinterpret_cast<uint4*>(staging) + lane * 8;
    const uint32_t staging_address = shared_address(staging);
    while (more) {
        named_barrier(kDecoderBarrier, kTaskLanes);  // the task before has left the memory
        float scale[kTaskBlocks];
#pragma unroll
        for (int b = 0; b < kTaskBlocks; b++) {
            scale[b] =
                p.w.absmax != nullptr
                    ? __uint_as_float(packed.absmax[b])
                    : __fadd_rn(
                          __fmul_rn(nested_codebook[packed.absmax[b]], packed.nested[b]), offset);
        }
        const ScaledTable<> first = scale_codebook<T>(codebook, scale[0]);
        const ScaledTable<> second = scale_codebook<T>(codebook, scale[1]);
        decode_block<T>(row, lane, first, packed.codes[0], packed.codes[1]);
        decode_block<T>(row + kTaskLanes * 8, lane, second, packed.codes[2], packed.codes[3]);
        fence_async_proxy();
        named_barrier(kDecoderBarrier, kTaskLanes);

        const int index = at.index;
        if (lane < kWarpSize && elect_lane()) {
            const int before = index - plan.slots;  // the chunk that had this slot
            if (before >= 0)
                wait_for_count(p.done + before, kCtas * plan.clusters, kSlotPollNs);
            // Kept in L2 until it is written again; otherwise half of what a layer of 4096 x 14336
            // writes to HBM at 16384 tokens is the ring (246 MB, now 129; H200, 2026-11).
            store_tile_kept(ring, staging_address, 0, place.line);
            store_tile_kept(
                ring, staging_address + kTaskBytes / 2, 0, place.line + place.block_lines);
            commit_stores();
        }
        at.task += gridDim.x;
        more = at.settle(plan);
        if (more) {
            place = at.place<Product>(plan);
            load_packed(p, place, lane, packed);  // while the stores end
        }
        if (lane < kWarpSize && elect_lane()) {
            wait_stores();
            increment_release(p.ready + index);
        }
    }
}

}  // namespace
}  // namespace lowbit::cuda
