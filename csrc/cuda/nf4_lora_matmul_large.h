// Many tokens through a 4-bit linear layer with a low-rank update, in two launches.
#pragma once

#include "nf4_lora_matmul.h"

namespace lowbit::cuda {

// Whether launch_nf4_lora_matmul_large computes this call on the current device: compute capability
// 9.0, a flat weight of blocks of 64 or more with K % 64 == 0 and N % 16 == 0, r <= 64, bf16 or
// fp16, all of it 16-byte aligned. Right for any M; worth it from about 4000.
bool serves_nf4_lora_matmul_large(const LoraMatmulArgs& args);

// Bytes that args.workspace must hold, 16-byte aligned; any contents. At most 32 MiB; 0 if there is
// nothing to run, or no such device.
size_t nf4_lora_matmul_large_workspace_bytes(const LoraMatmulArgs& args);

// The first launch may start before the kernels in front of it in the stream have ended
// (programmatic dependent launch); it waits for them itself.
cudaError_t launch_nf4_lora_matmul_large(const LoraMatmulArgs& args, cudaStream_t stream);

}  // namespace lowbit::cuda
