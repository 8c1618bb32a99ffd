// The operators of the optimizers. lowbit/optim packs state into slabs and lays out the tables that
// these take; csrc/cuda/registration_optimizer.cpp has the same operators for the GPU.

#include <cmath>

#include "bindings.h"
#include "optimizer.h"
#include "optimizer_bindings.h"

namespace lowbit::cpu {
namespace {

float scalar_or(const OptionalTensor& tensor, float otherwise, const char* argument) {
    return tensor.has_value() ? *checked_data<float>(*tensor, ScalarType::Float, 1, argument)
                              : otherwise;
}

template <typename Row>
const Row* rows_of(const Tensor& tensor, int64_t count, const char* argument) {
    const int64_t numbers = count * static_cast<int64_t>(sizeof(Row) / sizeof(int64_t));
    return reinterpret_cast<const Row*>(
        checked_data<int64_t>(tensor, ScalarType::Long, numbers, argument));
}

// `device` is the GPU operator's.
int64_t optimizer_table(
    std::vector<Tensor> parameters,
    std::vector<Tensor> gradients,
    Tensor slots,
    Tensor counts,
    ScalarType dtype,
    int64_t /*device*/,
    Tensor table) {
    const auto is_here = [](const Tensor& t) { return t.is_cpu(); };
    return write_step_table(parameters, gradients, slots, counts, dtype, table, is_here);
}

int64_t gradient_table(std::vector<Tensor> gradients, Tensor table) {
    const auto is_here = [](const Tensor& t) { return t.is_cpu(); };
    return write_gradient_table(gradients, table, is_here);
}

void optimizer_advance(
    Tensor rows,
    Tensor pointers,
    Tensor groups,
    OptionalTensor found_inf,
    int64_t algorithm,
    Tensor steps,
    Tensor numbers) {
    const int64_t tensors = rows.numel() / kRowNumbers;
    const auto* row = rows_of<TensorRow>(rows, tensors, "rows");
    const auto* pointer = rows_of<TensorPointers>(pointers, tensors, "pointers");
    checked_data<int64_t>(groups, ScalarType::Long, groups.numel(), "groups");
    const auto* group = static_cast<const GroupNumbers*>(groups.const_data_ptr());
    checked_data<float>(steps, ScalarType::Float, tensors, "steps");
    checked_data<float>(numbers, ScalarType::Float, tensors * kStepNumbers, "numbers");
    auto* step = static_cast<float*>(steps.mutable_data_ptr());
    auto* number = static_cast<StepNumbers*>(numbers.mutable_data_ptr());
    if (scalar_or(found_inf, 0.0f, "found_inf") != 0.0f)
        return;
    for (int64_t t = 0; t < tensors; ++t) {
        if (pointer[t].gradient == nullptr)
            continue;
        STD_TORCH_CHECK(
            row[t].group >= 0 && (row[t].group + 1) * kGroupNumbers <= groups.numel(),
            "group out of range");
        step[t] += 1.0f;
        number[t] = step_numbers(group[row[t].group], to_algorithm(algorithm), step[t]);
    }
}

void optimizer_step(
    Tensor rows,
    Tensor pointers,
    Tensor numbers,
    int64_t chunks,
    Tensor values,
    OptionalTensor scales,
    Tensor tables,
    OptionalTensor found_inf,
    OptionalTensor grad_scale,
    int64_t algorithm,
    ScalarType dtype,
    bool stochastic,
    int64_t seed,
    bool /*follows_step*/) {
    StepArgs a{};
    a.algorithm = to_algorithm(algorithm);
    const int64_t states = a.algorithm == Algorithm::kAdamW ? 2 : 1;
    a.tensors = rows.numel() / kRowNumbers;
    a.rows = rows_of<TensorRow>(rows, a.tensors, "rows");
    a.pointers = rows_of<TensorPointers>(pointers, a.tensors, "pointers");
    a.numbers = reinterpret_cast<const StepNumbers*>(
        checked_data<float>(numbers, ScalarType::Float, a.tensors * kStepNumbers, "numbers"));
    a.chunks = chunks;
    a.elements = values.numel() / states;
    STD_TORCH_CHECK(
        a.elements % kStateBlock == 0, "values must be [", states, ", a multiple of ", kStateBlock,
        "]");
    const ScalarType stored = scales.has_value() ? ScalarType::Byte : ScalarType::Float;
    checked_data<uint8_t>(values, stored, states * a.elements, "values");
    a.values = values.mutable_data_ptr();
    if (scales.has_value()) {
        const int64_t blocks = states * a.elements / kStateBlock;
        checked_data<float>(*scales, ScalarType::Float, blocks, "scales");
        a.scales = static_cast<float*>(scales->mutable_data_ptr());
        a.tables = checked_data<float>(tables, ScalarType::Float, states * 2 * 256, "tables");
    }
    a.grad_scale = scalar_or(grad_scale, 1.0f, "grad_scale");
    a.dtype = to_dtype(dtype, "dtype");
    a.stochastic = stochastic && a.dtype == Dtype::kBFloat16;
    a.seed = static_cast<uint64_t>(seed);
    if (scalar_or(found_inf, 0.0f, "found_inf") == 0.0f)
        launch_optimizer_step(a);
}

std::tuple<Tensor, Tensor> gradient_norm(Tensor table, int64_t chunks) {
    const int64_t tensors = table.numel() / kGradientNumbers;
    const auto* rows = rows_of<GradientRow>(table, tensors, "table");
    std::vector<double> partial_sums(static_cast<size_t>(chunks));
    const double sum = launch_gradient_squares(rows, tensors, chunks, partial_sums.data());
    Tensor norm = new_cpu_tensor({}, ScalarType::Float);
    Tensor found_inf = new_cpu_tensor({}, ScalarType::Float);
    *static_cast<float*>(norm.mutable_data_ptr()) = static_cast<float>(std::sqrt(sum));
    *static_cast<float*>(found_inf.mutable_data_ptr()) = std::isfinite(sum) ? 0.0f : 1.0f;
    return {norm, found_inf};
}

void clip_gradients(Tensor table, int64_t chunks, Tensor norm, double max_norm) {
    const int64_t tensors = table.numel() / kGradientNumbers;
    const auto* rows = rows_of<GradientRow>(table, tensors, "table");
    const float value = *checked_data<float>(norm, ScalarType::Float, 1, "norm");
    const float factor = static_cast<float>(max_norm) / (value + 1e-6f);
    if (!(factor >= 1.0f))  // a NaN goes on into the gradients, as in torch
        launch_scale_gradients(rows, tensors, chunks, factor);
}

}  // namespace
}  // namespace lowbit::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(lowbit_cpu, m) {
    lowbit::define_optimizer_operators(m);
}

STABLE_TORCH_LIBRARY_IMPL(lowbit_cpu, CompositeExplicitAutograd, m) {
    m.impl("optimizer_table", TORCH_BOX(&lowbit::cpu::optimizer_table));
    m.impl("gradient_table", TORCH_BOX(&lowbit::cpu::gradient_table));
}

STABLE_TORCH_LIBRARY_IMPL(lowbit_cpu, CPU, m) {
    m.impl("optimizer_advance", TORCH_BOX(&lowbit::cpu::optimizer_advance));
    m.impl("optimizer_step", TORCH_BOX(&lowbit::cpu::optimizer_step));
    m.impl("gradient_norm", TORCH_BOX(&lowbit::cpu::gradient_norm));
    m.impl("clip_gradients", TORCH_BOX(&lowbit::cpu::clip_gradients));
}
