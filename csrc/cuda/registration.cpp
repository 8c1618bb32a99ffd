// The compiled operators of the CUDA backend: 4-bit quantization and dequantization. Schemas equal
// the ones in lowbit/ops.py; the products are compositions in lowbit/backends/cuda.py.
//
// The Python layer has already raised readable errors for what users can get wrong; the checks here
// keep a direct call from reading out of bounds. Every operator runs on the current stream of its
// tensors' device.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "nf4_dequantize.h"
#include "nf4_quantize.h"

namespace lowbit::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

Dtype to_dtype(ScalarType type, const char* argument) {
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

int checked_log2(int64_t value, int64_t low, int64_t high, const char* argument) {
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
        STD_TORCH_CHECK(
            tensor.scalar_type() == type, argument, " must be ", torch::headeronly::toString(type),
            ", got ", torch::headeronly::toString(tensor.scalar_type()));
        STD_TORCH_CHECK(
            tensor.numel() == numel, argument, " must have ", numel, " elements, got ",
            tensor.numel());
        return static_cast<const T*>(tensor.const_data_ptr());
    }

private:
    int32_t device_;
    torch::stable::accelerator::DeviceGuard guard_;
    void* stream_ = nullptr;
};

void check_launch(cudaError_t error, const char* operation) {
    STD_TORCH_CHECK(error == cudaSuccess, "lowbit ", operation, ": ", cudaGetErrorString(error));
}

Tensor new_tensor(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
    return torch::stable::new_empty(
        like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), type);
}

// ---- quantize -----------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_4bit(
    Tensor weight,
    Tensor thresholds,
    Tensor order,
    OptionalTensor nested_codebook,
    int64_t blocksize,
    int64_t nested_blocksize,
    bool row_blocks) {
    const Call call(weight);
    call.check_here(weight, "weight");
    STD_TORCH_CHECK(weight.dim() == 2, "weight must be [N, K], got ", weight.dim(), " dimensions");
    const int64_t N = weight.size(0), K = weight.size(1);
    QuantizeArgs a{};
    a.weight = weight.const_data_ptr();
    a.dtype = to_dtype(weight.scalar_type(), "weight");
    a.rows = row_blocks ? N : 1;
    a.columns = row_blocks ? K : N * K;
    a.blocksize_log2 = checked_log2(blocksize, 32, 4096, "blocksize");
    a.thresholds = call.data<float>(thresholds, ScalarType::Float, 15, "thresholds");
    a.order = call.data<uint8_t>(order, ScalarType::Byte, 16, "order");
    const int64_t row_bytes = ceil_div(a.columns, 2);
    const int64_t blocks = a.rows * ceil_div(a.columns, blocksize);
    Tensor qweight = row_blocks ? new_tensor(weight, {N, row_bytes}, ScalarType::Byte)
                                : new_tensor(weight, {row_bytes}, ScalarType::Byte);
    Tensor absmax = new_tensor(weight, {blocks}, ScalarType::Float);
    a.qweight = static_cast<uint8_t*>(qweight.mutable_data_ptr());
    a.absmax = static_cast<float*>(absmax.mutable_data_ptr());
    if (!nested_codebook.has_value()) {
        check_launch(launch_quantize_4bit(a, call.stream()), "quantize_4bit");
        return {
            qweight, absmax, new_tensor(weight, {0}, ScalarType::Float),
            new_tensor(weight, {0}, ScalarType::Float)};
    }
    a.nested_blocksize_log2 = checked_log2(nested_blocksize, 32, 4096, "nested_blocksize");
    a.nested_codebook =
        call.data<float>(*nested_codebook, ScalarType::Float, 256, "nested_codebook");
    Tensor absmax_8bit = new_tensor(weight, {blocks}, ScalarType::Byte);
    Tensor nested_absmax =
        new_tensor(weight, {ceil_div(blocks, nested_blocksize)}, ScalarType::Float);
    Tensor nested_offset = new_tensor(weight, {}, ScalarType::Float);
    if (blocks == 0)
        torch::stable::zero_(nested_offset);
    // Freed on return: the allocator hands it (and the fp32 absmax) out again on this stream only.
    Tensor partial_sums = new_tensor(weight, {kMaxPartialSums}, ScalarType::Double);
    a.absmax_8bit = static_cast<uint8_t*>(absmax_8bit.mutable_data_ptr());
    a.nested_absmax = static_cast<float*>(nested_absmax.mutable_data_ptr());
    a.nested_offset = static_cast<float*>(nested_offset.mutable_data_ptr());
    a.partial_sums = static_cast<double*>(partial_sums.mutable_data_ptr());
    check_launch(launch_quantize_4bit(a, call.stream()), "quantize_4bit");
    return {qweight, absmax_8bit, nested_absmax, nested_offset};
}

// ---- dequantize ---------------------------------------------------------------------------------

// The weight arguments, in the order every operator has them.
WeightView make_weight_view(
    const Call& call,
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
    STD_TORCH_CHECK(
        absmax.has_value() && codebook.has_value(),
        "absmax and codebook are required: weight is not dense");
    WeightView w{};
    w.N = N;
    w.K = K;
    w.blocksize_log2 = checked_log2(blocksize, 32, 4096, "blocksize");
    w.flat = !row_blocks || K % blocksize == 0;
    const int64_t bytes = row_blocks ? N * ceil_div(K, 2) : ceil_div(N * K, 2);
    const int64_t blocks = row_blocks ? N * ceil_div(K, blocksize) : ceil_div(N * K, blocksize);
    w.qweight = call.data<uint8_t>(qweight, ScalarType::Byte, bytes, "qweight");
    w.codebook = call.data<float>(*codebook, ScalarType::Float, 16, "codebook");
    if (absmax->scalar_type() == ScalarType::Float) {
        w.absmax = call.data<float>(*absmax, ScalarType::Float, blocks, "absmax");
        return w;
    }
    STD_TORCH_CHECK(
        nested_absmax.has_value() && nested_codebook.has_value() && nested_offset.has_value(),
        "8-bit absmax needs nested_absmax, nested_codebook and nested_offset");
    w.nested_blocksize_log2 =
        checked_log2(nested_blocksize, 1, int64_t{1} << 30, "nested_blocksize");
    const int64_t nested_blocks = ceil_div(blocks, nested_blocksize);
    w.absmax_8bit = call.data<uint8_t>(*absmax, ScalarType::Byte, blocks, "absmax");
    w.nested_absmax =
        call.data<float>(*nested_absmax, ScalarType::Float, nested_blocks, "nested_absmax");
    w.nested_codebook =
        call.data<float>(*nested_codebook, ScalarType::Float, 256, "nested_codebook");
    w.nested_offset = call.data<float>(*nested_offset, ScalarType::Float, 1, "nested_offset");
    return w;
}

Tensor dequantize_4bit(
    Tensor qweight,
    OptionalTensor absmax,
    OptionalTensor codebook,
    OptionalTensor nested_absmax,
    OptionalTensor nested_codebook,
    OptionalTensor nested_offset,
    int64_t N,
    int64_t K,
    int64_t blocksize,
    int64_t nested_blocksize,
    bool row_blocks,
    ScalarType dtype) {
    const Call call(qweight);
    const WeightView w = make_weight_view(
        call, qweight, absmax, codebook, nested_absmax, nested_codebook, nested_offset, N, K,
        blocksize, nested_blocksize, row_blocks);
    Tensor out = new_tensor(qweight, {N, K}, dtype);
    check_launch(
        launch_dequantize_4bit(
            w, {0, N, 0, K}, to_dtype(dtype, "dtype"), out.mutable_data_ptr(), call.stream()),
        "dequantize_4bit");
    return out;
}

// The window of the weight whose upper left corner is (row0, column0) and whose size is that of
// out.
void dequantize_4bit_out(
    Tensor qweight,
    OptionalTensor absmax,
    OptionalTensor codebook,
    OptionalTensor nested_absmax,
    OptionalTensor nested_codebook,
    OptionalTensor nested_offset,
    int64_t N,
    int64_t K,
    int64_t blocksize,
    int64_t nested_blocksize,
    bool row_blocks,
    int64_t row0,
    Tensor out,
    int64_t column0) {
    const Call call(qweight);
    const WeightView w = make_weight_view(
        call, qweight, absmax, codebook, nested_absmax, nested_codebook, nested_offset, N, K,
        blocksize, nested_blocksize, row_blocks);
    call.check_here(out, "out");
    STD_TORCH_CHECK(out.dim() == 2, "out must be [rows, columns], got ", out.dim(), " dimensions");
    const DequantizeWindow window{row0, out.size(0), column0, out.size(1)};
    STD_TORCH_CHECK(
        row0 >= 0 && row0 + window.rows <= N && column0 >= 0 && column0 + window.columns <= K,
        "the window must lie within [", N, ", ", K, "], got rows ", row0, " to ",
        row0 + window.rows, " and columns ", column0, " to ", column0 + window.columns);
    const Dtype dtype = to_dtype(out.scalar_type(), "out");
    check_launch(
        launch_dequantize_4bit(w, window, dtype, out.mutable_data_ptr(), call.stream()),
        "dequantize_4bit_out");
}

}  // namespace
}  // namespace lowbit::cuda

// clang-format off
#define LOWBIT_WEIGHT \
    "Tensor qweight, Tensor? absmax, Tensor? codebook, Tensor? nested_absmax, Tensor? nested_codebook, " \
    "Tensor? nested_offset, int N, int K, int blocksize, int nested_blocksize, bool row_blocks"

STABLE_TORCH_LIBRARY(lowbit_cuda, m) {
    m.def("quantize_4bit(Tensor weight, Tensor thresholds, Tensor order, Tensor? nested_codebook, int blocksize, "
          "int nested_blocksize, bool row_blocks) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def("dequantize_4bit(" LOWBIT_WEIGHT ", ScalarType dtype) -> Tensor");
    m.def("dequantize_4bit_out(" LOWBIT_WEIGHT ", int row0, Tensor(a!) out, int column0=0) -> ()");
}
// clang-format on

STABLE_TORCH_LIBRARY_IMPL(lowbit_cuda, CUDA, m) {
    m.impl("quantize_4bit", TORCH_BOX(&lowbit::cuda::quantize_4bit));
    m.impl("dequantize_4bit", TORCH_BOX(&lowbit::cuda::dequantize_4bit));
    m.impl("dequantize_4bit_out", TORCH_BOX(&lowbit::cuda::dequantize_4bit_out));
}
