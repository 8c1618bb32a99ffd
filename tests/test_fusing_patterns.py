"""Which modules lowbit.fuse recognizes, and lowbit.nn's modules for trainers."""

import copy
import functools

import pytest
import torch
from torch import nn

import lowbit
from lowbit import fusing, prepare
from lowbit.nn import QLoRAGatedMLP, QLoRAGroup, QLoRALinear


def kinds(model):
    return {name: type(module) for name, module in model.named_modules()}


class GatedMLP(nn.Module):
    def __init__(self, act_fn=None):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(64, 96), nn.Linear(64, 96)
        self.down_proj = nn.Linear(96, 64)
        self.act_fn = nn.SiLU() if act_fn is None else act_fn

    def forward(self, x):
        """A docstring changes nothing."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Clamped(GatedMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=1) * self.up_proj(x))


class Swapped(GatedMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


def doubled(forward):
    return functools.wraps(forward)(lambda self, x: 2 * forward(self, x))


class Decorated(GatedMLP):
    forward = doubled(GatedMLP.forward)


class Attention(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(64, 64), nn.Linear(width, 64)
        self.v_proj = nn.Linear(width, 64)

    def forward(self, x):
        return torch.tanh(self.q_proj(x)) * self.k_proj(x) + self.v_proj(x)


class Cross(Attention):
    def forward(self, x, memory):
        return torch.tanh(self.q_proj(x)) * self.k_proj(memory) + self.v_proj(memory)


class Stateful(Attention):
    def forward(self, x):
        self.last = self.q_proj(x)
        return self.last * self.k_proj(x) + self.v_proj(x)


class Rebound(Attention):
    """The same name for another tensor: found when it is called, not before."""

    def forward(self, x):
        q = self.q_proj(x)
        x = x.relu()
        return q * self.k_proj(x) + self.v_proj(x)


class Added(Attention):
    def forward(self, x):
        q = self.q_proj(x)
        x += 1
        return q * self.k_proj(x) + self.v_proj(x)


class Scaled(Attention):
    def forward(self, x):
        q, k = self.q_proj(x), self.k_proj(x)
        x[0].mul_(2)
        return q * k + self.v_proj(x)


class Written(Attention):
    def forward(self, x):
        q, k = self.q_proj(x), self.k_proj(x)
        x[0] = 0
        return q * k + self.v_proj(x)


class Out(Attention):
    def forward(self, x):
        q, k = self.q_proj(x), self.k_proj(x)
        torch.neg(x, out=x)
        return q * k + self.v_proj(x)


def test_own_modules_that_follow_the_patterns():
    x = torch.randn(5, 64)
    for module in (
        GatedMLP(),
        GatedMLP(nn.GELU()),
        GatedMLP(nn.SiLU(inplace=True)),
        GatedMLP(torch.nn.functional.silu),
        Attention(),
        Rebound(),
    ):
        module = prepare(module, r=4)
        expected = module(x)
        report = lowbit.fuse(module)
        assert [*report.attention, *report.mlp] == [""]
        assert torch.equal(module(x), expected)
        assert isinstance(module, (GatedMLP, Attention))
        assert lowbit.unfuse(module) == 1


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (Clamped, "Clamped.forward is not down_proj"),
        (Swapped, "Swapped.forward is not down_proj"),
        (Decorated, "Decorated.forward is not down_proj"),
        (lambda: GatedMLP(nn.ReLU()), "its activation ReLU is neither SiLU nor GELU"),
        (lambda: GatedMLP(nn.PReLU()), "its activation PReLU is neither SiLU nor GELU"),
        (lambda: Cross(32), "Cross.forward does not call q_proj, k_proj and v_proj on one x"),
        (Stateful, "Stateful.forward does not call"),
        (Added, "Added.forward does not call"),
        (Scaled, "Scaled.forward does not call"),
        (Written, "Written.forward does not call"),
        (Out, "Out.forward does not call"),
    ],
)
def test_modules_of_another_kind_are_left_alone(build, why):
    model = prepare(nn.Sequential(build()), r=4)
    before = kinds(model)
    report = lowbit.fuse(model)
    assert why in report.skipped["0"]
    assert why in str(report)
    assert kinds(model) == before


def test_layers_that_cannot_be_grouped_are_left_alone():
    model = prepare(nn.Sequential(Attention(), Attention(), Attention()), r=4)
    model[0].k_proj = nn.Linear(64, 64)
    model[1].v_proj.register_forward_hook(lambda *_: None)
    model[2].forward = model[2].forward
    report = lowbit.fuse(model)
    assert not report.attention
    assert "a layer is of type Linear" in report.skipped["0"]
    assert "a layer has hooks" in report.skipped["1"]
    assert "its forward was replaced" in report.skipped["2"]


def test_what_changes_after_fusing_is_honoured():
    """A hook that comes later is called, and another activation is used."""
    model = prepare(nn.Sequential(Attention(), GatedMLP()), r=4)
    lowbit.fuse(model)
    calls, x = [], torch.randn(5, 64)
    for layer in (model[0].k_proj, model[1].up_proj):
        layer.register_forward_hook(lambda *_: calls.append(1))
    before = model(x)
    assert len(calls) == 2
    for layer in (model[0].k_proj, model[1].up_proj):
        layer._forward_hooks.clear()
    model[1].act_fn.register_forward_hook(lambda *_: calls.append(2))
    torch.testing.assert_close(model(x), before)
    assert calls == [1, 1, 2]
    model[1].act_fn = nn.ReLU()
    assert not torch.allclose(model(x), before)
    fused = model(x)
    lowbit.unfuse(model)
    assert torch.equal(model(x), fused)


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward", "full_backward_pre"])
def test_hooks_of_all_modules_are_honoured(kind, monkeypatch):
    """As profilers and counters of operations set them."""
    model, x, seen = prepare(nn.Sequential(Attention(), GatedMLP()), r=4), torch.randn(5, 64), []
    lowbit.fuse(model)
    register = getattr(nn.modules.module, f"register_module_{kind}_hook")
    handle = register(lambda module, *_: seen.append(module))
    try:
        model(x).sum().backward()
    finally:
        handle.remove()
    layers = [m for m in model.modules() if isinstance(m, QLoRALinear)]
    assert layers
    assert {id(m) for m in layers} <= {id(m) for m in seen}
    fused = []
    for name in ("compute_group", "compute_gated_mlp"):
        compute = getattr(fusing, name)
        monkeypatch.setattr(fusing, name, lambda *a, f=compute: fused.append(f) or f(*a))
    model(x)
    assert len(fused) == 2  # without the hook layers share their work again


def test_errors():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        lowbit.fuse("llama")
    with pytest.raises(ValueError, match="model has no quantized layer"):
        lowbit.fuse(nn.Linear(2, 2))
    module = prepare(GatedMLP(), r=4)
    lowbit.fuse(module)
    module.__class__ = type("Wrapped", (type(module),), {})  # as FSDP does
    with pytest.raises(ValueError, match="Wrapped was derived from a fused module"):
        lowbit.unfuse(module)


# ---- the modules for trainers --------------------------------------------------------------------


def test_group_module_shares_the_layers_of_its_owner():
    attention = prepare(Attention(), r=4)
    keys = list(attention.state_dict())
    attention.qkv = QLoRAGroup(attention, ["q_proj", "k_proj", "v_proj"])
    assert list(attention.state_dict()) == keys
    x = torch.randn(5, 64)
    for owner in (attention, copy.deepcopy(attention)):
        for y, name in zip(owner.qkv(x), owner.qkv.names, strict=True):
            assert torch.equal(y, getattr(owner, name)(x))
    other = copy.deepcopy(attention)
    nn.init.ones_(other.q_proj.lora_B)
    assert torch.equal(other.qkv(x)[0], other.q_proj(x))
    attention.k_proj = nn.Linear(64, 64)  # one by one from now on
    assert torch.equal(attention.qkv(x)[1], attention.k_proj(x))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated_mlp_module(activation):
    act_fn = {"silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh")}[activation]
    mlp = prepare(GatedMLP(act_fn), r=4)
    fused = QLoRAGatedMLP(mlp, activation)
    assert not list(fused.parameters())
    x = torch.randn(2, 5, 64)
    assert torch.equal(fused(x), mlp(x))
    mlp.up_proj.register_forward_hook(lambda *_: None)
    assert torch.equal(fused(x), mlp(x))
    assert "gate_proj, up_proj, down_proj, activation=" in repr(fused)


def test_errors_of_the_modules():
    with pytest.raises(ValueError, match="Attention has no layer called 'o_proj'"):
        QLoRAGroup(Attention(), ["q_proj", "o_proj"])
    with pytest.raises(ValueError, match="activation must be one of silu, gelu, gelu_tanh"):
        QLoRAGatedMLP(GatedMLP(), "relu")
