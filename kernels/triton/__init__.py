"""Triton kernels of lowbit: one module per operation, plain tensors in and out, no checks.

Installed as `lowbit.kernels`. Use lowbit's public functions; lowbit/backends/triton.py maps
operations to these.
"""

from .common import INTERPRETED
from .dropout import dropout_fwd
from .gated_activation import silu_mul_bwd, silu_mul_fwd
from .lora_grads import project, reduce_tokens, scaling_grad
from .nf4_dequantize import dequantize_fwd
from .nf4_lora_matmul import matmul_dx, matmul_fwd
from .nf4_quantize import quantize_absmax_fwd, quantize_fwd
from .rotary import rotate

__all__ = [
    "INTERPRETED",
    "dequantize_fwd",
    "dropout_fwd",
    "matmul_dx",
    "matmul_fwd",
    "project",
    "quantize_absmax_fwd",
    "quantize_fwd",
    "reduce_tokens",
    "rotate",
    "scaling_grad",
    "silu_mul_bwd",
    "silu_mul_fwd",
]
