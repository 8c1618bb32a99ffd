// Tensors to kernel structs, with the checks of the operator contract (tensors.h says why). Only
// registration files include this (it needs torch).
#pragma once

#include "common.h"
#include "memory.h"
#include "tensors.h"

namespace lowbit::cpu {

inline Dtype dtype_of(const Tensor& tensor, const char* argument) {
    return to_dtype(tensor.scalar_type(), argument);
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

// For the large results; the kernels write all of it.
inline Tensor new_result(std::vector<int64_t> sizes, ScalarType type) {
    Tensor result = new_cpu_tensor(std::move(sizes), type);
    prefer_huge_pages(result.mutable_data_ptr(), result.numel() * result.element_size());
    return result;
}

// The view borrows the tensors' memory.
inline WeightView make_weight_view(LOWBIT_WEIGHT_PARAMETERS) {
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
