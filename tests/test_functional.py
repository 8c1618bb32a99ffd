"""lowbit.matmul and lowbit.lora_matmul on every device: values, every gradient, and the contract
around them.
"""

import contextlib

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_bitwise_equal, assert_close_to_float64
from hypothesis import strategies as st
from torch._dynamo import compiled_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

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


def _problem(
    shape, dtype, device, *, bias=True, vector=False, double_quant=True, layout="rows", blocksize=64
):
    M, N, K, r = shape
    tensors = {
        "x": torch.randn(M, K),
        "lora_A": torch.randn(r, K) / K**0.5,
        "lora_B": torch.randn(N, r) / r**0.5,
        "bias": torch.randn(N) if bias else None,
        "dy": torch.randn(M, N),
    }
    out = {k: None if t is None else t.to(dtype).to(device) for k, t in tensors.items()}
    weight = (torch.randn(N, K) / K**0.5).to(device)
    options = {"double_quant": double_quant, "layout": layout, "blocksize": blocksize}
    out["w"] = lowbit.quantize(weight, **options).to(dtype=dtype)
    out["scaling"] = torch.rand(r, device=device) + 0.5 if vector else 2.0
    return out


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
    p = _problem(shape, dtype, device)
    _compare(_run(p), _formula(p, torch.float64), _formula(p, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"bias": False}, {"vector": True}, {"double_quant": False}, {"layout": "flat"}],
    ids=["no bias", "vector scaling", "plain absmax", "flat blocks"],
)
def test_options(device, options, dtype):
    p = _problem((33, 72, 100, 8), dtype, device, **options)
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
    p = _problem(shape, dtype, "cpu", blocksize=blocksize, layout=layout)
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
    p = _problem(shape, dtype, device)
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
    p = _problem((33, 72, 128, 8), dtype, device)
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
    p = _problem((17, 48, 64, 4), dtype, device)
    dense = p["w"].dequantize(dtype)
    _compare(_run(p, w=dense), _formula(p, torch.float64), _formula(p, dtype))
    y = lowbit.matmul(p["x"], dense, p["bias"])
    torch.testing.assert_close(y, torch.nn.functional.linear(p["x"], dense, p["bias"]))


def test_rows_do_not_depend_on_their_neighbours(device):
    p = _problem((40, 96, 256, 8), torch.bfloat16, device)
    first = _run(p)["y"]
    p["x"][1:] = torch.randn_like(p["x"][1:]) * 100
    assert_bitwise_equal(_run(p)["y"][0], first[0], "row 0")


def test_results_repeat_bit_for_bit(device):
    p = _problem((65, 100, 192, 16), torch.bfloat16, device)
    once, again = _run(p, 0.1), _run(p, 0.1)
    for name in once:
        assert_bitwise_equal(again[name], once[name], name)


def test_batch_shapes_strides_and_empty_inputs(device):
    p = _problem((24, 48, 64, 4), torch.float32, device)
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
    p = _problem((5, 48, 64, 4), dtype, device)
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
    p = _problem((5, 48, 64, 4), torch.float32, device)
    lora_B = p["lora_B"].requires_grad_()
    y = lowbit.lora_matmul(p["x"], p["w"], p["lora_A"], lora_B, 2.0)
    (grad,) = torch.autograd.grad(y.sum(), [lora_B])
    assert grad.shape == lora_B.shape
    assert p["x"].grad is None
    assert p["lora_A"].grad is None


def test_retain_graph_and_double_use(device):
    p = _problem((5, 48, 64, 4), torch.float32, device)
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
    p = _problem((5, 48, 64, 4), torch.float32, device)
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
    p = _problem((5, 48, 64, 4), torch.float32, device)
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
    p = _problem((M, 48, 64, 4), torch.float32, device)
    leaves = [p["lora_A"].requires_grad_(), p["lora_B"].requires_grad_()]
    with lowbit.dispatch.force(backend) if backend else contextlib.nullcontext():
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y = lowbit.lora_matmul(p["x"], p["w"], *leaves, 2.0).sum()
            gradients = torch.autograd.grad(y, leaves, retain_graph=True)
        for actual, expected in zip(gradients, torch.autograd.grad(y, leaves), strict=True):
            assert_bitwise_equal(actual, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_replays_dropout(device, use_reentrant):
    p = _problem((9, 48, 64, 4), torch.float32, device)
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


class _Recorder(TorchDispatchMode):
    """Names of the operators that run in its context."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_without_gradients_the_kernel_is_called_at_once(device):
    """The way past the registered operator gives the same bits; modes still see the operator."""
    q = lowbit.quantize(torch.randn(48, 128, device=device))
    x, bias = torch.randn(5, 128, device=device), torch.randn(48, device=device)
    lora_A = torch.nn.Parameter(torch.randn(4, 128, device=device))
    lora_B = torch.nn.Parameter(torch.randn(48, 4, device=device))

    def call():
        return lowbit.lora_matmul(x, q, lora_A, lora_B, 1.5, bias=bias), lowbit.matmul(x, q, bias)

    expected = call()  # the parameters record
    assert expected[0].requires_grad
    with torch.no_grad():
        direct = call()
        with _Recorder() as recorder:
            recorded = call()
    assert recorder.names == ["lowbit::lora_linear", "lowbit::linear"]
    for a, b, c in zip(direct, recorded, expected, strict=True):
        assert not a.requires_grad
        assert_bitwise_equal(a, c)
        assert_bitwise_equal(b, c)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_with_gradients_the_kernels_are_called_at_once(device, dropout_p):
    """The same bits as through the operators, which modes still see, backward too."""
    p = _problem((5, 48, 64, 4), torch.float32, device)
    vector = torch.rand(4, device=device) + 0.5
    leaves = [
        t.detach().clone().requires_grad_()
        for t in (p["x"], p["lora_A"], p["lora_B"], vector, p["bias"])
    ]

    def step():
        x, lora_A, lora_B, scaling, bias = leaves
        torch.manual_seed(3)
        y = lowbit.lora_matmul(x, p["w"], lora_A, lora_B, scaling, bias=bias, dropout_p=dropout_p)
        return y, *torch.autograd.grad(y, leaves, torch.ones_like(y))

    direct = step()
    with _Recorder() as recorder:
        recorded = step()
    assert [name for name in recorder.names if name.startswith("lowbit::lora")] == [
        "lowbit::lora_linear", "lowbit::lora_linear_backward",
    ]  # fmt: skip
    names = ("y", "d_x", "d_lora_A", "d_lora_B", "d_scaling", "d_bias")
    for name, a, b in zip(names, direct, recorded, strict=True):
        assert_bitwise_equal(a, b, name)


def test_only_leaves_that_ask_get_gradients(device):
    """Frozen adapters, an input without gradient, and a graph that is used twice."""
    p = _problem((5, 48, 64, 4), torch.float32, device)
    names = ("x", "lora_A", "lora_B", "bias")
    reference = None
    for wanted in [names, ("x",), ("lora_A", "lora_B"), ("lora_B",), ("bias",)]:
        leaves = {n: p[n].detach().clone().requires_grad_(n in wanted) for n in names}
        y = lowbit.lora_matmul(
            leaves["x"], p["w"], leaves["lora_A"], leaves["lora_B"], 2.0, bias=leaves["bias"]
        )
        y.backward(torch.ones_like(y), retain_graph=True)
        y.backward(torch.ones_like(y))
        grads = {n: leaf.grad for n, leaf in leaves.items()}
        reference = grads if reference is None else reference
        for name in names:
            if name in wanted:
                assert_bitwise_equal(grads[name], reference[name], name)
            else:
                assert grads[name] is None, name


@pytest.mark.parametrize("operators", [False, True])
@pytest.mark.parametrize("of", [torch.sum, lambda y: y.square().sum()], ids=["sum", "square"])
def test_second_derivatives_are_refused(device, of, operators):
    """Also where dy is a constant: dx depends on the adapter still."""
    p = _problem((5, 48, 64, 4), torch.float32, device)
    x = p["x"].detach().clone().requires_grad_()
    lora_A = p["lora_A"].detach().clone().requires_grad_()
    with FlopCounterMode(display=False) if operators else contextlib.nullcontext():
        y = lowbit.lora_matmul(x, p["w"], lora_A, p["lora_B"], 2.0)
        (dx,) = torch.autograd.grad(of(y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


@pytest.mark.parametrize("of", ["x", "lora_A", "lora_B", "bias"])
def test_derivatives_in_forward_mode_are_refused(device, of):
    """Not taken for zero."""
    p = _problem((5, 48, 64, 4), torch.float32, device)
    names = ("x", "lora_A", "lora_B", "bias")

    def single(value):
        x, A, B, bias = ({**p, of: value}[name] for name in names)
        return lowbit.lora_matmul(x, p["w"], A, B, 2.0, bias=bias)

    def mixed(value):
        x, A, B, bias = ({**p, of: value}[name] for name in names)
        index = torch.zeros(5, dtype=torch.int64, device=device)
        return lowbit.lora_matmul(x, p["w"], A[None], B[None], 2.0, bias=bias, adapter_index=index)

    def group(value):
        x, A, B, bias = ({**p, of: value}[name] for name in names)
        return lowbit.lora_matmul_group(x, [p["w"]], [A], [B], 2.0, biases=[bias])[0]

    # The tangent is of an outer level than the transform at work.
    one = torch.ones((), device=device)

    def inside_jvp(value):
        return torch.func.jvp(lambda v: single(value).sum() * v, (one,), (one,))[1]

    def inside_grad(value):
        return torch.func.grad(lambda v: single(value).sum() * v)(one)

    functions = [single, group, inside_jvp, inside_grad]
    for function in (*functions, mixed) if of in ("x", "bias") else functions:
        with pytest.raises(NotImplementedError, match="forward mode"):
            torch.func.jvp(function, (p[of],), (torch.ones_like(p[of]),))
    w = torch.ones(48, device=device)
    _, tangent = torch.func.jvp(lambda w: w * single(p[of]), (w,), (w,))  # of something else
    assert_bitwise_equal(tangent, single(p[of]))


@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev"])
def test_reverse_mode_of_torch_func_is_refused(device, transform):
    p = _problem((5, 48, 64, 4), torch.float32, device)
    x, A, B = (p[name].detach() for name in ("x", "lora_A", "lora_B"))

    def plain(x):
        return lowbit.matmul(x, p["w"]).sum()

    def single(x):
        return lowbit.lora_matmul(x, p["w"], A, B, 2.0).sum()

    def group(x):
        return lowbit.lora_matmul_group(x, [p["w"]], [A], [B], 2.0)[0].sum()

    trained = A.clone().requires_grad_()

    def each(x):
        rows = torch.func.vmap(lambda row: lowbit.lora_matmul(row, p["w"], trained, B, 2.0))
        return rows(x).sum()

    differentiate = {
        "grad": lambda function: torch.func.grad(function)(x),
        "vjp": lambda function: torch.func.vjp(function, x),
        "jacrev": lambda function: torch.func.jacrev(function)(x),
    }[transform]
    for function in (plain, single, group, each):
        with pytest.raises(NotImplementedError, match=r"use torch\.autograd\.grad"):
            differentiate(function)
    value = torch.func.grad(lambda v: single(x) * v)(torch.ones((), device=device))  # of another
    assert_bitwise_equal(value, single(x))


def test_a_gradient_of_x_alone_is_a_constant(device):
    p = _problem((5, 48, 64, 4), torch.float32, device)
    x = p["x"].detach().clone().requires_grad_()
    adapter = p["lora_A"].detach(), p["lora_B"].detach()
    y = lowbit.lora_matmul(x, p["w"], *adapter, 2.0)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert not dx.requires_grad


def test_batched_gradients(device):
    p = _problem((5, 48, 64, 4), torch.float32, device)
    leaves = [p[name].detach().clone().requires_grad_() for name in ("x", "lora_A", "lora_B")]
    x, lora_A, lora_B = leaves
    for _ in range(3):  # where calls like earlier ones are remembered, too
        y = lowbit.lora_matmul(x, p["w"], lora_A, lora_B, 2.0)
        dys = torch.randn(2, *y.shape, device=device)
        batched = torch.autograd.grad(y, leaves, dys, retain_graph=True, is_grads_batched=True)
        for i, dy in enumerate(dys):
            single = torch.autograd.grad(y, leaves, dy, retain_graph=True)
            for actual, expected in zip(batched, single, strict=True):
                torch.testing.assert_close(actual[i], expected)


def test_inference_mode_records_nothing_even_with_gradients_on(device):
    p = _problem((5, 48, 64, 4), torch.float32, device)
    lora_A = p["lora_A"].detach().clone().requires_grad_()
    args = p["x"].detach(), p["w"], lora_A, p["lora_B"].detach(), 2.0
    expected = lowbit.lora_matmul(*args)
    for _ in range(2):
        with torch.inference_mode(), torch.enable_grad():
            y = lowbit.lora_matmul(*args)
        assert not y.requires_grad
        torch.testing.assert_close(y, expected.detach())
    with torch.inference_mode(), torch.enable_grad():
        x, w, A, B, scaling = args
        (y,) = lowbit.lora_matmul_group(x.clone(), [w], [A], [B], scaling)
    torch.testing.assert_close(y, expected.detach())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_layer_computes(device):
    p = _problem((5, 48, 64, 4), torch.float32, device)
    adapter = p["lora_A"].detach(), p["lora_B"].detach()

    def layer(x):
        return lowbit.lora_matmul(x, p["w"], *adapter, 2.0)

    x, other = p["x"].detach(), torch.randn(5, 64, device=device)
    for _ in range(2):
        layer(x)
    traced = torch.jit.trace(layer, x, check_trace=False)
    torch.testing.assert_close(traced(other), layer(other))


def test_compiled_autograd(device):
    p = _problem((5, 48, 64, 4), torch.float32, device)
    leaves = [p[name].detach().clone().requires_grad_() for name in ("x", "lora_A", "lora_B")]
    x, lora_A, lora_B = leaves
    results = []
    for compiled in (False, True):
        y = lowbit.lora_matmul(x, p["w"], lora_A, lora_B, 2.0)
        compiler = torch.compile(backend="eager")
        with compiled_autograd._enable(compiler) if compiled else contextlib.nullcontext():
            y.square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
        for leaf in leaves:
            leaf.grad = None
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_saved_tensor_hooks_see_the_activations(device):
    """Offloading hooks can move what the step made, and leave the frozen weight where it is."""
    p = _problem((5, 48, 64, 4), torch.float32, device)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        lowbit.lora_matmul(p["x"].requires_grad_(), p["w"], p["lora_A"], p["lora_B"], 2.0)
    saved = {t.data_ptr() for t in packed}
    assert {p[name].data_ptr() for name in ("x", "lora_A", "lora_B")} <= saved
    assert (5, 4) in {tuple(t.shape) for t in packed}  # z
    assert p["w"].qweight.data_ptr() not in saved


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_compiles_without_graph_breaks(device, dropout_p):
    p = _problem((9, 48, 64, 4), torch.float32, device)

    def step(x, A, B):
        return lowbit.lora_matmul(x, p["w"], A, B, 2.0, bias=p["bias"], dropout_p=dropout_p).relu()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = [p[n].detach().clone().requires_grad_() for n in ("x", "lora_A", "lora_B")]
    torch.manual_seed(1)
    y = compiled(*leaves)
    grads = torch.autograd.grad(y.sum(), leaves)
    torch.manual_seed(1)
    eager = step(*leaves)
    if dropout_p == 0.0:
        assert_bitwise_equal(y, eager, "y")
        for name, a, b in zip("xAB", grads, torch.autograd.grad(eager.sum(), leaves), strict=True):
            assert_bitwise_equal(a, b, f"d_{name}")
    assert y.shape == eager.shape


@pytest.mark.parametrize("scaling", [2.0, "vector"])
def test_mixed_adapters_equal_one_call_per_adapter(device, scaling):
    p = _problem((12, 48, 64, 4), torch.float32, device)
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


def test_mixed_adapters_drop_what_one_adapter_drops(device):
    """From the same seed: the mask of a row does not depend on its adapter."""
    p = _problem((12, 48, 64, 4), torch.float32, device)
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
    p = _problem((3, 48, 64, 4), torch.float32, device)
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
