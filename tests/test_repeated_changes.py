"""Repeated calls of lora_matmul under gradient checkpointing, of layers whose state changes, and
from several threads.
"""

import contextlib
import threading

import pytest
import torch
from repeated_case import BF16, K, N, R, RepeatedCase, assert_same
from torch.utils.checkpoint import checkpoint

import lowbit
from lowbit import calls, dispatch, repeated
from lowbit.backends import cuda_direct

SHAPES = [(8, K), (2, 4, K), (1, 1, K), (2, 2, 2, K), (K,)]


@pytest.fixture
def layer(device, monkeypatch):
    if device.type == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels are compiled for capability 9.0")
    return lambda **options: RepeatedCase(device, monkeypatch, **options)


def forget():
    repeated._calls.clear()
    cuda_direct.accepted.clear()


@pytest.mark.parametrize("trains_x", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_hooks_of_saved_tensors_see_the_same_of_any_call(layer, shape, trains_x):
    case = layer(shape=shape)
    case.x.requires_grad_(trains_x)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        for _ in range(3):
            packed.append([])
            case.y()
    assert case.unchecked == [False, True, True]
    seen = [(t.shape, t.dtype, t.stride()) if isinstance(t, torch.Tensor) else t for t in packed]
    assert seen[0] == []
    assert seen[1:3] == seen[4:6] == seen[7:9]
    assert len(seen) == 9
    assert packed[1].data_ptr() == packed[7].data_ptr() == case.x.data_ptr()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trains_x", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_checkpointing_compares_any_call_with_any_other(layer, shape, trains_x, bias):
    """The first pass is checked and the recomputation is not; neither is; the recomputation is."""
    case = layer(shape=shape, bias=bias)
    case.x.requires_grad_(trains_x)
    leaves = [t for t in case.leaves() if t.requires_grad]
    expected = torch.autograd.grad(case.y(), leaves, case.dy)
    for use_reentrant in (False, True) if trains_x else (False,):
        forget()
        case.unchecked.clear()
        for forgets in (False, False, True):
            for leaf in leaves:
                leaf.grad = None
            y = checkpoint(lambda x: case.y(x=x), case.x, use_reentrant=use_reentrant)
            if forgets:
                forget()
            y.backward(case.dy)
            assert_same([leaf.grad for leaf in leaves], expected)
        # Reentrant checkpointing begins without gradients, which is another call.
        assert case.unchecked == [False, not use_reentrant, True, True, True, False]


@pytest.mark.parametrize("shape", SHAPES)
def test_an_input_changed_in_place_is_an_error(layer, shape):
    case = layer(shape=shape)
    case.warm()
    x = case.x * 1
    y = case.y(x=x)
    x.add_(1)
    assert case.unchecked == [True]
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        torch.autograd.grad(y, case.leaves(), case.dy)


def widened(t):
    return t.float() if t.shape[-1] == K else t


class _Wrapped(torch.Tensor):
    pass


HOOKS = {
    "another dtype": widened,
    "columns": lambda t: t.t().contiguous().t(),
    "columns of x": lambda t: t.t().contiguous().t() if t.shape[-1] == K else t,
    "columns of z": lambda t: t.t().contiguous().t() if t.shape[-1] == R else t,
    "a subclass": lambda t: t.as_subclass(_Wrapped),
}


@pytest.mark.parametrize("changed", HOOKS.values(), ids=HOOKS)
def test_what_hooks_put_in_place_is_never_taken_for_granted(layer, changed):
    """The operator decides; it refuses some of it."""
    case = layer(shape=(8, K))
    case.warm()
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, changed):
            y = case.y()
        before = case.checked_backward
        with contextlib.suppress(RuntimeError, TypeError, ValueError):
            torch.autograd.grad(y, case.leaves(), case.dy)
        assert case.checked_backward == before + 1
    assert case.unchecked == [True, True]
    case.step()
    assert case.checked_backward == before + 1


def test_what_the_library_cannot_read_is_not_remembered(layer, monkeypatch):
    """Even if an operator takes it."""
    case = layer(shape=(8, K))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, widened):
        case.y()
        y = case.y()
    assert case.unchecked == [False, True]
    monkeypatch.setattr(calls, "gradients", lambda *args: (case.x, None, None, None, None))
    for expected in (1, 2):
        torch.autograd.grad(y, case.x, case.dy, retain_graph=True)
        assert case.checked_backward == expected


def test_a_backend_forced_for_the_backward_pass_is_taken(layer):
    case = layer()
    case.warm()
    y = case.y()
    for forced in (contextlib.nullcontext(), dispatch.force("reference")):
        before = case.checked_backward
        with forced:
            torch.autograd.grad(y, case.leaves(), case.dy, retain_graph=True)
    assert case.checked_backward == before + 1


@pytest.mark.parametrize("name", ["absmax", "nested_absmax", "codebook", "nested_codebook"])
def test_a_weight_that_has_become_shorter_is_checked(layer, name):
    case = layer()
    case.warm()
    y = case.y()
    part = getattr(case.q, name)
    part.data = part.data[:-1]  # the same address
    with contextlib.suppress(RuntimeError, ValueError):
        torch.autograd.grad(y, case.leaves(), case.dy)
    assert case.checked_backward == 2
    case.unchecked.clear()
    with contextlib.suppress(RuntimeError, ValueError):
        case.y()
    assert case.unchecked in ([False], [])


# ---- modules


@pytest.fixture
def module(layer):
    """(a case, for its library; QLoRALinear; x; dy)."""
    case = layer()
    made = lowbit.nn.QLoRALinear.from_quantized(
        case.q, case.dy[0, 0].clone(), lora_A=case.lora_A, lora_B=case.lora_B, alpha=32
    )
    return case, made


def module_step(case, module):
    leaves = [case.x, *(p for p in module.parameters() if p.requires_grad)]
    y = module(case.x)
    return y.detach(), *torch.autograd.grad(y, leaves, case.dy, allow_unused=True)


def set_data(name, value):
    def change(module):
        getattr(module, name).data = value(getattr(module, name).data)

    return change


def load(module):
    module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()})


def replaced(module):
    module.lora_A = torch.nn.Parameter(module.lora_A.detach() * 2)


def scale_in_place(module):
    with torch.no_grad():
        module.lora_A.mul_(2)
        module.weight_absmax.copy_(module.weight_absmax.roll(1))


STATES = {
    "disabled": lambda m: setattr(m, "adapter_enabled", False),
    "merged": lambda m: m.merge(),
    "merged and back": lambda m: (m.merge(), m.unmerge()),
    "loaded": load,
    "an adapter replaced": replaced,
    "changed in place": scale_in_place,
    "the weight elsewhere": set_data("weight", torch.clone),
    "the scales elsewhere": set_data("weight_absmax", torch.clone),
    "an adapter elsewhere": set_data("lora_B", torch.clone),
    "an adapter of another dtype": set_data("lora_A", torch.Tensor.float),
    "an adapter by columns": set_data("lora_A", lambda t: t.t().contiguous().t()),
    "a frozen adapter": lambda m: m.lora_A.requires_grad_(False),
    "all frozen": lambda m: m.requires_grad_(False),
    "a trained bias": lambda m: m.bias.requires_grad_(True),
    "no bias": lambda m: setattr(m, "bias", None),
    "another scale": lambda m: setattr(m, "alpha", 8),
    "dropout": lambda m: setattr(m, "dropout", 0.5),
    "evaluated": lambda m: m.eval(),
    "another adapter's rank": lambda m: (set_data("lora_A", lambda t: t[:8].clone())(m),
                                         set_data("lora_B", lambda t: t[:, :8].clone())(m)),
}  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_a_layer_may_change_between_calls(module, state):
    case, made = module
    for _ in range(3):
        module_step(case, made)
    STATES[state](made)
    results = []
    for forgets in (False, False, False, True):
        if forgets:
            forget()
        torch.manual_seed(1)
        results.append(module_step(case, made))
    for actual in results[:-1]:
        for mine, expected in zip(actual, results[-1], strict=True):
            assert (mine is None) == (expected is None)
        assert_same(*([t for t in r if t is not None] for r in (actual, results[-1])))


def test_hooks_of_modules_and_tensors_run(module):
    case, made = module
    seen = []
    made.register_forward_hook(lambda *_: seen.append("forward"))
    made.register_full_backward_hook(lambda *_: seen.append("backward"))
    made.lora_A.register_hook(lambda gradient: gradient * 2)
    first, second, third = (module_step(case, made) for _ in range(3))
    assert case.unchecked == [False, True, True]
    assert_same(second, first)
    assert_same(third, first)
    assert seen == ["forward", "backward"] * 3


# ---- states of the process


def test_modes_that_alternate(layer):
    """Each finds its own call: no gradients, autocast, deterministic algorithms, other tokens."""
    case = layer()
    expected = case.warm()
    on = case.x.device.type
    x = case.x.detach().float()
    half = {"lora_A": case.lora_A.detach().half(), "lora_B": case.lora_B.detach().half()}
    for _ in range(3):
        with torch.no_grad():
            assert not case.y().requires_grad
        with torch.inference_mode():
            assert case.y().is_inference()
        with torch.autocast(on, BF16):
            assert_same([case.y(x=x)], expected[:1])
        with torch.autocast(on, torch.float16):
            assert case.y(x=x, **half).dtype == torch.float16
        assert case.y(x=case.x[:1]).shape == (1, 4, N)
        torch.use_deterministic_algorithms(True)
        try:
            assert_same(case.step(), expected)
        finally:
            torch.use_deterministic_algorithms(False)
        assert_same(case.step(), expected)


def test_threads(layer):
    case = layer()
    case.warm()
    xs = [torch.randn(1 + i % 2, 4, K, device=case.x.device).to(BF16) for i in range(6)]
    adapters = [(case.lora_A.detach() * i, case.lora_B.detach()) for i in range(6)]

    def step(i):
        x, *adapter = leaves = [t.clone().requires_grad_() for t in (xs[i], *adapters[i])]
        y = lowbit.lora_matmul(x, case.q, *adapter, 2.0)
        return y.detach(), *torch.autograd.grad(y.square().sum(), leaves)

    expected = [step(i) for i in range(6)]
    forget()
    results = [[] for _ in expected]

    def work(i):
        for _ in range(8):
            results[i].append(step(i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, right in zip(results, expected, strict=True):
        assert len(mine) == 8
        for actual in mine:
            assert_same(actual, right)


def test_layers_that_differ_in_one_thing_are_beside_each_other(layer):
    case = layer()
    A, B = case.lora_A.detach(), case.lora_B.detach()
    larger = lowbit.quantize(torch.randn(N, K).to(case.x), blocksize=128)
    kinds = [
        (case.q, A, B),
        (larger, A, B),
        (case.q, A[: R // 2].clone(), B[:, : R // 2].clone()),
        (case.q, A.float(), B),
        (case.q, A, B.float()),
    ]
    for i in range(3):
        case.unchecked.clear()
        for w, lora_A, lora_B in kinds:
            case.y(w=w, lora_A=lora_A, lora_B=lora_B)
        assert case.unchecked == [i > 0] * len(kinds)
        assert len(repeated._calls) == len(kinds)


def test_what_hooks_turn_is_not_taken_for_the_same(layer):
    """As many elements in another shape."""
    case = layer(shape=(8, K))
    case.warm()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.t().contiguous()):
        y = case.y()
    with contextlib.suppress(RuntimeError, TypeError, ValueError):
        torch.autograd.grad(y, case.leaves(), case.dy)
    assert case.checked_backward == 2


def test_an_adapter_of_another_shape_is_refused(layer):
    """Also where it has as many elements."""
    case = layer(shape=(8, K))
    case.warm()
    y = case.y()
    r = case.lora_A.shape[0]
    case.lora_A.data = case.lora_A.data.reshape(2 * r, K // 2)
    with pytest.raises((RuntimeError, ValueError)):
        torch.autograd.grad(y, case.leaves(), case.dy)


def test_batched_gradients(layer):
    """torch's older vmap, under which backward finds tensors without memory of their own."""
    case = layer(shape=(8, K))
    case.warm()
    y = case.y()
    dys = torch.stack([case.dy, 2 * case.dy])
    batched = torch.autograd.grad(y, case.leaves(), dys, retain_graph=True, is_grads_batched=True)
    for i, dy in enumerate(dys):
        single = torch.autograd.grad(y, case.leaves(), dy, retain_graph=True)
        assert_same([gradient[i] for gradient in batched], single)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_is_of_the_operator(layer):
    case = layer(shape=(8, K))
    frozen = {"lora_A": case.lora_A.detach(), "lora_B": case.lora_B.detach()}
    x = case.x.detach()
    for _ in range(3):
        case.y(x=x, **frozen)
    traced = torch.jit.trace(lambda x: case.y(x=x, **frozen), x, check_trace=False)
    assert_same([traced(2 * x)], [case.y(x=2 * x, **frozen)])


def test_second_derivatives_of_a_repeated_call_are_refused(layer):
    case = layer()
    case.warm()
    (dx,) = torch.autograd.grad(case.y().sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()
