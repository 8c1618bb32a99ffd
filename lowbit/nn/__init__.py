"""Linear layers with a 4-bit weight: `Linear4bit`, and `QLoRALinear` with a trained adapter."""

from .linear import Linear4bit
from .qlora import MergeError, QLoRALinear

__all__ = ["Linear4bit", "MergeError", "QLoRALinear"]
