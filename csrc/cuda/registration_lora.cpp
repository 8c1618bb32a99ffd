// The compiled products of the CUDA backend: one operator per kernel, all with one schema. Which of
// them runs is decided in lowbit/dispatch.py; an operator refuses what its kernel does not serve.

#include "lora_calls.h"

namespace lowbit::cuda {
namespace {

template <const ProductKernel& kKernel>
Tensor lora_matmul(
    Tensor x,
    LOWBIT_WEIGHT_PARAMETERS,
    OptionalTensor lora_A,
    OptionalTensor lora_B,
    OptionalTensor lora_scaling,
    double scaling,
    OptionalTensor bias,
    OptionalTensor z_in,
    OptionalTensor z_out) {
    const Call call(x);
    const ScalarType type = x.scalar_type();
    align(x);
    for (OptionalTensor* tensor : {&lora_A, &lora_B, &bias, &z_in})
        align(*tensor);
    LoraMatmulArgs a{};
    a.w = make_weight_view(call, LOWBIT_WEIGHT_ARGUMENTS);
    a.dtype = to_dtype(type, "x");
    STD_TORCH_CHECK(x.dim() == 2, "x must be [M, K], got ", x.dim(), " dimensions");
    a.M = x.size(0);
    a.r = lora_B.has_value() ? static_cast<int>(lora_B->size(1)) : 0;
    STD_TORCH_CHECK(
        !lora_B.has_value() || lora_A.has_value() != z_in.has_value(),
        "lora_B needs either lora_A or z_in");
    a.x = checked_data(call, x, type, a.M, K, "x");
    a.lora_A = checked_data(call, lora_A, type, a.r, K, "lora_A");
    a.lora_B = checked_data(call, lora_B, type, N, a.r, "lora_B");
    a.bias = checked_data(call, bias, type, N, 1, "bias");
    a.z_in = checked_data(call, z_in, type, a.M, a.r, "z_in");
    a.z_out = const_cast<void*>(checked_data(call, z_out, type, a.M, a.r, "z_out"));
    if (lora_scaling.has_value())
        a.lora_scaling = call.data<float>(*lora_scaling, ScalarType::Float, a.r, "lora_scaling");
    a.scaling = static_cast<float>(scaling);

    Tensor y = new_tensor(x, {a.M, N}, type);
    a.y = y.mutable_data_ptr();
    run_product(kKernel, a, call.stream());
    return y;
}

}  // namespace
}  // namespace lowbit::cuda

// clang-format off
#define LOWBIT_PRODUCT \
    "(Tensor x, " LOWBIT_WEIGHT ", Tensor? lora_A, Tensor? lora_B, Tensor? lora_scaling, float scaling, " \
    "Tensor? bias, Tensor? z_in, Tensor(a!)? z_out) -> Tensor"
// clang-format on

STABLE_TORCH_LIBRARY_FRAGMENT(lowbit_cuda, m) {
    m.def("nf4_lora_gemv" LOWBIT_PRODUCT);
    m.def("nf4_lora_matmul_small" LOWBIT_PRODUCT);
    m.def("nf4_lora_matmul_mid" LOWBIT_PRODUCT);
    m.def("nf4_lora_matmul_large" LOWBIT_PRODUCT);
    m.def("nf4_lora_matmul_portable" LOWBIT_PRODUCT);
}

STABLE_TORCH_LIBRARY_IMPL(lowbit_cuda, CUDA, m) {
    using namespace lowbit::cuda;
    m.impl("nf4_lora_gemv", TORCH_BOX(&lora_matmul<kGemv>));
    m.impl("nf4_lora_matmul_small", TORCH_BOX(&lora_matmul<kSmall>));
    m.impl("nf4_lora_matmul_mid", TORCH_BOX(&lora_matmul<kMid>));
    m.impl("nf4_lora_matmul_large", TORCH_BOX(&lora_matmul<kLarge>));
    m.impl("nf4_lora_matmul_portable", TORCH_BOX(&lora_matmul<kPortable>));
}
