// One token through a 4-bit linear layer with a low-rank update, in one launch.
#pragma once

#include <cstddef>

#include "nf4_lora_matmul.h"

namespace lowbit::cuda {

// Whether launch_nf4_lora_gemv computes this call on the current device: M = 1, compute capability
// 9.0, a flat weight with K % 64 == 0, 0 < K <= 32768, N >= 4 and N * K < 2^32, r <= 64, bf16 or
// fp16, and what a CTA keeps of its rows fits shared memory. On a device of 78 SMs or more it does
// up to N = 2^19 and N * K = 2^31.
bool serves_nf4_lora_gemv(const LoraMatmulArgs& args);

// Bytes that args.workspace must hold, 16-byte aligned; any contents. At most 256 KB with 132 SMs.
size_t nf4_lora_gemv_workspace_bytes(const LoraMatmulArgs& args);

// Launched so that it may start before the kernels in front of it in the stream
// have ended (programmatic dependent launch); it waits for them itself.
cudaError_t launch_nf4_lora_gemv(const LoraMatmulArgs& args, cudaStream_t stream);

}  // namespace lowbit::cuda
