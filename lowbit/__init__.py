"""lowbit: fast 4-bit linear layers with trainable low-rank adapters.

Names are imported when they are first used, so that `lowbit --help` needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import adapters, dispatch, memory, nn, optim
    from .checkpoint import load, save
    from .codebooks import codebook, nested_codebook, normal_float
    from .functional import lora_matmul, matmul
    from .fusing import FusionReport, fuse, unfuse
    from .gated_mlp import lora_gated_mlp
    from .grouped import lora_matmul_group
    from .preparation import prepare
    from .quantization import dequantize, pack, quantize, unpack
    from .weight import QuantizedWeight

_MODULES = ("adapters", "dispatch", "memory", "nn", "optim")
_HOME = {
    "checkpoint": ("load", "save"),
    "codebooks": ("codebook", "nested_codebook", "normal_float"),
    "functional": ("lora_matmul", "matmul"),
    "fusing": ("FusionReport", "fuse", "unfuse"),
    "gated_mlp": ("lora_gated_mlp",),
    "grouped": ("lora_matmul_group",),
    "preparation": ("prepare",),
    "quantization": ("dequantize", "pack", "quantize", "unpack"),
    "weight": ("QuantizedWeight",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "FusionReport",
    "QuantizedWeight",
    "__version__",
    "adapters",
    "codebook",
    "dequantize",
    "dispatch",
    "fuse",
    "load",
    "lora_gated_mlp",
    "lora_matmul",
    "lora_matmul_group",
    "matmul",
    "memory",
    "nested_codebook",
    "nn",
    "normal_float",
    "optim",
    "pack",
    "prepare",
    "quantize",
    "save",
    "unfuse",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
