// A few tokens, 2 to 64, through a 4-bit linear layer with a low-rank update, in one launch.
#pragma once

#include <cstddef>

#include "nf4_lora_matmul.h"

namespace lowbit::cuda {

// Whether launch_nf4_lora_matmul_small computes this call on the current device: M = 1..64, compute
// capability 9.0, a flat weight of blocks of 64 or more with K % 64 == 0 and N % 16 == 0, r <= 64,
// qweight and absmax 16-byte aligned. K % 256 == 0 and blocks of 64 are fast.
bool serves_nf4_lora_matmul_small(const LoraMatmulArgs& args);

// Bytes that args.workspace must hold, 16-byte aligned; any contents. At most 9 MB with 132 SMs.
size_t nf4_lora_matmul_small_workspace_bytes(const LoraMatmulArgs& args);

// The kernel may start before those in front of it in the stream have ended (programmatic dependent
// launch); it waits for them itself.
cudaError_t launch_nf4_lora_matmul_small(const LoraMatmulArgs& args, cudaStream_t stream);

}  // namespace lowbit::cuda
