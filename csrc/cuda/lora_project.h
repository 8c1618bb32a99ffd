// The first product of the low-rank term: x lora_A^T, rounded for the caller and scaled for the
// second product.
#pragma once

#include "nf4_lora_matmul.h"

namespace lowbit::cuda {

// Columns of z as the second product reads it: whole k16 steps.
inline int padded_rank(int r) {
    return (r + 15) / 16 * 16;
}

// Tokens that a CTA of the projection on spare SMs takes at a time.
inline int spare_sm_tokens(int r) {
    return r > 16 ? 32 : 64;
}

// Tokens of a cluster on the whole card. Each reads lora_A once more, which above 16 columns soon
// costs more than x; but 64 tokens keep the card busy only if there are many (at 1024 tokens, 4096
// x 4096 and rank 64 they took 8 us longer than 16, from 2048 on 5 to 15 less; H200, 2026-11).
inline int projection_tokens(int64_t M, int r) {
    return r > 16 && M > 1536 ? 64 : 16;
}

struct Projection {
    void* z_scaled;   // [M, padded_rank(r)] of x's dtype
    uint32_t* flags;  // cleared for the kernel that follows
    int flag_count;
    int spare_sms;  // 0: on the whole card; otherwise on these, a multiple of 4, while a kernel
                    // that leaves them alone runs on the others
};

// Fills z_scaled from args.x and lora_A, or from args.z_in, and args.z_out unless null. A kernel
// launched after it as its programmatic dependent may start while this one runs: everything before
// it is complete by then, but z and flags only after griddepcontrol.wait.
cudaError_t
launch_lora_project(const LoraMatmulArgs& args, const Projection& projection, cudaStream_t stream);

}  // namespace lowbit::cuda
