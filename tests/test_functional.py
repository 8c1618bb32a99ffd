"""lowbit.matmul and lowbit.lora_matmul on every device: values, every gradient, and the contract
around them.
"""

import contextlib

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from functional_problem import problem
from helpers import assert_bitwise_equal, assert_close_to_float64, relative_rms
from hypothesis import strategies as st

import lowbit
from lowbit import reference
from lowbit.nn import QLoRALinear

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# M, N, K, r and why each is here.
SHAPES = [
    (1, 256, 256, 16),  # decode
    (17, 48, 64, 4),  # odd M, one block per row, N no multiple of a tile
    (65, 100, 192, 5),  # one over a tile, ragged N, odd rank
    (33, 72, 100, 8),  # K is no multiple of the blocksize: short last block
    (130, 64, 576, 16),  # the demo model's hidden size
    (3, 7, 65, 1),  # odd K, rank 1
]


def _ids(shape):
    return "M{}-N{}-K{}-r{}".format(*shape)


def _run(p, dropout_p=0.0, w=None):
    """Output and gradients of lora_matmul by name."""
    names = ["x", "lora_A", "lora_B", "bias"]
    leaves = {n: p[n].detach().clone().requires_grad_() for n in names if p[n] is not None}
    scaling = p["scaling"]
    if isinstance(scaling, torch.Tensor):
        scaling = leaves["scaling"] = scaling.detach().clone().requires_grad_()
    torch.manual_seed(7)
    y = lowbit.lora_matmul(
        leaves["x"], p["w"] if w is None else w, leaves["lora_A"], leaves["lora_B"], scaling,
        bias=leaves.get("bias"), dropout_p=dropout_p,
    )  # fmt: skip
    y.backward(p["dy"].to(y.dtype))
    return {"y": y.detach()} | {f"d_{n}": t.grad for n, t in leaves.items()}


def _formula(p, dtype, keep=None):
    """The same in plain torch of one dtype, from the dequantized weight."""
    names = ["x", "lora_A", "lora_B", "bias"]
    leaves = {n: p[n].detach().cpu().to(dtype).requires_grad_() for n in names if p[n] is not None}
    scaling = p["scaling"]
    if isinstance(scaling, torch.Tensor):
        scaling = leaves["scaling"] = scaling.detach().cpu().to(dtype).requires_grad_()
    weight = p["w"].cpu()
    if not isinstance(weight, torch.Tensor):
        with lowbit.dispatch.force("reference"):
            weight = weight.dequantize(torch.float32)
    weight = weight.to(dtype)
    dropped = leaves["x"] if keep is None else leaves["x"] * keep.to(dtype)
    y = (
        leaves["x"] @ weight.t()
        + ((dropped @ leaves["lora_A"].t()) * scaling) @ leaves["lora_B"].t()
    )
    if "bias" in leaves:
        y = y + leaves["bias"]
    y.backward(p["dy"].cpu().to(dtype))
    return {"y": y.detach()} | {f"d_{n}": t.grad for n, t in leaves.items()}


def _compare(actual, expected, lowp):
    assert actual.keys() == expected.keys()
    for name in actual:
        assert_close_to_float64(
            name, actual[name], expected[name], lowp[name], 2.0 if name == "y" else 3.0
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=_ids)
def test_values_and_every_gradient(device, shape, dtype):
    p = problem(shape, dtype, device)
    _compare(_run(p), _formula(p, torch.float64), _formula(p, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"bias": False}, {"vector": True}, {"double_quant": False}, {"layout": "flat"}],
    ids=["no bias", "vector scaling", "plain absmax", "flat blocks"],
)
def test_options(device, options, dtype):
    p = problem((33, 72, 100, 8), dtype, device, **options)
    _compare(_run(p), _formula(p, torch.float64), _formula(p, dtype))


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    shape=st.tuples(
        st.integers(1, 40), st.integers(8, 90), st.integers(32, 300), st.integers(1, 9)
    ),
    dtype=st.sampled_from(DTYPES),
    blocksize=st.sampled_from([32, 64, 256, 4096]),
    layout=st.sampled_from(["rows", "flat"]),
)
def test_any_shape_stays_within_its_roundings(shape, dtype, blocksize, layout):
    """Each element is off by a few roundings of the sum of its terms' magnitudes. (In small tensors
    plain torch's own error, which the tests above measure by, may be zero by luck.)
    """
    torch.manual_seed(0)
    p = problem(shape, dtype, "cpu", blocksize=blocksize, layout=layout)
    actual, expected = _run(p), _formula(p, torch.float64)
    p["w"] = p["w"].dequantize(torch.float32)
    magnitudes = {k: v.abs() if isinstance(v, torch.Tensor) else v for k, v in p.items()}
    rounding = 4 * torch.finfo(dtype).eps
    for name, sums in _formula(magnitudes, torch.float64).items():
        error = (actual[name].double() - expected[name]).abs()
        assert (error <= rounding * sums).all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(17, 48, 64, 4), (65, 72, 100, 8)], ids=_ids)
def test_dropout_matches_its_mask(device, shape, dtype):
    """Given the mask, dropout is a product; the mask is the reference's Philox from the drawn
    seed.
    """
    probability = 0.3
    p = problem(shape, dtype, device)
    torch.manual_seed(7)
    seed = torch.randint(-(2**63 - 1), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    keep = reference.dropout_mask(*p["x"].shape, probability, seed.cpu()) / (1 - probability)
    actual = _run(p, dropout_p=probability)
    _compare(actual, _formula(p, torch.float64, keep), _formula(p, dtype, keep))


def test_dropout_keeps_the_right_share_and_scale(device):
    x = torch.ones(512, 1024, device=device)
    y = torch.ops.lowbit.dropout(x, 0.25, torch.tensor([99], device=device))
    kept = (y != 0).float().mean().item()
    assert abs(kept - 0.75) < 5 * (0.75 * 0.25 / x.numel()) ** 0.5
    assert y.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert_bitwise_equal(y.cpu(), reference.dropout(x.cpu(), 0.25, torch.tensor([99])), "dropout")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fp32_adapters_with_16_bit_activations(device, dtype):
    p = problem((33, 72, 128, 8), dtype, device)
    exact = _formula(p, torch.float64)
    lowp = _formula(p, dtype)
    for name in ("lora_A", "lora_B"):
        p[name] = p[name].float()
    actual = _run(p)
    assert actual["d_lora_A"].dtype == actual["d_lora_B"].dtype == torch.float32
    _compare(actual, exact, lowp)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_hot_rows_read_the_weight_exactly(device, dtype):
    """x = I makes y the dequantized weight: decode, layout and transposition are checked bit for
    bit.
    """
    for layout in ("rows", "flat"):
        w = lowbit.quantize(torch.randn(40, 100, device=device), layout=layout)
        expected = w.dequantize(dtype)
        y = lowbit.matmul(torch.eye(100, dtype=dtype, device=device), w)
        assert_bitwise_equal(y.t().contiguous(), expected, f"y ({layout})")
        dx = torch.ops.lowbit.linear_dx(torch.eye(40, dtype=dtype, device=device), *w.args())
        assert_bitwise_equal(dx, expected, f"dx ({layout})")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dense_weight_is_accepted(device, dtype):
    p = problem((17, 48, 64, 4), dtype, device)
    dense = p["w"].dequantize(dtype)
    _compare(_run(p, w=dense), _formula(p, torch.float64), _formula(p, dtype))
    y = lowbit.matmul(p["x"], dense, p["bias"])
    torch.testing.assert_close(y, torch.nn.functional.linear(p["x"], dense, p["bias"]))


def test_rows_do_not_depend_on_their_neighbours(device):
    p = problem((40, 96, 256, 8), torch.bfloat16, device)
    first = _run(p)["y"]
    p["x"][1:] = torch.randn_like(p["x"][1:]) * 100
    assert_bitwise_equal(_run(p)["y"][0], first[0], "row 0")


def test_results_repeat_bit_for_bit(device):
    p = problem((65, 100, 192, 16), torch.bfloat16, device)
    once, again = _run(p, 0.1), _run(p, 0.1)
    for name in once:
        assert_bitwise_equal(again[name], once[name], name)


def test_batch_shapes_strides_and_empty_inputs(device):
    p = problem((24, 48, 64, 4), torch.float32, device)
    args = (p["w"], p["lora_A"], p["lora_B"], 2.0)
    flat = lowbit.lora_matmul(p["x"], *args)
    batched = lowbit.lora_matmul(p["x"].view(2, 3, 4, 64), *args)
    assert_bitwise_equal(batched.view(24, 48), flat, "batched")
    strided = lowbit.lora_matmul(p["x"].t().contiguous().t(), *args)
    assert_bitwise_equal(strided, flat, "strided")
    assert lowbit.lora_matmul(p["x"][0], *args).shape == (48,)
    empty = p["x"][:0].view(0, 5, 64).requires_grad_()
    lora_A = p["lora_A"].clone().requires_grad_()
    y = lowbit.lora_matmul(empty, p["w"], lora_A, p["lora_B"], 2.0)
    y.sum().backward()
    assert y.shape == (0, 5, 48)
    assert empty.grad.shape == empty.shape
    assert (lora_A.grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bias_may_have_any_strides(device, dtype):
    p = problem((5, 48, 64, 4), dtype, device)
    adapter = p["lora_A"], p["lora_B"]
    for base, view in (
        (torch.randn(1), lambda b: b.expand(48)),
        (torch.randn(96), lambda b: b[::2]),
    ):
        base = base.to(p["x"]).requires_grad_()
        strided, plain = view(base), view(base).contiguous()
        for call in (
            lambda bias: lowbit.matmul(p["x"], p["w"], bias),
            lambda bias: lowbit.lora_matmul(p["x"], p["w"], *adapter, 2.0, bias=bias),
            lambda bias: lowbit.lora_matmul_group(
                p["x"], [p["w"]], *([t] for t in adapter), 2.0, biases=[bias]
            )[0],
        ):
            y, expected = call(strided), call(plain)
            assert_bitwise_equal(y, expected, "y")
            gradients = (torch.autograd.grad(t, base, p["dy"])[0] for t in (y, expected))
            assert_bitwise_equal(*gradients, "d_bias")


def test_only_what_is_needed_gets_a_gradient(device):
    p = problem((5, 48, 64, 4), torch.float32, device)
    lora_B = p["lora_B"].requires_grad_()
    y = lowbit.lora_matmul(p["x"], p["w"], p["lora_A"], lora_B, 2.0)
    (grad,) = torch.autograd.grad(y.sum(), [lora_B])
    assert grad.shape == lora_B.shape
    assert p["x"].grad is None
    assert p["lora_A"].grad is None


def test_retain_graph_and_double_use(device):
    p = problem((5, 48, 64, 4), torch.float32, device)
    x = p["x"].requires_grad_()
    before = x.detach().clone()
    y = lowbit.lora_matmul(x, p["w"], p["lora_A"], p["lora_B"], 2.0)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    second = torch.autograd.grad(y.sum(), x)[0]
    assert_bitwise_equal(second, first, "dx")
    assert_bitwise_equal(x.detach(), before, "x")


def test_gradients_of_the_definition_by_finite_differences():
    w = lowbit.quantize(torch.randn(24, 70))
    x = torch.randn(3, 70, dtype=torch.float64, requires_grad=True)
    A, B = torch.randn(4, 70, dtype=torch.float64), torch.randn(24, 4, dtype=torch.float64)
    s, bias = torch.rand(4, dtype=torch.float64), torch.randn(24, dtype=torch.float64)
    leaves = [x, *(t.requires_grad_() for t in (A, B, s, bias))]

    def function(x, A, B, s, bias, dropout_p=0.0):
        torch.manual_seed(3)
        return lowbit.lora_matmul(x, w, A, B, s, bias=bias, dropout_p=dropout_p)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *a: function(*a, 0.3), leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: lowbit.matmul(x, w), (x,), fast_mode=True)


def test_float64_is_computed_by_plain_torch(device):
    """By every function, also under autocast, which leaves it alone."""
    p = problem((5, 48, 64, 4), torch.float32, device)
    x, A, B, bias = (p[name].double() for name in ("x", "lora_A", "lora_B", "bias"))
    low_rank = 2.0 * (x @ A.t()) @ B.t()
    base = x @ lowbit.dequantize(p["w"], torch.float32).double().t() + bias
    index = torch.tensor([0, 0, -1, 0, -1], device=device)
    layer = QLoRALinear.from_quantized(p["w"], bias, lora_A=A.float(), lora_B=B.float(), alpha=8)
    down = lowbit.quantize(torch.randn(64, 48, device=device))
    mlp = [p["w"], p["w"], down], [A, A, None], [B, B, None], 2.0

    def run(x):
        yield lowbit.matmul(x, p["w"], bias)
        yield lowbit.lora_matmul(x, p["w"], A, B, 2.0, bias=bias)
        yield lowbit.lora_matmul(x, p["w"], A[None], B[None], 2.0, bias=bias, adapter_index=index)
        yield lowbit.lora_matmul_group(x, [p["w"]], [A], [B], 2.0, biases=[bias])[0]
        yield layer(x)
        yield lowbit.lora_gated_mlp(x, *mlp, biases=[bias, bias, None])

    hidden = F.silu(base + low_rank) * (base + low_rank)
    expected = [
        base,
        base + low_rank,
        base + low_rank * (index >= 0).unsqueeze(1),
        base + low_rank,
        base + low_rank,
        hidden @ lowbit.dequantize(down, torch.float32).double().t(),
    ]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        under_autocast = list(run(x))
    for actual in (list(run(x)), under_autocast):
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(device, dtype):
    if (
        device.type == "cpu"
        and dtype == torch.float16
        and not torch.amp.is_autocast_available("cpu")
    ):
        pytest.skip("no CPU autocast to fp16 in this torch")
    p = problem((5, 48, 64, 4), torch.float32, device)
    x = p["x"].requires_grad_()
    lora_A = p["lora_A"].requires_grad_()
    with torch.autocast(device.type, dtype=dtype):
        y = lowbit.lora_matmul(x, p["w"], lora_A, p["lora_B"], 2.0, bias=p["bias"])
        assert y.dtype == dtype
    y.float().sum().backward()
    assert x.grad.dtype == lora_A.grad.dtype == torch.float32
    direct = lowbit.lora_matmul(x.to(dtype), p["w"], lora_A, p["lora_B"], 2.0, bias=p["bias"])
    assert_bitwise_equal(y, direct, "y")


@pytest.mark.parametrize("M", [5, 70])
@pytest.mark.parametrize(
    "backend", [None, "reference", pytest.param("cuda:panels", marks=pytest.mark.gpu)]
)
def test_backward_under_autocast(device, backend, M):
    """Gradients of fp32 adapters are not rounded for it."""
    if backend == "cuda:panels" and device.type == "cpu":
        pytest.skip("panels are the CUDA backend's")
    p = problem((M, 48, 64, 4), torch.float32, device)
    leaves = [p["lora_A"].requires_grad_(), p["lora_B"].requires_grad_()]
    with lowbit.dispatch.force(backend) if backend else contextlib.nullcontext():
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y = lowbit.lora_matmul(p["x"], p["w"], *leaves, 2.0).sum()
            gradients = torch.autograd.grad(y, leaves, retain_graph=True)
        for actual, expected in zip(gradients, torch.autograd.grad(y, leaves), strict=True):
            assert_bitwise_equal(actual, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_replays_dropout(device, use_reentrant):
    p = problem((9, 48, 64, 4), torch.float32, device)
    plain = _run(p, 0.4)
    leaves = {n: p[n].detach().clone().requires_grad_() for n in ("x", "lora_A", "lora_B", "bias")}
    torch.manual_seed(7)
    y = torch.utils.checkpoint.checkpoint(
        lambda x, A, B, b: lowbit.lora_matmul(x, p["w"], A, B, 2.0, bias=b, dropout_p=0.4),
        *leaves.values(),
        use_reentrant=use_reentrant,
    )
    y.backward(p["dy"])
    assert_bitwise_equal(y.detach(), plain["y"], "y")
    for name, leaf in leaves.items():
        assert_bitwise_equal(leaf.grad, plain[f"d_{name}"], f"d_{name}")


@pytest.mark.parametrize("scaling", [2.0, "vector"])
def test_mixed_adapters_equal_one_call_per_adapter(device, scaling):
    p = problem((12, 48, 64, 4), torch.float32, device)
    A, B = torch.randn(3, 4, 64, device=device), torch.randn(3, 48, 4, device=device)
    scales = torch.tensor([0.5, 1.0, 2.0], device=device) if scaling == "vector" else scaling
    index = torch.tensor([0, 1, 2, -1] * 3, device=device, dtype=torch.int32)
    leaves = [t.requires_grad_() for t in (p["x"], A, B)]
    y = lowbit.lora_matmul(p["x"], p["w"], A, B, scales, bias=p["bias"], adapter_index=index)
    grads = torch.autograd.grad(y, leaves, p["dy"])
    expected = []
    for m, i in enumerate(index.tolist()):
        s = float(scales[i]) if scaling == "vector" else scaling
        row = p["x"][m : m + 1]
        base = lowbit.matmul(row, p["w"], p["bias"])
        expected.append(base if i < 0 else base + s * (row @ A[i].t()) @ B[i].t())
    expected = torch.cat(expected)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for name, a, b in zip(
        "xAB", grads, torch.autograd.grad(expected, leaves, p["dy"]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3, msg=lambda m, n=name: f"d_{n}: {m}")


def test_mixed_adapters_scale_float64_in_float64(device):
    p = problem((12, 48, 64, 4), torch.float32, device)
    A, B = torch.randn(2, 4, 64, device=device), torch.randn(2, 48, 4, device=device)
    index = torch.tensor([0, 1, -1] * 4, device=device)
    x, A, B = p["x"].double(), A.double(), B.double()
    exact = x @ lowbit.dequantize(p["w"], torch.float32).double().t()
    for i in range(2):
        exact += (index == i).unsqueeze(1) * ((x @ A[i].t() / 3) @ B[i].t())
    y = lowbit.lora_matmul(x, p["w"], A, B, 1 / 3, adapter_index=index)
    assert relative_rms(y, exact) < 1e-14


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32], ids=str)
def test_adapter_index_has_the_shape_of_the_rows(device, dtype):
    """[2, 3] and [6] for x [2, 3, K], of any integer type; [3, 2] would be other rows."""
    p = problem((6, 48, 64, 4), torch.float32, device)
    A, B = torch.randn(3, 4, 64, device=device), torch.randn(3, 48, 4, device=device)
    index = torch.tensor([0, 1, 2, 2, 1, 0], device=device)
    expected = lowbit.lora_matmul(p["x"], p["w"], A, B, 2.0, adapter_index=index)
    x, index = p["x"].view(2, 3, 64), index.to(dtype)
    for shape in ((6,), (2, 3)):
        y = lowbit.lora_matmul(x, p["w"], A, B, 2.0, adapter_index=index.view(shape))
        assert_bitwise_equal(y.view(6, 48), expected, "y")
    with pytest.raises(ValueError, match=r"one entry per row, \[6\] or \[2, 3\], got .* \[3, 2\]"):
        lowbit.lora_matmul(x, p["w"], A, B, 2.0, adapter_index=index.view(3, 2))


def test_mixed_adapters_drop_what_one_adapter_drops(device):
    """From the same seed: the mask of a row does not depend on its adapter."""
    p = problem((12, 48, 64, 4), torch.float32, device)
    A, B = torch.randn(3, 4, 64, device=device), torch.randn(3, 48, 4, device=device)
    index = torch.tensor([0, 1, 2, -1] * 3, device=device)

    def rows_of(adapter):
        torch.manual_seed(1)
        return lowbit.lora_matmul(p["x"], p["w"], A[adapter], B[adapter], 2.0, dropout_p=0.25)

    torch.manual_seed(1)
    y = lowbit.lora_matmul(p["x"], p["w"], A, B, 2.0, dropout_p=0.25, adapter_index=index)
    rows = [lowbit.matmul(p["x"], p["w"]), *(rows_of(i) for i in range(3))]
    expected = torch.stack(rows)[index + 1, torch.arange(12, device=device)]
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("index", [[0, 3, -1], [-2, 0, 1]], ids=str)
def test_an_adapter_that_is_not_there(device, index):
    """An error where looking costs nothing; in a traced graph and on a GPU, the base weight."""
    p = problem((3, 48, 64, 4), torch.float32, device)
    A, B = torch.randn(3, 4, 64, device=device), torch.randn(3, 48, 4, device=device)
    index = torch.tensor(index, device=device)

    def run(x, index):
        return lowbit.lora_matmul(x, p["w"], A, B, 2.0, adapter_index=index)

    if device.type == "cpu":
        with pytest.raises(
            ValueError, match=r"adapter_index must lie in -1\.\.2, got -[12]\.\.[13]"
        ):
            run(p["x"], index)
        traced = torch.compile(run, fullgraph=True, backend="aot_eager")
    else:
        traced = run
    base = torch.where(index < 3, index, -1).clamp(min=-1)
    assert_bitwise_equal(traced(p["x"], index), run(p["x"], base), "y")
