// What the bindings of both libraries share: names for torch's types, checks of host tensors, and
// the weight arguments of an operator. Only binding files include this (it needs torch).
//
// The Python layer has already raised readable errors for what users can get wrong; these checks
// keep a direct call of an operator from reading out of bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "dtype.h"

// The 11 weight arguments, in the order every operator has them: in a schema, as parameters, and
// passed on.
// clang-format off
#define LOWBIT_WEIGHT \
    "Tensor qweight, Tensor? absmax, Tensor? codebook, Tensor? nested_absmax, Tensor? nested_codebook, " \
    "Tensor? nested_offset, int N, int K, int blocksize, int nested_blocksize, bool row_blocks"
#define LOWBIT_WEIGHT_PARAMETERS \
    const Tensor& qweight, const OptionalTensor& absmax, const OptionalTensor& codebook, \
    const OptionalTensor& nested_absmax, const OptionalTensor& nested_codebook, \
    const OptionalTensor& nested_offset, int64_t N, int64_t K, int64_t blocksize, \
    int64_t nested_blocksize, bool row_blocks
#define LOWBIT_WEIGHT_ARGUMENTS \
    qweight, absmax, codebook, nested_absmax, nested_codebook, nested_offset, N, K, blocksize, \
    nested_blocksize, row_blocks
// clang-format on

namespace lowbit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype to_dtype(ScalarType type, const char* argument) {
    switch (type) {
    case ScalarType::Float:
        return Dtype::kFloat32;
    case ScalarType::BFloat16:
        return Dtype::kBFloat16;
    case ScalarType::Half:
        return Dtype::kFloat16;
    default:
        STD_TORCH_CHECK(
            false, argument, " must be float32, bfloat16 or float16, got ",
            torch::headeronly::toString(type));
    }
}

inline void check_cpu_contiguous(const Tensor& tensor, const char* argument) {
    STD_TORCH_CHECK(tensor.is_cpu(), argument, " must be a CPU tensor");
    STD_TORCH_CHECK(tensor.is_contiguous(), argument, " must be contiguous");
    STD_TORCH_CHECK(
        tensor.numel() == 0 || tensor.const_data_ptr() != nullptr, argument,
        " has no memory: its storage was freed");
}

// Data of a contiguous tensor of the given type with exactly `numel` elements, wherever it lies.
template <typename T>
const T* typed_data(const Tensor& tensor, ScalarType type, int64_t numel, const char* argument) {
    STD_TORCH_CHECK(
        tensor.scalar_type() == type, argument, " must be ", torch::headeronly::toString(type),
        ", got ", torch::headeronly::toString(tensor.scalar_type()));
    STD_TORCH_CHECK(
        tensor.numel() == numel, argument, " must have ", numel, " elements, got ", tensor.numel());
    return static_cast<const T*>(tensor.const_data_ptr());
}

// The same of a tensor on the host.
template <typename T>
const T* checked_data(const Tensor& tensor, ScalarType type, int64_t numel, const char* argument) {
    check_cpu_contiguous(tensor, argument);
    return typed_data<T>(tensor, type, numel, argument);
}

}  // namespace lowbit
