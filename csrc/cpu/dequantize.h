// W [N, K] out of a 4-bit weight, on raw pointers. dequantize_kernel.h has the formula.
#pragma once

#include "common.h"

namespace lowbit::cpu {

// out [N, K] of dtype, contiguous. The weight must be 4-bit.
void launch_dequantize(const WeightView& weight, Dtype dtype, void* out);

}  // namespace lowbit::cpu
