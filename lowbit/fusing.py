"""lowbit.fuse: let the attention, MLP and norm modules of a prepared model use lowbit's functions.

What a module computes is read from the source of its forward; patterns.py has the patterns, which
are those of transformers' Llama, Mistral, Qwen2, Qwen2.5-VL and many models after them. A module
with another forward stays as it is. A fused module changes its class, to a subclass that overrides
forward alone: its layers, parameters, hooks and attributes remain where they were, so that state
dicts, adapters and checkpoints are not concerned, and `unfuse` gives it its class back.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import packed_attention, patterns, pointwise
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
from .patterns import QKV

GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
_ACTIVATION = "_fused_activation"  # attribute of a fused MLP: (its act_fn, the name of that)
_log = logging.getLogger("lowbit")


@dataclass
class FusionReport:
    """What `lowbit.fuse` did.

    Attributes:
        attention: names of the attention modules whose q, k and v are now computed together.
        mlp: names of the MLP modules that are now one function.
        norms: names of the RMS norms that are now one launch, on a GPU.
        pieces: names of the attention modules, of a vision tower, that now attend within all pieces
            of a packed sequence in one launch, on a GPU.
        skipped: {name: why} of modules that have such layers and stay as they were.
    """

    attention: list[str] = field(default_factory=list)
    mlp: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        text = (
            f"fused {len(self.attention)} attention modules, {len(self.mlp)} MLPs and "
            f"{len(self.norms)} norms"
        )
        if self.pieces:
            text += f", and {len(self.pieces)} attention modules of a vision tower"
        reasons: dict[str, list[str]] = {}
        for name, why in self.skipped.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            more = f" and {len(names) - 1} more for the same reason" if len(names) > 1 else ""
            text += f"; skipped {names[0]} ({why}){more}"
        return text


def fuse(model: nn.Module) -> FusionReport:
    """Compute q, k, v of attention as one group, gated MLPs as one function, and what lies between
    in fewer launches, in place.

    Args:
        model: prepared model; transformers' Llama, Mistral, Qwen2, Qwen2.5-VL, or any other whose
            modules follow a pattern of lowbit/patterns.py.

    Returns:
        FusionReport: what was fused, and why a candidate was not. It is logged, too (logger
        "lowbit", level INFO).

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: the model has no quantized layer.

    Notes:
        Outputs and gradients are those of the model before, up to the order of additions, and on a
        GPU up to the roundings that RMS norms and rotary embeddings leave out there; dropout draws
        the same masks from the same seed. State-dict keys, adapters' files, merging, switching off,
        gradient checkpointing and torch.compile work as before, and in any order with this call. In
        a call for which the layers do not permit it (one got a hook, was replaced by another type
        or moved to another device) the module's own forward runs.

    Example:
        >>> model = lowbit.prepare(model, r=16)  # doctest: +SKIP
        >>> print(lowbit.fuse(model))  # doctest: +SKIP
        fused 32 attention modules, 32 MLPs and 65 norms
    """
    if not quantized_layers(model):
        raise ValueError("model has no quantized layer; call lowbit.prepare(model) first")
    report = FusionReport()
    for name, module in model.named_modules():
        for kind in _KINDS:
            if not kind.candidate(module):
                continue
            why = _why_not(module, kind)
            if why is not None:
                report.skipped[name] = why
                continue
            kind.prepare(module)
            module.__class__ = _fused_class(type(module), kind)
            getattr(report, kind.place).append(name)
    _log.info("%s", report)
    return report


def _why_not(module: nn.Module, kind: type[_Fused]) -> str | None:
    """Why a candidate cannot be fused, or None."""
    if isinstance(module, _Fused):
        return "it is fused already"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    return kind.problem(module)


def unfuse(model: nn.Module) -> int:
    """Undo `fuse`: every module computes by its own forward again.

    Args:
        model: any model.

    Returns:
        How many modules were fused.

    Raises:
        ValueError: another library has made a subclass of a fused module's class (FSDP).

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
    place: str  # the list of FusionReport it is in

    @staticmethod
    def candidate(module: nn.Module) -> bool:
        """Whether a module has what this kind is about."""
        raise NotImplementedError

    @staticmethod
    def problem(module: nn.Module) -> str | None:
        """What else is in the way of fusing a candidate, or None."""
        return None

    @staticmethod
    def prepare(module: nn.Module) -> None:
        """Leave on the module what the forward of the class needs."""

    def __reduce_ex__(self, protocol):
        """Pickle and deepcopy: the class is made again from the one it had."""
        if "unfused" not in type(self).__dict__:
            return super().__reduce_ex__(protocol)
        return _rebuild, (self.unfused, self.place), self.__dict__.copy()


class _FusedMLP(_Fused):
    place = "mlp"

    @staticmethod
    def candidate(module):
        return _has(module, GATE_UP_DOWN)

    @staticmethod
    def problem(module):
        kind = type(module)
        if not patterns.is_gated_mlp(kind.forward):
            return f"{kind.__name__}.forward is not down_proj(act_fn(gate_proj(x)) * up_proj(x))"
        if activation_of(module.act_fn) is None:  # the source says that there is an act_fn
            return f"its activation {type(module.act_fn).__name__} is neither SiLU nor GELU"
        return why_separate_mlp([getattr(module, name) for name in GATE_UP_DOWN])

    @staticmethod
    def prepare(module):
        module.__dict__[_ACTIVATION] = (module.act_fn, activation_of(module.act_fn))

    def forward(self, *args, **kwargs):
        layers = [self.gate_proj, self.up_proj, self.down_proj]
        inputs = (*args, *kwargs.values())
        act_fn, activation = self.__dict__[_ACTIVATION]
        known = len(inputs) == 1 and self.act_fn is act_fn
        known = known and not (isinstance(act_fn, nn.Module) and has_hooks(act_fn))
        if not known or not shares(inputs[0]) or why_separate_mlp(layers) is not None:
            return self.unfused.forward(self, *args, **kwargs)
        return compute_gated_mlp(layers, inputs[0], activation)


class _FusedAttention(_Fused):
    place = "attention"

    @staticmethod
    def candidate(module):
        return _has(module, QKV)

    @staticmethod
    def problem(module):
        kind = type(module)
        if not patterns.is_attention(kind.forward):
            return f"{kind.__name__}.forward does not call q_proj, k_proj and v_proj on one x"
        return why_separate([getattr(module, name) for name in QKV])

    def forward(self, *args, **kwargs):
        layers = [self.q_proj, self.k_proj, self.v_proj]
        if why_separate(layers) is not None:
            return self.unfused.forward(self, *args, **kwargs)
        forward = self.unfused.forward
        if layers[0].weight.is_cuda and not torch.compiler.is_compiling():
            forward = _with_rotary(forward)
        return forward(_StandIn(self, layers), *args, **kwargs)


class _FusedNorm(_Fused):
    place = "norms"

    @staticmethod
    def candidate(module):
        return patterns.is_rms_norm(_forward_of(module))

    def forward(self, hidden_states):
        x, weight = hidden_states, self.weight
        separate = torch.compiler.is_compiling() or torch.is_autocast_enabled("cuda")
        if not x.is_cuda or x.dtype != weight.dtype or separate:
            return self.unfused.forward(self, x)
        return pointwise.rms_norm(x, weight, self.variance_epsilon)


class _FusedPieces(_Fused):
    place = "pieces"

    @staticmethod
    def candidate(module):
        return patterns.attends_by_pieces(_forward_of(module)) and not _has(module, QKV)

    def forward(self, hidden_states, *args, **kwargs):
        forward = self.unfused.forward
        usual = getattr(self.config, "_attn_implementation", None) == "sdpa"
        separate = torch.compiler.is_compiling() or not hidden_states.is_cuda
        # A graph would keep the lengths that it was recorded with.
        if usual and not separate and not torch.cuda.is_current_stream_capturing():
            forward = _by_pieces(forward)
        return forward(self, hidden_states, *args, **kwargs)


_KINDS = (_FusedAttention, _FusedMLP, _FusedNorm, _FusedPieces)


def _has(module: nn.Module, children: tuple[str, ...]) -> bool:
    return all(isinstance(getattr(module, child, None), nn.Module) for child in children)


def _forward_of(module: nn.Module) -> Callable | None:
    """The forward of a module's class before it was fused; TorchScript's classes have none."""
    return getattr(getattr(type(module), "unfused", type(module)), "forward", None)


class _Names(dict):
    """What a function finds by name, as its module has it now, but for some of it something else. A
    compiler, which asks by `in`, does not find that; it gets the original.
    """

    def __init__(self, names: dict[str, Any], others: dict[str, Any]) -> None:
        super().__init__({n: names[n] for n in ("__builtins__", "__name__") if n in names})
        self._names = names
        self._others = {name: (names[name], other) for name, other in others.items()}

    def __missing__(self, name: str) -> Any:
        value = self._names[name]
        own, other = self._others.get(name, (None, None))
        return other if other is not None and value is own else value


def _with_others(forward: Callable, others: dict[str, Any]) -> Callable:
    """A copy of a forward that finds others by some names."""
    names, closure = forward.__globals__, forward.__closure__
    decorated = getattr(forward, "__wrapped__", None)
    if decorated is None:
        names = _Names(names, others)
    else:  # the decorator stays, around a copy of what it decorates
        copied = types.CellType(_with_others(decorated, others))
        closure = tuple(copied if cell.cell_contents is decorated else cell for cell in closure)
    copy = types.FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, closure
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


@functools.cache
def _with_rotary(forward: Callable) -> Callable:
    """A forward with lowbit's rotation in place of transformers' own."""
    if not patterns.uses_rotary(forward):
        return forward
    return _with_others(forward, {patterns.ROTARY: pointwise.rotary})


class _Packed:
    """In place of transformers' attention functions: the one for all pieces at once."""

    @staticmethod
    def get_interface(*_: object) -> Callable:
        return packed_attention.attend


def _by_pieces(forward: Callable) -> Callable:
    """A forward that takes its way for flash attention, and comes to lowbit's function there; the
    forward itself where somebody has replaced a name that this takes, or the function for "sdpa".
    """
    copy, own = _copy_by_pieces(forward)
    names = forward.__globals__
    if any(names.get(name) is not value for name, value in own.items()):
        return forward
    function = own[patterns.FUNCTIONS].get("sdpa")
    usual = getattr(function, "__module__", None) == "transformers.integrations.sdpa_attention"
    return copy if usual else forward


@functools.cache
def _copy_by_pieces(forward: Callable) -> tuple[Callable, dict[str, Any]]:
    """The copy, and what it was made from."""
    others = {
        patterns.FLASH: lambda config: True,
        patterns.LONGEST: lambda *_, **__: None,
        patterns.FUNCTIONS: _Packed,
    }
    if patterns.uses_vision_rotary(forward):
        others[patterns.VISION_ROTARY] = pointwise.vision_rotary
    own = (patterns.FLASH, patterns.LONGEST, patterns.FUNCTIONS)
    return _with_others(forward, others), {name: forward.__globals__[name] for name in own}


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
def _fused_class(unfused: type[nn.Module], mixin: type[_Fused]) -> type[nn.Module]:
    names = {"unfused": unfused, "__module__": unfused.__module__, "__doc__": unfused.__doc__}
    return type(f"Fused{unfused.__name__}", (mixin, unfused), names)


def _rebuild(unfused: type[nn.Module], place: str) -> nn.Module:
    mixin = next(kind for kind in _KINDS if kind.place == place)
    fused = _fused_class(unfused, mixin)
    return fused.__new__(fused)


def activation_of(act_fn: Callable) -> str | None:
    """Which of ACTIVATIONS a function or module computes, found by trying it."""
    if isinstance(act_fn, nn.Module) and (
        has_hooks(act_fn) or next(act_fn.parameters(), None) is not None
    ):
        return None
    probe = torch.linspace(-8, 8, 257, dtype=torch.float32, device="cpu")
    try:
        with torch.no_grad():
            values = act_fn(probe.clone())  # it may work in place
    except Exception:
        return None  # it takes something else than one tensor
    for name in ACTIVATIONS:
        if isinstance(values, torch.Tensor) and torch.equal(values, activate(probe, name)):
            return name
    return None
