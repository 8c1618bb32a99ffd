"""Operations a backend may leave out: composed of others that every backend has.

dispatch.select looks here when the chosen backend exports no function of the operation's name.
"""

from __future__ import annotations

import torch

from .. import dispatch

_WEIGHT_COUNT = 11


# cuBLAS may leave out what is behind the last 64 terms of a sum that it divides among CTAs: of 5569
# tokens the last, of 4994 the last two, in fp16 and bf16, whatever the results' dtype and alignment
# (CUDA 13.0, H200; its kernels of both operands' columns, d_lora_A's and d_lora_B's products).
WHOLE = 64


def mm_wide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, accumulated and returned in fp32 (fp64 for fp64)."""
    with torch.autocast(a.device.type, enabled=False):  # it would round products in fp32
        if a.dtype.itemsize >= 4:
            return a @ b
        whole = a.shape[1] // WHOLE * WHOLE
        if not a.is_cuda or whole == 0:
            return a.float() @ b.float()
        sums = torch.mm(a[:, :whole], b[:whole], out_dtype=torch.float32)
        if whole < a.shape[1]:
            sums.addmm_(a[:, whole:].float(), b[whole:].float())
        return sums


def add_low_rank(y, z, lora_B, lora_scaling, scaling):
    """y += (z * s) lora_B^T, in place; in 16 bits y is rounded once more."""
    lora_B = lora_B.to(y.dtype)
    if lora_scaling is None:
        return y.addmm_(z, lora_B.t(), alpha=scaling)
    return y.addmm_((z * (lora_scaling * scaling)).to(y.dtype), lora_B.t())


def linear_low_rank(x, *rest):
    """The product without an adapter, then one pass over y."""
    weight, (z, lora_B, lora_scaling, scaling, bias) = rest[:_WEIGHT_COUNT], rest[_WEIGHT_COUNT:]
    args = (x, *weight, bias)
    y = dispatch.select("linear", args, for_backward=False)(*args)
    return add_low_rank(y, z, lora_B, lora_scaling, scaling)
