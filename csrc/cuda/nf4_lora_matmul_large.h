// Launcher of the 4-bit linear layer for many tokens (nf4_lora_matmul_large.cu), sm_90 only.
#pragma once

#include "nf4_lora_matmul.h"

namespace lowbit::cuda {

// Whether this path takes the layer: flat weight, K % 64 == 0, N % 16 == 0, blocks of 64 or more,
// r <= 64, a 16-bit dtype, 16-byte aligned pointers. Right for any M; worth it from about 2048.
bool serves_lora_matmul_large(const LoraMatmulArgs& args);

// Bytes of args.workspace, 16-byte aligned; at most 32 MiB. 0: nothing to run, or no such device.
size_t workspace_lora_matmul_large_bytes(const LoraMatmulArgs& args);

cudaError_t launch_lora_matmul_large(const LoraMatmulArgs& args, cudaStream_t stream);

}  // namespace lowbit::cuda
