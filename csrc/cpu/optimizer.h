// Optimizer steps over many tensors at once, on raw pointers. optimizer_kernel.h has the formulas;
// the tables are those of csrc/cuda/optimizer.h.
#pragma once

#include "common.h"

namespace lowbit::cpu {

constexpr int64_t kStateBlock = 256;  // elements per 8-bit scale; every tensor starts a new block
constexpr int64_t kStepChunk = 4096;  // elements a thread takes at a time, never of two tensors
constexpr int64_t kGroupNumbers = 8;
constexpr int64_t kStepNumbers = 12;

enum class Algorithm : int { kAdamW = 0, kLion = 1 };

struct TensorRow {
    int64_t offset;       // of its state in the slab, a multiple of kStateBlock
    int64_t count;        // elements
    int64_t first_chunk;  // chunks of the slab's tensors before it
    int64_t group;        // of its numbers
    int64_t position;     // of its first element among all of the optimizer's: the random stream
};

struct TensorPointers {
    void* parameter;
    const void* gradient;  // null: the tensor sits this step out
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

struct GradientRow {
    void* data;
    int64_t count;
    int64_t first_chunk;
    int64_t dtype;  // a Dtype
};

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
