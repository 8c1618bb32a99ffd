// Products with a frozen weight and an optional low-rank branch, on raw pointers; gemm.h does the
// arithmetic.
#pragma once

#include "dropout.h"
#include "gemm.h"

namespace lowbit::cpu {

// The low-rank branch of both directions: t = A thin [M, r], then (t * scale) low [M, columns] is
// added to the main product.
//
//                thin       low        t                               dropout
//     forward    lora_A^T   lora_B^T   z, rounded to the input type    on A
//     backward   lora_B     lora_A     u, in fp32                      on the low-rank product
struct LowRank {
    Operand thin, low;
    int64_t r;
    const float* scale;          // [r]
    const DropoutArgs* dropout;  // null: none
    bool dropout_on_input;       // else on the low-rank product
    void* rounded;               // [M, r]: t is rounded to the input's type and kept here; or null
    float* exact;                // [M, r]: t in fp32; or null
};

// out [M, columns] = A [M, K] main + low rank + bias. With out null only the low-rank factor t is
// computed.
struct FusedProduct {
    const void* a;
    Dtype type;  // of a and out
    int64_t M;
    Operand main;
    const LowRank* low_rank;  // or null
    const void* bias;         // [columns] of bias_type, or null
    Dtype bias_type;
    void* out;
};
void run_fused_product(const FusedProduct& args);

// The product of A with a frozen weight alone: out = A W^T (transposed) or A W.
FusedProduct weight_product(
    const void* a, Dtype type, int64_t M, const WeightView& w, bool transposed, void* out);

// A dense matrix [rows, columns] as an operand.
Operand dense_operand(
    const void* data, Dtype type, Dtype rounding, int64_t rows, int64_t columns, bool transposed);

}  // namespace lowbit::cpu
