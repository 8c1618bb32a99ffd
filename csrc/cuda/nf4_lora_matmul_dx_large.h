// The gradient of a 4-bit linear layer's input for many tokens, in two launches.
#pragma once

#include "lora_grads.h"
#include "nf4_lora_matmul_dx.h"

namespace lowbit::cuda {

// As serves_nf4_lora_matmul_dx, with any blocksize from 64 on. Right for any M, but up to 256
// tokens and more than 16000 columns can exceed the workspace.
bool serves_nf4_lora_matmul_dx_large(const LoraDxArgs& args);

// From 257 tokens on at most 24 MiB, and 2 bytes per element of an fp32 lora_A; 0 if there is
// nothing to run.
size_t nf4_lora_matmul_dx_large_workspace_bytes(const LoraDxArgs& args);

// As programmatic dependent launches.
cudaError_t launch_nf4_lora_matmul_dx_large(const LoraDxArgs& args, cudaStream_t stream);

// The same with u, d_lora_A and d_lora_B of `grads` made by the same launches, where there are few
// tiles d_lora_A by one more; u is needed, and args.u is the same. For r from 1 to 16, without
// gradients of bias and scaling, and at most 32 MiB together with u.
bool serves_nf4_lora_backward_large(const LoraDxArgs& args, const LoraGradsArgs& grads);

size_t nf4_lora_backward_large_workspace_bytes(const LoraDxArgs& args, const LoraGradsArgs& grads);

cudaError_t launch_nf4_lora_backward_large(
    const LoraDxArgs& args, const LoraGradsArgs& grads, cudaStream_t stream);

}  // namespace lowbit::cuda
