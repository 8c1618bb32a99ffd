// The matrix products of the CPU backend. Schemas equal the ones in lowbit/ops.py.

#include <tuple>

#include "bindings.h"
#include "lora_linear.h"

namespace lowbit::cpu {
namespace {

// [M, columns] of any float type; returns M.
int64_t check_activation(const Tensor& tensor, int64_t columns, const char* argument) {
    check_cpu_contiguous(tensor, argument);
    STD_TORCH_CHECK(
        tensor.dim() == 2 && tensor.size(1) == columns, argument, " must be [M, ", columns, "]");
    return tensor.size(0);
}

void check_matrix(const Tensor& tensor, int64_t rows, int64_t columns, const char* argument) {
    const int64_t M = check_activation(tensor, columns, argument);
    STD_TORCH_CHECK(M == rows, argument, " must be [", rows, ", ", columns, "], got ", M, " rows");
}

struct Bias {
    const void* data = nullptr;
    Dtype type = Dtype::kFloat32;
};

Bias checked_bias(const OptionalTensor& bias, int64_t N) {
    if (!bias.has_value())
        return {};
    check_cpu_contiguous(*bias, "bias");
    STD_TORCH_CHECK(bias->numel() == N, "bias must have N = ", N, " elements, got ", bias->numel());
    return {bias->const_data_ptr(), dtype_of(*bias, "bias")};
}

Tensor linear_op(Tensor x, LOWBIT_WEIGHT_PARAMETERS, OptionalTensor bias) {
    const WeightView w = make_weight_view(LOWBIT_WEIGHT_ARGUMENTS);
    const int64_t M = check_activation(x, K, "x");
    const Bias b = checked_bias(bias, N);
    Tensor y = new_result({M, N}, x.scalar_type());
    FusedProduct product =
        weight_product(x.const_data_ptr(), dtype_of(x, "x"), M, w, true, y.mutable_data_ptr());
    product.bias = b.data;
    product.bias_type = b.type;
    run_fused_product(product);
    return y;
}

Tensor linear_dx_op(Tensor dy, LOWBIT_WEIGHT_PARAMETERS) {
    const WeightView w = make_weight_view(LOWBIT_WEIGHT_ARGUMENTS);
    const int64_t M = check_activation(dy, N, "dy");
    Tensor dx = new_result({M, K}, dy.scalar_type());
    run_fused_product(weight_product(
        dy.const_data_ptr(), dtype_of(dy, "dy"), M, w, false, dx.mutable_data_ptr()));
    return dx;
}

// The adapter arguments, checked, and what LoraArgs points to.
struct Adapter {
    LoraArgs args{};
    std::vector<float> scale;
    DropoutArgs dropout{};

    Adapter(
        const WeightView& w,
        const Tensor& lora_A,
        const Tensor& lora_B,
        const OptionalTensor& lora_scaling,
        double scaling,
        double dropout_p,
        const OptionalTensor& seed) {
        const int64_t r = lora_A.size(0);
        check_matrix(lora_A, r, w.K, "lora_A");
        check_matrix(lora_B, w.N, r, "lora_B");
        STD_TORCH_CHECK(r >= 1, "lora_A must have at least one row");
        scale.assign(r, static_cast<float>(scaling));
        if (lora_scaling.has_value()) {
            const float* const factors =
                checked_data<float>(*lora_scaling, ScalarType::Float, r, "lora_scaling");
            for (int64_t j = 0; j < r; ++j)
                scale[j] *= factors[j];
        }
        args.weight = w;
        args.lora_A = lora_A.const_data_ptr();
        args.lora_B = lora_B.const_data_ptr();
        args.lora_A_type = dtype_of(lora_A, "lora_A");
        args.lora_B_type = dtype_of(lora_B, "lora_B");
        args.scale = scale.data();
        args.r = r;
        if (dropout_p > 0.0) {
            STD_TORCH_CHECK(dropout_p < 1.0, "dropout_p must be below 1, got ", dropout_p);
            STD_TORCH_CHECK(seed.has_value(), "seed is required with dropout_p > 0");
            dropout = {dropout_p, *checked_data<int64_t>(*seed, ScalarType::Long, 1, "seed")};
            args.dropout = &dropout;
        }
    }
    Adapter(const Adapter&) = delete;  // args points into this object
    Adapter& operator=(const Adapter&) = delete;
};

std::tuple<Tensor, Tensor> lora_linear_op(
    Tensor x,
    LOWBIT_WEIGHT_PARAMETERS,
    Tensor lora_A,
    Tensor lora_B,
    OptionalTensor lora_scaling,
    double scaling,
    OptionalTensor bias,
    double dropout_p,
    OptionalTensor seed) {
    const Adapter adapter(
        make_weight_view(LOWBIT_WEIGHT_ARGUMENTS), lora_A, lora_B, lora_scaling, scaling, dropout_p,
        seed);
    const int64_t M = check_activation(x, K, "x");
    const Bias b = checked_bias(bias, N);
    Tensor y = new_result({M, N}, x.scalar_type());
    Tensor z = new_cpu_tensor({M, adapter.args.r}, x.scalar_type());
    lora_linear(
        x.const_data_ptr(), dtype_of(x, "x"), M, adapter.args, b.data, b.type, y.mutable_data_ptr(),
        z.mutable_data_ptr());
    return {y, z};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients lora_linear_backward_op(
    Tensor dy,
    Tensor x,
    Tensor z,
    LOWBIT_WEIGHT_PARAMETERS,
    Tensor lora_A,
    Tensor lora_B,
    OptionalTensor lora_scaling,
    double scaling,
    double dropout_p,
    OptionalTensor seed,
    bool need_dx,
    bool need_d_lora_A,
    bool need_d_lora_B,
    bool need_d_bias,
    bool need_d_lora_scaling) {
    const Adapter adapter(
        make_weight_view(LOWBIT_WEIGHT_ARGUMENTS), lora_A, lora_B, lora_scaling, scaling, dropout_p,
        seed);
    const int64_t M = check_activation(dy, N, "dy"), r = adapter.args.r;
    const ScalarType type = dy.scalar_type();
    check_matrix(x, M, K, "x");
    check_matrix(z, M, r, "z");
    STD_TORCH_CHECK(
        x.scalar_type() == type && z.scalar_type() == type, "x and z must have the type of dy");
    const auto wanted = [](bool need, std::vector<int64_t> sizes, ScalarType dtype) {
        return new_cpu_tensor(need ? sizes : std::vector<int64_t>{0}, dtype);
    };
    Tensor dx = need_dx ? new_result({M, K}, type) : new_cpu_tensor({0}, type);
    Tensor d_lora_A = wanted(need_d_lora_A, {r, K}, lora_A.scalar_type());
    Tensor d_lora_B = wanted(need_d_lora_B, {N, r}, lora_B.scalar_type());
    Tensor d_bias = wanted(need_d_bias, {N}, type);
    Tensor d_lora_scaling = wanted(need_d_lora_scaling, {r}, ScalarType::Float);
    LoraGradients gradients{};
    gradients.dx = need_dx ? dx.mutable_data_ptr() : nullptr;
    gradients.d_lora_A = need_d_lora_A ? d_lora_A.mutable_data_ptr() : nullptr;
    gradients.d_lora_B = need_d_lora_B ? d_lora_B.mutable_data_ptr() : nullptr;
    gradients.d_bias = need_d_bias ? d_bias.mutable_data_ptr() : nullptr;
    gradients.d_lora_scaling =
        need_d_lora_scaling ? static_cast<float*>(d_lora_scaling.mutable_data_ptr()) : nullptr;
    lora_linear_backward(
        dy.const_data_ptr(), x.const_data_ptr(), z.const_data_ptr(), dtype_of(dy, "dy"), M,
        adapter.args, static_cast<float>(scaling), gradients);
    return {dx, d_lora_A, d_lora_B, d_bias, d_lora_scaling};
}

}  // namespace
}  // namespace lowbit::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(lowbit_cpu, m) {
    m.def("linear(Tensor x, " LOWBIT_WEIGHT ", Tensor? bias) -> Tensor");
    m.def("linear_dx(Tensor dy, " LOWBIT_WEIGHT ") -> Tensor");
    m.def(
        "lora_linear(Tensor x, " LOWBIT_WEIGHT
        ", Tensor lora_A, Tensor lora_B, Tensor? lora_scaling, float scaling, Tensor? bias, "
        "float dropout_p, Tensor? seed) -> (Tensor y, Tensor z)");
    m.def(
        "lora_linear_backward(Tensor dy, Tensor x, Tensor z, " LOWBIT_WEIGHT
        ", Tensor lora_A, Tensor lora_B, Tensor? lora_scaling, float scaling, float dropout_p, "
        "Tensor? seed, bool need_dx, bool need_d_lora_A, bool need_d_lora_B, bool need_d_bias, "
        "bool need_d_lora_scaling) -> (Tensor dx, Tensor d_lora_A, Tensor d_lora_B, "
        "Tensor d_bias, Tensor d_lora_scaling)");
}

STABLE_TORCH_LIBRARY_IMPL(lowbit_cpu, CPU, m) {
    m.impl("linear", TORCH_BOX(&lowbit::cpu::linear_op));
    m.impl("linear_dx", TORCH_BOX(&lowbit::cpu::linear_dx_op));
    m.impl("lora_linear", TORCH_BOX(&lowbit::cpu::lora_linear_op));
    m.impl("lora_linear_backward", TORCH_BOX(&lowbit::cpu::lora_linear_backward_op));
}
