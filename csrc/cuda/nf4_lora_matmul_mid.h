// Some hundred tokens, 65 to about 4000, through a 4-bit linear layer with a low-rank update.
#pragma once

#include <cstddef>

#include "nf4_lora_matmul.h"

namespace lowbit::cuda {

// Whether launch_nf4_lora_matmul_mid computes this call on the current device: compute capability
// 9.0, a flat weight of blocks of 64 to 4096 with K % 64 == 0 and N % 16 == 0, r <= 64, bf16 or
// fp16, x, y, lora_A and qweight 16-byte aligned. Right for any M; worth it from 65 to about 4000.
bool serves_nf4_lora_matmul_mid(const LoraMatmulArgs& args);

// Bytes that args.workspace must hold, 16-byte aligned; any contents: 2 M r, r rounded up to 16,
// words for marks, and up to 17 MB of partial sums.
size_t nf4_lora_matmul_mid_workspace_bytes(const LoraMatmulArgs& args);

// One or two kernels, one after the other in the stream, as programmatic dependent launches; the
// product, the last, may be a cooperative launch as well.
cudaError_t launch_nf4_lora_matmul_mid(const LoraMatmulArgs& args, cudaStream_t stream);

}  // namespace lowbit::cuda
