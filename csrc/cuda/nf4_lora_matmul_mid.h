// The 4-bit linear layer with a low-rank update for 65 to about 2048 tokens, sm_90a. See
// nf4_lora_matmul_mid.cu.
#pragma once

#include <cstddef>

#include "nf4_lora_matmul.h"

namespace lowbit::cuda {

// 16-bit dtype, flat weight, K % 64 == 0, N % 16 == 0, blocksize 64 to 4096, r <= 64, 16-byte
// aligned x, y, lora_A and qweight. Any M is computed right; outside 65..2048 others are faster.
bool serves_nf4_lora_matmul_mid(const LoraMatmulArgs& args);

size_t workspace_nf4_lora_matmul_mid_bytes(const LoraMatmulArgs& args);

// Two to three kernels, one after the other in the stream, as programmatic dependent launches.
cudaError_t launch_nf4_lora_matmul_mid(const LoraMatmulArgs& args, cudaStream_t stream);

}  // namespace lowbit::cuda
