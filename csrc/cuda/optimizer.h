// Optimizer steps over many tensors at once, on raw pointers. optimizer.cu has the formulas.
#pragma once

#include "optimizer_tables.h"
#include "weight.h"

namespace lowbit::cuda {

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
    bool follows_step;               // may overlap the kernel before it, which steps another slab
};

cudaError_t launch_optimizer_step(const StepArgs& args, cudaStream_t stream);

// ---- gradients ----------------------------------------------------------------------------------

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
