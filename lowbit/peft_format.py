"""Adapters of a prepared model in files of PEFT's format.

    adapter_model.safetensors    base_model.model.<layer>.lora_A.weight [r, K],
                                 base_model.model.<layer>.lora_B.weight [N, r]
    adapter_config.json          PEFT's LoraConfig

PEFT loads such a folder onto the plain 16-bit model, and what PEFT saved loads onto a lowbit model.
"""

from __future__ import annotations

import collections
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .modules import (
    adapted_layers,
    check_replaceable,
    check_whole,
    matches,
    own,
    own_name,
    own_names,
    plain,
    quantized_layers,
    replace_all,
)
from .nn import Linear4bit, QLoRALinear
from .state import CheckpointError
from .tensor_files import TensorSource, atomic_folder, write_tensors

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(.+)\.lora_(A|B)\.weight")
# Options of PEFT that change what a layer computes, and what is wrong with them here.
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "biases in lora_B",
    "fan_in_fan_out": "layers that store [K, N] (Conv1D)",
    "modules_to_save": "trained modules beside the adapters",
    "trainable_token_indices": "trained embedding rows",
    "target_parameters": "adapters of bare parameters",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
# These initializations also change the base weight, which the adapter's file does not hold.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> Path:
    """Save the adapters in PEFT's format.

    Args:
        model: prepared model, or what torch.compile, checkpoint_wrapper or DistributedDataParallel
            made of one.
        folder: directory to write; the two files are replaced, each in one step.
        base_model_name_or_path: goes into the configuration; default what a transformers model
            knows.
        task_type: PEFT's task type; default "CAUSAL_LM" for a transformers ...ForCausalLM, else
            none.

    Returns:
        The folder.

    Raises:
        ValueError: the model has no adapter or is sharded (FSDP2), or `folder` is a file.

    Notes:
        `peft.PeftModel.from_pretrained(base, folder)` computes what the lowbit model computes, up
        to the quantization of the base. Layers of differing rank or alpha go to rank_pattern,
        alpha_pattern.

    Example:
        >>> model = lowbit.prepare(torch.nn.Sequential(torch.nn.Linear(64, 64)), r=4)
        >>> folder = lowbit.adapters.save_adapter(model, tempfile.mkdtemp())
        >>> sorted(path.name for path in folder.iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    model = plain(model)
    layers = {own_name(name): layer for name, layer in adapted_layers(model).items()}
    tensors = {}
    for name, layer in layers.items():
        for part, param in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            if param.is_meta:
                raise ValueError(
                    f"{name}.{part} is on the meta device and has no data; load it first"
                )
            check_whole([(f"{name}.{part}", param)])
            # A copy: layers may share parameters, and files share nothing.
            tensors[f"{_PREFIX}{name}.{part}.weight"] = own(param).contiguous()
    if base_model_name_or_path is None:
        base_model_name_or_path = (
            getattr(getattr(model, "config", None), "_name_or_path", "") or None
        )
    if task_type is None and type(model).__name__.endswith("ForCausalLM"):
        task_type = "CAUSAL_LM"
    config = _peft_config(model, layers)
    config |= {"base_model_name_or_path": base_model_name_or_path, "task_type": task_type}
    with atomic_folder(folder) as scratch:
        write_tensors(scratch / WEIGHTS_NAME, tensors, {"format": "pt"})
        (scratch / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return Path(folder)


def _peft_config(model: nn.Module, layers: Mapping[str, QLoRALinear]) -> dict[str, Any]:
    """LoraConfig fields: the most common options, and patterns for the layers that differ."""

    def most_common(values):
        return collections.Counter(values).most_common(1)[0][0]

    use_rslora = most_common(layer.use_rslora for layer in layers.values())
    ranks = {name: layer.r for name, layer in layers.items()}
    alphas = {name: _alpha(layer, use_rslora) for name, layer in layers.items()}
    r, alpha = most_common(ranks.values()), most_common(alphas.values())

    def pattern(values, usual):
        # "^" and escapes, because PEFT reads the keys as regular expressions that match name
        # endings.
        return {f"^{re.escape(n)}": value for n, value in values.items() if value != usual}

    return {
        "peft_type": "LORA",
        "auto_mapping": None,
        "revision": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": most_common(layer.dropout for layer in layers.values()),
        "rank_pattern": pattern(ranks, r),
        "alpha_pattern": pattern(alphas, alpha),
        "target_modules": _target_modules(model, list(layers)),
        "use_rslora": use_rslora,
        "use_dora": False,
        "lora_bias": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _alpha(layer: QLoRALinear, use_rslora: bool) -> float:
    """The alpha that gives the layer's scaling under the common rule."""
    if layer.use_rslora == use_rslora:
        return layer.alpha
    return layer.scaling * (math.sqrt(layer.r) if use_rslora else layer.r)


def _target_modules(model: nn.Module, names: list[str]) -> list[str] | str:
    """Full names; as one regular expression if a name is also the ending of another module's."""
    others = own_names(model).keys() - set(names)
    if any(matches(o, n) for n in names for o in others if o.endswith(n)):
        return "|".join(re.escape(name) for name in names)
    return sorted(names)


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    trainable: bool = True,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load adapters in PEFT's format; afterwards the model has exactly these adapters.

    Layers that are in the file get its adapter (a Linear4bit becomes a QLoRALinear on the same
    storage), and other layers lose theirs.

    Args:
        model: prepared model (r=0 will do), compiled or not.
        folder: directory with adapter_config.json and adapter_model.safetensors.
        trainable: whether lora_A and lora_B require gradients.
        dtype: dtype of lora_A and lora_B; default that of the file.

    Returns:
        The model. Layers are replaced, so make the optimizer and DistributedDataParallel or FSDP2
        afterwards.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: the adapter is of a kind that lowbit does not compute (DoRA, trained biases,
            ...), or the model is in DistributedDataParallel or sharded already.
        CheckpointError: a file is damaged, or does not fit the model; the message names the tensor.
            In every case the model is unchanged.

    Example:
        >>> model = lowbit.prepare(torch.nn.Sequential(torch.nn.Linear(64, 64)), r=4)
        >>> folder = lowbit.adapters.save_adapter(model, tempfile.mkdtemp())
        >>> base = lowbit.prepare(torch.nn.Sequential(torch.nn.Linear(64, 64)), r=0)
        >>> lowbit.adapters.load_adapter(base, folder)[0].r
        4
    """
    check_replaceable(model)
    inner, folder = plain(model), Path(folder)
    config = _read_config(folder / CONFIG_NAME)
    if not (folder / WEIGHTS_NAME).is_file():
        raise FileNotFoundError(
            f"there is no {folder / WEIGHTS_NAME}; lowbit reads safetensors only"
        )
    pairs = _read_pairs(folder / WEIGHTS_NAME)
    for name, layer in quantized_layers(inner).items():
        if isinstance(layer, QLoRALinear) and layer.merged:
            raise ValueError(f"{name} has its adapter merged; call unmerge_adapter(model) first")
    new: dict[nn.Module, nn.Module] = {}
    modules = own_names(inner)
    for name, pair in pairs.items():
        layer = modules.get(own_name(name))
        if not isinstance(layer, Linear4bit):
            got = "absent in the model"
            if layer is not None:
                got = f"a {type(layer).__name__} in the model, not a 4-bit layer"
            cure = "; call lowbit.prepare(model) first" if type(layer) is nn.Linear else ""
            raise CheckpointError(f"{name} has an adapter in the file and is {got}{cure}")
        new[layer] = _adapted(name, layer, pair, config, dtype)
    for layer in new.values():
        layer.lora_A.requires_grad_(trainable)
        layer.lora_B.requires_grad_(trainable)
    for layer in quantized_layers(inner).values():
        if layer not in new and isinstance(layer, QLoRALinear):
            new[layer] = layer.without_adapter()
    loaded = replace_all(inner, new)
    return model if loaded is inner else loaded


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; is this the folder of an adapter?")
    try:
        config = json.loads(path.read_text())
        r, alpha = config["r"], config["lora_alpha"]
        kind = config["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r})") from None
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type must be LORA, got {kind!r}")
    finite = isinstance(alpha, (int, float)) and math.isfinite(alpha)
    if not isinstance(r, int) or r < 1 or not finite:
        raise CheckpointError(f"{path} is damaged: r = {r!r}, lora_alpha = {alpha!r}")
    dropout = config.get("lora_dropout") or 0.0
    if not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
        raise CheckpointError(f"{path} is damaged: lora_dropout = {dropout!r}")
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(field) or {}, dict):
            raise CheckpointError(f"{path} is damaged: {field} = {config[field]!r}")
    for field, meaning in _UNSUPPORTED.items():
        if config.get(field):
            raise ValueError(f"{path}: {field} = {config[field]!r}: lowbit has no {meaning}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias must be 'none', got {config['bias']!r}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise ValueError(
            f"{path}: an adapter initialized by {start!r} needs the base weight it changed; "
            "save it with PEFT's path_initial_model_for_weight_conversion first"
        )
    return config


def _read_pairs(path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{layer: (lora_A, lora_B)}, checked for form. Files of PEFT and older ones may have the names
    of compiled blocks.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in TensorSource(path):
        match = _KEY.fullmatch(key)
        if match is None:
            wrapped = key.startswith("module.")
            hint = "; save it from DistributedDataParallel's .module" if wrapped else ""
            raise ValueError(
                f"{key} is no LoRA matrix of a linear layer, which is all lowbit reads{hint}"
            )
        if tensor.dim() != 2 or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise CheckpointError(
                f"{key} must be a finite floating matrix, got {tensor.dtype} {list(tensor.shape)}"
            )
        found.setdefault(match[1], {})[match[2]] = own(tensor)
    for name, pair in found.items():
        for part in "AB":
            if part not in pair:
                raise CheckpointError(f"{_PREFIX}{name}.lora_{part}.weight is missing in {path}")
    if not found:
        raise CheckpointError(f"{path} holds no adapter")
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def _adapted(name: str, layer: Linear4bit, pair, config, dtype) -> QLoRALinear:
    """A new layer on the storage of `layer` with the adapter of the file."""
    lora_A, lora_B = pair
    r = _pattern_value(config, "rank_pattern", name, config["r"])
    alpha = _pattern_value(config, "alpha_pattern", name, config["lora_alpha"])
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise CheckpointError(f"{CONFIG_NAME} is damaged: the lora_alpha of {name} is {alpha!r}")
    key = f"{_PREFIX}{name}.lora_"
    N, K = layer.out_features, layer.in_features
    for part, tensor, shape in (("A", lora_A, (r, K)), ("B", lora_B, (N, r))):
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{key}{part}.weight must be {list(shape)}, got {list(tensor.shape)}"
            )
    if dtype is not None:
        lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    adapted = QLoRALinear.from_quantized(
        layer.quantized_weight,
        lora_A=lora_A,
        lora_B=lora_B,
        alpha=alpha,
        dropout=config.get("lora_dropout") or 0.0,
        use_rslora=bool(config.get("use_rslora")),
    )
    adapted.register_parameter("bias", layer.bias)
    return adapted.train(layer.training)


def _pattern_value(config: Mapping[str, Any], field: str, name: str, default: Any) -> Any:
    """PEFT's rule: the first key that, as a regular expression, matches the name or its ending; the
    name in the file, for which the key was written, or the model's own.
    """
    for pattern, value in (config.get(field) or {}).items():
        try:
            expression = re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            raise CheckpointError(
                f"{CONFIG_NAME} is damaged: {field} has the key {pattern!r}, no regular expression "
                f"({error})"
            ) from None
        if any(expression.match(n) for n in (name, own_name(name))):
            return value
    return default
