// What the optimizers' bindings of both libraries share: schemas, and the tables of addresses,
// which are made on the host from lists of tensors.
#pragma once

#include <algorithm>
#include <tuple>

#include "optimizer_tables.h"
#include "tensors.h"

namespace lowbit {

constexpr int64_t kRowNumbers = sizeof(TensorRow) / sizeof(int64_t);
constexpr int64_t kPointerNumbers = sizeof(TensorPointers) / sizeof(int64_t);
constexpr int64_t kGradientNumbers = sizeof(GradientRow) / sizeof(int64_t);

inline Algorithm to_algorithm(int64_t value) {
    STD_TORCH_CHECK(value == 0 || value == 1, "algorithm must be 0 or 1, got ", value);
    return static_cast<Algorithm>(value);
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
    if (a.dim() != b.dim())
        return false;
    for (int64_t i = 0; i < a.dim(); i++) {
        if (a.size(i) != b.size(i))
            return false;
    }
    return true;
}

// False for a tensor whose storage was freed under it (resized to nothing). Its address does not
// tell: that of a view is then its offset.
inline bool has_memory(const Tensor& t) {
    int64_t storage_bytes = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &storage_bytes));
    return t.numel() == 0 || storage_bytes > 0;
}

// Writes (parameter, gradient) addresses to table [tensors, 2]; rows whose slot is not listed stay
// 0. counts [tensors] holds the elements each row was laid out for. Returns -1, or the position in
// `parameters` of the first pair that is not fit to be stepped. is_here tells whether a tensor lies
// where the step runs.
template <typename IsHere>
int64_t write_step_table(
    const std::vector<Tensor>& parameters,
    const std::vector<Tensor>& gradients,
    const Tensor& slots,
    const Tensor& counts,
    ScalarType dtype,
    Tensor& table,
    IsHere is_here) {
    const int64_t pairs = static_cast<int64_t>(parameters.size());
    const int64_t tensors = counts.numel();
    const auto* slot = checked_data<int64_t>(slots, ScalarType::Long, pairs, "slots");
    const auto* count = checked_data<int64_t>(counts, ScalarType::Long, tensors, "counts");
    checked_data<int64_t>(table, ScalarType::Long, table.numel(), "table");
    STD_TORCH_CHECK(
        static_cast<int64_t>(gradients.size()) == pairs &&
            table.numel() >= kPointerNumbers * tensors,
        "parameters, gradients and table must agree");
    const auto fit = [&](const Tensor& t) {
        return is_here(t) && t.is_contiguous() && t.scalar_type() == dtype && has_memory(t);
    };
    auto* rows = static_cast<TensorPointers*>(table.mutable_data_ptr());
    std::fill(rows, rows + tensors, TensorPointers{});
    for (int64_t i = 0; i < pairs; i++) {
        const Tensor &p = parameters[i], &g = gradients[i];
        STD_TORCH_CHECK(slot[i] >= 0 && slot[i] < tensors, "slot out of range");
        if (!fit(p) || !fit(g) || p.numel() != count[slot[i]] || !same_shape(p, g))
            return i;
        // The address of an empty tensor is null, which would mean no gradient; it is never read.
        const void* gradient = g.numel() > 0 ? g.const_data_ptr() : rows;
        rows[slot[i]] = {const_cast<void*>(p.const_data_ptr()), gradient};
    }
    return -1;
}

// Writes GradientRows to table and returns the number of chunks.
template <typename IsHere>
int64_t write_gradient_table(const std::vector<Tensor>& gradients, Tensor& table, IsHere is_here) {
    const int64_t tensors = static_cast<int64_t>(gradients.size());
    checked_data<int64_t>(table, ScalarType::Long, kGradientNumbers * tensors, "table");
    auto* rows = static_cast<GradientRow*>(table.mutable_data_ptr());
    int64_t chunks = 0;
    for (const Tensor& g : gradients) {
        STD_TORCH_CHECK(is_here(g), "gradients must lie on the device of the step");
        STD_TORCH_CHECK(g.is_contiguous(), "gradients must be contiguous");
        STD_TORCH_CHECK(has_memory(g), "the memory of a gradient was freed");
        *rows++ = {
            const_cast<void*>(g.const_data_ptr()), g.numel(), chunks,
            static_cast<int64_t>(to_dtype(g.scalar_type(), "gradients"))};
        chunks += ceil_div(g.numel(), kStepChunk);
    }
    return chunks;
}

// clang-format off
template <typename Library>
void define_optimizer_operators(Library& m) {
    m.def("optimizer_table(Tensor[] parameters, Tensor[] gradients, Tensor slots, Tensor counts, ScalarType dtype, "
          "int device, Tensor(a!) table) -> int");
    m.def("optimizer_advance(Tensor rows, Tensor pointers, Tensor groups, Tensor? found_inf, int algorithm, "
          "Tensor(a!) steps, Tensor(b!) numbers) -> ()");
    m.def("optimizer_step(Tensor rows, Tensor pointers, Tensor numbers, int chunks, Tensor(a!) values, "
          "Tensor(b!)? scales, Tensor tables, Tensor? found_inf, Tensor? grad_scale, int algorithm, "
          "ScalarType dtype, bool stochastic, int seed, bool follows_step) -> ()");
    m.def("gradient_table(Tensor[] gradients, Tensor(a!) table) -> int");
    m.def("gradient_norm(Tensor table, int chunks) -> (Tensor, Tensor)");
    m.def("clip_gradients(Tensor table, int chunks, Tensor norm, float max_norm) -> ()");
}
// clang-format on

}  // namespace lowbit
