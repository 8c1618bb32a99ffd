"""Adapters of a prepared model: merging, switching off, and files in PEFT's format.

The files are read and written in peft_format.py. Several adapters in one batch are a matter of
`lowbit.lora_matmul(..., adapter_index=...)`.
"""

from __future__ import annotations

import torch
from torch import nn

from .modules import adapted_layers, check_whole, quantized_layers, replace_all
from .nn import MergeError, QLoRALinear
from .peft_format import load_adapter, save_adapter

__all__ = [
    "disable_adapter",
    "drop_adapter",
    "enable_adapter",
    "load_adapter",
    "merge",
    "merge_adapter",
    "save_adapter",
    "unmerge_adapter",
]


def merge(model: nn.Module, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every 4-bit layer by a dense nn.Linear with its adapter folded in: RN(W + s B A).

    Args:
        model: prepared model; changed in place, layer by layer.
        dtype: fp32, fp16 or bf16; default the dtype of each original weight.

    Returns:
        The model, an ordinary 16-bit one.

    Raises:
        ValueError: the model has no quantized layer, or is sharded (FSDP2).

    Notes:
        The sum is formed in fp32 and rounded once. The base stays what quantization made of it.

    Example:
        >>> model = lowbit.prepare(torch.nn.Sequential(torch.nn.Linear(64, 64)), r=4)
        >>> lowbit.adapters.merge(model, dtype=torch.bfloat16)[0].weight.dtype
        torch.bfloat16
    """
    layers = quantized_layers(model)
    if not layers:
        raise ValueError("model has no quantized layer; there is nothing to merge")
    check_whole(model.named_parameters())
    while layers:  # one by one, and without keeping the old ones alive
        _, layer = layers.popitem()
        model = replace_all(model, {layer: layer.to_linear(dtype)})
    return model


def merge_adapter(model: nn.Module) -> dict[str, MergeError]:
    """Fold all adapters into the 4-bit weights, reversibly.

    Args:
        model: prepared model.

    Returns:
        {layer: MergeError}: the relative error of requantizing and the relative size of the update.

    Raises:
        ValueError: the model has no adapter or is sharded (FSDP2), one is merged already or
            switched off, or a merged weight is not finite; nothing is merged then.

    Example:
        >>> model = lowbit.prepare(torch.nn.Sequential(torch.nn.Linear(64, 64)), r=4)
        >>> report = lowbit.adapters.merge_adapter(model)
        >>> report["0"].update  # a fresh adapter changes nothing
        0.0
    """
    layers = adapted_layers(model)
    check_whole(model.named_parameters())
    merged: dict[str, MergeError] = {}
    try:
        for name, layer in layers.items():
            merged[name] = layer.merge()
    except ValueError as error:
        for done in merged:
            layers[done].unmerge()
        raise ValueError(f"{name}: {error}") from error
    return merged


def unmerge_adapter(model: nn.Module) -> None:
    """Undo `merge_adapter`, bit for bit.

    Raises:
        ValueError: the model has no adapter, or none is merged.

    Example:
        >>> model = lowbit.prepare(torch.nn.Sequential(torch.nn.Linear(64, 64)), r=4)
        >>> report = lowbit.adapters.merge_adapter(model)
        >>> lowbit.adapters.unmerge_adapter(model)
    """
    merged = [layer for layer in adapted_layers(model).values() if layer.merged]
    if not merged:
        raise ValueError("no adapter of the model is merged; call merge_adapter(model) first")
    for layer in merged:
        layer.unmerge()


def drop_adapter(model: nn.Module) -> nn.Module:
    """Replace QLoRALinear layers by Linear4bit ones on the same storage.

    After `merge_adapter` this makes the merge final; else the adapters are lost.

    Returns:
        The model.

    Raises:
        ValueError: the model has no adapter or is sharded (FSDP2).

    Example:
        >>> model = lowbit.prepare(torch.nn.Sequential(torch.nn.Linear(64, 64)), r=4)
        >>> type(lowbit.adapters.drop_adapter(model)[0]).__name__
        'Linear4bit'
    """
    layers = adapted_layers(model).values()
    check_whole(model.named_parameters())
    return replace_all(model, {layer: layer.without_adapter() for layer in layers})


class _Disabled:
    """What `disable_adapter` returns: a context manager that restores the previous state."""

    def __init__(self, layers: list[QLoRALinear]) -> None:
        self._before = [(layer, layer.adapter_enabled) for layer in layers]
        for layer in layers:
            layer.adapter_enabled = False

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for layer, enabled in self._before:
            layer.adapter_enabled = enabled


def disable_adapter(model: nn.Module) -> _Disabled:
    """Compute the base model only, until `enable_adapter` or, in a with statement, for its block.

    Raises:
        ValueError: the model has no adapter, or one is merged into the weight.

    Example:
        >>> model = lowbit.prepare(torch.nn.Sequential(torch.nn.Linear(64, 64)), r=4)
        >>> with lowbit.adapters.disable_adapter(model):
        ...     reference = model(torch.randn(2, 64))
    """
    layers = list(adapted_layers(model).values())
    if any(layer.merged for layer in layers):
        raise ValueError("an adapter is merged into its weight; call unmerge_adapter(model) first")
    return _Disabled(layers)


def enable_adapter(model: nn.Module) -> None:
    """Let all adapters take part again.

    Raises:
        ValueError: the model has no adapter.

    Example:
        >>> model = lowbit.prepare(torch.nn.Sequential(torch.nn.Linear(64, 64)), r=4)
        >>> before = lowbit.adapters.disable_adapter(model)
        >>> lowbit.adapters.enable_adapter(model)
    """
    for layer in adapted_layers(model).values():
        layer.adapter_enabled = True
