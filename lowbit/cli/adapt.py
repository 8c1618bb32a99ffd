"""Quantize a loaded model, give it adapters, and count what that did to its size."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import CliError
from .settings import Settings

Sizes = dict[str, dict[str, float]]


def prepare_model(
    model: nn.Module, settings: Settings, device: torch.device, *, rank: int
) -> nn.Module:
    """Quantize every linear layer and add adapters of `rank` (0: none), on `device`.

    The adapters are kept in float32: Adam's small steps would be lost in bfloat16.
    """
    from ..preparation import prepare

    try:
        return prepare(
            model,
            rank,
            settings.alpha,
            settings.dropout,
            settings.target_names,
            quant_type=settings.quant_type,
            blocksize=settings.blocksize,
            double_quant=settings.double_quant,
            lora_dtype=torch.float32 if rank else None,
            device=device,
        )
    except ValueError as error:
        raise CliError(str(error).replace("target_modules", "--targets")) from error


def checkpoint_activations(model: nn.Module) -> None:
    """Turn on gradient checkpointing of the non-reentrant kind, which needs no input gradients.

    The generators' state is kept only if a block draws from them: keeping it waits for the GPU.
    """
    # transformers 5.23 renamed the method and warns about the old name.
    enable = getattr(model, "activation_checkpointing_enable", None)
    options = {"use_reentrant": False, "preserve_rng_state": draws_random_numbers(model)}
    try:
        (enable or model.gradient_checkpointing_enable)(options)
    except ValueError as error:
        raise CliError(f"--gradient-checkpointing: {error}") from error


def draws_random_numbers(model: nn.Module) -> bool:
    """Whether a training step of the model drops anything at random."""
    for module in model.modules():
        rates = (getattr(module, name, 0.0) for name in ("p", "dropout", "attention_dropout"))
        if any(isinstance(rate, float) and rate > 0.0 for rate in rates):
            return True
    settings = getattr(model, "config", None)
    named = vars(settings).items() if settings is not None else ()
    return any("drop" in name and isinstance(v, float) and v > 0.0 for name, v in named)


def fuse(model: nn.Module) -> str:
    """Let groups of layers compute together; says in one line what was fused."""
    from ..fusing import fuse as fuse_layers

    return str(fuse_layers(model))


def save_adapter(model: nn.Module, folder: Path, model_name: str) -> None:
    """Write the adapter in PEFT's format; the base model's name goes into its configuration."""
    from .. import adapters

    adapters.save_adapter(model, folder, base_model_name_or_path=model_name)


def load_adapter(model: nn.Module, folder: Path, *, trainable: bool) -> nn.Module:
    """Load an adapter onto a prepared model; CliError if the folder or the fit is wrong."""
    from .. import adapters

    try:
        return adapters.load_adapter(model, folder, trainable=trainable)
    except (ValueError, FileNotFoundError) as error:
        raise CliError(f"adapter {folder}: {error}") from error


def adapter_base(folder: Path) -> str | None:
    """Name of the base model in an adapter's configuration; CliError if `folder` holds no
    adapter.
    """
    import json

    if not folder.is_dir():
        raise CliError(f"adapter folder {folder} does not exist")
    path = folder / "adapter_config.json"
    if not path.exists():
        raise CliError(f"{folder} is no adapter: it has no adapter_config.json")
    try:
        return json.loads(path.read_text()).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        raise CliError(f"{path} is damaged: not a JSON object") from None


def tensor_bytes(tensors: Any) -> int:
    """Bytes of distinct tensors; a tied weight counts once."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors if t.numel()}.values())


class SizeCounter:
    """Counts parameters and bytes before quantization, and bytes after; adapters are not
    counted.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        self.weights = {name: layer.weight.numel() for name, layer in self.layers.items()}
        self.layer_bytes = {name: _own_bytes(layer) for name, layer in self.layers.items()}
        self.parameters = sum(p.numel() for p in model.parameters())
        self.total = tensor_bytes(model.parameters())
        self.layers = {}  # the dense layers must not be kept alive

    def after(self, model: nn.Module) -> Sizes:
        """Sizes of the quantized layers together, and of the whole model."""
        from ..nn import Linear4bit

        layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
        adapters = [
            p for n, p in model.named_parameters() if n.rpartition(".")[2] in ("lora_A", "lora_B")
        ]
        everything = [*model.parameters(), *_quantization_buffers(layers.values())]
        sizes = {
            "4-bit layers": {
                "parameters": sum(self.weights[name] for name in layers),
                "bytes_before": sum(self.layer_bytes[name] for name in layers),
                "bytes_after": sum(_own_bytes(layer) for layer in layers.values()),
            },
            "whole model": {
                "parameters": self.parameters,
                "bytes_before": self.total,
                "bytes_after": tensor_bytes(everything) - tensor_bytes(adapters),
            },
        }
        return sizes


def _own_bytes(layer: nn.Module) -> int:
    """Bytes of the weight of one layer with its quantization constants; bias and adapter not
    counted.
    """
    return tensor_bytes([layer.weight, *_quantization_buffers([layer])])


def _quantization_buffers(layers: Any) -> list[torch.Tensor]:
    return [
        buffer
        for layer in layers
        for name, buffer in layer.named_buffers()
        if name.startswith("weight_")
    ]
