// The compiled backward pass of a 4-bit linear layer with an adapter: one operator per kernel, and
// one that runs them all, because at small M the host's time decides. What is not asked for comes
// back as None. Which layers take them is decided in lowbit/dispatch.py; an operator refuses what
// its kernel does not serve.

#include <tuple>

#include "lora_calls.h"

namespace lowbit::cuda {
namespace {

using Gradients =
    std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;

struct Needs {
    bool d_lora_A, d_lora_B, d_bias, d_lora_scaling;
};

// A new tensor if it is wanted, and where it is.
template <typename Pointer>
OptionalTensor output(
    bool wanted,
    const Tensor& like,
    std::initializer_list<int64_t> sizes,
    ScalarType type,
    Pointer*& data) {
    if (!wanted)
        return std::nullopt;
    Tensor tensor = new_tensor(like, sizes, type);
    data = static_cast<Pointer*>(tensor.mutable_data_ptr());
    return tensor;
}

// ---- the skinny products ------------------------------------------------------------------------

LoraGradsArgs grads_args(
    const Call& call,
    const Tensor& dy,
    const OptionalTensor& x,
    const OptionalTensor& z,
    const Tensor& lora_A,
    const Tensor& lora_B,
    const OptionalTensor& lora_scaling,
    double scaling) {
    const ScalarType type = dy.scalar_type();
    LoraGradsArgs a{};
    a.dtype = to_dtype(type, "dy");
    a.lora_A_dtype = to_dtype(lora_A.scalar_type(), "lora_A");
    a.lora_B_dtype = to_dtype(lora_B.scalar_type(), "lora_B");
    STD_TORCH_CHECK(
        dy.dim() == 2 && lora_A.dim() == 2 && lora_B.dim() == 2,
        "dy, lora_A and lora_B must be matrices");
    a.M = dy.size(0), a.N = dy.size(1), a.K = lora_A.size(1);
    a.r = static_cast<int>(lora_A.size(0));
    a.dy = checked_data(call, dy, type, a.M, a.N, "dy");
    a.x = checked_data(call, x, type, a.M, a.K, "x");
    a.z = checked_data(call, z, type, a.M, a.r, "z");
    a.lora_B = checked_data(call, lora_B, lora_B.scalar_type(), a.N, a.r, "lora_B");
    if (lora_scaling.has_value())
        a.lora_scaling = call.data<float>(*lora_scaling, ScalarType::Float, a.r, "lora_scaling");
    a.scaling = static_cast<float>(scaling);
    return a;
}

// Allocates the gradients that are asked for; the first is left to the caller.
Gradients new_gradients(
    LoraGradsArgs& a,
    const Needs& needs,
    const Tensor& dy,
    const Tensor& lora_A,
    const Tensor& lora_B) {
    STD_TORCH_CHECK(!needs.d_lora_A || a.x != nullptr, "the gradient of lora_A needs x");
    STD_TORCH_CHECK(
        !(needs.d_lora_B || needs.d_lora_scaling) || a.z != nullptr,
        "the gradients of lora_B and lora_scaling need z");
    return {
        std::nullopt, output(needs.d_lora_A, dy, {a.r, a.K}, lora_A.scalar_type(), a.d_lora_A),
        output(needs.d_lora_B, dy, {a.N, a.r}, lora_B.scalar_type(), a.d_lora_B),
        output(needs.d_bias, dy, {a.N}, dy.scalar_type(), a.d_bias),
        output(needs.d_lora_scaling, dy, {a.r}, ScalarType::Float, a.d_lora_scaling)};
}

Gradients lora_grads(
    Tensor dy,
    OptionalTensor x,
    OptionalTensor z,
    Tensor lora_A,
    Tensor lora_B,
    OptionalTensor lora_scaling,
    double scaling,
    bool need_u,
    bool need_d_lora_A,
    bool need_d_lora_B,
    bool need_d_bias,
    bool need_d_lora_scaling) {
    const Call call(dy);
    align(dy);
    align(lora_B);
    align(x);
    align(z);
    LoraGradsArgs a = grads_args(call, dy, x, z, lora_A, lora_B, lora_scaling, scaling);
    const Needs needs{need_d_lora_A, need_d_lora_B, need_d_bias, need_d_lora_scaling};
    Gradients gradients = new_gradients(a, needs, dy, lora_A, lora_B);
    std::get<0>(gradients) =
        output(need_u || need_d_lora_A, dy, {a.M, lora_columns(a.r)}, dy.scalar_type(), a.u);
    STD_TORCH_CHECK(serves_lora_grads(a), "lora_grads does not serve these sizes");
    const LoraGradsPlan plan = plan_lora_grads(a);
    const auto bytes = static_cast<int64_t>(lora_grads_workspace_bytes(a, plan));
    // Freed on return, here and below: the allocator hands it out again on this stream only.
    const Tensor workspace = new_tensor(dy, {bytes}, ScalarType::Byte);
    a.workspace = workspace.mutable_data_ptr();
    run_grads(a, plan, call.stream());
    return gradients;
}

// ---- dx -----------------------------------------------------------------------------------------

LoraDxArgs dx_args(const WeightView& w, const Call& call, const Tensor& dy) {
    LoraDxArgs a{};
    a.w = w;
    a.dtype = a.lora_A_dtype = to_dtype(dy.scalar_type(), "dy");
    a.M = dy.size(0);
    a.dy = checked_data(call, dy, dy.scalar_type(), a.M, w.N, "dy");
    return a;
}

// dx: a new tensor, or null with the result added to dx_sum, which must not overlap x or dy: the
// adapter's gradients may still be read from them.
template <const DxKernel& kKernel>
OptionalTensor
new_dx(LoraDxArgs& a, const Call& call, const Tensor& dy, const OptionalTensor& dx_sum) {
    a.adds = dx_sum.has_value();
    a.dx = const_cast<void*>(checked_data(call, dx_sum, dy.scalar_type(), a.M, a.w.K, "dx_sum"));
    OptionalTensor dx = output(!a.adds, dy, {a.M, a.w.K}, dy.scalar_type(), a.dx);
    STD_TORCH_CHECK(kKernel.serves(a), kKernel.name, " does not serve these sizes");
    return dx;
}

template <const DxKernel& kKernel>
OptionalTensor nf4_lora_matmul_dx(Tensor dy, LOWBIT_WEIGHT_PARAMETERS, OptionalTensor dx_sum) {
    const Call call(dy);
    align(dy);
    LoraDxArgs a = dx_args(make_weight_view(call, LOWBIT_WEIGHT_ARGUMENTS), call, dy);
    OptionalTensor dx = new_dx<kKernel>(a, call, dy, dx_sum);
    const Workspace workspace(kKernel.workspace_bytes(a));
    a.workspace = workspace.data();
    check_launch(kKernel.launch(a, call.stream()), kKernel.name);
    return dx;
}

// ---- all ----------------------------------------------------------------------------------------

template <const DxKernel& kKernel>
Gradients nf4_lora_backward(
    Tensor dy,
    OptionalTensor x,
    OptionalTensor z,
    LOWBIT_WEIGHT_PARAMETERS,
    Tensor lora_A,
    Tensor lora_B,
    OptionalTensor lora_scaling,
    double scaling,
    OptionalTensor dx_sum,
    bool need_dx,
    bool need_d_lora_A,
    bool need_d_lora_B,
    bool need_d_bias,
    bool need_d_lora_scaling) {
    const Call call(dy);
    align(dy);
    align(lora_A);
    align(lora_B);
    align(x);
    align(z);
    LoraGradsArgs a = grads_args(call, dy, x, z, lora_A, lora_B, lora_scaling, scaling);
    STD_TORCH_CHECK(a.N == N && a.K == K, "lora_A and lora_B must fit the weight");
    const Needs needs{need_d_lora_A, need_d_lora_B, need_d_bias, need_d_lora_scaling};
    Gradients gradients = new_gradients(a, needs, dy, lora_A, lora_B);

    LoraDxArgs b{};
    if (need_dx) {
        b = dx_args(make_weight_view(call, LOWBIT_WEIGHT_ARGUMENTS), call, dy);
        b.r = a.r;
        b.lora_A_dtype = a.lora_A_dtype;
        b.lora_A = checked_data(call, lora_A, lora_A.scalar_type(), a.r, K, "lora_A");
        std::get<0>(gradients) = new_dx<kKernel>(b, call, dy, dx_sum);
    }
    run_backward(kKernel, a, b, call.stream());
    return gradients;
}

}  // namespace
}  // namespace lowbit::cuda

// clang-format off
#define LOWBIT_ADAPTER "Tensor lora_A, Tensor lora_B, Tensor? lora_scaling, float scaling, "
#define LOWBIT_NEEDS "bool need_d_lora_A, bool need_d_lora_B, bool need_d_bias, bool need_d_lora_scaling"
#define LOWBIT_GRADIENTS "Tensor? d_lora_A, Tensor? d_lora_B, Tensor? d_bias, Tensor? d_lora_scaling)"
#define LOWBIT_DX "(Tensor dy, " LOWBIT_WEIGHT ", Tensor(a!)? dx_sum) -> Tensor?"
#define LOWBIT_BACKWARD                                                                            \
    "(Tensor dy, Tensor? x, Tensor? z, " LOWBIT_WEIGHT ", " LOWBIT_ADAPTER                         \
    "Tensor(a!)? dx_sum, bool need_dx, " LOWBIT_NEEDS ") -> (Tensor? dx, " LOWBIT_GRADIENTS

STABLE_TORCH_LIBRARY_FRAGMENT(lowbit_cuda, m) {
    m.def("lora_grads(Tensor dy, Tensor? x, Tensor? z, " LOWBIT_ADAPTER "bool need_u, " LOWBIT_NEEDS
          ") -> (Tensor? u, " LOWBIT_GRADIENTS);
    m.def("nf4_lora_matmul_dx" LOWBIT_DX);
    m.def("nf4_lora_matmul_dx_large" LOWBIT_DX);
    m.def("nf4_lora_backward" LOWBIT_BACKWARD);
    m.def("nf4_lora_backward_large" LOWBIT_BACKWARD);
}
// clang-format on

STABLE_TORCH_LIBRARY_IMPL(lowbit_cuda, CUDA, m) {
    using namespace lowbit::cuda;
    m.impl("lora_grads", TORCH_BOX(&lora_grads));
    m.impl("nf4_lora_matmul_dx", TORCH_BOX(&nf4_lora_matmul_dx<kDxInLoop>));
    m.impl("nf4_lora_matmul_dx_large", TORCH_BOX(&nf4_lora_matmul_dx<kDxLarge>));
    m.impl("nf4_lora_backward", TORCH_BOX(&nf4_lora_backward<kDxInLoop>));
    m.impl("nf4_lora_backward_large", TORCH_BOX(&nf4_lora_backward<kDxLarge>));
}
