// The products of an adapted layer, from arguments that are filled in to launches: what operators
// (registration_*.cpp) and direct calls (direct.cpp) share. Workspaces are freed on return: the
// allocator hands them out again on the same stream only.
#pragma once

#include <algorithm>

#include "bindings.h"
#include "lora_grads.h"
#include "nf4_lora_gemv.h"
#include "nf4_lora_matmul_dx.h"
#include "nf4_lora_matmul_dx_large.h"
#include "nf4_lora_matmul_large.h"
#include "nf4_lora_matmul_mid.h"
#include "nf4_lora_matmul_portable.h"
#include "nf4_lora_matmul_small.h"

namespace lowbit::cuda {

// Uninitialized memory on the current device for kernels of its current stream, freed on return.
// It is from torch's allocator like a tensor's, also while a CUDA graph is captured. A tensor
// around it would cost the host one or two microseconds.
class Workspace {
public:
    explicit Workspace(size_t bytes) {
        if (bytes > 0)
            TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_caching_allocator_raw_alloc(bytes, &data_));
    }
    ~Workspace() {
        if (data_ != nullptr)
            aoti_torch_cuda_caching_allocator_raw_delete(data_);
    }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    uint8_t* data() const {
        return static_cast<uint8_t*>(data_);
    }

private:
    void* data_ = nullptr;
};

// ---- forward ------------------------------------------------------------------------------------

// What a kernel's header offers.
struct ProductKernel {
    const char* name;
    bool (*serves)(const LoraMatmulArgs&);
    size_t (*workspace_bytes)(const LoraMatmulArgs&);
    cudaError_t (*launch)(const LoraMatmulArgs&, cudaStream_t);
};

inline constexpr ProductKernel kGemv{
    "nf4_lora_gemv", serves_nf4_lora_gemv, nf4_lora_gemv_workspace_bytes, launch_nf4_lora_gemv};
inline constexpr ProductKernel kSmall{
    "nf4_lora_matmul_small", serves_nf4_lora_matmul_small, nf4_lora_matmul_small_workspace_bytes,
    launch_nf4_lora_matmul_small};
inline constexpr ProductKernel kMid{
    "nf4_lora_matmul_mid", serves_nf4_lora_matmul_mid, nf4_lora_matmul_mid_workspace_bytes,
    launch_nf4_lora_matmul_mid};
inline constexpr ProductKernel kLarge{
    "nf4_lora_matmul_large", serves_nf4_lora_matmul_large, nf4_lora_matmul_large_workspace_bytes,
    launch_nf4_lora_matmul_large};

inline constexpr ProductKernel kPortable{
    "nf4_lora_matmul_portable", serves_nf4_lora_matmul_portable,
    nf4_lora_matmul_portable_workspace_bytes, launch_nf4_lora_matmul_portable};

inline void run_product(const ProductKernel& kernel, LoraMatmulArgs& a, cudaStream_t stream) {
    STD_TORCH_CHECK(kernel.serves(a), kernel.name, " does not serve these sizes");
    const Workspace workspace(kernel.workspace_bytes(a));
    a.workspace = workspace.data();
    check_launch(kernel.launch(a, stream), kernel.name);
}

// ---- backward -----------------------------------------------------------------------------------

struct DxKernel {
    const char* name;
    bool (*serves)(const LoraDxArgs&);
    size_t (*workspace_bytes)(const LoraDxArgs&);
    cudaError_t (*launch)(const LoraDxArgs&, cudaStream_t);
    bool rounds_lora_A;  // itself; else lora_grads does, in front
    bool waits_for_u;    // may begin before lora_grads has ended
    // Where lora_grads runs, beside the product perhaps; null: always in front.
    LoraGradsPlan (*plan_grads)(const LoraDxArgs&, const LoraGradsArgs&, cudaStream_t) = nullptr;
    // By which it learns from lora_grads that u is there; null: none.
    int (*marks)(const LoraDxArgs&) = nullptr;
    // With the gradients of the adapter; null: lora_grads makes them.
    bool (*serves_all)(const LoraDxArgs&, const LoraGradsArgs&) = nullptr;
    size_t (*workspace_bytes_of_all)(const LoraDxArgs&, const LoraGradsArgs&) = nullptr;
    cudaError_t (*launch_all)(const LoraDxArgs&, const LoraGradsArgs&, cudaStream_t) = nullptr;
};

inline constexpr DxKernel kDxInLoop{
    "nf4_lora_matmul_dx",
    serves_nf4_lora_matmul_dx,
    nf4_lora_matmul_dx_workspace_bytes,
    launch_nf4_lora_matmul_dx,
    false,
    true,
    plan_grads_of_nf4_lora_matmul_dx,
    nf4_lora_matmul_dx_marks};
inline constexpr DxKernel kDxLarge{
    "nf4_lora_matmul_dx_large",
    serves_nf4_lora_matmul_dx_large,
    nf4_lora_matmul_dx_large_workspace_bytes,
    launch_nf4_lora_matmul_dx_large,
    true,
    false,
    nullptr,
    nullptr,
    serves_nf4_lora_backward_large,
    nf4_lora_backward_large_workspace_bytes,
    launch_nf4_lora_backward_large};

inline void run_grads(const LoraGradsArgs& a, const LoraGradsPlan& plan, cudaStream_t stream) {
    if (a.u || a.d_lora_B || a.d_bias || a.d_lora_scaling)
        check_launch(launch_lora_grads(a, plan, stream), "lora_grads");
}

// Every gradient that has a pointer in a or b; u is made for both. `launched` is set before
// the first launch: from then on dx may have been added to.
inline void run_backward(
    const DxKernel& kernel,
    LoraGradsArgs& a,
    LoraDxArgs& b,
    cudaStream_t stream,
    bool* launched = nullptr) {
    // One workspace: u, its marks, lora_A rounded, and what the kernels need for themselves: in
    // turn, but where the product may begin before lora_grads has ended.
    constexpr int64_t kAlignment = 256;
    const auto round_up = [](int64_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; };
    const bool need_dx = b.dx != nullptr, need_u = need_dx || a.d_lora_A != nullptr;
    const bool rounds = need_dx && !kernel.rounds_lora_A && b.r > 0 && b.lora_A_dtype != b.dtype;
    const int64_t u_bytes = need_u ? round_up(a.M * lora_columns(a.r) * 2) : 0;
    const int64_t factor_bytes = rounds ? round_up(2 * b.r * b.w.K) : 0;
    a.u = need_u ? const_cast<void*>(a.dy) : nullptr;  // until it is known where they lie
    a.rounded_lora_A = rounds ? a.u : nullptr;
    STD_TORCH_CHECK(serves_lora_grads(a), "lora_grads does not serve these sizes");
    const bool all = need_dx && kernel.serves_all != nullptr && kernel.serves_all(b, a);
    LoraGradsPlan plan{};
    if (!all)
        plan = need_dx && kernel.plan_grads != nullptr ? kernel.plan_grads(b, a, stream)
                                                       : plan_lora_grads(a);
    b.follows_grads = !all;
    b.beside_grads = plan.spare_sms > 0;
    if (plan.leaves_A)
        b.x = a.x, b.d_lora_A = a.d_lora_A, b.d_lora_A_dtype = a.lora_A_dtype;
    const int marks = need_dx && kernel.marks != nullptr ? kernel.marks(b) : 0;
    a.u_marks = {};
    if (marks > 0 && plan.marks_u())
        a.u_marks = {nullptr, marks, next_mark()};
    const int64_t mark_bytes = round_up(a.u_marks.count * sizeof(uint64_t));
    size_t own_bytes = 0, dx_offset = 0;
    if (all) {
        own_bytes = kernel.workspace_bytes_of_all(b, a);
    } else {
        own_bytes = lora_grads_workspace_bytes(a, plan);
        if (kernel.waits_for_u)
            dx_offset = round_up(own_bytes);
        if (need_dx)
            own_bytes = std::max(own_bytes, dx_offset + kernel.workspace_bytes(b));
    }
    const Workspace workspace(static_cast<size_t>(u_bytes + mark_bytes + factor_bytes) + own_bytes);
    uint8_t* bytes = workspace.data();
    a.u = need_u ? bytes : nullptr;
    bytes += u_bytes;
    if (mark_bytes > 0)
        a.u_marks.words = reinterpret_cast<uint64_t*>(bytes);
    b.u_marks = a.u_marks;
    bytes += mark_bytes;
    if (rounds) {
        a.lora_A = b.lora_A;
        b.lora_A = a.rounded_lora_A = bytes;
        b.lora_A_dtype = b.dtype;
    }
    a.workspace = bytes + factor_bytes;
    b.workspace = bytes + factor_bytes + dx_offset;
    b.u = a.u;
    if (launched != nullptr)
        *launched = true;
    if (all) {
        check_launch(kernel.launch_all(b, a, stream), kernel.name);
        return;
    }
    run_grads(a, plan, stream);
    if (!need_dx)
        return;
    check_launch(kernel.launch(b, stream), kernel.name);
}

}  // namespace lowbit::cuda
