// The 4-bit linear layer with a low-rank update as its kernels see it: device pointers and sizes.
//
//     y[m, n] = sum_k x[m, k] W[n, k] + sum_j s_j z[m, j] lora_B[n, j] + bias[n]
//     z = x lora_A^T,  s_j = scaling * lora_scaling[j]
//
// x, lora_A, lora_B, bias, y and z have one 16-bit dtype, are row-major, contiguous and 16-byte
// aligned. Products accumulate in fp32 unless a kernel's file says otherwise; z is scaled in fp32
// before it is rounded for the second product; y is rounded once.
#pragma once

#include "device.h"
#include "weight.h"

namespace lowbit::cuda {

struct LoraMatmulArgs {
    WeightView w;
    Dtype dtype;                // kBFloat16 or kFloat16
    const void* x;              // [M, K]
    const void* lora_A;         // [r, K], or null: z_in is given, or there is no adapter (r = 0)
    const void* lora_B;         // [N, r], null when r = 0
    const float* lora_scaling;  // [r], or null: all 1
    float scaling;
    const void* bias;  // [N] or null
    const void* z_in;  // [M, r], z computed elsewhere, or null
    void* z_out;       // [M, r], receives x lora_A^T rounded (unscaled), or null
    void* y;           // [M, N]
    int64_t M;
    int r;
    void* workspace;  // as many bytes as the kernel asks for, uninitialized
};

// Columns of z as the second product reads it: whole k16 steps.
__host__ __device__ inline int padded_rank(int r) {
    return (r + 15) / 16 * 16;
}

}  // namespace lowbit::cuda
