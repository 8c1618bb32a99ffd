"""lowbit.fuse: let the attention and MLP modules of a prepared model use the group functions.

What a module computes is read from the source of its forward. Two patterns are known, which are
those of transformers' Llama, Mistral, Qwen2, Qwen2.5-VL and many models after them:

    attention   self.q_proj(h), self.k_proj(h) and self.v_proj(h), each once, of the same name h
    MLP         self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)), and nothing else

A module with another forward stays as it is. A fused module changes its class, to a subclass that
overrides forward alone: its layers, parameters, hooks and attributes remain where they were, so
that state dicts, adapters and checkpoints are not concerned, and `unfuse` gives it its class back.
"""

from __future__ import annotations

import ast
import functools
import inspect
import logging
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .gated_mlp import ACTIVATIONS, activate
from .modules import quantized_layers
from .nn.fused import (
    compute_gated_mlp,
    compute_group,
    has_hooks,
    shares,
    why_separate,
    why_separate_mlp,
)

QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
_ACTIVATION = "_fused_activation"  # attribute of a fused MLP: (its act_fn, the name of that)
_log = logging.getLogger("lowbit")


@dataclass
class FusionReport:
    """What `lowbit.fuse` did.

    Attributes:
        attention: names of the attention modules whose q, k and v are now computed together.
        mlp: names of the MLP modules that are now one function.
        skipped: {name: why} of modules that have such layers and stay as they were.
    """

    attention: list[str] = field(default_factory=list)
    mlp: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"fused {len(self.attention)} attention modules and {len(self.mlp)} MLPs"
        reasons: dict[str, list[str]] = {}
        for name, why in self.skipped.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            text += f"; skipped {names[0]}{more}: {why}"
        return text


def fuse(model: nn.Module) -> FusionReport:
    """Compute q, k, v of attention as one group and gated MLPs as one function, in place.

    Args:
        model: prepared model; transformers' Llama, Mistral, Qwen2, Qwen2.5-VL, or any other whose
            modules follow one of the two patterns at the top of lowbit/fusing.py.

    Returns:
        FusionReport: what was fused, and why a candidate was not. It is logged, too (logger
        "lowbit", level INFO).

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: the model has no quantized layer.

    Notes:
        Outputs and gradients are those of the model before, up to the order of additions; dropout
        draws the same masks from the same seed. State-dict keys, adapters' files, merging,
        switching off, gradient checkpointing and torch.compile work as before, and in any order
        with this call. In a call for which the layers do not permit it (one got a hook, was
        replaced by another type or moved to another device) the module's own forward runs.

    Example:
        >>> model = lowbit.prepare(model, r=16)  # doctest: +SKIP
        >>> print(lowbit.fuse(model))  # doctest: +SKIP
        fused 32 attention modules and 32 MLPs
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not quantized_layers(model):
        raise ValueError("model has no quantized layer; call lowbit.prepare(model) first")
    report = FusionReport()
    for name, module in model.named_modules():
        for names, look, done in (
            (QKV, _attention_problem, report.attention),
            (GATE_UP_DOWN, _mlp_problem, report.mlp),
        ):
            if not all(isinstance(getattr(module, child, None), nn.Module) for child in names):
                continue
            why = "it is fused already" if isinstance(module, _Fused) else look(module)
            if why is not None:
                report.skipped[name] = why
                continue
            if names == GATE_UP_DOWN:
                module.__dict__[_ACTIVATION] = (module.act_fn, activation_of(module.act_fn))
            module.__class__ = _fused_class(type(module), names == QKV)
            done.append(name)
    _log.info("%s", report)
    return report


def unfuse(model: nn.Module) -> int:
    """Undo `fuse`: every module computes by its own forward again.

    Returns:
        How many modules were fused.

    Example:
        >>> lowbit.unfuse(torch.nn.Linear(2, 2))
        0
    """
    count = 0
    for module in model.modules():
        if isinstance(module, _Fused):
            # Another library may have made a subclass of ours (FSDP does); it must undo that first.
            if "unfused" not in type(module).__dict__:
                raise ValueError(
                    f"{type(module).__name__} was derived from a fused module after lowbit.fuse; "
                    "undo that first"
                )
            module.__class__ = type(module).unfused
            module.__dict__.pop(_ACTIVATION, None)
            count += 1
    return count


# ---- fused modules


class _Fused:
    """Mixin of the classes made by `_fused_class`; `unfused` is the class a module had."""

    unfused: type[nn.Module]

    def __reduce_ex__(self, protocol):
        """Pickle and deepcopy: the class is made again from the one it had."""
        if "unfused" not in type(self).__dict__:
            return super().__reduce_ex__(protocol)
        return _rebuild, (self.unfused, isinstance(self, _FusedAttention)), self.__dict__.copy()


class _FusedMLP(_Fused):
    def forward(self, *args, **kwargs):
        layers = [self.gate_proj, self.up_proj, self.down_proj]
        inputs = (*args, *kwargs.values())
        act_fn, activation = self.__dict__[_ACTIVATION]
        known = len(inputs) == 1 and self.act_fn is act_fn
        if not known or not shares(inputs[0]) or why_separate_mlp(layers) is not None:
            return self.unfused.forward(self, *args, **kwargs)
        return compute_gated_mlp(layers, inputs[0], activation)


class _FusedAttention(_Fused):
    def forward(self, *args, **kwargs):
        layers = [self.q_proj, self.k_proj, self.v_proj]
        if why_separate(layers) is not None:
            return self.unfused.forward(self, *args, **kwargs)
        return self.unfused.forward(_StandIn(self, layers), *args, **kwargs)


class _StandIn:
    """An attention module whose q_proj, k_proj and v_proj share their work, for one call.

    The first projection that is called computes all three; the others hand out theirs, if they are
    called with the same tensor. Living for one call, it holds nothing between calls and is safe
    in threads.
    """

    def __init__(self, module: nn.Module, layers: list[nn.Module]) -> None:
        self._module, self._layers, self._x, self._ys = module, layers, None, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def _project(self, i: int, x: torch.Tensor) -> torch.Tensor:
        if not shares(x):
            return self._layers[i](x)
        if self._x is None:
            self._x, self._ys = x, compute_group(self._layers, x)
        return self._ys[i] if x is self._x else self._layers[i](x)

    def q_proj(self, x: torch.Tensor) -> torch.Tensor:
        return self._project(0, x)

    def k_proj(self, x: torch.Tensor) -> torch.Tensor:
        return self._project(1, x)

    def v_proj(self, x: torch.Tensor) -> torch.Tensor:
        return self._project(2, x)


@functools.cache
def _fused_class(unfused: type[nn.Module], attention: bool) -> type[nn.Module]:
    mixin = _FusedAttention if attention else _FusedMLP
    names = {"unfused": unfused, "__module__": unfused.__module__, "__doc__": unfused.__doc__}
    return type(f"Fused{unfused.__name__}", (mixin, unfused), names)


def _rebuild(unfused: type[nn.Module], attention: bool) -> nn.Module:
    fused = _fused_class(unfused, attention)
    return fused.__new__(fused)


# ---- what can be fused


def _attention_problem(module: nn.Module) -> str | None:
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if not _is_attention(type(module).forward):
        return f"{type(module).__name__}.forward does not call q_proj, k_proj and v_proj on one x"
    return why_separate([getattr(module, name) for name in QKV])


def _mlp_problem(module: nn.Module) -> str | None:
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if not _is_gated_mlp(type(module).forward):
        return (
            f"{type(module).__name__}.forward is not down_proj(act_fn(gate_proj(x)) * up_proj(x))"
        )
    if activation_of(module.act_fn) is None:  # the source says that there is an act_fn
        return f"its activation {type(module.act_fn).__name__} is neither SiLU nor GELU"
    return why_separate_mlp([getattr(module, name) for name in GATE_UP_DOWN])


def activation_of(act_fn: Callable) -> str | None:
    """Which of ACTIVATIONS a function or module computes, found by trying it."""
    if isinstance(act_fn, nn.Module) and (
        has_hooks(act_fn) or next(act_fn.parameters(), None) is not None
    ):
        return None
    probe = torch.linspace(-8, 8, 257, dtype=torch.float32, device="cpu")
    try:
        with torch.no_grad():
            values = act_fn(probe)
    except Exception:
        return None  # it takes something else than one tensor
    for name in ACTIVATIONS:
        if isinstance(values, torch.Tensor) and torch.equal(values, activate(probe, name)):
            return name
    return None


@functools.cache
def _source(function: Callable) -> ast.FunctionDef | None:
    """The definition of a method, or None if it cannot be found."""
    try:
        parsed = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return None
    definition = parsed.body[0]
    return definition if isinstance(definition, ast.FunctionDef) else None


@functools.cache
def _is_gated_mlp(forward: Callable) -> bool:
    """Whether a forward is the pattern of the MLP, as one expression or through one variable."""
    definition = _source(forward)
    if definition is None or definition.args.vararg or definition.args.kwarg:
        return False
    if definition.decorator_list or hasattr(forward, "__wrapped__"):
        return False  # the source does not say what the decorator does
    names = [argument.arg for argument in (*definition.args.args, *definition.args.kwonlyargs)]
    body = [node for node in definition.body if not _is_docstring(node)]
    if len(names) != 2 or not 1 <= len(body) <= 2 or not isinstance(body[-1], ast.Return):
        return False
    value = body[-1].value
    if len(body) == 2:
        if not isinstance(body[0], ast.Assign) or len(body[0].targets) != 1:
            return False
        if ast.dump(body[0].targets[0]) != ast.dump(_stored(value)):
            return False
        value = body[0].value
    this, x = names
    pattern = f"{this}.down_proj({this}.act_fn({this}.gate_proj({x})) * {this}.up_proj({x}))"
    return value is not None and ast.unparse(value) == pattern


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _stored(node: ast.expr | None) -> ast.AST:
    """A name as the target of an assignment; anything else as it is."""
    return ast.Name(node.id, ast.Store()) if isinstance(node, ast.Name) else ast.Pass()


@functools.cache
def _is_attention(forward: Callable) -> bool:
    """Whether a forward calls the three projections once each, on one name, and works for a
    stand-in: it neither stores attributes nor calls super().
    """
    definition = _source(forward)
    if definition is None or not definition.args.args:
        return False
    this = definition.args.args[0].arg
    read: dict[str, list[str]] = {name: [] for name in QKV}
    mentions = 0
    for node in ast.walk(definition):
        if isinstance(node, ast.Name) and node.id == "super":
            return False
        if isinstance(node, ast.Attribute) and _is_name(node.value, this):
            if not isinstance(node.ctx, ast.Load):
                return False
            mentions += node.attr in QKV
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            callee = node.func
            if _is_name(callee.value, this) and callee.attr in QKV:
                if len(node.args) != 1 or node.keywords or not isinstance(node.args[0], ast.Name):
                    return False
                read[callee.attr].append(node.args[0].id)
    inputs = [name for names in read.values() for name in names]
    each_once = all(len(names) == 1 for names in read.values())
    return each_once and mentions == len(QKV) and len(set(inputs)) == 1


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
