"""Rotary embedding of q and k, forward and backward, in one launch.

    forward    y1 = x1 cos1 - x2 sin1    y2 = x2 cos2 + x1 sin2     x = (x1, x2), halves of a head
    backward   x1 = y1 cos1 + y2 sin2    x2 = y2 cos2 - y1 sin1

q and k are [batch, heads, tokens, d] with any strides but 1 for d, of one dtype (bf16, fp16 or
fp32); cos and sin [batch or 1, tokens, d], of any of these. All arithmetic is fp32, rounded once.
Results lie in memory as [batch, tokens, heads, d]. One program owns HEADS heads of a token.
Bound by bytes: each of q and k is read and written once.
Callers have checked shapes and dtypes.
"""

from __future__ import annotations

import torch

import triton
import triton.language as tl

from .common import LAUNCH_OPTIONS, device_guard

HEADS = 16  # per program


@triton.jit
def _rotate_heads(
    x_ptr, y_ptr, x_stride, heads, first, cos_ptr, sin_ptr, HALF: tl.constexpr,
    FORWARD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = first + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    inside = d < HALF
    mask = (head < heads)[:, None] & inside[None, :]
    cos1 = tl.load(cos_ptr + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos2 = tl.load(cos_ptr + HALF + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin1 = tl.load(sin_ptr + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin2 = tl.load(sin_ptr + HALF + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    x = x_ptr + head.to(tl.int64)[:, None] * x_stride + d[None, :]
    x1 = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x + HALF, mask=mask, other=0.0).to(tl.float32)
    if FORWARD:
        y1 = x1 * cos1 - x2 * sin1
        y2 = x2 * cos2 + x1 * sin2
    else:
        y1 = x1 * cos1 + x2 * sin2
        y2 = x2 * cos2 - x1 * sin1
    y = y_ptr + head[:, None] * (2 * HALF) + d[None, :]
    dtype = y_ptr.dtype.element_ty
    tl.store(y, y1.to(dtype), mask=mask)
    tl.store(y + HALF, y2.to(dtype), mask=mask)


@triton.jit
def rotary_kernel(
    q_ptr, k_ptr, q_out, k_out, cos_ptr, sin_ptr,
    tokens, q_heads, k_heads,
    q_batch, q_head, q_token, k_batch, k_head, k_token,  # strides
    cos_batch, cos_token, sin_batch, sin_token,
    HALF: tl.constexpr,
    FORWARD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    cos = cos_ptr + batch * cos_batch + token * cos_token
    sin = sin_ptr + batch * sin_batch + token * sin_token
    block = tl.program_id(1)
    q_blocks = tl.cdiv(q_heads, BLOCK_H)
    if block < q_blocks:
        _rotate_heads(
            q_ptr + batch * q_batch + token * q_token, q_out + row * q_heads * (2 * HALF), q_head,
            q_heads, block * BLOCK_H, cos, sin, HALF, FORWARD, BLOCK_H, BLOCK_D,
        )  # fmt: skip
    else:
        _rotate_heads(
            k_ptr + batch * k_batch + token * k_token, k_out + row * k_heads * (2 * HALF), k_head,
            k_heads, (block - q_blocks) * BLOCK_H, cos, sin, HALF, FORWARD, BLOCK_H, BLOCK_D,
        )  # fmt: skip


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, forward: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k rotated, or their gradients from those of the results."""
    B, q_heads, T, d = q.shape
    k_heads = k.shape[1]
    ys = [q.new_empty((B, T, heads, d)).transpose(1, 2) for heads in (q_heads, k_heads)]
    blocks = triton.cdiv(q_heads, HEADS) + triton.cdiv(k_heads, HEADS)
    batches = [0 if t.shape[0] == 1 else t.stride(0) for t in (cos, sin)]
    with device_guard(q):
        rotary_kernel[(B * T, blocks)](
            q, k, *ys, cos, sin, T, q_heads, k_heads, *q.stride()[:3], *k.stride()[:3],
            batches[0], cos.stride(1), batches[1], sin.stride(1), HALF=d // 2, FORWARD=forward,
            BLOCK_H=HEADS, BLOCK_D=triton.next_power_of_2(d // 2), num_warps=4, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return ys[0], ys[1]
