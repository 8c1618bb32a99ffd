// The tables of the optimizers, as lowbit/optim packs them and the kernels of both libraries read
// them: every entry 8 bytes, so that each is a row of an int64 tensor. No torch, no CUDA.
#pragma once

#include <cstdint>

namespace lowbit {

constexpr int kStateBlock = 256;  // elements per 8-bit scale; every tensor starts a new block
constexpr int kStepChunk = 4096;  // elements a CTA or thread takes at a time, never of two tensors
constexpr int kGroupNumbers = 8;  // doubles per parameter group, see GroupNumbers
constexpr int kStepNumbers = 12;  // floats per tensor, see StepNumbers

enum class Algorithm : int { kAdamW = 0, kLion = 1 };

// A tensor's place. Rows are made once and stay.
struct TensorRow {
    int64_t offset;       // of its state in the slab, a multiple of kStateBlock
    int64_t count;        // elements
    int64_t first_chunk;  // chunks of the slab's tensors before it
    int64_t group;        // of its numbers
    int64_t position;     // of its first element among all of the optimizer's: the random stream
};

// Where a tensor's data is in this step; gradient is null for a tensor that sits it out.
struct TensorPointers {
    void* parameter;
    const void* gradient;
};

struct GroupNumbers {
    double lr, beta1, beta2, eps, weight_decay, sign, unused[2];  // sign -1 maximizes
};

// What one step multiplies by, each rounded once from double.
struct alignas(16) StepNumbers {
    float decay;  // 1 - lr * weight_decay
    float beta1, one_minus_beta1, beta2, one_minus_beta2;
    float step_size;   // AdamW: lr / (1 - beta1^step); Lion: lr
    float correction;  // AdamW: sqrt(1 - beta2^step)
    float eps, sign;
    float step;  // of this tensor, counted from 1
    float unused[2];
};

struct GradientRow {
    void* data;
    int64_t count;
    int64_t first_chunk;
    int64_t dtype;  // a Dtype
};

}  // namespace lowbit
