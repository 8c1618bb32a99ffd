// Launcher of the 4-bit quantization kernel (nf4_quantize.cu).
#pragma once

#include "weight.h"

namespace lowbit::cuda {

// Doubles of workspace in which CTAs leave their sums of absmax; also the largest grid.
constexpr int kMaxPartialSums = 4096;

struct QuantizeArgs {
    const void* weight;  // [rows, columns] contiguous, of type `dtype`
    Dtype dtype;
    int64_t rows;  // rows over which blocks run: a flat layout is one row of N * K
    int64_t columns;
    int blocksize_log2;       // 5..12
    const float* thresholds;  // [15]: rank = number of thresholds below x * (1 / absmax)
    const uint8_t* order;     // [16]: code = order[rank]
    uint8_t* qweight;         // [rows, ceil(columns / 2)]
    float* absmax;            // [blocks], 16-byte aligned; a workspace when double-quantized

    // Double quantization; all null without it.
    const float* nested_codebook;  // [256], ascending
    int nested_blocksize_log2;
    uint8_t* absmax_8bit;  // [blocks], 4-byte aligned
    float* nested_absmax;  // [ceil(blocks / nested_blocksize)]
    float* nested_offset;  // [1]
    double* partial_sums;  // [kMaxPartialSums], with any contents
};

cudaError_t launch_quantize_4bit(const QuantizeArgs& args, cudaStream_t stream);

}  // namespace lowbit::cuda
