// The two products of nf4_lora_matmul_large_kernel.cuh: how each of them lays the weight W [N, K]
// into panels, steps and lines, and hands it to wgmma.
//
//                                   panel            step            a line of 64
//     ForwardProduct  y = x W^T     256 rows of W    64 columns      along the sums
//     DxProduct       dx = dy W     256 columns      64 rows         along the output: transposed
//
// Tasks, and what they write, are the same in both: blocks of 64 codes below each other.
#pragma once

#include "bulk_sm90.cuh"
#include "nf4_lora_matmul_large_pipeline.cuh"
#include "wgmma_sm90.cuh"

namespace lowbit::cuda {
namespace {

// The blocks of a task, or the block of a line: where they lie in W, for lane 0 and the first
// block, and in the ring. May be outside of W.
struct Place {
    int row, column;
    int line;
    int block_lines;  // from a block of the task to the next one
};

struct ForwardProduct {
    static constexpr bool kIsForward = true;  // adds a bias

    __device__ static __forceinline__ Place
    of_task(const Plan& plan, const Wave& wave, int chunk, int slot, int task) {
        constexpr int kPairs = kChunkSteps / kTaskBlocks;
        const int row = task / kPairs * kTaskLanes, step = task % kPairs * kTaskBlocks;
        return {
            panel_row(plan, wave, row / kPanelRows) + row % kPanelRows,
            chunk * kChunkDepth + step * kStepDepth, ring_line(plan, slot, step) + row,
            ring_line(plan, 0, 1)};
    }

    // The line-th of a step of the first chunks.
    __device__ static __forceinline__ Place
    of_line(const Plan& plan, const Wave& wave, int step, int line) {
        return {
            panel_row(plan, wave, line / kPanelRows) + line % kPanelRows, step * kStepDepth,
            ring_line(plan, 0, step) + line, 0};
    }

    // What z is made with, [ranks][depth].
    __device__ static __forceinline__ const CUtensorMap& z_factor(const TensorMaps& maps) {
        return maps.lora_A;
    }

    // The low-rank step's weight operand: lora_B.
    __device__ static __forceinline__ void
    load_factor(const TensorMaps& maps, uint32_t destination, int first_row, uint32_t barrier) {
        load_tile(destination, maps.lora_B, 0, first_row, barrier);
    }

    __device__ static __forceinline__ uint64_t descriptor(uint32_t w) {
        return operand_descriptor(w);
    }

    // Of a step's four parts, 16 deep each, the i-th.
    template <typename T>
    __device__ static __forceinline__ void
    multiply(float (&d)[128], uint64_t w, uint64_t x, int i, bool accumulate, T type) {
        wgmma(d, w + 2 * i, x + 2 * i, accumulate, type);
    }
};

struct DxProduct {
    static constexpr bool kIsForward = false;  // z is u; may add to what is there

    __device__ static __forceinline__ Place
    of_task(const Plan& plan, const Wave& wave, int chunk, int slot, int task) {
        constexpr int kPairs = kPanelRows / (kTaskBlocks * kLine);
        const int panel = task / kTasksPerPanel, block = task % kPairs * kTaskBlocks;
        const int row = task % kTasksPerPanel / kPairs * kTaskLanes;
        return {
            chunk * kChunkDepth + row, panel_row(plan, wave, panel) + block * kLine,
            ring_line(plan, slot, row / kStepDepth) + panel * kPanelRows + block * kStepDepth +
                row % kStepDepth,
            kStepDepth};
    }

    __device__ static __forceinline__ Place
    of_line(const Plan& plan, const Wave& wave, int step, int line) {
        return {
            step * kStepDepth + line % kStepDepth,
            panel_row(plan, wave, line / kPanelRows) + line % kPanelRows / kStepDepth * kLine,
            ring_line(plan, 0, step) + line, 0};
    }

    __device__ static __forceinline__ const CUtensorMap& z_factor(const TensorMaps& maps) {
        return maps.lora_B;
    }

    // lora_A, whose rows are lines as they are.
    __device__ static __forceinline__ void
    load_factor(const TensorMaps& maps, uint32_t destination, int first_row, uint32_t barrier) {
        load_tile(destination, maps.lora_A, first_row, 0, barrier);
        load_tile(destination + kWBytes / 2, maps.lora_A, first_row + kLine, 0, barrier);
    }

    __device__ static __forceinline__ uint64_t descriptor(uint32_t w) {
        return transposed_operand_descriptor(w);
    }

    template <typename T>
    __device__ static __forceinline__ void
    multiply(float (&d)[128], uint64_t w, uint64_t x, int i, bool accumulate, T type) {
        wgmma_transposed(d, w + 128 * i, x + 2 * i, accumulate, type);
    }
};

}  // namespace
}  // namespace lowbit::cuda
