// Tensors to kernel structs, with the checks of the operator contract. Only registration files
// include this (it needs torch).
//
// The Python layer has already raised readable errors for what users can get wrong; these checks
// keep a direct call of the operator from reading out of bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "common.h"

namespace lowbit::cpu {

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

inline Dtype dtype_of(const Tensor& tensor, const char* argument) {
    return to_dtype(tensor.scalar_type(), argument);
}

inline void check_cpu_contiguous(const Tensor& tensor, const char* argument) {
    STD_TORCH_CHECK(tensor.is_cpu(), argument, " must be a CPU tensor");
    STD_TORCH_CHECK(tensor.is_contiguous(), argument, " must be contiguous");
}

// Data of a contiguous CPU tensor of the given type with exactly `numel` elements.
template <typename T>
const T* checked_data(const Tensor& tensor, ScalarType type, int64_t numel, const char* argument) {
    check_cpu_contiguous(tensor, argument);
    STD_TORCH_CHECK(
        tensor.scalar_type() == type, argument, " must be ", torch::headeronly::toString(type),
        ", got ", torch::headeronly::toString(tensor.scalar_type()));
    STD_TORCH_CHECK(
        tensor.numel() == numel, argument, " must have ", numel, " elements, got ", tensor.numel());
    return static_cast<const T*>(tensor.const_data_ptr());
}

inline int checked_log2(int64_t value, const char* argument) {
    STD_TORCH_CHECK(
        value > 0 && (value & (value - 1)) == 0, argument, " must be a power of two, got ", value);
    return __builtin_ctzll(static_cast<uint64_t>(value));
}

inline Tensor new_cpu_tensor(std::vector<int64_t> sizes, ScalarType type) {
    return torch::stable::empty(
        torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), type, std::nullopt,
        torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

// The 11 weight arguments, in the order every operator has them. The view borrows the tensors'
// memory.
inline WeightView make_weight_view(
    const Tensor& qweight,
    const OptionalTensor& absmax,
    const OptionalTensor& codebook,
    const OptionalTensor& nested_absmax,
    const OptionalTensor& nested_codebook,
    const OptionalTensor& nested_offset,
    int64_t N,
    int64_t K,
    int64_t blocksize,
    int64_t nested_blocksize,
    bool row_blocks) {
    STD_TORCH_CHECK(N >= 0 && K >= 0, "N and K must be non-negative, got ", N, " and ", K);
    WeightView w{};
    w.N = N;
    w.K = K;
    if (!codebook.has_value()) {
        check_cpu_contiguous(qweight, "weight");
        w.dense_dtype = dtype_of(qweight, "weight");
        STD_TORCH_CHECK(
            qweight.numel() == N * K, "weight must have N * K = ", N * K, " elements, got ",
            qweight.numel());
        w.dense = qweight.const_data_ptr();
        return w;
    }
    w.blocksize = blocksize;
    w.blocksize_log2 = checked_log2(blocksize, "blocksize");
    // Kernels take scales per whole byte and per vector of 32 elements.
    STD_TORCH_CHECK(blocksize >= 32, "blocksize must be at least 32, got ", blocksize);
    w.row_blocks = row_blocks;
    w.row_bytes = row_blocks ? ceil_div(K, 2) : 0;
    w.blocks_per_row = row_blocks ? ceil_div(K, blocksize) : 0;
    const int64_t bytes = row_blocks ? N * w.row_bytes : ceil_div(N * K, 2);
    w.qweight = checked_data<uint8_t>(qweight, ScalarType::Byte, bytes, "qweight");
    w.codebook = checked_data<float>(*codebook, ScalarType::Float, 16, "codebook");
    STD_TORCH_CHECK(absmax.has_value(), "absmax is required with a codebook");
    const int64_t blocks = w.num_blocks();
    if (absmax->scalar_type() == ScalarType::Float) {
        w.absmax = checked_data<float>(*absmax, ScalarType::Float, blocks, "absmax");
        return w;
    }
    w.absmax_8bit = checked_data<uint8_t>(*absmax, ScalarType::Byte, blocks, "absmax");
    w.nested_blocksize = nested_blocksize;
    w.nested_blocksize_log2 = checked_log2(nested_blocksize, "nested_blocksize");
    STD_TORCH_CHECK(
        nested_absmax.has_value() && nested_codebook.has_value() && nested_offset.has_value(),
        "8-bit absmax needs nested_absmax, nested_codebook and nested_offset");
    w.nested_absmax = checked_data<float>(
        *nested_absmax, ScalarType::Float, ceil_div(blocks, nested_blocksize), "nested_absmax");
    w.nested_codebook =
        checked_data<float>(*nested_codebook, ScalarType::Float, 256, "nested_codebook");
    w.nested_offset = *checked_data<float>(*nested_offset, ScalarType::Float, 1, "nested_offset");
    return w;
}

}  // namespace lowbit::cpu
