"""Parameters stay away from hooks of saved tensors, and are looked after all the same."""

import pytest
import torch
from helpers import assert_bitwise_equal
from torch.utils.checkpoint import checkpoint

import lowbit
from lowbit import nn

K, H, TOKENS = 64, 128, 9


@pytest.fixture(params=["layer", "group", "MLP"])
def model(request, device):
    """(function of x, its modules' adapters)."""
    torch.manual_seed(0)
    owner = torch.nn.Module()
    sizes = {"gate_proj": (K, H), "up_proj": (K, H), "down_proj": (H, K)}
    for name, (inputs, outputs) in sizes.items():
        layer = nn.QLoRALinear(inputs, outputs, r=4).to(device)
        torch.nn.init.normal_(layer.lora_B, std=0.1)
        setattr(owner, name, layer)
    group = nn.QLoRAGroup(owner, ["gate_proj", "up_proj"])
    function = {
        "layer": owner.gate_proj,
        "group": lambda x: sum(group(x)),
        "MLP": nn.QLoRAGatedMLP(owner),
    }[request.param]
    return function, [p for p in owner.parameters() if p.requires_grad and p.dim() == 2]


def x_like(adapters):
    return torch.randn(TOKENS, K, device=adapters[0].device).requires_grad_()


def gradients(y, leaves, **options):
    return torch.autograd.grad(y.square().sum(), leaves, allow_unused=True, **options)


def assert_same(actual, expected):
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert (a is None) == (b is None)
        if a is not None:
            assert_bitwise_equal(a, b, f"gradient {i}")


def test_hooks_get_activations_but_no_parameter(model):
    function, adapters = model
    x = x_like(adapters)
    leaves = [x, *adapters]
    expected = gradients(function(x), leaves)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = function(x)
    addresses = {t.data_ptr() for t in packed}
    assert x.data_ptr() in addresses
    assert not addresses & {p.data_ptr() for p in adapters}
    assert_same(gradients(y, leaves, retain_graph=True), expected)
    assert_same(gradients(y, leaves), expected)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(y, leaves)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_under_checkpointing(model, use_reentrant):
    function, adapters = model
    x = x_like(adapters)
    expected = gradients(function(x), [x, *adapters])
    y = checkpoint(function, x, use_reentrant=use_reentrant)
    y.square().sum().backward()
    assert_same([x.grad, *(p.grad for p in adapters)], expected)


@pytest.mark.parametrize("hooks", [False, True])
def test_a_parameter_changed_in_place_is_an_error(model, hooks):
    function, adapters = model
    x = x_like(adapters)
    if hooks:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            y = function(x)
    else:
        y = function(x)
    with torch.no_grad():
        adapters[0].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(y, [x, *adapters])


def test_a_tensor_that_is_no_parameter_goes_to_the_hooks(device):
    """What was computed for the call has no other owner."""
    q = lowbit.quantize(torch.randn(H, K, device=device))
    A, B = torch.nn.Parameter(torch.randn(4, K, device=device)), torch.zeros(H, 4, device=device)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        lowbit.lora_matmul(torch.randn(TOKENS, K, device=device), q, A * 1.0, B, 2.0)
    assert (4, K) in {tuple(t.shape) for t in packed}


@pytest.mark.parametrize("kind", ["layer", "group", "MLP"])
def test_a_dense_weight_changed_in_place_before_backward_is_an_error(kind, device):
    gate, up, down = (torch.randn(shape, device=device) / 8 for shape in ((H, K), (H, K), (K, H)))
    As = [torch.randn(4, W.shape[1], device=device) / 8 for W in (gate, up, down)]
    Bs = [torch.randn(W.shape[0], 4, device=device) for W in (gate, up, down)]
    x = torch.randn(TOKENS, K, device=device, requires_grad=True)
    if kind == "layer":
        y = lowbit.lora_matmul(x, gate, As[0], Bs[0], 2.0)
    elif kind == "group":
        y = sum(lowbit.lora_matmul_group(x, [gate, up], As[:2], Bs[:2], 2.0))
    else:
        y = lowbit.lora_gated_mlp(x, [gate, up, down], As, Bs, 2.0)
    gate.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
