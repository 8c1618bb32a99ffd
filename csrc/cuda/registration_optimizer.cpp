// The operators of the optimizers. lowbit/optim packs state into slabs and lays out the tables that
// these take; csrc/cpu/registration_optimizer.cpp has the same operators for the CPU.

#include "bindings.h"
#include "optimizer.h"
#include "optimizer_bindings.h"

namespace lowbit::cuda {
namespace {

const float* optional_scalar(const Call& call, const OptionalTensor& tensor, const char* argument) {
    return tensor.has_value() ? call.data<float>(*tensor, ScalarType::Float, 1, argument) : nullptr;
}

// `device` is the index of the GPU.
int64_t optimizer_table(
    std::vector<Tensor> parameters,
    std::vector<Tensor> gradients,
    Tensor slots,
    Tensor counts,
    ScalarType dtype,
    int64_t device,
    Tensor table) {
    const auto is_here = [device](const Tensor& t) {
        return t.is_cuda() && t.get_device_index() == device;
    };
    return write_step_table(parameters, gradients, slots, counts, dtype, table, is_here);
}

int64_t gradient_table(std::vector<Tensor> gradients, Tensor table) {
    const auto is_here = [](const Tensor& t) { return t.is_cuda(); };
    return write_gradient_table(gradients, table, is_here);
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
    int64_t seed,
    bool follows_step) {
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
    a.follows_step = follows_step;
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

STABLE_TORCH_LIBRARY_FRAGMENT(lowbit_cuda, m) {
    lowbit::define_optimizer_operators(m);
}

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
