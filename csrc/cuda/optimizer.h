// Optimizer steps over many tensors at once, on raw pointers. optimizer.cu has the formulas.
#pragma once

#include "weight.h"

namespace lowbit::cuda {

constexpr int kStateBlock = 256;  // elements per 8-bit scale; every tensor starts a new block
constexpr int kStepChunk = 4096;  // elements a CTA takes at a time, never of two tensors
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
struct StepNumbers {
    float decay;  // 1 - lr * weight_decay
    float beta1, one_minus_beta1, beta2, one_minus_beta2;
    float step_size;   // AdamW: lr / (1 - beta1^step); Lion: lr
    float correction;  // AdamW: sqrt(1 - beta2^step)
    float eps, sign;
    float step;  // of this tensor, counted from 1
    float unused[2];
};

struct AdvanceArgs {
    const TensorRow* rows;           // [tensors]
    const TensorPointers* pointers;  // [tensors]
    int64_t tensors;                 //
    const GroupNumbers* groups;      //
    const float* found_inf;          // [1], null or 0: advance
    Algorithm algorithm;             //
    float* steps;                    // [tensors] += 1 where there is a gradient
    StepNumbers* numbers;            // [tensors] out
};

cudaError_t launch_optimizer_advance(const AdvanceArgs& args, cudaStream_t stream);

struct StepArgs {
    const TensorRow* rows;           // [tensors], those of one slab
    const TensorPointers* pointers;  // [tensors]
    const StepNumbers* numbers;      // [tensors]
    int64_t tensors, chunks;         //
    void* values;                    // [states, elements] fp32, or uint8 codes with scales
    float* scales;                   // [states, elements / kStateBlock], null: fp32 state
    int64_t elements;                // a multiple of kStateBlock
    const float* tables;             // [states, 2, 256]: codebook, then thresholds and +inf
    const float* found_inf;          // [1], null or 0: step
    const float* grad_scale;         // [1], null or what gradients are to be divided by
    Algorithm algorithm;             //
    Dtype dtype;                     // of parameters and gradients
    bool stochastic;                 // round bf16 parameters at random
    uint64_t seed;                   //
};

cudaError_t launch_optimizer_step(const StepArgs& args, cudaStream_t stream);

// ---- gradients ----------------------------------------------------------------------------------

struct GradientRow {
    void* data;
    int64_t count;
    int64_t first_chunk;
    int64_t dtype;  // a Dtype
};

// norm[0] = sqrt(sum of squares of every gradient), found_inf[0] = 1 if one is NaN or Inf, else 0.
// partial_sums: [chunks] scratch.
cudaError_t launch_gradient_norm(
    const GradientRow* rows,
    int64_t tensors,
    int64_t chunks,
    double* partial_sums,
    float* norm,
    float* found_inf,
    cudaStream_t stream);

// Multiply every gradient by min(1, max_norm / (norm[0] + 1e-6)).
cudaError_t launch_clip_gradients(
    const GradientRow* rows,
    int64_t tensors,
    int64_t chunks,
    const float* norm,
    float max_norm,
    cudaStream_t stream);

}  // namespace lowbit::cuda
