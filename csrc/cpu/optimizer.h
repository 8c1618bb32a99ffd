// Optimizer steps over many tensors at once, on raw pointers. optimizer_kernel.h has the formulas;
// optimizer_tables.h the tables.
#pragma once

#include "common.h"
#include "optimizer_tables.h"

namespace lowbit::cpu {

struct StepArgs {
    const TensorRow* rows;           // [tensors], those of one slab
    const TensorPointers* pointers;  // [tensors]
    const StepNumbers* numbers;      // [tensors]
    int64_t tensors, chunks;         //
    void* values;                    // [states, elements] fp32, or uint8 codes with scales
    float* scales;                   // [states, elements / kStateBlock], null: fp32 state
    int64_t elements;                // a multiple of kStateBlock
    const float* tables;             // [states, 2, 256]: codebook, then thresholds and +inf
    float grad_scale;                // what gradients are to be divided by
    Algorithm algorithm;             //
    Dtype dtype;                     // of parameters and gradients
    bool stochastic;                 // round bf16 parameters at random
    uint64_t seed;                   //
};

StepNumbers step_numbers(const GroupNumbers& group, Algorithm algorithm, double step);
void launch_optimizer_step(const StepArgs& args);

// The sum of squares of every gradient, summed in fp64 in an order that does not depend on the
// number of threads. partial_sums: [chunks] scratch.
double launch_gradient_squares(
    const GradientRow* rows, int64_t tensors, int64_t chunks, double* partial_sums);

// Multiply every gradient by factor.
void launch_scale_gradients(const GradientRow* rows, int64_t tensors, int64_t chunks, float factor);

// The row that chunk belongs to: the last whose first_chunk is not above it. Empty tensors have no
// chunk, so a row that shares its first_chunk with the next one is never the answer.
template <typename Row>
static inline int64_t row_of_chunk(const Row* rows, int64_t tensors, int64_t chunk) {
    int64_t low = 0, high = tensors;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (rows[middle].first_chunk <= chunk)
            low = middle;
        else
            high = middle;
    }
    return low;
}

}  // namespace lowbit::cpu
