// The skinny products of the backward pass of a low-rank adapter, sm_90a. See lora_grads_sm90.cu.
//
//     u[m, j] = s_j sum_n dy[m, n] lora_B[n, j]        s_j = scaling * lora_scaling[j]
//     d_lora_B[n, j] = s_j sum_m dy[m, n] z[m, j]      d_bias[n] = sum_m dy[m, n]
//     d_lora_scaling[j] = scaling * sum_m (dy lora_B)[m, j] z[m, j]
//     d_lora_A[j, k] = sum_m u[m, j] x[m, k]
#pragma once

#include <cstddef>

#include "device.h"
#include "marks.h"
#include "weight.h"

namespace lowbit::cuda {

// Columns of u: r padded to one width of a swizzle.
inline int lora_columns(int r) {
    return r <= 16 ? 16 : r <= 32 ? 32 : 64;
}

struct LoraGradsArgs {
    Dtype dtype;                // of dy, x, z, u and d_bias: kBFloat16 or kFloat16
    Dtype lora_A_dtype;         // of d_lora_A: dtype or kFloat32
    Dtype lora_B_dtype;         // of lora_B and d_lora_B: dtype or kFloat32
    const void* dy;             // [M, N]
    const void* x;              // [M, K], with dropout the dropped-out one; null: no d_lora_A
    const void* z;              // [M, r], null: no d_lora_B and no d_lora_scaling
    const void* lora_B;         // [N, r]
    const void* lora_A;         // [r, K] fp32, for rounded_lora_A alone
    const float* lora_scaling;  // [r], or null: all 1
    float scaling;
    int64_t M, N, K;
    int r;
    void* rounded_lora_A;   // [r, K] in dtype, for a product that follows; null: not wanted
    void* u;                // [M, lora_columns(r)], rounded, zeros behind r; null: not wanted
    void* d_lora_A;         // [r, K] or null: not wanted, like the rest
    void* d_lora_B;         // [N, r]
    void* d_bias;           // [N]
    float* d_lora_scaling;  // [r]
    Marks u_marks;          // see LoraGradsPlan::marks_u
    void* workspace;        // lora_grads_workspace_bytes, uninitialized
};

// How a pass over an activation [tokens, C] is divided among CTAs, of cta_columns x cta_tokens.
struct LoraGradsDivision {
    int64_t cta_columns, cta_tokens;
    int64_t column_parts, token_parts;
    int64_t pass_tokens;
    int passes;
    int64_t projection_floats, sum_floats, column_sum_floats;
    int64_t time_10ns;  // of a pass and the sum over its parts, expected, in units of 10 ns

    int64_t ctas() const {  // of a pass
        return column_parts * token_parts;
    }

    int64_t bytes() const {
        return 4 * (projection_floats + sum_floats + column_sum_floats);
    }
};

struct LoraGradsPlan {
    LoraGradsDivision dy, x;
    bool makes_A, leaves_A;  // makes d_lora_A, leaves it to the product
    bool one_launch;
    int64_t time_10ns;       // of the one launch, roughly; 0: they are several
    int64_t time_of_A_10ns;  // of its pass over x
    // 0: in front of the product; else whole clusters of kBesideCluster that it leaves alone.
    int spare_sms;

    // The same without the pass over x: one launch, and u is there when it ends.
    LoraGradsPlan without_A() const {
        LoraGradsPlan plan = *this;
        plan.x = {};
        plan.makes_A = false, plan.leaves_A = makes_A;
        plan.time_10ns -= time_of_A_10ns, plan.time_of_A_10ns = 0;
        return plan;
    }

    // Whether u_marks are set when u is there. A kernel that follows as a programmatic dependent
    // may wait for one of them, and see u, while d_lora_A is being made.
    bool marks_u() const {
        return one_launch && makes_A;
    }
};

// 16-bit dtype, 1 <= r <= 64, N % 8 == 0, K % 8 == 0, 16-byte aligned dy, x, z, lora_B, u and
// d_lora_B.
bool serves_lora_grads(const LoraGradsArgs& args);

// On so many SMs, 0: on all. The host's time counts: once per call. Of pointers, only which are
// null matters.
LoraGradsPlan plan_lora_grads(const LoraGradsArgs& args, int sms = 0);

// At most 28 MiB with rounded_lora_A, but for extreme shapes.
size_t lora_grads_workspace_bytes(const LoraGradsArgs& args, const LoraGradsPlan& plan);

// How many SMs of the idle device, or of the green context that a stream is in, clusters of
// kBesideCluster of these CTAs can occupy at once.
int lora_grads_room(cudaStream_t stream);

// One read of dy, and for d_lora_A, with which u is wanted, one of x.
cudaError_t
launch_lora_grads(const LoraGradsArgs& args, const LoraGradsPlan& plan, cudaStream_t stream);

// d_lora_A alone, from u.
cudaError_t launch_lora_grads_x(const LoraGradsArgs& args, cudaStream_t stream);

}  // namespace lowbit::cuda
