"""lowbit: fast 4-bit linear layers with trainable low-rank adapters."""

from . import dispatch, ops  # noqa: F401  (ops registers torch.ops.lowbit)
from .codebooks import codebook, nested_codebook, normal_float
from .functional import lora_matmul, matmul
from .quantize import dequantize, pack, quantize, unpack
from .weight import QuantizedWeight

__all__ = [
    "QuantizedWeight",
    "codebook",
    "dequantize",
    "dispatch",
    "lora_matmul",
    "matmul",
    "nested_codebook",
    "normal_float",
    "pack",
    "quantize",
    "unpack",
]
