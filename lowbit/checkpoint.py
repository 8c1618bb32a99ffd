"""lowbit.save and lowbit.load: a whole prepared model as a folder of safetensors and JSON.

lowbit_config.json      which layers are 4-bit, their adapters' options, which names share a
                        tensor
model.safetensors       the state dict; quantized layers in bitsandbytes' keys (lowbit/state.py)
config.json, generation_config.json     of a transformers model, so that the folder is complete
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .materialize import restore_buffers
from .modules import (
    check_replaceable,
    check_whole,
    own,
    own_name,
    own_names,
    plain,
    quantized_layers,
    replace_all,
    train_adapters_only,
)
from .nn import Linear4bit, QLoRALinear
from .preparation import check_before_loading
from .state import CheckpointError, entry_keys, from_state_entries
from .tensor_files import TensorSource, atomic_folder, write_tensors

CONFIG_NAME = "lowbit_config.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT_VERSION = 1
_ADAPTER_FIELDS = ("r", "alpha", "dropout", "use_rslora")


def save(model: nn.Module, folder: str | os.PathLike) -> Path:
    """Save a prepared model, bit for bit.

    Args:
        model: model with Linear4bit or QLoRALinear layers, not on the meta device; also what
            torch.compile, checkpoint_wrapper or DistributedDataParallel made of one or the first
            two of its blocks: names in the file are those without. Adapters merged in place are
            saved unmerged.
        folder: directory to write; created if it is not there. Files of the same names are
            replaced, each in one step; an error leaves what was there before.

    Returns:
        The folder.

    Raises:
        ValueError: the model has no quantized layer, is on the meta device or sharded (FSDP2), or
            `folder` is a file.

    Example:
        >>> model = lowbit.prepare(torch.nn.Sequential(torch.nn.Linear(64, 64)), r=4)
        >>> folder = lowbit.save(model, tempfile.mkdtemp())
        >>> fresh = torch.nn.Sequential(torch.nn.Linear(64, 64, device="meta"))
        >>> torch.equal(lowbit.load(fresh, folder)[0].lora_A, model[0].lora_A)
        True
    """
    model = plain(model)
    if not quantized_layers(model):
        raise ValueError("model has no quantized layer; call lowbit.prepare(model) first")
    state = {own_name(name): tensor for name, tensor in model.state_dict().items()}
    check_whole(state.items())
    tensors, shared = _distinct(state)
    layers = {name: m for name, m in own_names(model).items() if isinstance(m, Linear4bit)}
    config = {
        "format": "lowbit",
        "version": FORMAT_VERSION,
        "model": type(model).__name__,
        "layers": {name: _layer_config(layer) for name, layer in layers.items()},
        "shared": shared,
    }
    with atomic_folder(folder) as scratch:
        write_tensors(scratch / WEIGHTS_NAME, tensors, {"format": "pt"})
        for part in (getattr(model, "config", None), getattr(model, "generation_config", None)):
            if hasattr(part, "save_pretrained"):
                part.save_pretrained(scratch)
        (scratch / CONFIG_NAME).write_text(json.dumps(config, indent=1) + "\n")
    return Path(folder)


def _layer_config(layer: Linear4bit) -> dict[str, Any]:
    if not isinstance(layer, QLoRALinear):
        return {}
    return {field: getattr(layer, field) for field in _ADAPTER_FIELDS}


def _distinct(
    state: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Split a state dict into tensors that share nothing and {name: name of the same tensor}."""
    first: dict[tuple, str] = {}
    storages: set[tuple] = set()
    tensors: dict[str, torch.Tensor] = {}
    shared: dict[str, str] = {}
    for name, tensor in state.items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has no data; load the model first")
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        view = (*storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and view in first:
            shared[name] = first[view]
            continue
        first[view] = name
        # Overlapping but different views are written as separate tensors.
        tensors[name] = own(tensor) if storage in storages else tensor.contiguous()
        storages.add(storage)
    return tensors, shared


def load(
    model: nn.Module | str | os.PathLike,
    folder: str | os.PathLike | None = None,
    *,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Load a model saved by `lowbit.save`.

    Args:
        model: the model to fill, in place: plain (its linear layers are replaced) or prepared, on
            any device, usually the meta device; it or its blocks may be compiled or in
            checkpoint_wrapper. Or the folder alone, for a transformers model: it is built from the
            config.json there, in eval mode.
        folder: directory written by `lowbit.save`.
        device: where the tensors go; default where the model is, the CPU for a meta model.

    Returns:
        The model, everything but the adapters frozen, every tensor equal to what was saved.

    Raises:
        FileNotFoundError: the folder or a file in it is not there.
        CheckpointError: the checkpoint is damaged, cut off or does not fit the model. The message
            names the tensor. The model is unchanged: everything is checked first.
        ValueError: the model must be given but was not, or it is in DistributedDataParallel or
            sharded already.

    Example:
        >>> model = lowbit.prepare(torch.nn.Sequential(torch.nn.Linear(64, 64)), r=0)
        >>> folder = lowbit.save(model, tempfile.mkdtemp())
        >>> lowbit.load(torch.nn.Sequential(torch.nn.Linear(64, 64)), folder)[0].blocksize
        64
    """
    if folder is None:
        if isinstance(model, nn.Module):
            raise ValueError("folder is missing: lowbit.load(model, folder)")
        return _load(_build(Path(model)), Path(model), device).eval()
    check_replaceable(model)
    inner = plain(model)
    loaded = _load(inner, Path(folder), device)
    return model if loaded is inner else loaded


def _load(model: nn.Module, folder: Path, device: torch.device | str | None) -> nn.Module:
    config = _read_config(folder / CONFIG_NAME)
    source = TensorSource(folder / WEIGHTS_NAME)
    if device is None:
        device = next((p.device for p in model.parameters() if not p.is_meta), "cpu")
    target = torch.device(device)
    # On a CPU the file's tensors are memory maps; a copy does not depend on the file any more.
    state = {own_name(n): own(t) if target.type == "cpu" else t.to(target) for n, t in source}
    state |= {name: state[kept] for name, kept in config["shared"].items() if kept in state}
    layers = _check_layers(model, config["layers"], state)
    _check_rest(model, layers, state)
    model = _fill(model, layers, state)
    restore_buffers(model, target)
    model.to(target)
    train_adapters_only(model)
    check_before_loading(model)
    return model


def _build(folder: Path) -> nn.Module:
    """A transformers model on the meta device, as the folder's config.json describes it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; load a folder of lowbit.save")
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} has no config.json, so it does not say which model to build; "
            "use lowbit.load(model, folder)"
        )
    try:
        import transformers
    except ImportError as error:
        raise ImportError("lowbit.load(folder) needs transformers to build the model") from error
    name = str(_read_config(folder / CONFIG_NAME).get("model"))
    model_class = getattr(transformers, name, None)
    if not hasattr(model_class, "_from_config"):
        raise ValueError(
            f"{folder} holds a {name}, which transformers does not have; "
            "use lowbit.load(model, folder)"
        )
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = model_class._from_config(config)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; is this a folder of lowbit.save?")
    try:
        config = json.loads(path.read_text())
        known = config["format"] == "lowbit" and isinstance(config["layers"], dict)
        version, shared = config["version"], config["shared"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r})") from None
    known = known and isinstance(shared, dict)
    known = known and all(isinstance(name, str) for name in shared.values())
    if not known or not all(isinstance(options, dict) for options in config["layers"].values()):
        raise CheckpointError(f"{path} does not describe a lowbit model")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this lowbit reads {FORMAT_VERSION}; upgrade it"
        )
    # Older files have the names of compiled blocks.
    layers = {own_name(name): options for name, options in config["layers"].items()}
    shared = {own_name(name): own_name(kept) for name, kept in shared.items()}
    return config | {"layers": layers, "shared": shared}


def _check_layers(model, layers: dict[str, Any], state) -> dict[str, Linear4bit]:
    """Build the quantized layers from the checkpoint, without touching the model."""
    modules = own_names(model)
    built: dict[str, Linear4bit] = {}
    same: dict[int, Linear4bit] = {}  # a layer used in several places is built once
    for name, options in layers.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            got = "nothing" if module is None else type(module).__name__
            raise CheckpointError(f"{name} is a 4-bit layer in the checkpoint, {got} in the model")
        if id(module) not in same:
            same[id(module)] = _build_layer(module, name, options, state)
        built[name] = same[id(module)]
    for name, module in modules.items():
        if isinstance(module, Linear4bit) and name not in layers:
            raise CheckpointError(f"{name} is quantized in the model but not in the checkpoint")
    return built


def _build_layer(module: nn.Linear, name: str, options: dict[str, Any], state) -> Linear4bit:
    prefix = f"{name}." if name else ""
    qw = from_state_entries(state, prefix + "weight")
    if qw.shape != (module.out_features, module.in_features):
        expected = [module.out_features, module.in_features]
        raise CheckpointError(f"{prefix}weight has shape {list(qw.shape)}, the model {expected}")
    bias = state.get(prefix + "bias")
    if (bias is None) != (module.bias is None):
        raise CheckpointError(f"{prefix}bias is in only one of checkpoint and model")
    if bias is not None and bias.shape != module.bias.shape:
        raise CheckpointError(
            f"{prefix}bias has shape {list(bias.shape)}, the model {list(module.bias.shape)}"
        )
    if bias is not None and not bias.is_floating_point():
        raise CheckpointError(f"{prefix}bias must be a floating tensor, got {bias.dtype}")
    if not options:
        return Linear4bit.from_quantized(qw, bias).train(module.training)
    adapter = _adapter_entries(qw, prefix, options, state)
    try:
        layer = QLoRALinear.from_quantized(qw, bias, **adapter, **options)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{CONFIG_NAME}: layer {name}: {error}") from None
    return layer.train(module.training)


def _adapter_entries(qw, prefix: str, options, state) -> dict[str, torch.Tensor]:
    if set(options) != set(_ADAPTER_FIELDS):
        raise CheckpointError(f"{CONFIG_NAME}: layer {prefix} has options {sorted(options)}")
    r = options["r"]
    entries = {}
    for name, shape in (("lora_A", (r, qw.K)), ("lora_B", (qw.N, r))):
        key = prefix + name
        if key not in state:
            raise CheckpointError(f"{key} is missing; the checkpoint is incomplete")
        if tuple(state[key].shape) != shape or not state[key].is_floating_point():
            got = f"{state[key].dtype} {list(state[key].shape)}"
            raise CheckpointError(f"{key} must be a floating tensor {list(shape)}, got {got}")
        entries[name] = state[key]
    return entries


def _check_rest(model, layers: dict[str, Linear4bit], state) -> None:
    """Check what is not part of a quantized layer: names and shapes, both ways."""
    owned = set()
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        owned |= {prefix + key for key, _ in layer.named_parameters()}
        owned |= set(entry_keys(state, prefix + "weight"))
    expected = {
        key: tensor
        for key, tensor in ((own_name(key), t) for key, t in model.state_dict().items())
        if key not in owned and not _inside(key, layers)
    }
    found = {key: tensor for key, tensor in state.items() if key not in owned}
    for key, tensor in expected.items():
        if key not in found:
            raise CheckpointError(f"{key} is missing; the checkpoint is incomplete")
        if found[key].shape != tensor.shape:
            got = list(found[key].shape)
            raise CheckpointError(f"{key} has shape {got}, the model has {list(tensor.shape)}")
    for key in found:
        if key not in expected:
            raise CheckpointError(f"{key} is in the checkpoint but not in the model")


def _inside(key: str, layers) -> bool:
    """Whether a key of the model's state dict belongs to a layer that will be replaced."""
    return any(key[:cut] in layers for cut, char in enumerate(key) if char == ".") or "" in layers


def _fill(model, layers: dict[str, Linear4bit], state) -> nn.Module:
    """Put the checked layers and tensors in place; one Parameter per distinct tensor."""
    modules = own_names(model)
    model = replace_all(model, {modules[name]: layer for name, layer in layers.items()})
    del modules
    parameters: dict[int, nn.Parameter] = {}
    for path, module in own_names(model).items():
        if isinstance(module, Linear4bit):
            continue
        prefix = f"{path}." if path else ""
        for name, old in list(module._parameters.items()):
            if old is not None:
                value = state[prefix + name]
                module._parameters[name] = parameters.setdefault(
                    id(value), nn.Parameter(value, False)
                )
        for name, old in list(module._buffers.items()):
            if old is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = state[prefix + name]
    return model
