// The compiled operators of the CUDA backend: 4-bit quantization and dequantization. Schemas equal
// the ones in lowbit/ops.py. The products are in registration_lora.cpp.

#include <tuple>

#include "bindings.h"
#include "nf4_dequantize.h"
#include "nf4_quantize.h"

namespace lowbit::cuda {
namespace {

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

Tensor dequantize_4bit(LOWBIT_WEIGHT_PARAMETERS, ScalarType dtype) {
    const Call call(qweight);
    const WeightView w = make_weight_view(call, LOWBIT_WEIGHT_ARGUMENTS);
    Tensor out = new_tensor(qweight, {N, K}, dtype);
    check_launch(
        launch_dequantize_4bit(
            w, {0, N, 0, K}, to_dtype(dtype, "dtype"), out.mutable_data_ptr(), call.stream()),
        "dequantize_4bit");
    return out;
}

// The window of the weight whose upper left corner is (row0, column0) and whose size is that of
// out.
void dequantize_4bit_out(LOWBIT_WEIGHT_PARAMETERS, int64_t row0, Tensor out, int64_t column0) {
    const Call call(qweight);
    const WeightView w = make_weight_view(call, LOWBIT_WEIGHT_ARGUMENTS);
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
