"""Calls of lora_matmul like an earlier one: the same bits without a check, and what is checked."""

import contextlib

import pytest
import torch
from helpers import assert_bitwise_equal
from repeated_case import BF16, K, N, R, RepeatedCase, assert_same
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import lowbit
from lowbit import dispatch, repeated
from lowbit.weight import WeightArgs


@pytest.fixture
def layer(device, monkeypatch):
    if device.type == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels are compiled for capability 9.0")
    return lambda **options: RepeatedCase(device, monkeypatch, **options)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(8, K), (2, 4, K), (1, K), (K,)])
def test_the_same_bits_without_a_check(layer, shape, bias):
    case = layer(shape=shape, bias=bias)
    case.warm()
    other = lowbit.quantize(torch.randn(N, K, device=case.x.device))
    expected = case.step(w=other)
    assert_same(case.step(w=other), expected)
    assert (case.unchecked, case.checked_backward) == ([False, True], 1)


@pytest.mark.parametrize("shape", [(0, K), (2, 0, K)])
def test_no_tokens(layer, shape):
    case = layer(shape=shape)
    for _ in range(2):
        y, dx, d_A, d_B = case.step()
        assert (y.shape, dx.shape) == ((*shape[:-1], N), shape)
        assert not d_A.any()
        assert not d_B.any()
    assert case.unchecked == [False, False]


def test_without_gradients(layer):
    case = layer()
    with torch.no_grad():
        first, second = case.y(), case.y()
    assert case.unchecked == [False, True]
    assert not second.requires_grad
    assert_bitwise_equal(second, first)


@pytest.mark.parametrize(
    "trained", ["x", "lora_A", "lora_B", "bias", "lora_A lora_B", "x lora_A lora_B bias"]
)
@pytest.mark.parametrize("later", ["more", "less"])
def test_what_is_trained_may_change(layer, trained, later):
    """That needs no check: of the others there is no gradient, and none is computed."""
    case = layer(bias=True)
    names = ["x", "lora_A", "lora_B", "bias"]

    def train(some):
        for name in names:
            getattr(case, name).requires_grad_(name in some)

    def trained_gradients(some):
        train(some)
        leaves = [getattr(case, name) for name in names if name in some]
        return torch.autograd.grad(case.y(), leaves, case.dy)

    settled, some = names, trained.split()
    if later == "more":
        settled, some = some, settled
    trained_gradients(settled)
    trained_gradients(settled)
    (call,) = repeated._calls.values()
    (key, run), made = call.backward, []
    call.backward = key, lambda *args: made.append(run(*args)) or made[-1]
    actual = trained_gradients(some)
    assert (case.unchecked, case.checked_backward) == ([False, True, True], 1)
    assert [gradient is not None for gradient in made[0][:4]] == [name in some for name in names]
    repeated._calls.clear()
    assert_same(actual, trained_gradients(some))
    assert case.unchecked[-1] is False


def test_only_what_is_needed_gets_a_gradient(layer):
    case = layer()
    case.lora_A.requires_grad_(False)
    y, z = case.y(), case.y()
    for result in (y, z, z):
        gradients = torch.autograd.grad(result, [case.x, case.lora_B], case.dy, retain_graph=True)
        if result is y:
            first = gradients
        assert_same(gradients, first)
    assert case.unchecked == [False, True]


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _Wrapped(torch.Tensor):
    pass


def _wrapped(q):
    parts = q.args()._asdict()
    return WeightArgs(**parts | {"absmax": parts["absmax"].as_subclass(_Wrapped)})


CHANGES = {
    "more tokens": lambda c: {"x": torch.cat([c.x, c.x])},
    "columns of a larger x": lambda c: {"x": torch.cat([c.x, c.x], dim=-1)[..., :K]},
    "another dtype": lambda c: {"x": c.x.float(), "bias": None},
    "a subclass": lambda c: {"lora_B": c.lora_B.detach().as_subclass(_Wrapped).requires_grad_()},
    "a weight of a subclass": lambda c: {"w": _wrapped(c.q)},
    "fp32 adapters": lambda c: {"lora_A": torch.nn.Parameter(c.lora_A.detach().float())},
    "another rank": lambda c: {"lora_A": c.lora_A[:8], "lora_B": c.lora_B[:, :8]},
    "fp32 scales": lambda c: {"w": lowbit.quantize(torch.ones(N, K).to(c.x), double_quant=False)},
    "larger blocks": lambda c: {"w": lowbit.quantize(torch.ones(N, K).to(c.x), blocksize=128)},
    "a bias": lambda c: {"bias": torch.ones(N).to(c.x)},
    "a vector": lambda c: {"scaling": torch.full((R,), 2.0, device=c.x.device)},
    "a scaling of another type": lambda c: {"scaling": 2},
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_differs_is_checked(layer, change):
    case = layer()
    case.warm()
    changes = CHANGES[change](case)
    if change == "another dtype":
        changes |= {"lora_A": case.lora_A.float(), "lora_B": case.lora_B.float()}
    y = case.y(**changes)
    assert True not in case.unchecked
    repeated._calls.clear()
    assert_bitwise_equal(y, case.y(**changes))


SURROUNDINGS = {
    "a mode": lambda c: _Mode(),
    "forward derivatives": lambda c: forward_ad.dual_level(),
    "a forced backend": lambda c: dispatch.force("reference"),
    "no gradients": lambda c: torch.no_grad(),
    "inference": lambda c: torch.inference_mode(),
    "autocast": lambda c: torch.autocast(c.x.device.type, torch.float16),
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_where_something_may_intercept_calls_are_checked(layer, surroundings):
    case = layer()
    case.warm()
    with SURROUNDINGS[surroundings](case):
        if surroundings == "autocast":
            case.lora_A, case.lora_B = case.lora_A.half(), case.lora_B.half()
        case.y()
    assert True not in case.unchecked


def test_transforms_are_not_passed_by(layer):
    case = layer()
    case.warm()
    with contextlib.suppress(RuntimeError):  # whether the operation can be mapped is another matter
        torch.func.vmap(lambda _: case.y())(torch.ones(2, device=case.x.device))
    assert True not in case.unchecked


def test_a_mode_in_the_backward_pass_sees_the_operator(layer):
    case = layer()
    case.warm()
    y = case.y()
    with _Mode():
        torch.autograd.grad(y, case.leaves(), case.dy)
    assert case.checked_backward == 2


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be"),
        ({"x": torch.ones(2, 4, K - 1, dtype=BF16)}, ValueError, "x must be"),
        ({"lora_A": torch.ones(R, K - 1, dtype=BF16)}, ValueError, "lora_A must be"),
        ({"lora_B": torch.ones(N - 1, R, dtype=BF16)}, ValueError, "lora_B must be"),
        ({"bias": torch.ones(N - 1, dtype=BF16)}, ValueError, "bias must be"),
        ({"w": "a string"}, TypeError, "w must be"),
    ],
)
def test_wrong_arguments_are_still_named(layer, changes, error, message):
    case = layer()
    case.warm()
    on = case.x.device
    moved = {k: v.to(on) if isinstance(v, torch.Tensor) else v for k, v in changes.items()}
    with pytest.raises(error, match=message):
        case.y(**moved)


@pytest.mark.parametrize("shape", [(8, K), (2, 4, K)])
def test_the_result_may_be_changed_in_place(layer, shape):
    case = layer(shape=shape)
    case.warm()
    expected = torch.autograd.grad(case.y().relu(), case.leaves(), case.dy)
    assert_same(torch.autograd.grad(case.y().relu_(), case.leaves(), case.dy), expected)
    if case.library is not None:
        case.library.refuses = True
        assert_same(torch.autograd.grad(case.y().relu_(), case.leaves(), case.dy), expected)


def test_what_the_library_refuses_goes_to_the_operator(layer):
    """A view that its loads cannot read."""
    case = layer()
    expected = case.warm()
    whole = torch.empty(case.x.numel() + 1, dtype=BF16, device=case.x.device)
    shifted = whole[1:].view(case.x.shape).copy_(case.x.detach()).requires_grad_()
    case.x = shifted
    if case.library is not None:
        case.library.refuses = True
    assert_same(case.step(), expected)
    assert case.unchecked == [True]


@pytest.mark.parametrize("shape", [(8, K), (2, 4, K), (K,)])
def test_saved_tensors_that_hooks_have_moved(layer, shape):
    case = layer(shape=shape)
    expected = case.warm()[1:]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, torch.clone):
        y = case.y()
    assert_same(torch.autograd.grad(y, case.leaves(), case.dy), expected)
    assert (case.unchecked, case.checked_backward) == ([True], 1)


def test_a_graph_is_used_twice_and_then_freed(layer):
    case = layer()
    expected = case.warm()[1:]
    y = case.y()
    assert_same(torch.autograd.grad(y, case.leaves(), case.dy, retain_graph=True), expected)
    assert_same(torch.autograd.grad(y, case.leaves(), case.dy), expected)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, case.leaves(), case.dy)


def test_second_derivatives_are_refused(layer):
    case = layer()
    case.warm()
    (dx,) = torch.autograd.grad(case.y().square().sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_an_adapter_changed_in_place_is_an_error(layer):
    case = layer()
    case.warm()
    y = case.y()
    with torch.no_grad():
        case.lora_B.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, case.leaves(), case.dy)


def test_a_weight_that_moves_before_the_backward_pass(layer):
    """As sharded parameters do, whose memory is freed in between."""
    case = layer()
    expected = case.warm()[1:]
    y = case.y()
    case.q.qweight.data = case.q.qweight.data.clone()
    assert_same(torch.autograd.grad(y, case.leaves(), case.dy), expected)
    assert case.checked_backward == 2


def test_a_graph_break_is_not_needed(layer):
    case = layer()
    case.warm()
    compiled = torch.compile(case.y, fullgraph=True, backend="aot_eager")
    assert_bitwise_equal(compiled(), case.y())
    assert case.unchecked == [True]


def test_calls_are_forgotten_in_time(layer, monkeypatch):
    monkeypatch.setattr(repeated, "_MOST_CALLS", 2)
    case = layer()
    for tokens in (1, 2, 3):
        case.y(x=case.x[:1, :tokens])
        assert len(repeated._calls) == (tokens if tokens < 3 else 1)
