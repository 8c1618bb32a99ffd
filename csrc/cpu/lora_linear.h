// The 4-bit linear layer with a low-rank branch, forward and backward, on raw pointers.
#pragma once

#include "linear.h"

namespace lowbit::cpu {

struct LoraArgs {
    WeightView weight;   // W [N, K]
    const void* lora_A;  // [r, K]
    const void* lora_B;  // [N, r]
    Dtype lora_A_type, lora_B_type;
    const float* scale;  // [r]: scaling, times lora_scaling when there is one
    int64_t r;
    const DropoutArgs* dropout;  // null: none
};

// z [M, r] = dropped(x) lora_A^T,  y [M, N] = x W^T + bias + (z * scale) lora_B^T; all of `type`.
void lora_linear(
    const void* x,
    Dtype type,
    int64_t M,
    const LoraArgs& lora,
    const void* bias,
    Dtype bias_type,
    void* y,
    void* z);

// Gradients; a null pointer is not computed.
struct LoraGradients {
    void* dx;               // [M, K] of `type`
    void* d_lora_A;         // [r, K] of lora_A_type
    void* d_lora_B;         // [N, r] of lora_B_type
    void* d_bias;           // [N] of `type`
    float* d_lora_scaling;  // [r]: scaling * sum over m of u z
};
void lora_linear_backward(
    const void* dy,
    const void* x,
    const void* z,
    Dtype type,
    int64_t M,
    const LoraArgs& lora,
    float scaling,
    const LoraGradients& gradients);

}  // namespace lowbit::cpu
