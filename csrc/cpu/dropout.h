// Inverted dropout with a counter-based mask (Philox4x32-10), on raw pointers. dropout_kernel.h has
// the formula.
#pragma once

#include "common.h"

namespace lowbit::cpu {

struct DropoutArgs {
    double p;      // 0 < p < 1
    int64_t seed;  //
};

// out[i] = dropped x[i] for i in [0, count); x is element `first` of the whole [M, K] tensor, whose
// mask is a function of the flat index. Serial: for kernels that drop a panel while they read it.
void dropout_range(
    const void* x, Dtype dtype, int64_t first, int64_t count, const DropoutArgs& args, void* out);

// The whole tensor, on the thread pool. out may be x.
void launch_dropout(const void* x, Dtype dtype, int64_t count, const DropoutArgs& args, void* out);

}  // namespace lowbit::cpu
