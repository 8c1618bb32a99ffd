// Blockwise 4-bit quantization and the 8-bit quantization of its scales, on raw pointers.
// quantize_kernel.h has the formulas.
#pragma once

#include "common.h"

namespace lowbit::cpu {

struct QuantizeArgs {
    const void* weight;       // [rows, columns] of dtype, contiguous; the flat layout is one row
    Dtype dtype;              //
    int64_t rows, columns;    //
    int64_t blocksize;        // multiple of 32
    const float* thresholds;  // [15] ascending
    const uint8_t* order;     // [16] rank -> code
    uint8_t* qweight;         // [rows, ceil(columns / 2)]
    float* absmax;            // [rows, ceil(columns / blocksize)]
};

void launch_quantize(const QuantizeArgs& args);

struct QuantizeAbsmaxArgs {
    const float* absmax;           // [blocks]
    int64_t blocks;                //
    float offset;                  // mean of absmax, computed by the caller
    const float* nested_codebook;  // [256] ascending
    int64_t nested_blocksize;      //
    uint8_t* codes;                // [blocks]
    float* nested_absmax;          // [ceil(blocks / nested_blocksize)]
};

void launch_quantize_absmax(const QuantizeAbsmaxArgs& args);

constexpr float kFloor = 1e-38f;  // ABSMAX_FLOOR of lowbit/reference.py: 1 / floor is finite

static inline float reciprocal(float absmax) {
    return 1.0f / (absmax > kFloor ? absmax : kFloor);
}

}  // namespace lowbit::cpu
