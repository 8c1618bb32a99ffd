"""Linear layers with a 4-bit weight: `Linear4bit`, and `QLoRALinear` with a trained adapter.

`QLoRAGroup` and `QLoRAGatedMLP` compute several of them as one function.
"""

from .fused import QLoRAGatedMLP, QLoRAGroup
from .linear import Linear4bit
from .qlora import MergeError, QLoRALinear

__all__ = ["Linear4bit", "MergeError", "QLoRAGatedMLP", "QLoRAGroup", "QLoRALinear"]
