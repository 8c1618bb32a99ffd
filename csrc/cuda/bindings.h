// What the operators' bindings share: checks, the current stream, and the weight arguments.
//
// The Python layer has already raised readable errors for what users can get wrong; the checks here
// keep a direct call from reading out of bounds. Every operator runs on the current stream of its
// tensors' device.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <initializer_list>

#include "device.h"
#include "tensors.h"
#include "weight.h"

namespace lowbit::cuda {

inline int checked_log2(int64_t value, int64_t low, int64_t high, const char* argument) {
    STD_TORCH_CHECK(
        value >= low && value <= high && (value & (value - 1)) == 0, argument,
        " must be a power of two from ", low, " to ", high, ", got ", value);
    return __builtin_ctzll(static_cast<uint64_t>(value));
}

// All tensors of a call live on one CUDA device.
class Call {
public:
    explicit Call(const Tensor& tensor) : device_(tensor.get_device_index()), guard_(device_) {
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream_));
    }

    cudaStream_t stream() const {
        return static_cast<cudaStream_t>(stream_);
    }

    void check_here(const Tensor& tensor, const char* argument) const {
        STD_TORCH_CHECK(
            tensor.is_cuda() && tensor.get_device_index() == device_, argument,
            " must be on cuda:", device_);
        STD_TORCH_CHECK(tensor.is_contiguous(), argument, " must be contiguous");
    }

    template <typename T>
    const T*
    data(const Tensor& tensor, ScalarType type, int64_t numel, const char* argument) const {
        check_here(tensor, argument);
        return typed_data<T>(tensor, type, numel, argument);
    }

private:
    int32_t device_;
    torch::stable::accelerator::DeviceGuard guard_;
    void* stream_ = nullptr;
};

inline void check_launch(cudaError_t error, const char* operation) {
    if (error != cudaSuccess)
        cudaGetLastError();  // it is reported here
    STD_TORCH_CHECK(error == cudaSuccess, "lowbit ", operation, ": ", cudaGetErrorString(error));
}

// Uninitialized and contiguous, on the device of `like`. By the plain C function: torch::stable's
// new_empty goes through the dispatcher with boxed arguments, which costs a small product several
// microseconds.
inline Tensor
new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
    int64_t strides[4];
    STD_TORCH_CHECK(sizes.size() <= 4, "new_tensor: too many dimensions");
    int64_t stride = 1;
    for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes.begin()[i], 1))
        strides[i] = stride;
    const auto type_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
    AtenTensorHandle tensor = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        sizes.size(), sizes.begin(), strides, type_code, aoti_torch_device_type_cuda(),
        like.get_device_index(), &tensor));
    return Tensor(tensor);
}

// A matrix or vector argument of a product: its pointer, or null when absent.
inline const void* checked_data(
    const Call& call,
    const OptionalTensor& tensor,
    ScalarType type,
    int64_t rows,
    int64_t columns,
    const char* argument) {
    if (!tensor.has_value())
        return nullptr;
    call.check_here(*tensor, argument);
    STD_TORCH_CHECK(
        tensor->scalar_type() == type, argument, " must be ", torch::headeronly::toString(type),
        ", got ", torch::headeronly::toString(tensor->scalar_type()));
    STD_TORCH_CHECK(
        tensor->numel() == rows * columns && tensor->size(0) == rows, argument, " must have ", rows,
        " rows and ", rows * columns, " elements, got ", tensor->size(0), " and ", tensor->numel());
    const void* data = tensor->const_data_ptr();
    STD_TORCH_CHECK(data != nullptr || tensor->numel() == 0, argument, " has no memory");
    STD_TORCH_CHECK(is_aligned(data), argument, " must be 16-byte aligned");
    return data;
}

// A view may start anywhere; the kernels' wide loads cannot.
inline void align(Tensor& tensor) {
    if (!is_aligned(tensor.const_data_ptr()))
        tensor = torch::stable::clone(tensor);
}

inline void align(OptionalTensor& tensor) {
    if (tensor.has_value())
        align(*tensor);
}

// The weight arguments of an operator without their tensors, as kernels want them. Every field
// takes 8 bytes: lowbit/backends/cuda_direct.py packs them in this order.
struct WeightArguments {
    const uint8_t* qweight;
    const void* absmax;  // fp32, or uint8 if there is a nested_codebook
    const float *codebook, *nested_absmax, *nested_codebook, *nested_offset;
    int64_t N, K, blocksize, nested_blocksize, row_blocks;

    WeightView view() const {
        WeightView w{};
        w.qweight = qweight;
        w.codebook = codebook;
        w.N = N, w.K = K;
        w.flat = row_blocks == 0 || K % blocksize == 0;
        w.blocksize_log2 = __builtin_ctzll(static_cast<uint64_t>(blocksize));
        if (nested_codebook == nullptr) {
            w.absmax = static_cast<const float*>(absmax);
            return w;
        }
        w.absmax_8bit = static_cast<const uint8_t*>(absmax);
        w.nested_absmax = nested_absmax;
        w.nested_codebook = nested_codebook;
        w.nested_offset = nested_offset;
        w.nested_blocksize_log2 = __builtin_ctzll(static_cast<uint64_t>(nested_blocksize));
        return w;
    }
};

// The same from tensors, which are checked.
inline WeightView make_weight_view(const Call& call, LOWBIT_WEIGHT_PARAMETERS) {
    STD_TORCH_CHECK(N >= 0 && K >= 0, "N and K must be non-negative, got ", N, " and ", K);
    STD_TORCH_CHECK(
        absmax.has_value() && codebook.has_value(),
        "absmax and codebook are required: weight is not dense");
    checked_log2(blocksize, 32, 4096, "blocksize");
    WeightArguments a{};
    a.N = N, a.K = K;
    a.blocksize = blocksize, a.nested_blocksize = nested_blocksize, a.row_blocks = row_blocks;
    const int64_t bytes = row_blocks ? N * ceil_div(K, 2) : ceil_div(N * K, 2);
    const int64_t blocks = row_blocks ? N * ceil_div(K, blocksize) : ceil_div(N * K, blocksize);
    const auto floats = [&](const Tensor& tensor, int64_t count, const char* argument) {
        return call.data<float>(tensor, ScalarType::Float, count, argument);
    };
    a.qweight = call.data<uint8_t>(qweight, ScalarType::Byte, bytes, "qweight");
    a.codebook = floats(*codebook, 16, "codebook");
    if (absmax->scalar_type() == ScalarType::Float) {
        a.absmax = floats(*absmax, blocks, "absmax");
        return a.view();
    }
    STD_TORCH_CHECK(
        nested_absmax.has_value() && nested_codebook.has_value() && nested_offset.has_value(),
        "8-bit absmax needs nested_absmax, nested_codebook and nested_offset");
    checked_log2(nested_blocksize, 1, int64_t{1} << 30, "nested_blocksize");
    a.absmax = call.data<uint8_t>(*absmax, ScalarType::Byte, blocks, "absmax");
    a.nested_absmax = floats(*nested_absmax, ceil_div(blocks, nested_blocksize), "nested_absmax");
    a.nested_codebook = floats(*nested_codebook, 256, "nested_codebook");
    a.nested_offset = floats(*nested_offset, 1, "nested_offset");
    return a.view();
}

}  // namespace lowbit::cuda
