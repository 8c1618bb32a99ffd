"""Linear4bit and QLoRALinear behave like nn.Linear wherever trainers and checkpoints touch them."""

import copy
import fractions
import io
import math
import pickle

import numpy as np
import pytest
import torch
from helpers import assert_bitwise_equal, assert_close_to_float64
from nn_layers import (
    BUFFERS,
    DTYPES,
    K,
    N,
    R,
    all_tensors,
    assert_same_state,
    both,
    expected_output,
    linear,
    qlora,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowbit
from lowbit.nn import Linear4bit, QLoRALinear

# ---- what the layers compute ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, K), (0, K)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients(device, dtype, shape):
    for layer in both(dtype, device):
        x = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
        y = layer(x)
        assert y.dtype == dtype
        assert y.shape == (*shape[:-1], N)
        dy = torch.randn_like(y)
        wide, wide_x = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
        low_x = x.detach().requires_grad_()
        exact, low = expected_output(wide, wide_x), expected_output(layer, low_x)
        assert_close_to_float64("y", y, exact, low)
        named = {n: p for n, p in layer.named_parameters() if p.requires_grad}
        wide_named = dict(wide.named_parameters())
        grads = torch.autograd.grad(y, [x, *named.values()], dy)
        low_grads = torch.autograd.grad(low, [low_x, *named.values()], dy)
        wide_grads = torch.autograd.grad(
            exact, [wide_x, *(wide_named[n] for n in named)], dy.double()
        )
        for name, *triple in zip(["x", *named], grads, wide_grads, low_grads, strict=True):
            assert_close_to_float64(f"d_{name}", *triple, factor=3.0)


def test_layers_are_linear_layers_with_frozen_weight():
    for layer in both():
        assert isinstance(layer, nn.Linear)
        assert (layer.in_features, layer.out_features) == (K, N)
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.shape == (N * K // 2, 1)
        assert not layer.weight.requires_grad


def test_fresh_adapter_is_pefts_and_changes_nothing():
    source = linear()
    base = Linear4bit.from_linear(source)
    torch.manual_seed(3)
    layer = QLoRALinear.from_linear(source, r=R, alpha=8)
    torch.manual_seed(3)
    expected = nn.init.kaiming_uniform_(torch.empty(R, K), a=math.sqrt(5))
    assert_bitwise_equal(layer.lora_A.detach(), expected, "lora_A")
    assert not layer.lora_B.any()
    x = torch.randn(7, K)
    torch.testing.assert_close(layer(x), base(x))


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 8 / 4), (True, 8 / 2)])
def test_scaling(rslora, scaling):
    assert qlora(use_rslora=rslora).scaling == scaling


@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_and_scaling_follow_each_other(rslora):
    """Files hold alpha alone, so that what computes is what is saved."""
    layer = qlora(use_rslora=rslora)
    layer.alpha = 10
    assert layer.scaling == 10 / (math.sqrt(R) if rslora else R)
    assert layer.alpha == 10
    layer.scaling = 0.3
    again = QLoRALinear(K, N, r=R, alpha=layer.alpha, use_rslora=rslora)
    assert again.scaling == pytest.approx(0.3)
    with pytest.raises(ValueError, match="alpha must be a finite number"):
        layer.alpha = math.inf


@pytest.mark.parametrize("number", [np.int64, np.float32, fractions.Fraction])
def test_numbers_of_other_libraries(number, tmp_path):
    """Sizes and options may come from numpy; files take Python's numbers only."""
    layer = QLoRALinear(
        np.int64(64), np.int64(32), r=np.int64(4), alpha=number(8), use_rslora=np.bool_(True)
    )
    plain = QLoRALinear(64, 32, r=4, alpha=8, use_rslora=True)
    plain.load_state_dict(layer.state_dict())
    assert (layer.r, layer.alpha, layer.scaling) == (plain.r, plain.alpha, plain.scaling)
    model = nn.Sequential(layer)
    lowbit.adapters.save_adapter(model, tmp_path / "adapter")
    lowbit.save(model, tmp_path / "model")
    again = lowbit.load(nn.Sequential(nn.Linear(64, 32)), tmp_path / "model")[0]
    assert_same_state(again, layer)
    assert again.scaling == layer.scaling
    prepared = lowbit.prepare(nn.Sequential(nn.Linear(64, 32)), r=np.int64(4), alpha=number(8))
    assert prepared[0].r == 4


@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_of_a_layer_pickled_when_it_was_an_attribute(rslora):
    layer = qlora(use_rslora=rslora)
    vars(layer)["alpha"] = vars(layer).pop("_alpha")
    layer = pickle.loads(pickle.dumps(layer))
    assert layer.alpha == pytest.approx(8)
    layer.alpha = 4
    assert copy.deepcopy(layer).alpha == 4


def test_fp32_masters_under_16_bit_weights():
    layer = qlora(torch.bfloat16, lora_dtype=torch.float32)
    x = torch.randn(5, K, dtype=torch.bfloat16)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.lora_A.grad.dtype == torch.float32
    assert layer.lora_B.grad.dtype == torch.float32


def test_dropout_only_in_training():
    layer = qlora(dropout=0.5)
    x = torch.randn(64, K)
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(layer(x), first)
    layer.eval()
    torch.testing.assert_close(layer(x), expected_output(layer, x))


def test_disabled_adapter_leaves_the_base():
    layer = qlora()
    x = torch.randn(5, K)
    layer.adapter_enabled = False
    assert torch.equal(layer(x), layer.without_adapter()(x))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing(use_reentrant, dropout):
    layer = qlora(dropout=dropout)
    x = torch.randn(6, K, requires_grad=True)
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(5)
        if checkpointed:
            y = checkpoint(layer, x, use_reentrant=use_reentrant)
        else:
            y = layer(x)
        layer.zero_grad()
        x.grad = None
        y.square().sum().backward()
        results.append([y, x.grad, layer.lora_A.grad.clone(), layer.lora_B.grad.clone()])
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device, dtype):
    for layer in both(device=device):
        x = torch.randn(5, K, device=device)
        with torch.autocast(device.type, dtype=dtype):
            y = layer(x)
        assert y.dtype == dtype
        y.float().sum().backward()
        assert layer.bias.grad.dtype == torch.float32
        exact = expected_output(copy.deepcopy(layer).double(), x.double())
        assert_close_to_float64("y", y, exact, expected_output(layer, x.to(dtype)))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiles_without_graph_breaks(dropout):
    for layer in (Linear4bit.from_linear(linear()), qlora(dropout=dropout)):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(5, K, requires_grad=True)
        layer.eval()
        y = compiled(x)
        torch.testing.assert_close(y, layer(x))
        layer.train()
        compiled(x).sum().backward()
        assert x.grad is not None
        if isinstance(layer, QLoRALinear):
            assert layer.lora_B.grad is not None


def test_compiled_layer_follows_changes_of_its_weight():
    layer = Linear4bit.from_linear(linear())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, K)
    compiled(x)
    other = Linear4bit.from_linear(linear(), blocksize=32, double_quant=False)
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(compiled(x), other(x))


@pytest.mark.slow
def test_compiles_with_inductor(device):
    model = nn.Sequential(qlora(device=device), nn.GELU(), nn.Linear(N, 1, device=device))
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(5, K, device=device)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    compiled(x).sum().backward()
    assert model[0].lora_A.grad is not None


# ---- construction --------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_type", [Linear4bit, QLoRALinear])
def test_fresh_layer_is_initialized_like_nn_linear(layer_type):
    torch.manual_seed(2)
    layer = layer_type(256, 64, dtype=torch.bfloat16)
    torch.manual_seed(2)
    dense = nn.Linear(256, 64, dtype=torch.bfloat16)
    expected = lowbit.quantize(dense.weight.detach())
    assert_bitwise_equal(layer.weight.view(64, -1), expected.qweight, "weight")
    assert layer.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ["rows", "flat"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("features", [(96, 48), (33, 5), (256, 128)])
def test_meta_layer_has_the_shapes_of_a_real_one(features, double_quant, layout):
    options = {"double_quant": double_quant, "layout": layout, "nested_blocksize": 32}
    real = QLoRALinear(*features, r=R, **options)
    for meta in (
        QLoRALinear(*features, r=R, device="meta", **options),
        QLoRALinear.from_linear(nn.Linear(*features, device="meta"), r=R, **options),
    ):
        expected, found = all_tensors(real), all_tensors(meta)
        assert list(found) == list(expected)
        for name, tensor in found.items():
            assert tensor.is_meta
            assert (tensor.shape, tensor.dtype) == (expected[name].shape, expected[name].dtype), (
                name
            )
        assert list(meta.state_dict()) == list(real.state_dict())


def test_meta_device_context_and_materialization():
    with torch.device("meta"):
        layer = QLoRALinear(K, N, r=R)
    assert all(t.is_meta for t in [*layer.parameters(), *layer.buffers()])
    assert layer(torch.empty(3, K, device="meta")).shape == (3, N)
    layer.to_empty(device="cpu").reset_parameters()
    assert torch.isfinite(layer(torch.randn(3, K))).all()
    assert not layer.lora_B.any()


def test_a_frozen_adapter_without_data_is_drawn_frozen():
    layer = QLoRALinear(K, N, r=R, device="meta")
    layer.lora_A.requires_grad_(False)
    layer._adopt(lowbit.quantize(torch.randn(N, K)))
    layer.reset_adapter()
    assert layer.lora_A.any()
    assert (layer.lora_A.requires_grad, layer.lora_B.requires_grad) == (False, True)


def test_from_linear_keeps_mode_bias_and_source():
    source = linear().eval()
    source.bias.requires_grad_(False)
    before = source.weight.clone()
    layer = Linear4bit.from_linear(source)
    assert not layer.training
    assert not layer.bias.requires_grad
    assert layer.bias.data_ptr() == source.bias.data_ptr()
    assert torch.equal(source.weight, before)
    assert Linear4bit.from_linear(linear(bias=False)).bias is None


def test_adapter_on_a_quantized_layer_shares_its_storage():
    base = Linear4bit.from_linear(linear(), blocksize=32, quant_type="fp4")
    layer = QLoRALinear.from_linear(base, r=R)
    assert layer.weight.data_ptr() == base.weight.data_ptr()
    assert (layer.blocksize, layer.quant_type) == (32, "fp4")


def test_custom_codebook_survives():
    codebook = torch.arange(-7, 9) / 8
    layer = Linear4bit.from_linear(linear(), codebook=codebook)
    assert layer.quant_type == "custom"
    fresh = Linear4bit(K, N)
    fresh.load_state_dict(layer.state_dict())
    assert_same_state(fresh, layer)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: QLoRALinear(K, N, r=0), ValueError, "r must be an integer of at least 1"),
        (lambda: QLoRALinear(K, N, r=2.5), ValueError, "r must be an integer"),
        (lambda: QLoRALinear(K, N, r=True), ValueError, "r must be an integer"),
        (lambda: QLoRALinear(K, N, dropout=1.0), ValueError, r"dropout must lie in \[0, 1\)"),
        (lambda: QLoRALinear(K, N, dropout="0.1"), TypeError, "dropout must be a number"),
        (lambda: QLoRALinear(K, N, lora_dtype=torch.int8), TypeError, "lora_dtype must be"),
        (lambda: QLoRALinear(K, N, lora_dtype="float16"), TypeError, "lora_dtype must be"),
        (lambda: QLoRALinear(K, N, alpha="8"), ValueError, "alpha must be a finite number"),
        (lambda: QLoRALinear(K, N, alpha=math.nan), ValueError, "alpha must be a finite number"),
        (lambda: QLoRALinear(-1, N), ValueError, "in_features must be an integer of at least 1"),
        (lambda: Linear4bit(K, 0, device="meta"), ValueError, "out_features must be an integer"),
        (lambda: Linear4bit(K, N).to_linear(torch.int8), TypeError, "dtype must be float32"),
        (lambda: QLoRALinear(K, N).to_linear(torch.int8), TypeError, "dtype must be float32"),
        (lambda: QLoRALinear(K, N, device="meta").merge(), ValueError, "has no data"),
        (lambda: Linear4bit(K, N, dtype=torch.float64), TypeError, "dtype must be float32"),
        (lambda: Linear4bit(K, N, layout="columns"), ValueError, 'layout must be "rows" or "flat"'),
        (lambda: Linear4bit(K, N, blocksize=48), ValueError, "blocksize must be one of"),
        (lambda: Linear4bit(K, N, quant_type="int4", device="meta"), ValueError, "quant_type must"),
        (lambda: Linear4bit.from_linear(nn.Conv2d(1, 1, 1)), TypeError, "must be an nn.Linear"),
    ],
)
def test_bad_options(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"qw": torch.zeros(3)}, TypeError, "qw must be a QuantizedWeight, got Tensor"),
        ({"bias": [0.0] * N}, TypeError, "bias must be a floating tensor, got list"),
        ({"bias": torch.zeros(N).int()}, TypeError, "bias must be .* got torch.int32"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must be \[N\] = \[.*\], got \[3\]"),
        ({"lora_A": torch.zeros(2, K)}, ValueError, "lora_A and lora_B must both be given"),
        ({"lora_A": [1], "lora_B": [1]}, TypeError, "lora_A must be a tensor, got list"),
    ],
)
def test_bad_parts_of_a_layer(given, error, message):
    qw = lowbit.quantize(torch.randn(N, K))
    with pytest.raises(error, match=message):
        QLoRALinear.from_quantized(**{"qw": qw} | given)


def test_nan_weight_is_refused():
    source = linear()
    with torch.no_grad():
        source.weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"1 NaN or Inf value .* first at \(3, 5\)"):
        Linear4bit.from_linear(source)


# ---- moving and copying --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.bfloat16(),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.type(torch.bfloat16),
        lambda m: nn.Sequential(m).to(torch.bfloat16)[0],
    ],
)
def test_casting_keeps_the_quantized_weight(cast):
    for layer in both():
        before = layer.quantized_weight.dequantize()
        layer = cast(layer)
        assert layer.weight.dtype == torch.uint8
        assert layer.weight_absmax.dtype == torch.uint8
        for name in BUFFERS[1:]:
            assert getattr(layer, name).dtype == torch.float32, name
        assert layer.bias.dtype == torch.bfloat16
        if isinstance(layer, QLoRALinear):
            assert layer.lora_A.dtype == layer.lora_B.dtype == torch.bfloat16
        assert_bitwise_equal(layer.quantized_weight.dequantize(), before, "weight")
        assert layer(torch.randn(2, K, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_plain_absmax_stays_fp32():
    layer = Linear4bit.from_linear(linear(), double_quant=False).half()
    assert layer.weight_absmax.dtype == torch.float32


@pytest.mark.gpu
def test_moves_between_devices_bit_for_bit():
    layer = qlora()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.cuda()
    assert all(t.is_cuda for t in [*layer.parameters(), *layer.buffers()])
    layer(torch.randn(3, K, device="cuda"))
    for key, value in layer.cpu().state_dict().items():
        assert_bitwise_equal(value, before[key], key)


def test_deepcopy_and_pickle():
    for layer in both():
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        x = torch.randn(3, K)
        for twin in (
            copy.deepcopy(layer),
            pickle.loads(pickle.dumps(layer)),
            torch.load(buffer, weights_only=False),
        ):
            assert twin.weight.data_ptr() != layer.weight.data_ptr()
            assert torch.equal(twin(x), layer(x))
            assert_same_state(twin, layer)


def test_view_of_the_weight_follows_parameter_swaps():
    """FSDP and functional_call put other tensors in the parameter's place."""
    layer, other = both()
    x = torch.randn(3, K)
    layer.weight = nn.Parameter(other.weight.clone(), requires_grad=False)
    for name in BUFFERS:
        setattr(layer, name, getattr(other, name).clone())
    bias = {"bias": other.bias}
    other.adapter_enabled = False
    assert torch.equal(torch.func.functional_call(layer, bias, (x,)), other(x))
    weight = layer.weight
    del layer.weight  # FSDP1: the parameter becomes a plain attribute
    layer.weight = weight.data
    assert torch.equal(torch.func.functional_call(layer, bias, (x,)), other(x))


def test_adapters_follow_parameter_swaps():
    """FSDP1 makes plain attributes of parameters, torch's parametrizations properties."""
    layer, other = qlora(), qlora()
    x, names = torch.randn(3, K), ("lora_A", "lora_B", "bias")
    swapped = {name: getattr(other, name) for name in names}
    expected = torch.func.functional_call(layer, swapped, (x,))
    assert not torch.equal(expected, layer(x))
    for name in names:
        delattr(layer, name)
        setattr(layer, name, getattr(other, name).data)
    assert torch.equal(layer(x), expected)


def test_arguments_of_the_weight_are_those_of_the_quantized_weight():
    layer, _ = both()
    for actual, expected in zip(layer.weight_args(), layer.quantized_weight.args(), strict=True):
        assert actual is expected or actual == expected
    assert layer.weight_args().shape == tuple(layer.quantized_weight.shape)


def test_weight_changed_in_place_is_seen():
    layer = Linear4bit.from_linear(linear())
    view = layer.quantized_weight
    layer.weight.data.zero_()
    assert not view.qweight.any()


# ---- merging -------------------------------------------------------------------------------------


def test_merge_reports_its_error_and_unmerge_restores_every_bit():
    layer = qlora()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    exact = layer.quantized_weight.dequantize(torch.float32) + layer.delta_weight()
    report = layer.merge()
    merged = layer.quantized_weight.dequantize(torch.float32)
    error = ((merged - exact).norm() / exact.norm()).item()
    assert report.weight_error == pytest.approx(error)
    assert 0 < report.weight_error < 0.15  # NF4 on normal data is near 0.09
    assert report.update == pytest.approx((layer.delta_weight().norm() / exact.norm()).item())
    x = torch.randn(3, K)
    torch.testing.assert_close(layer(x), x @ merged.t() + layer.bias)
    used = [layer.weight, *layer.buffers()]
    for name, value in layer.state_dict().items():  # base and adapter, not the merged weight
        assert_bitwise_equal(value, before[name], name)
    assert isinstance(layer.state_dict(keep_vars=True)["weight"], torch.nn.Parameter)
    # Other threads may call the layer while its state dict is made.
    assert all(a is b for a, b in zip([layer.weight, *layer.buffers()], used, strict=True))
    with pytest.raises(ValueError, match="merged already"):
        layer.merge()
    with pytest.raises(RuntimeError, match=r"call unmerge\(\) before loading"):
        layer.load_state_dict(before)
    twin = copy.deepcopy(layer)
    for merged_layer in (layer, twin, pickle.loads(pickle.dumps(layer))):
        merged_layer.unmerge()
        for name, value in merged_layer.state_dict().items():
            assert_bitwise_equal(value, before[name], name)
    with pytest.raises(ValueError, match="not merged"):
        layer.unmerge()


@pytest.mark.parametrize(
    "options",
    [
        {"double_quant_type": "fp8"}, {"codebook": torch.arange(-7, 9) / 8},
        {"blocksize": 32, "nested_blocksize": 64}, {},
    ],
)  # fmt: skip
def test_merge_keeps_the_format(options):
    layer = qlora(torch.bfloat16, **options)
    before = layer.quantized_weight
    layer.merge()
    after = layer.quantized_weight
    assert after.dtype == torch.bfloat16
    assert after.quant_type == before.quant_type
    assert after.blocksize == before.blocksize
    assert after.nested_blocksize == before.nested_blocksize
    assert torch.equal(after.codebook, before.codebook)
    assert torch.equal(after.nested_codebook, before.nested_codebook)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_merge_rounds_once(dtype):
    layer = qlora(torch.bfloat16)
    dense = layer.to_linear(dtype)
    exact = layer.quantized_weight.dequantize(torch.float32) + layer.delta_weight()
    assert type(dense) is nn.Linear
    assert_bitwise_equal(dense.weight.detach(), exact.to(dtype), "merged weight")
    assert dense.bias.dtype == dtype
    base = layer.without_adapter()
    expected = base.quantized_weight.dequantize(dtype)
    assert_bitwise_equal(base.to_linear(dtype).weight.detach(), expected, "dequantized weight")
