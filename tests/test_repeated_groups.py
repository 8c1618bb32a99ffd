"""Groups and gated MLPs whose members' calls are like earlier ones (lowbit/repeated.py): the bits
of the checked call, and where members are checked after all.
"""

import contextlib
import types

import pytest
import torch
from library_on_cpu import Library
from repeated_case import BF16, assert_same
from torch.utils.checkpoint import checkpoint

import lowbit
from lowbit import gated_mlp, group_products, grouped, repeated
from lowbit.backends import cuda_direct

K, H, R = 256, 320, 16
WIDTHS = {"group": ((H, K), (K, K), (K, K)), "mlp": ((H, K), (H, K), (K, H))}


class Case:
    """Operands of a function, and how its members went.

    Attributes:
        forward, backward: whether each call, and each backward pass, needed no check.
    """

    def __init__(self, kind, device, monkeypatch, shape=(2, 4, K), bias=True):
        def randn(*shape):
            return (torch.randn(shape, device=device) / shape[-1] ** 0.5).to(BF16)

        monkeypatch.setattr(repeated, "_calls", {})
        monkeypatch.setattr(cuda_direct, "accepted", set())
        self.library = Library(monkeypatch) if device.type == "cpu" else None
        self.function = {"group": lowbit.lora_matmul_group, "mlp": lowbit.lora_gated_mlp}[kind]
        widths = WIDTHS[kind]
        self.x = torch.randn(shape, device=device).to(BF16).requires_grad_()
        self.weights = [lowbit.quantize(randn(*width)) for width in widths]
        self.lora_As = [randn(R, k).requires_grad_() for _, k in widths]
        self.lora_Bs = [randn(n, R).requires_grad_() for n, _ in widths]
        biases = [randn(n).requires_grad_() for n, _ in widths]
        self.biases = [biases[0], None, biases[2]] if bias else None
        ends = widths if kind == "group" else widths[-1:]
        self.dys = [torch.randn(*shape[:-1], n, device=device).to(BF16) for n, _ in ends]
        self.forward, self.backward = [], []
        find, run = grouped.found_members, group_products._repeated_backward

        def found_members(*args):
            members = find(*args)
            self.forward.append(members is not None)
            return members

        def repeated_backward(*args):
            results = run(*args)
            self.backward.append(results is not None)
            return results

        monkeypatch.setattr(grouped, "found_members", found_members)
        monkeypatch.setattr(gated_mlp, "found_members", found_members)
        monkeypatch.setattr(group_products, "_repeated_backward", repeated_backward)

    def leaves(self):
        leaves = [self.x, *self.lora_As, *self.lora_Bs, *(self.biases or ())]
        return [t for t in leaves if t is not None and t.requires_grad]

    def ys(self, x=None, **changes):
        names = ("weights", "lora_As", "lora_Bs")
        arguments = [changes.pop(name, getattr(self, name)) for name in names]
        options = {"scalings": 2.0, "biases": self.biases} | changes
        ys = self.function(self.x if x is None else x, *arguments, **options)
        return ys if isinstance(ys, tuple) else (ys,)

    def step(self, **changes):
        return self.results(self.ys(**changes))

    def results(self, ys):
        gradients = torch.autograd.grad(ys, self.leaves(), self.dys, allow_unused=True)
        return *(y.detach() for y in ys), *gradients

    def warm(self):
        """The results of a call that was checked, when the next one needs it no more."""
        first = self.step()
        assert_same(self.step(), first)
        assert_same(self.step(), first)
        assert self.forward == [False, True, True]
        assert not self.backward[0]
        assert self.backward[-1]
        self.forward.clear()
        self.backward.clear()
        return first


@pytest.fixture
def any_case(device, monkeypatch):
    if device.type == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels are compiled for capability 9.0")
    return lambda kind, **options: Case(kind, device, monkeypatch, **options)


@pytest.fixture(params=["group", "mlp"])
def case(request, any_case):
    return lambda **options: any_case(request.param, **options)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(8, K), (2, 4, K), (1, 100, K), (K,)])
def test_the_same_bits_without_a_check(case, shape, bias):
    case = case(shape=shape, bias=bias)
    case.warm()
    case.weights[1] = lowbit.quantize(torch.randn(case.weights[1].shape, device=case.x.device))
    expected = case.step()
    assert_same(case.step(), expected)
    assert case.forward == [False, True]


def test_without_gradients(case):
    case = case()
    with torch.no_grad():
        first, second = case.ys(), case.ys()
    assert case.forward == [False, True]
    assert not any(y.requires_grad for y in second)
    assert_same(second, first)


@pytest.mark.parametrize("frozen", ["x", "lora_As", "lora_Bs", "biases", "first", "x lora_As"])
def test_only_what_is_needed_gets_a_gradient(case, frozen):
    case = case()
    case.warm()
    for name in frozen.split():
        if name == "first":
            some = [case.lora_As[0], case.lora_Bs[0], case.biases[0]]
        else:
            some = [case.x] if name == "x" else getattr(case, name)
        for tensor in some:
            if tensor is not None:
                tensor.requires_grad_(False)
    actual = case.step()
    assert case.forward == [True]
    assert case.backward[-1] is ("lora_As" not in frozen)  # then x is not kept
    repeated._calls.clear()
    assert_same(actual, case.step())
    assert case.forward == [True, False]


def test_outputs_that_nobody_used(any_case):
    case = any_case("group")
    case.warm()

    def gradients():
        return torch.autograd.grad(case.ys()[1], case.leaves(), case.dys[1], allow_unused=True)

    actual = gradients()
    assert (case.forward, case.backward) == ([True], [True])
    repeated._calls.clear()
    expected = gradients()
    assert [g is None for g in actual] == [g is None for g in expected]
    pairs = [(a, b) for a, b in zip(actual, expected, strict=True) if a is not None]
    assert_same(*zip(*pairs, strict=True))


def test_members_beside_one_that_the_library_does_not_serve_are_checked(case, monkeypatch):
    """And nobody chooses a function to remember for them in every call."""
    case, chosen = case(), []
    select = repeated.dispatch.select
    spy = types.SimpleNamespace(**vars(repeated.dispatch))
    spy.select = lambda *args, **options: chosen.append(args[0]) or select(*args, **options)
    monkeypatch.setattr(repeated, "dispatch", spy)
    n, k = case.weights[1].shape
    case.weights[1] = lowbit.quantize(torch.randn(n, k, device=case.x.device), blocksize=32)
    expected = case.step()
    assert len(chosen) > 0
    chosen.clear()
    assert_same(case.step(), expected)
    assert case.forward == [False, False]
    assert not chosen


CHANGES = {
    "dropout": lambda case: {"dropout_p": [0.0, 0.5, 0.0]},
    "a vector": lambda case: {"scalings": [2.0, torch.ones(R, device=case.x.device), 2.0]},
    "no adapter": lambda case: {
        name: [*getattr(case, name)[:2], None] for name in ("lora_As", "lora_Bs")
    },
    "fp32 adapters": lambda case: {"lora_As": [A.float() for A in case.lora_As]},
    "a view": lambda case: {"x": case.x[:1]},
    "strides": lambda case: {"x": case.x.mT.contiguous().mT},
    "a factor with strides": lambda case: {"lora_Bs": [B.mT.contiguous().mT for B in case.lora_Bs]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_differs_is_checked(case, change):
    case = case()
    case.warm()
    with torch.no_grad():
        changes = CHANGES[change](case)
    case.ys(**changes)
    assert case.forward == [False]


ERRORS = {
    "no dimensions": (lambda case: {"x": case.x.sum()}, ValueError, "x must be"),
    "no weights": (lambda case: {"weights": []}, ValueError, "weights must"),
    "dropout_p": (lambda case: {"dropout_p": [0.0, 0.0]}, ValueError, "dropout_p must have one"),
    "no dropout_p": (lambda case: {"dropout_p": None}, TypeError, "dropout_p must be a number"),
    "scalings": (lambda case: {"scalings": [2.0, 2.0]}, ValueError, "scalings must have one"),
    "no number": (lambda case: {"scalings": "a"}, TypeError, "scaling must be a number"),
    "biases": (lambda case: {"biases": [None]}, ValueError, "biases must have one"),
    "no biases": (lambda case: {"biases": []}, ValueError, "biases must have one"),
    "lora_As": (lambda case: {"lora_As": [None] * 3}, ValueError, "must both be given"),
    "no lora_As": (lambda case: {"lora_As": None}, TypeError, "lora_As must be a list"),
    "a weight alone": (lambda case: {"weights": case.weights[0]}, TypeError, "weights must be a"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_wrong_arguments_are_still_named(case, what):
    case = case()
    case.warm()
    changed, error, message = ERRORS[what]
    changes = changed(case)
    with pytest.raises(error, match=message):
        case.ys(**changes)


def test_hooks_of_saved_tensors_see_the_same_of_any_call(case):
    case = case()
    seen = []

    def shapes():
        seen.clear()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: seen.append(tuple(t.shape)) or t, lambda t: t
        ):
            case.step()
        return list(seen)

    expected = shapes()
    case.warm()
    assert shapes() == expected
    assert case.forward == []


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(case, use_reentrant):
    case = case()
    expected = case.warm()

    def checkpointed():
        ys = checkpoint(lambda x: case.ys(x), case.x, use_reentrant=use_reentrant)
        leaves = case.leaves()
        torch.autograd.backward(ys, case.dys)
        gradients = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return *(y.detach() for y in ys), *gradients

    for _ in range(3):
        assert_same(checkpointed(), expected)
    assert any(case.forward) is use_reentrant


def test_what_the_library_refuses_goes_to_the_operator(case, monkeypatch):
    """The whole pass where a part of it was refused; dx is not added to twice."""
    case = case(shape=(8, K))
    if case.library is None:
        pytest.skip("the library here refuses nothing of this")
    expected = case.warm()
    case.library.refuses = True
    assert_same(case.step(), expected)
    assert (case.forward, case.backward[-1]) == ([True], False)
    case.library.refuses = False
    for call in repeated._calls.values():
        key, run = call.backward
        passes = []

        def refuse_second(*args, run=run, passes=passes):
            passes.append(args)
            return None if len(passes) == 2 else run(*args)

        call.backward = key, refuse_second
    assert_same(case.step(), expected)


def test_an_adapter_changed_in_place_is_an_error(case):
    case = case()
    case.warm()
    ys = case.ys()
    with torch.no_grad():
        case.lora_As[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        case.results(ys)


def test_a_weight_that_moves_before_the_backward_pass(case):
    case = case()
    expected = case.warm()
    ys = case.ys()
    for weight in case.weights:
        weight.qweight.data = weight.qweight.data.clone()
    assert_same(case.results(ys), expected)
    assert not case.backward[0]


def test_results_may_be_changed_in_place(case):
    case = case()
    case.warm()
    for y in case.ys():
        y.mul_(2)
    assert case.forward == [True]


def test_second_derivatives_are_refused(case):
    case = case()
    case.warm()
    (dx,) = torch.autograd.grad(case.ys(), [case.x], case.dys, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_batched_gradients_go_by_the_operators(case):
    case = case(shape=(8, K))
    case.warm()
    ys, stacked = case.ys(), [torch.stack([dy, dy]) for dy in case.dys]
    with contextlib.suppress(RuntimeError):  # an operator without a rule for it
        torch.autograd.grad(ys, [case.x], stacked, is_grads_batched=True)
    assert case.backward
    assert not any(case.backward)
