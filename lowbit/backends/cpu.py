"""The compiled CPU backend: `torch.ops.lowbit_cpu.*` under the operations' signatures.

The library `_C_cpu.so` picks its instruction set at run time (generic C++, AVX2, AVX-512); `isa()`
tells which. Operators equal lowbit/reference.py bit for bit where bits are promised: quantize,
dequantize, the dropout mask.
"""

from __future__ import annotations

import torch

from .. import _library  # noqa: F401  loads _C_cpu.so, which registers torch.ops.lowbit_cpu
from . import reference as _plain

_ops = torch.ops.lowbit_cpu

ISA_LEVELS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")  # each one implies those before it


def isa() -> str:
    """The instruction-set level in use: the machine's highest, capped by $LOWBIT_CPU_ISA."""
    return _ops.isa()


def set_isa(name: str) -> None:
    """Use another level for the whole process; RuntimeError when the machine lacks it."""
    _ops.set_isa(name)


def quantize_4bit(
    weight, thresholds, order, nested_codebook, blocksize, nested_blocksize, row_blocks
):
    return _ops.quantize_4bit(
        weight, thresholds, order, nested_codebook, blocksize, nested_blocksize, row_blocks
    )


def dequantize_4bit(
    qweight, absmax, codebook, nested_absmax, nested_codebook, nested_offset,
    N, K, blocksize, nested_blocksize, row_blocks, dtype,
):  # fmt: skip
    if absmax is None:
        return qweight.to(dtype)
    return _ops.dequantize_4bit(
        qweight, absmax, codebook, nested_absmax, nested_codebook, nested_offset,
        N, K, blocksize, nested_blocksize, row_blocks, dtype,
    )  # fmt: skip


def dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    return _ops.dropout(x, p, seed)


# A single row of a dense weight: torch's matrix-vector product reads the weight where it lies, the
# product here would pack it first (4096 x 4096 in fp32: 2.7 against 8.3 ms on one AVX2 core).


def linear(x, *weight_and_bias):
    if weight_and_bias[1] is None and x.shape[0] == 1:
        return _plain.linear(x, *weight_and_bias)
    return _ops.linear(x, *weight_and_bias)


def linear_dx(dy, *weight):
    if weight[1] is None and dy.shape[0] == 1:
        return _plain.linear_dx(dy, *weight)
    return _ops.linear_dx(dy, *weight)


def lora_linear(x, *rest):
    if rest[1] is None and x.shape[0] == 1:
        return _plain.lora_linear(x, *rest)
    return _ops.lora_linear(x, *rest)


def lora_linear_backward(dy, x, z, *rest):
    return _ops.lora_linear_backward(dy, x, z, *rest)
