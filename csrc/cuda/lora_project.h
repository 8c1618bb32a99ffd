// The first product of the low-rank term: x lora_A^T, rounded for the caller and scaled for the
// second product.
#pragma once

#include "nf4_lora_matmul.h"

namespace lowbit::cuda {

// Columns of z as the second product reads it: whole k16 steps.
inline int padded_rank(int r) {
    return (r + 15) / 16 * 16;
}

// Fills z_scaled [M, padded_rank(r)] of x's dtype from args.x and lora_A, or from args.z_in, and
// args.z_out unless null. A kernel launched after it as its programmatic dependent may start while
// this one runs: everything before it is complete by then, but z only after griddepcontrol.wait.
cudaError_t launch_lora_project(const LoraMatmulArgs& args, void* z_scaled, cudaStream_t stream);

}  // namespace lowbit::cuda
