// Launcher of the 4-bit dequantization kernels (nf4_dequantize.cu).
#pragma once

#include "weight.h"

namespace lowbit::cuda {

// out [rows, columns], contiguous, = W[row0 : row0 + rows, column0 : column0 + columns], rounded to
// `dtype`.
struct DequantizeWindow {
    int64_t row0;
    int64_t rows;
    int64_t column0;
    int64_t columns;
};

cudaError_t launch_dequantize_4bit(
    const WeightView& weight,
    const DequantizeWindow& window,
    Dtype dtype,
    void* out,
    cudaStream_t stream);

}  // namespace lowbit::cuda
