"""Linear layers of real models, and the lists of sizes the command line takes. Needs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """A linear layer that exists: N = out_features, K = in_features."""

    name: str
    N: int
    K: int


# Distinct shapes only: an output projection is as large as q, `up` as large as `gate`, `v` as `k`.
MODELS = {
    "llama-8b": (
        Layer("q8b", 4096, 4096),
        Layer("kv8b", 1024, 4096),
        Layer("gate8b", 14336, 4096),
        Layer("down8b", 4096, 14336),
    ),
    "llama-70b": (
        Layer("q70b", 8192, 8192),
        Layer("kv70b", 1024, 8192),
        Layer("gate70b", 28672, 8192),
        Layer("down70b", 8192, 28672),
    ),
    "qwen2.5-7b": (
        Layer("q-qwen7b", 3584, 3584),
        Layer("kv-qwen7b", 512, 3584),
        Layer("gate-qwen7b", 18944, 3584),
        Layer("down-qwen7b", 3584, 18944),
    ),
    # Rows of 3420 elements: the last block of a row is short.
    "qwen2.5-vl-vision": (
        Layer("qkv-vision", 3840, 1280),
        Layer("proj-vision", 1280, 1280),
        Layer("gate-vision", 3420, 1280),
        Layer("down-vision", 1280, 3420),
    ),
    "smollm2-135m": (
        Layer("q135m", 576, 576),
        Layer("gate135m", 1536, 576),
        Layer("down135m", 576, 1536),
    ),
}

LAYERS = {layer.name: layer for layers in MODELS.values() for layer in layers}


def names(text: str) -> list[str]:
    """The parts of a list separated by commas, without blanks and empty parts."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_shapes(text: str) -> list[Layer]:
    """Read a list of layers.

    Args:
        text: models (`llama-8b`), layers (`gate70b`) and `OUTxIN` sizes (`4096x11008`), with commas
            between.

    Returns:
        The layers in order, each shape once.

    Raises:
        ValueError: nothing is named, or a name is none of these.
    """
    found: dict[tuple[int, int], Layer] = {}
    for name in names(text):
        for layer in _layers(name):
            found.setdefault((layer.N, layer.K), layer)
    if not found:
        raise ValueError("--shapes is empty; give models, layers or OUTxIN sizes, for instance q8b")
    return list(found.values())


def _layers(name: str) -> tuple[Layer, ...]:
    if name.lower() in MODELS:
        return MODELS[name.lower()]
    if name in LAYERS:
        return (LAYERS[name],)
    size = re.fullmatch(r"0*([1-9]\d{0,6})[xX]0*([1-9]\d{0,6})", name)
    if size is None:
        raise ValueError(
            f"--shapes: {name!r} is no model ({', '.join(MODELS)}), no layer of one like q8b or "
            "gate70b, and no OUTxIN size like 4096x11008"
        )
    N, K = int(size[1]), int(size[2])
    return (Layer(f"{N}x{K}", N, K),)


def parse_counts(option: str, text: str) -> list[int]:
    """Read positive integers separated by commas, each once, in order.

    Raises:
        ValueError: the list is empty, or a part is no positive integer.
    """
    parts = names(text)
    if not parts or not all(re.fullmatch(r"0*[1-9]\d{0,8}", part) for part in parts):
        raise ValueError(
            f"{option} must be positive integers separated by commas, for instance 1,16,256; "
            f"got {text!r}"
        )
    return list(dict.fromkeys(int(part) for part in parts))
