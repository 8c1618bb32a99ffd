"""Dropout whose mask is a function of a seed and the element's position.

    y[i] = RN_dtype(x[i] * (1 / (1 - p)))  if  (word(i) >> 8) * 2^-24 >= p  else 0

x, y bf16, fp16 or fp32, contiguous; i is the flat index. word(i) is word i % 4 of Philox4x32-10
with key = the halves of the int64 seed and counter = (low, high half of i / 4, 0, 0), so a backward
pass regenerates the mask from the seed.
The product is fp32 and rounded once, on store: bit-identical to lowbit/reference.py.
One program owns TILE elements, i.e. TILE / 4 Philox blocks.
Bound by bytes (2 or 4 read and as many written), with some 30 integer operations per element.
Callers have checked dtypes, 0 <= p < 1, and that the seed is int64 on x's device.
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import torch

import triton
import triton.language as tl

from .common import LAUNCH_OPTIONS, device_guard, is_kept, philox_words

TILE = 2048  # elements per program, 16 per thread at 4 warps


@triton.jit
def dropout_kernel(
    x_ptr,  # [n]
    seed_ptr,  # int64 scalar
    y_ptr,  # [n], dtype of x
    n,
    p,
    keep_scale,  # 1 / (1 - p)
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    counter = start // 4 + tl.arange(0, BLOCK // 4)
    keep = is_kept(philox_words(tl.load(seed_ptr), counter), p)
    offs = start + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
    y = tl.where(keep, x * keep_scale, 0.0)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=offs < n)


def dropout_fwd(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """Dropped-out copy of a contiguous x."""
    if p == 0.0:
        return x.clone()
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    with device_guard(x):
        dropout_kernel[(triton.cdiv(x.numel(), TILE),)](
            x,
            seed,
            y,
            x.numel(),
            float(p),
            1.0 / (1.0 - p),
            BLOCK=TILE,
            num_warps=4,
            **LAUNCH_OPTIONS,
        )
    return y
