"""lowbit: fast 4-bit linear layers with trainable low-rank adapters."""

from . import ops  # isort: skip  (registers torch.ops.lowbit before anything calls it)
from . import adapters, dispatch, nn
from ._version import __version__
from .checkpoint import load, save
from .codebooks import codebook, nested_codebook, normal_float
from .functional import lora_matmul, matmul
from .prepare import prepare
from .quantize import dequantize, pack, quantize, unpack
from .weight import QuantizedWeight

__all__ = [
    "QuantizedWeight",
    "__version__",
    "adapters",
    "codebook",
    "dequantize",
    "dispatch",
    "load",
    "lora_matmul",
    "matmul",
    "nested_codebook",
    "nn",
    "normal_float",
    "ops",
    "pack",
    "prepare",
    "quantize",
    "save",
    "unpack",
]
