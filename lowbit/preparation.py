"""lowbit.prepare: quantize the linear layers of a model and give them adapters, layer by layer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from . import fusing
from .materialize import Materializer
from .modules import (
    check_module,
    check_replaceable,
    forget_quantizer,
    fp32_names,
    group_shared,
    is_linear,
    linear_names,
    output_names,
    own_name,
    own_names,
    replace,
    select,
    tied_names,
    train_adapters_only,
)
from .nn import Linear4bit, QLoRALinear
from .nn.qlora import is_rank
from .quantization import check_floating
from .state import CheckpointError, check_entry
from .tensor_files import TensorSource


def prepare(
    model: nn.Module,
    r: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    target_modules: str | Iterable[str] = "all-linear",
    *,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    double_quant_type: str = "dynamic",
    layout: str = "rows",
    use_rslora: bool = False,
    lora_dtype: torch.dtype | None = None,
    skip_modules: Iterable[str] | None = None,
    weights: str | os.PathLike | Mapping[str, torch.Tensor] | Iterable | None = None,
    device: torch.device | str | None = None,
    fuse: bool = False,
) -> nn.Module:
    """Turn a model into a QLoRA model, in place: 4-bit frozen linear layers, trained adapters.

    Every linear layer is quantized; those that `target_modules` names get an adapter as well:
    y = x W^T + bias + s * drop(x) A^T B^T. Each 16-bit weight is freed before the next one is
    touched, so the peak is one layer above the final size.

    Args:
        model: any nn.Module, on any device; on the meta device nothing is allocated.
        r: rank of the adapters; 0 quantizes only.
        alpha, dropout, use_rslora, lora_dtype: as in QLoRALinear.
        target_modules: "all-linear", a list of layer names or name endings ("q_proj"), or a regular
            expression that matches whole names.
        quant_type, blocksize, double_quant, double_quant_type, layout: as in `lowbit.quantize`.
        skip_modules: names or name endings of linear layers to leave alone; default the output
            embedding (lm_head) and what a transformers model keeps in fp32 (T5's wo), unless
            `target_modules` names it.
        weights: where the weights are, for a model on the meta device: path of a safetensors file
            or folder (Hugging Face shards included), mapping, or iterable of (name, tensor). Each
            tensor is read, cast to the model's dtype, quantized and placed as it comes; weights
            that bitsandbytes or lowbit has quantized are taken as they are. None leaves a meta
            model on the meta device, for `lowbit.load`.
        device: where the result goes; each layer is quantized there. Default where the model is.
        fuse: compute q, k, v of attention as one group and gated MLPs as one function where the
            model allows: `lowbit.fuse(model)`, whose report is logged.

    Returns:
        The model (a new layer if the model itself is an nn.Linear), everything but the adapters
        frozen.

    Raises:
        ValueError: an option is out of range, a name matches no linear layer (the message lists
            close names), the model has no linear layer, has adapters already or is in
            DistributedDataParallel or sharded, or a weight has NaN or Inf.
        CheckpointError, FileNotFoundError: `weights` is damaged, incomplete or does not fit.

    Notes:
        Options, names and, unless `weights` is an iterable, the names in the checkpoint are checked
        before anything is changed; NaN in a weight is found when its turn comes. Layers whose
        weight is tied to another module are never quantized. Neither are subclasses of nn.Linear
        with a forward of their own, nor transformers' Conv1D (GPT-2). Hooks of a layer that is
        replaced are not taken over; register them afterwards. Layers that are quantized
        already (Linear4bit, bitsandbytes) keep their storage. The bits do not depend on the order
        of the layers or on `weights`; lora_A is drawn with torch's generator in the order of the
        modules. With reentrant gradient checkpointing, the input of a checkpointed block must
        require a gradient (transformers: model.enable_input_require_grads()), or
        use_reentrant=False.

    Source: QLoRA (Dettmers et al. 2023), section 3.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64))
        >>> model = lowbit.prepare(model, r=8, target_modules=["0"])
        >>> [type(layer).__name__ for layer in model]
        ['QLoRALinear', 'Linear4bit']
    """
    adapter = {
        "r": r,
        "alpha": alpha,
        "dropout": dropout,
        "use_rslora": use_rslora,
        "lora_dtype": lora_dtype,
    }
    quantization = {
        "quant_type": quant_type,
        "blocksize": blocksize,
        "double_quant": double_quant,
        "double_quant_type": double_quant_type,
        "layout": layout,
    }
    _check_options(model, r, adapter, quantization)
    targets = _plan(model, target_modules if r else [], skip_modules)
    adapter = adapter if r else {}
    if weights is None:
        if device is not None and any(p.is_meta for p in model.parameters()):
            raise ValueError(
                "device has no meaning for a model on the meta device without weights="
            )
        model = _convert(model, targets, adapter, quantization, device)
    else:
        filler = Materializer(model, targets, quantization, device)
        model = filler.run(TensorSource(weights), adapter)
    train_adapters_only(model)
    check_before_loading(model)
    forget_quantizer(model)
    if fuse:
        fusing.fuse(model)
    return model


def _check_options(model, r, adapter: dict[str, Any], quantization: dict[str, Any]) -> None:
    """Check by building a tiny layer with the options, so that no rule is written twice."""
    check_module(model)
    check_replaceable(model)
    if hasattr(model, "peft_config"):
        raise ValueError("model has PEFT adapters already; merge them, or prepare the plain model")
    if not is_rank(r) or r < 0:
        raise ValueError(f"r must be an integer of at least 0, got {r!r}")
    with torch.random.fork_rng(devices=[]):  # a check must not change what is drawn later
        probe = nn.Linear(32, 1, bias=False, device="cpu", dtype=torch.float32)
        if r:
            QLoRALinear.from_linear(probe, **adapter, **quantization)
        else:
            Linear4bit.from_linear(probe, **quantization)


def _plan(model, target_modules, skip_modules) -> dict[str, bool]:
    """Decide what happens to each linear layer: {name: gets an adapter}, in module order."""
    linear = linear_names(model)
    if not linear:
        raise ValueError(
            f"model ({type(model).__name__}) has no linear layers{_unsupported_note(model)}"
        )
    tied = tied_names(model)
    every = isinstance(target_modules, str) and target_modules == "all-linear"
    wanted = [] if every else select(linear, target_modules, "target_modules", model)
    if skip_modules is None:
        skipped = (output_names(model) | fp32_names(model)) - set(wanted)
    else:
        if isinstance(skip_modules, str):
            raise TypeError(f"skip_modules must be a list of names, got {skip_modules!r}")
        skipped = set(select(linear, skip_modules, "skip_modules", model))
    for name in wanted:
        if name in tied:
            raise ValueError(f"target_modules: the weight of {name} is tied to another module")
        if name in skipped:
            raise ValueError(f"{name} is named by both target_modules and skip_modules")
    plan = {
        name: every or name in wanted for name in linear if name not in tied and name not in skipped
    }
    if not plan:
        raise ValueError(
            "model has no linear layers to quantize besides the skipped and tied ones"
            f"{_unsupported_note(model)}"
        )
    for name in plan:
        linear = model.get_submodule(name)
        if isinstance(linear, QLoRALinear):
            raise ValueError(f"{name} has an adapter already; the model was prepared before")
        packed = isinstance(linear, Linear4bit) or getattr(linear.weight, "quant_state", None)
        if not packed:
            check_floating(linear.weight, f"{name}.weight" if name else "weight")
    return plan


def _unsupported_note(model: nn.Module) -> str:
    """What the model has that only looks like a linear layer to replace."""
    kinds = {
        type(m).__name__
        for m in model.modules()
        if type(m).__name__ == "Conv1D" or (isinstance(m, nn.Linear) and not is_linear(m))
    }
    return f"; layers of type {', '.join(sorted(kinds))} are not supported" if kinds else ""


def _convert(model, plan: dict[str, bool], adapter, quantization, device) -> nn.Module:
    """Quantize a model whose weights are there (or stay on the meta device)."""
    model.requires_grad_(False)
    for names in group_shared(model, plan):
        with_adapter = any(plan[name] for name in names)

        def build(linear, name=names[0], with_adapter=with_adapter):
            return _quantized(linear, name, with_adapter, adapter, quantization, device)

        model = replace(model, names, build)
    return model if device is None else model.to(device)


def _quantized(linear, name, with_adapter, adapter, quantization, device) -> Linear4bit:
    try:
        if with_adapter:
            return QLoRALinear.from_linear(linear, **quantization, device=device, **adapter)
        return Linear4bit.from_linear(linear, **quantization, device=device)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def check_before_loading(model: nn.Module) -> None:
    """Register `check_state_dict` on a model, once."""
    hooks = model._load_state_dict_pre_hooks.values()
    if not any(getattr(hook, "hook", None) is check_state_dict for hook in hooks):
        model.register_load_state_dict_pre_hook(check_state_dict)


def check_state_dict(
    model, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
) -> None:
    """Refuse a state dict with a damaged or misfitting entry before anything is loaded.

    torch loads module by module and reports errors at the end; by then the layers before the
    damaged one have changed. As a pre-hook of the whole model this runs before the first one.

    Raises:
        CheckpointError: names the tensors.
    """
    assign = local_metadata.get("assign_to_params_buffers", False)
    problems: list[str] = []
    layers = {name: m for name, m in own_names(model).items() if isinstance(m, Linear4bit)}
    state_dict = {
        prefix + own_name(key.removeprefix(prefix)): tensor
        for key, tensor in state_dict.items()
        if key.startswith(prefix)
    }
    by_layer = _entries_by_layer(layers, state_dict, prefix)
    for path, entries in by_layer.items():
        layer = layers[path]
        problems += layer._inspect_state(entries, _join(prefix, path), assign)[1]
    for name, param in model.named_parameters(remove_duplicate=False):
        name = own_name(name)
        entry = state_dict.get(prefix + name)
        if name.rpartition(".")[0] in by_layer or entry is None:
            continue  # checked above, or left to torch's own report of missing keys
        check_entry(entry, prefix + name)
        if entry.shape != param.shape:
            got, expected = list(entry.shape), list(param.shape)
            problems.append(f"{prefix}{name} has shape {got}, the model has {expected}")
    if problems:
        raise CheckpointError("state_dict does not fit: " + "; ".join(problems))


def _entries_by_layer(layers, state_dict, prefix) -> dict[str, dict[str, torch.Tensor]]:
    """Entries of each quantized layer, found in one pass over the keys."""
    entries: dict[str, dict[str, torch.Tensor]] = {name: {} for name in layers}
    for key, tensor in state_dict.items():
        path = key[len(prefix) :]
        while path:
            path = path.rpartition(".")[0]
            if path in entries:
                entries[path][key] = tensor
                break
    if "" in entries:
        entries[""] = state_dict
    return entries


def _join(prefix: str, path: str) -> str:
    return f"{prefix}{path}." if path else prefix
