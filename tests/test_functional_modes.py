"""lowbit.lora_matmul under torch's modes: what is called and recorded, transforms, tracers and
compilers.
"""

import contextlib

import pytest
import torch
from functional_problem import problem
from helpers import assert_bitwise_equal
from torch._dynamo import compiled_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import lowbit


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
    p = problem((5, 48, 64, 4), torch.float32, device)
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
    p = problem((5, 48, 64, 4), torch.float32, device)
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
    p = problem((5, 48, 64, 4), torch.float32, device)
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
    p = problem((5, 48, 64, 4), torch.float32, device)
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
    p = problem((5, 48, 64, 4), torch.float32, device)
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
    p = problem((5, 48, 64, 4), torch.float32, device)
    x = p["x"].detach().clone().requires_grad_()
    adapter = p["lora_A"].detach(), p["lora_B"].detach()
    y = lowbit.lora_matmul(x, p["w"], *adapter, 2.0)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert not dx.requires_grad


def test_batched_gradients(device):
    p = problem((5, 48, 64, 4), torch.float32, device)
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
    p = problem((5, 48, 64, 4), torch.float32, device)
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
    p = problem((5, 48, 64, 4), torch.float32, device)
    adapter = p["lora_A"].detach(), p["lora_B"].detach()

    def layer(x):
        return lowbit.lora_matmul(x, p["w"], *adapter, 2.0)

    x, other = p["x"].detach(), torch.randn(5, 64, device=device)
    for _ in range(2):
        layer(x)
    traced = torch.jit.trace(layer, x, check_trace=False)
    torch.testing.assert_close(traced(other), layer(other))


def test_compiled_autograd(device):
    p = problem((5, 48, 64, 4), torch.float32, device)
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
    p = problem((5, 48, 64, 4), torch.float32, device)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        lowbit.lora_matmul(p["x"].requires_grad_(), p["w"], p["lora_A"], p["lora_B"], 2.0)
    saved = {t.data_ptr() for t in packed}
    assert {p[name].data_ptr() for name in ("x", "lora_A", "lora_B")} <= saved
    assert (5, 4) in {tuple(t.shape) for t in packed}  # z
    assert p["w"].qweight.data_ptr() not in saved


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_compiles_without_graph_breaks(device, dropout_p):
    p = problem((9, 48, 64, 4), torch.float32, device)

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
