// The gradient of a 4-bit linear layer's input, sm_90a. See nf4_lora_matmul_dx_sm90.cu.
//
//     dx[m, k] = sum_n dy[m, n] W[n, k] + sum_j u[m, j] lora_A[j, k]        (+ dx[m, k])
#pragma once

#include "device.h"
#include "lora_grads.h"
#include "weight.h"

namespace lowbit::cuda {

struct LoraDxArgs {
    WeightView w;
    Dtype dtype;         // of dy, u and dx: kBFloat16 or kFloat16
    const void* dy;      // [M, N]
    const void* u;       // [M, lora_columns(r)]: RN(s_j sum_n dy[m, n] lora_B[n, j]), 0 behind r
    const void* lora_A;  // [r, K]; u and lora_A null when r = 0
    Dtype lora_A_dtype;  // dtype or kFloat32, which is rounded on the way: see DxKernel
    void* dx;            // [M, K]
    bool adds;           // to what is in dx, in its own dtype
    // launch_lora_grads is in front in the stream: it makes u and has waited for all else in here.
    bool follows_grads;
    Marks u_marks;      // that it sets when u is there: nf4_lora_matmul_dx_marks words, or none
    bool beside_grads;  // which runs on SMs that the product leaves to it, see below
    // Of lora_A, where the plan of launch_lora_grads leaves that gradient to the product.
    const void* x;         // [M, K]
    void* d_lora_A;        // [r, K], 16-byte aligned, or null
    Dtype d_lora_A_dtype;  // dtype or kFloat32
    int64_t M;
    int r;
    void* workspace;  // uninitialized
};

// 16-bit dtype, flat weight, K % 64 == 0, K <= 2^18 (rounded, lora_A takes 32 MiB), N % 8 == 0, N
// <= 2^20, blocksize 64 to 4096, r <= 64, M <= 2^19, 16-byte aligned pointers. Dropout stays
// outside: with it, r = 0 here and the caller adds the masked low-rank term.
bool serves_nf4_lora_matmul_dx(const LoraDxArgs& args);

// How launch_lora_grads had better run: with spare SMs beside the product, whose beside_grads is
// then true, else in front of it. It may leave d_lora_A to the product.
LoraGradsPlan plan_grads_of_nf4_lora_matmul_dx(
    const LoraDxArgs& args, const LoraGradsArgs& grads, cudaStream_t stream);

// Words of u_marks, 0 if it waits for the end of the gradients before it begins.
int nf4_lora_matmul_dx_marks(const LoraDxArgs& args);

// At most 6 MiB with 132 SMs, not those of the gradients, which may still run; 0 above 256 tokens
// or N = 32 Ki.
size_t nf4_lora_matmul_dx_workspace_bytes(const LoraDxArgs& args);

// One kernel or two, one after the other in the stream, as programmatic dependent launches; lora_A
// in dtype.
cudaError_t launch_nf4_lora_matmul_dx(const LoraDxArgs& args, cudaStream_t stream);

}  // namespace lowbit::cuda
