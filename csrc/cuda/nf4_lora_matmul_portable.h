// A few tokens through a 4-bit linear layer with a low-rank update, in two launches, on any card
// from compute capability 8.0 on.
#pragma once

#include <cstddef>

#include "nf4_lora_matmul.h"

namespace lowbit::cuda {

// Whether launch_nf4_lora_matmul_portable computes this call on the current device: M up to 256, a
// flat weight of blocks of 64 or more with K % 64 == 0 and N % 16 == 0, r <= 64, qweight and absmax
// 16-byte aligned. K % 512 == 0 and blocks of 64 are fast. With fp16 and M > 16 absmax must be
// finite in fp16.
bool serves_nf4_lora_matmul_portable(const LoraMatmulArgs& args);

// Bytes that args.workspace must hold, 16-byte aligned; any contents. At most 33 KB for each SM and
// 1 MB.
size_t nf4_lora_matmul_portable_workspace_bytes(const LoraMatmulArgs& args);

cudaError_t launch_nf4_lora_matmul_portable(const LoraMatmulArgs& args, cudaStream_t stream);

}  // namespace lowbit::cuda
