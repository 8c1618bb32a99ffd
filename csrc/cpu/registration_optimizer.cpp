// The operators of the optimizers. lowbit/optim packs state into slabs and lays out the tables that
// these take; csrc/cuda/registration_optimizer.cpp has the same operators for the GPU.

#include <algorithm>
#include <cmath>
#include <tuple>

#include "bindings.h"
#include "optimizer.h"

namespace lowbit::cpu {
namespace {

constexpr int64_t kRowNumbers = sizeof(TensorRow) / sizeof(int64_t);
constexpr int64_t kPointerNumbers = sizeof(TensorPointers) / sizeof(int64_t);
constexpr int64_t kGradientNumbers = sizeof(GradientRow) / sizeof(int64_t);

Algorithm to_algorithm(int64_t value) {
    STD_TORCH_CHECK(value == 0 || value == 1, "algorithm must be 0 or 1, got ", value);
    return static_cast<Algorithm>(value);
}

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

bool same_shape(const Tensor& a, const Tensor& b) {
    if (a.dim() != b.dim())
        return false;
    for (int64_t i = 0; i < a.dim(); ++i) {
        if (a.size(i) != b.size(i))
            return false;
    }
    return true;
}

// Writes (parameter, gradient) addresses to table [tensors, 2]; rows whose slot is not listed stay
// 0. counts [tensors] holds the elements each row was laid out for. Returns -1, or the position in
// `parameters` of the first pair that is not fit to be stepped; nothing is changed. `device` is the
// GPU operator's.
int64_t optimizer_table(
    std::vector<Tensor> parameters,
    std::vector<Tensor> gradients,
    Tensor slots,
    Tensor counts,
    ScalarType dtype,
    int64_t /*device*/,
    Tensor table) {
    const int64_t pairs = static_cast<int64_t>(parameters.size());
    const int64_t tensors = counts.numel();
    const auto* slot = checked_data<int64_t>(slots, ScalarType::Long, pairs, "slots");
    const auto* count = checked_data<int64_t>(counts, ScalarType::Long, tensors, "counts");
    checked_data<int64_t>(table, ScalarType::Long, table.numel(), "table");
    STD_TORCH_CHECK(
        static_cast<int64_t>(gradients.size()) == pairs &&
            table.numel() >= kPointerNumbers * tensors,
        "parameters, gradients and table must agree");
    auto* rows = static_cast<TensorPointers*>(table.mutable_data_ptr());
    std::fill(rows, rows + tensors, TensorPointers{});
    for (int64_t i = 0; i < pairs; ++i) {
        const Tensor &p = parameters[i], &g = gradients[i];
        STD_TORCH_CHECK(slot[i] >= 0 && slot[i] < tensors, "slot out of range");
        const bool fit = p.is_cpu() && p.is_contiguous() && p.scalar_type() == dtype &&
                         p.numel() == count[slot[i]] && g.is_cpu() && g.is_contiguous() &&
                         g.scalar_type() == dtype && same_shape(p, g);
        if (!fit)
            return i;
        // The address of an empty tensor is null, which would mean no gradient; it is never read.
        const void* gradient = g.numel() > 0 ? g.const_data_ptr() : rows;
        rows[slot[i]] = {const_cast<void*>(p.const_data_ptr()), gradient};
    }
    return -1;
}

// Writes GradientRows to table and returns the number of chunks.
int64_t gradient_table(std::vector<Tensor> gradients, Tensor table) {
    const int64_t tensors = static_cast<int64_t>(gradients.size());
    checked_data<int64_t>(table, ScalarType::Long, kGradientNumbers * tensors, "table");
    auto* rows = static_cast<GradientRow*>(table.mutable_data_ptr());
    int64_t chunks = 0;
    for (const Tensor& g : gradients) {
        check_cpu_contiguous(g, "gradients");
        *rows++ = {
            const_cast<void*>(g.const_data_ptr()), g.numel(), chunks,
            static_cast<int64_t>(dtype_of(g, "gradients"))};
        chunks += ceil_div(g.numel(), kStepChunk);
    }
    return chunks;
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
    int64_t seed) {
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

// clang-format off
STABLE_TORCH_LIBRARY_FRAGMENT(lowbit_cpu, m) {
    m.def("optimizer_table(Tensor[] parameters, Tensor[] gradients, Tensor slots, Tensor counts, ScalarType dtype, "
          "int device, Tensor(a!) table) -> int");
    m.def("optimizer_advance(Tensor rows, Tensor pointers, Tensor groups, Tensor? found_inf, int algorithm, "
          "Tensor(a!) steps, Tensor(b!) numbers) -> ()");
    m.def("optimizer_step(Tensor rows, Tensor pointers, Tensor numbers, int chunks, Tensor(a!) values, "
          "Tensor(b!)? scales, Tensor tables, Tensor? found_inf, Tensor? grad_scale, int algorithm, "
          "ScalarType dtype, bool stochastic, int seed) -> ()");
    m.def("gradient_table(Tensor[] gradients, Tensor(a!) table) -> int");
    m.def("gradient_norm(Tensor table, int chunks) -> (Tensor, Tensor)");
    m.def("clip_gradients(Tensor table, int chunks, Tensor norm, float max_norm) -> ()");
}
// clang-format on

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
