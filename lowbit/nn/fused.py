"""QLoRAGroup and QLoRAGatedMLP: several 4-bit layers of a module, computed as one function.

They own no parameters. They know the module that has the layers and the layers' names there, and
look them up in every call: the layers stay where they are, under the keys they have, and may be
moved, merged, switched off or replaced (adapters.load_adapter) at any time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .. import dispatch, widening
from ..gated_mlp import ACTIVATIONS, activate, lora_gated_mlp
from ..grouped import lora_matmul_group
from .linear import Linear4bit
from .qlora import QLoRALinear

# torch changes these in place.
_HOOKS_OF_ALL = tuple(
    getattr(nn.modules.module, f"_global_{kind}_hooks")
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _ByName(nn.Module):
    """Layers of `owner` by name; nothing is registered, so nothing is saved twice."""

    def __init__(self, owner: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        if not names:
            raise ValueError("names must hold at least one layer's, got none")
        for name in names:
            if not isinstance(getattr(owner, name, None), nn.Module):
                raise ValueError(f"{type(owner).__name__} has no layer called {name!r}")
        self.__dict__["_owner"] = owner
        self.names = tuple(names)

    def layers(self) -> list[nn.Module]:
        """The layers as they are now."""
        return [getattr(self._owner, name) for name in self.names]

    def extra_repr(self) -> str:
        return ", ".join(self.names)


class QLoRAGroup(_ByName):
    """Apply several layers that read the same x, such as q_proj, k_proj and v_proj.

    Args:
        owner: the module that has the layers as attributes.
        names: their names there.

    Shape: x [..., K] -> tuple of y_i [..., N_i] in the dtype of x.

    Raises:
        ValueError: `owner` has no layer of a name.

    Notes:
        Computes what the layers compute one by one, through `lowbit.lora_matmul_group`: x is read
        once for all lora_A, saved once, and its gradient accumulated in one buffer. Adapters that
        are switched off or merged are left out, as in the layers. Layers that `lowbit.nn` cannot
        group (not 4-bit, with hooks, on several devices) are called one by one. An owner that has
        the group as an attribute is in a reference cycle with it: its memory goes when Python
        collects garbage, not with the last reference.

    Example:
        >>> attention = torch.nn.Module()
        >>> for name in ("q_proj", "k_proj", "v_proj"):
        ...     setattr(attention, name, lowbit.nn.QLoRALinear(64, 32, r=4))
        >>> q, k, v = lowbit.nn.QLoRAGroup(attention, ["q_proj", "k_proj", "v_proj"])(
        ...     torch.randn(5, 64)
        ... )
        >>> q.shape
        torch.Size([5, 32])
    """

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        layers = self.layers()
        if not shares(x) or why_separate(layers) is not None:
            return tuple(layer(x) for layer in layers)
        return compute_group(layers, x)


class QLoRAGatedMLP(_ByName):
    """Apply down(act(gate(x)) * up(x)) of a module that has the three layers.

    Args:
        owner: the module that has the layers as attributes.
        activation: "silu", "gelu" or "gelu_tanh".
        gate, up, down: names of the layers there.

    Shape: x [..., K] -> y [..., N] in the dtype of x.

    Raises:
        ValueError: `owner` has no layer of a name, or the activation is another one.

    Notes:
        Computes what the layers compute one by one, through `lowbit.lora_gated_mlp`: of the
        tensors as wide as the hidden layer only gate(x) and up(x) are saved for backward. As in
        QLoRAGroup, adapters may be off or merged, and layers it cannot group are called one by one.

    Example:
        >>> mlp = torch.nn.Module()
        >>> mlp.gate_proj = lowbit.nn.QLoRALinear(64, 96, r=4)
        >>> mlp.up_proj = lowbit.nn.QLoRALinear(64, 96, r=4)
        >>> mlp.down_proj = lowbit.nn.QLoRALinear(96, 64, r=4)
        >>> lowbit.nn.QLoRAGatedMLP(mlp)(torch.randn(5, 64)).shape
        torch.Size([5, 64])
    """

    def __init__(
        self,
        owner: nn.Module,
        activation: str = "silu",
        *,
        gate: str = "gate_proj",
        up: str = "up_proj",
        down: str = "down_proj",
    ) -> None:
        super().__init__(owner, (gate, up, down))
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers = self.layers()
        if not shares(x) or why_separate_mlp(layers) is not None:
            gate, up, down = layers
            return down(activate(gate(x), self.activation) * up(x))
        return compute_gated_mlp(layers, x, self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


def compute_group(layers: Sequence[nn.Module], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Outputs of layers that read the same x; `why_separate(layers)` is None."""
    weights, biases, *adapters, dropout_p = _arguments(layers)
    return lora_matmul_group(x, weights, *adapters, biases=biases, dropout_p=dropout_p)


def compute_gated_mlp(layers: Sequence[nn.Module], x: torch.Tensor, activation: str):
    """down(act(gate(x)) * up(x)); `why_separate_mlp(layers)` is None."""
    mlp = widening.MLP(*_arguments(layers))
    mlp = widening.for_kernels(x, mlp, [layer.quant_type for layer in layers])
    weights, biases, *adapters, dropout_p = mlp
    return lora_gated_mlp(
        x, weights, *adapters, activation=activation, biases=biases, dropout_p=dropout_p
    )


def shares(x: torch.Tensor) -> bool:
    """Whether a group has anything to share: backward's work, or products of many tokens."""
    return torch.is_grad_enabled() or dispatch.stacks(x.device, x.numel() // max(1, x.shape[-1]))


def why_separate(layers: Sequence[nn.Module]) -> str | None:
    """Why layers cannot be computed as a group, or None if they can."""
    if any(_HOOKS_OF_ALL):
        return "all modules have hooks, which would not be called"
    first = layers[0]
    for layer in layers:
        kind = type(layer)
        if not isinstance(layer, Linear4bit):
            return f"a layer is of type {kind.__name__}, not one of lowbit.nn"
        if kind.forward is not QLoRALinear.forward and kind.forward is not Linear4bit.forward:
            return f"{kind.__name__} has a forward of its own"
        if "forward" in layer.__dict__:
            return "the forward of a layer was replaced"
        if has_hooks(layer):
            return "a layer has hooks, which would not be called"
        if layer.in_features != first.in_features:
            return f"layers take {first.in_features} and {layer.in_features} features"
        if layer.weight.device != first.weight.device:
            return f"layers are on {first.weight.device} and {layer.weight.device}"
    return None


def why_separate_mlp(layers: Sequence[nn.Module]) -> str | None:
    """The same for gate, up and down, of which only the first two must read the same x."""
    return why_separate(layers[:2]) or why_separate(layers[2:])


def has_hooks(module: nn.Module) -> bool:
    return any(map(module.__dict__.__getitem__, _HOOKS))


def _arguments(layers: Sequence[nn.Module]) -> tuple[list, ...]:
    """(weights, biases, lora_As, lora_Bs, scalings, dropout_ps) as the layers would use them."""
    rows = []
    for layer in layers:
        if isinstance(layer, QLoRALinear) and layer.adapter_enabled and not layer.merged:
            lora_A, lora_B, bias = layer.trained()
            dropout_p = layer.dropout if layer.training else 0.0
            rows.append((layer.weight_args(), bias, lora_A, lora_B, layer.scaling, dropout_p))
        else:
            rows.append((layer.weight_args(), layer.bias, None, None, 1.0, 0.0))
    return tuple(map(list, zip(*rows, strict=True)))
