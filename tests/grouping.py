"""Layers for the tests of the group functions: members by name, and plain torch to compare with."""

import torch

import lowbit

# Both ways to compute a group (lowbit/dispatch.py); "stacked" also where it is never chosen.
WAYS = {"member by member": (), "stacked": ("cpu", "cuda")}


def choose_way(monkeypatch, way: str) -> None:
    monkeypatch.setattr(lowbit.dispatch, "STACKED_DEVICES", WAYS[way])
    monkeypatch.setattr(lowbit.dispatch, "STACKED_TOKENS", 1)
    monkeypatch.setattr(lowbit.dispatch, "STACKED_FORWARD_TOKENS", 1)


def make_member(N, K, r, dtype, device, *, bias=True, vector=False, lora_dtype=None):
    """Tensors of one layer; r = 0: no adapter."""
    lora_dtype = dtype if lora_dtype is None else lora_dtype
    member = {"w": lowbit.quantize((torch.randn(N, K) / K**0.5).to(device)).to(dtype=dtype)}
    member["scaling"] = 2.0
    if bias:
        member["bias"] = torch.randn(N).to(device, dtype)
    if r:
        member["lora_A"] = (torch.randn(r, K) / K**0.5).to(device, dtype).to(lora_dtype)
        member["lora_B"] = (torch.randn(N, r) / r**0.5).to(device, dtype).to(lora_dtype)
        if vector:
            member["scaling"] = torch.rand(r, device=device) + 0.5
    return member


def leaves_of(x, members, dtype=None, device=None, frozen=()):
    """(x, members) with fresh leaves, and the leaves by name: "x", "0.lora_A", ..."""

    def leaf(tensor, name):
        tensor = tensor.detach().clone().to(device=device, dtype=dtype)
        return tensor.requires_grad_(name not in frozen)

    fresh, named = [], {"x": leaf(x, "x")}
    for i, member in enumerate(members):
        copy = dict(member)
        for key, value in member.items():
            if isinstance(value, torch.Tensor):
                copy[key] = named[f"{i}.{key}"] = leaf(value, f"{i}.{key}")
        fresh.append(copy)
    return named["x"], fresh, named


def arguments(members):
    """(weights, lora_As, lora_Bs, scalings) and the biases of members."""
    keys = ("w", "lora_A", "lora_B", "scaling")
    columns = [[m.get(key) for m in members] for key in keys]
    return columns, [m.get("bias") for m in members]


def separate(x, member, dropout_p=0.0):
    """One layer by the functions for single layers."""
    if "lora_A" not in member:
        return lowbit.matmul(x, member["w"], member.get("bias"))
    return lowbit.lora_matmul(
        x, member["w"], member["lora_A"], member["lora_B"], member["scaling"],
        bias=member.get("bias"), dropout_p=dropout_p,
    )  # fmt: skip


def formula(x, member, keep=None):
    """One layer in plain torch of x's dtype, from the dequantized weight."""
    with lowbit.dispatch.force("reference"):
        weight = member["w"].to("cpu").dequantize(torch.float32).to(x.device, x.dtype)
    y = x @ weight.t()
    if "lora_A" in member:
        dropped = x if keep is None else x * keep.to(x.dtype)
        scaling = member["scaling"]
        scaling = scaling.to(x.dtype) if isinstance(scaling, torch.Tensor) else scaling
        z = (dropped @ member["lora_A"].to(x.dtype).t()) * scaling
        y = y + z @ member["lora_B"].to(x.dtype).t()
    return y + member["bias"].to(x.dtype) if "bias" in member else y


def gradients(ys, dys, named):
    """Outputs and gradients by name; None for what got none."""
    wanted = {name: leaf for name, leaf in named.items() if leaf.requires_grad}
    pairs = [(y, dy) for y, dy in zip(ys, dys, strict=True) if y.requires_grad]
    outputs, upstream = zip(*pairs, strict=True)
    grads = torch.autograd.grad(outputs, list(wanted.values()), upstream, allow_unused=True)
    results = {f"y{i}": y.detach() for i, y in enumerate(ys)}
    return results | {f"d_{name}": grad for name, grad in zip(wanted, grads, strict=True)}
