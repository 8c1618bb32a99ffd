// The operators of the optimizers. lowbit/optim packs state into slabs and lays out the tables that
// these take; csrc/cpu/registration_optimizer.cpp has the same operators for the CPU.

#include <algorithm>

#include "bindings.h"
#include "optimizer.h"

namespace lowbit::cuda {
namespace {

constexpr int64_t kRowNumbers = sizeof(TensorRow) / sizeof(int64_t);
constexpr int64_t kPointerNumbers = sizeof(TensorPointers) / sizeof(int64_t);
constexpr int64_t kGradientNumbers = sizeof(GradientRow) / sizeof(int64_t);

const float* optional_scalar(const Call& call, const OptionalTensor& tensor, const char* argument) {
    return tensor.has_value() ? call.data<float>(*tensor, ScalarType::Float, 1, argument) : nullptr;
}

Algorithm to_algorithm(int64_t value) {
    STD_TORCH_CHECK(value == 0 || value == 1, "algorithm must be 0 or 1, got ", value);
    return static_cast<Algorithm>(value);
}

bool same_shape(const Tensor& a, const Tensor& b) {
    if (a.dim() != b.dim())
        return false;
    for (int64_t i = 0; i < a.dim(); i++) {
        if (a.size(i) != b.size(i))
            return false;
    }
    return true;
}

// ---- tables, made on the host -------------------------------------------------------------------

// Writes (parameter, gradient) addresses to table [tensors, 2]; rows whose slot is not listed stay
// 0. counts [tensors] holds the elements each row was laid out for. Returns -1, or the position in
// `parameters` of the first pair that is not fit to be stepped; nothing is launched.
int64_t optimizer_table(
    std::vector<Tensor> parameters,
    std::vector<Tensor> gradients,
    Tensor slots,
    Tensor counts,
    ScalarType dtype,
    int64_t device,
    Tensor table) {
    const int64_t pairs = static_cast<int64_t>(parameters.size());
    const int64_t tensors = counts.numel();
    STD_TORCH_CHECK(
        static_cast<int64_t>(gradients.size()) == pairs && slots.numel() == pairs &&
            table.numel() >= kPointerNumbers * tensors,
        "parameters, gradients, slots and table must agree");
    STD_TORCH_CHECK(
        slots.is_cpu() && counts.is_cpu() && table.is_cpu() && table.is_contiguous() &&
            slots.scalar_type() == ScalarType::Long && counts.scalar_type() == ScalarType::Long &&
            table.scalar_type() == ScalarType::Long,
        "slots, counts and table must be int64 CPU tensors");
    const auto* slot = static_cast<const int64_t*>(slots.const_data_ptr());
    const auto* count = static_cast<const int64_t*>(counts.const_data_ptr());
    auto* rows = static_cast<TensorPointers*>(table.mutable_data_ptr());
    std::fill(rows, rows + tensors, TensorPointers{});
    for (int64_t i = 0; i < pairs; i++) {
        const Tensor &p = parameters[i], &g = gradients[i];
        STD_TORCH_CHECK(slot[i] >= 0 && slot[i] < tensors, "slot out of range");
        const bool fit = p.is_cuda() && p.get_device_index() == device && p.is_contiguous() &&
                         p.scalar_type() == dtype && p.numel() == count[slot[i]] && g.is_cuda() &&
                         g.get_device_index() == device && g.is_contiguous() &&
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
    STD_TORCH_CHECK(
        table.is_cpu() && table.is_contiguous() && table.scalar_type() == ScalarType::Long &&
            table.numel() == kGradientNumbers * tensors,
        "table must be an int64 CPU tensor [", tensors, ", ", kGradientNumbers, "]");
    auto* rows = static_cast<GradientRow*>(table.mutable_data_ptr());
    int64_t chunks = 0;
    for (const Tensor& g : gradients) {
        STD_TORCH_CHECK(g.is_cuda() && g.is_contiguous(), "gradients must be contiguous on a GPU");
        *rows++ = {
            const_cast<void*>(g.const_data_ptr()), g.numel(), chunks,
            static_cast<int64_t>(to_dtype(g.scalar_type(), "gradients"))};
        chunks += ceil_div(g.numel(), kStepChunk);
    }
    return chunks;
}

// ---- steps --------------------------------------------------------------------------------------

template <typename Row>
const Row* rows_of(const Call& call, const Tensor& tensor, int64_t count, const char* argument) {
    const int64_t numbers = count * static_cast<int64_t>(sizeof(Row) / sizeof(int64_t));
    return reinterpret_cast<const Row*>(
        call.data<int64_t>(tensor, ScalarType::Long, numbers, argument));
}

void optimizer_advance(
    Tensor rows,
    Tensor pointers,
    Tensor groups,
    OptionalTensor found_inf,
    int64_t algorithm,
    Tensor steps,
    Tensor numbers) {
    const Call call(rows);
    AdvanceArgs a{};
    a.tensors = rows.numel() / kRowNumbers;
    a.rows = rows_of<TensorRow>(call, rows, a.tensors, "rows");
    a.pointers = rows_of<TensorPointers>(call, pointers, a.tensors, "pointers");
    call.check_here(groups, "groups");
    STD_TORCH_CHECK(
        groups.scalar_type() == ScalarType::Long && groups.numel() % kGroupNumbers == 0,
        "groups must hold the bits of ", kGroupNumbers, " doubles per group");
    a.groups = static_cast<const GroupNumbers*>(groups.const_data_ptr());
    a.found_inf = optional_scalar(call, found_inf, "found_inf");
    a.algorithm = to_algorithm(algorithm);
    call.data<float>(steps, ScalarType::Float, a.tensors, "steps");
    call.data<float>(numbers, ScalarType::Float, a.tensors * kStepNumbers, "numbers");
    a.steps = static_cast<float*>(steps.mutable_data_ptr());
    a.numbers = static_cast<StepNumbers*>(numbers.mutable_data_ptr());
    check_launch(launch_optimizer_advance(a, call.stream()), "optimizer_advance");
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
    const Call call(rows);
    StepArgs a{};
    a.algorithm = to_algorithm(algorithm);
    const int64_t states = a.algorithm == Algorithm::kAdamW ? 2 : 1;
    a.tensors = rows.numel() / kRowNumbers;
    a.rows = rows_of<TensorRow>(call, rows, a.tensors, "rows");
    a.pointers = rows_of<TensorPointers>(call, pointers, a.tensors, "pointers");
    a.numbers = reinterpret_cast<const StepNumbers*>(
        call.data<float>(numbers, ScalarType::Float, a.tensors * kStepNumbers, "numbers"));
    a.chunks = chunks;
    const ScalarType stored = scales.has_value() ? ScalarType::Byte : ScalarType::Float;
    a.elements = values.numel() / states;
    STD_TORCH_CHECK(
        a.elements % kStateBlock == 0, "values must be [", states, ", a multiple of ", kStateBlock,
        "]");
    call.data<uint8_t>(values, stored, states * a.elements, "values");
    a.values = values.mutable_data_ptr();
    if (scales.has_value()) {
        const int64_t blocks = states * a.elements / kStateBlock;
        call.data<float>(*scales, ScalarType::Float, blocks, "scales");
        a.scales = static_cast<float*>(scales->mutable_data_ptr());
        a.tables = call.data<float>(tables, ScalarType::Float, states * 2 * 256, "tables");
    }
    a.found_inf = optional_scalar(call, found_inf, "found_inf");
    a.grad_scale = optional_scalar(call, grad_scale, "grad_scale");
    a.dtype = to_dtype(dtype, "dtype");
    a.stochastic = stochastic && a.dtype == Dtype::kBFloat16;
    a.seed = static_cast<uint64_t>(seed);
    check_launch(launch_optimizer_step(a, call.stream()), "optimizer_step");
}

std::tuple<Tensor, Tensor> gradient_norm(Tensor table, int64_t chunks) {
    const Call call(table);
    const int64_t tensors = table.numel() / kGradientNumbers;
    const auto* rows = rows_of<GradientRow>(call, table, tensors, "table");
    Tensor partial_sums = new_tensor(table, {chunks}, ScalarType::Double);
    Tensor norm = new_tensor(table, {}, ScalarType::Float);
    Tensor found_inf = new_tensor(table, {}, ScalarType::Float);
    check_launch(
        launch_gradient_norm(
            rows, tensors, chunks, static_cast<double*>(partial_sums.mutable_data_ptr()),
            static_cast<float*>(norm.mutable_data_ptr()),
            static_cast<float*>(found_inf.mutable_data_ptr()), call.stream()),
        "gradient_norm");
    return {norm, found_inf};
}

void clip_gradients(Tensor table, int64_t chunks, Tensor norm, double max_norm) {
    const Call call(table);
    const int64_t tensors = table.numel() / kGradientNumbers;
    const auto* rows = rows_of<GradientRow>(call, table, tensors, "table");
    check_launch(
        launch_clip_gradients(
            rows, tensors, chunks, call.data<float>(norm, ScalarType::Float, 1, "norm"),
            static_cast<float>(max_norm), call.stream()),
        "clip_gradients");
}

}  // namespace
}  // namespace lowbit::cuda

// clang-format off
STABLE_TORCH_LIBRARY_FRAGMENT(lowbit_cuda, m) {
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

// The tables are made on the host, from lists of GPU tensors; an empty list has no device.
STABLE_TORCH_LIBRARY_IMPL(lowbit_cuda, CompositeExplicitAutograd, m) {
    m.impl("optimizer_table", TORCH_BOX(&lowbit::cuda::optimizer_table));
    m.impl("gradient_table", TORCH_BOX(&lowbit::cuda::gradient_table));
}

STABLE_TORCH_LIBRARY_IMPL(lowbit_cuda, CUDA, m) {
    m.impl("optimizer_advance", TORCH_BOX(&lowbit::cuda::optimizer_advance));
    m.impl("optimizer_step", TORCH_BOX(&lowbit::cuda::optimizer_step));
    m.impl("gradient_norm", TORCH_BOX(&lowbit::cuda::gradient_norm));
    m.impl("clip_gradients", TORCH_BOX(&lowbit::cuda::clip_gradients));
}
