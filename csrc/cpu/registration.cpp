// The operators of the CPU backend that are about the 4-bit format itself, and the instruction-set
// switch. The matmuls register in registration_linear.cpp. Schemas equal the ones in lowbit/ops.py;
// each function checks what it needs to stay in bounds.

#include <tuple>

#include "bindings.h"
#include "dequantize.h"
#include "dropout.h"
#include "isa.h"
#include "memory.h"
#include "quantize.h"

namespace lowbit::cpu {
namespace {

std::string isa_op() {
    return isa_name(current_isa());
}

void set_isa_op(std::string name) {
    set_isa(name);
}

// torch's own reduction, so that double quantization has the offset, to the last bit, that
// absmax.mean() has in Python.
Tensor mean(const Tensor& tensor) {
    std::array<StableIValue, 2> stack{
        torch::stable::detail::from(tensor),
        torch::stable::detail::from(std::optional<ScalarType>(std::nullopt))};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mean", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

using Quantized = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Quantized quantize_nested(
    const Tensor& qweight,
    const Tensor& absmax,
    const Tensor& nested_codebook,
    int64_t nested_blocksize) {
    checked_log2(nested_blocksize, "nested_blocksize");
    const int64_t blocks = absmax.numel();
    Tensor offset = blocks == 0 ? new_cpu_tensor({}, ScalarType::Float) : mean(absmax);
    if (blocks == 0)
        torch::stable::zero_(offset);
    Tensor codes = new_cpu_tensor({blocks}, ScalarType::Byte);
    Tensor nested_absmax = new_cpu_tensor({ceil_div(blocks, nested_blocksize)}, ScalarType::Float);
    QuantizeAbsmaxArgs args{};
    args.absmax = absmax.const_data_ptr<float>();
    args.blocks = blocks;
    args.offset = *offset.const_data_ptr<float>();
    args.nested_codebook =
        checked_data<float>(nested_codebook, ScalarType::Float, 256, "nested_codebook");
    args.nested_blocksize = nested_blocksize;
    args.codes = codes.mutable_data_ptr<uint8_t>();
    args.nested_absmax = nested_absmax.mutable_data_ptr<float>();
    launch_quantize_absmax(args);
    return {qweight, codes, nested_absmax, offset};
}

Quantized quantize_4bit(
    const Tensor& weight,
    const Tensor& thresholds,
    const Tensor& order,
    const OptionalTensor& nested_codebook,
    int64_t blocksize,
    int64_t nested_blocksize,
    bool row_blocks) {
    check_cpu_contiguous(weight, "weight");
    STD_TORCH_CHECK(weight.dim() == 2, "weight must be [N, K], got ", weight.dim(), " dimensions");
    checked_log2(blocksize, "blocksize");
    STD_TORCH_CHECK(blocksize >= 32, "blocksize must be at least 32, got ", blocksize);
    const int64_t N = weight.size(0), K = weight.size(1);
    QuantizeArgs args{};
    args.weight = weight.const_data_ptr();
    args.dtype = dtype_of(weight, "weight");
    args.rows = row_blocks ? N : 1;
    args.columns = row_blocks ? K : N * K;
    args.blocksize = blocksize;
    args.thresholds = checked_data<float>(thresholds, ScalarType::Float, 15, "thresholds");
    args.order = checked_data<uint8_t>(order, ScalarType::Byte, 16, "order");
    const int64_t row_bytes = ceil_div(args.columns, 2);
    Tensor qweight = row_blocks ? new_result({N, row_bytes}, ScalarType::Byte)
                                : new_result({row_bytes}, ScalarType::Byte);
    Tensor absmax =
        new_cpu_tensor({args.rows * ceil_div(args.columns, blocksize)}, ScalarType::Float);
    args.qweight = qweight.mutable_data_ptr<uint8_t>();
    args.absmax = absmax.mutable_data_ptr<float>();
    launch_quantize(args);
    if (nested_codebook.has_value()) {
        return quantize_nested(qweight, absmax, *nested_codebook, nested_blocksize);
    }
    return {
        qweight, absmax, new_cpu_tensor({0}, ScalarType::Float),
        new_cpu_tensor({0}, ScalarType::Float)};
}

Tensor dequantize_4bit(LOWBIT_WEIGHT_PARAMETERS, ScalarType dtype) {
    const WeightView weight = make_weight_view(LOWBIT_WEIGHT_ARGUMENTS);
    STD_TORCH_CHECK(!weight.is_dense(), "qweight must be a 4-bit weight, got a dense one");
    Tensor out = new_result({N, K}, dtype);
    launch_dequantize(weight, to_dtype(dtype, "dtype"), out.mutable_data_ptr());
    return out;
}

Tensor dropout(const Tensor& x, double p, const Tensor& seed) {
    check_cpu_contiguous(x, "x");
    STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "p must be in [0, 1), got ", p);
    if (p == 0.0)
        return torch::stable::clone(x);
    const Dtype dtype = dtype_of(x, "x");
    const DropoutArgs args{p, *checked_data<int64_t>(seed, ScalarType::Long, 1, "seed")};
    Tensor out = torch::stable::empty_like(x);
    prefer_huge_pages(out.mutable_data_ptr(), out.numel() * out.element_size());
    launch_dropout(x.const_data_ptr(), dtype, x.numel(), args, out.mutable_data_ptr());
    return out;
}

}  // namespace
}  // namespace lowbit::cpu

STABLE_TORCH_LIBRARY(lowbit_cpu, m) {
    m.def("isa() -> str");
    m.def("set_isa(str name) -> ()");
    m.def(
        "quantize_4bit(Tensor weight, Tensor thresholds, Tensor order, Tensor? nested_codebook, "
        "int blocksize, int nested_blocksize, bool row_blocks) -> (Tensor qweight, Tensor absmax, "
        "Tensor nested_absmax, Tensor nested_offset)");
    m.def("dequantize_4bit(" LOWBIT_WEIGHT ", ScalarType dtype) -> Tensor");
    m.def("dropout(Tensor x, float p, Tensor seed) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lowbit_cpu, CompositeExplicitAutograd, m) {
    m.impl("isa", TORCH_BOX(&lowbit::cpu::isa_op));
    m.impl("set_isa", TORCH_BOX(&lowbit::cpu::set_isa_op));
}

STABLE_TORCH_LIBRARY_IMPL(lowbit_cpu, CPU, m) {
    m.impl("quantize_4bit", TORCH_BOX(&lowbit::cpu::quantize_4bit));
    m.impl("dequantize_4bit", TORCH_BOX(&lowbit::cpu::dequantize_4bit));
    m.impl("dropout", TORCH_BOX(&lowbit::cpu::dropout));
}
