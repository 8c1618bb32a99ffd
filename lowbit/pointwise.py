"""The steps of a transformer block between its products, in few launches.

    rms_norm   y = w * x / sqrt(mean x^2 + eps)
    rotary     y = x * cos + (-x2, x1) * sin          x = (x1, x2), halves of a head

As chains of torch operations these are 8 launches for a norm and 10 to 14 for the rotation of q and
k, twice as many again in backward, each a pass over memory. Here sums are fp32; a norm is rounded
once, and so is a rotation by Triton's kernel, where the chains round every step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import calls, dispatch

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q [batch, heads, tokens, d] and k by cos and sin [batch, tokens, d], which get no
    gradient; with unsqueeze_dim 2 q is [batch, tokens, heads, d].
    """
    return _Rotary.apply(q, k, cos, sin, unsqueeze_dim)


def vision_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of q [tokens, heads, d] by cos and sin [tokens, d], in fp32 and rounded once."""
    return _Rotary.apply(q, k, cos.float(), sin.float(), 1)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, heads):
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads
        return _rotate_both(q, k, cos, sin, heads, True)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        return *_rotate_both(dq, dk, *ctx.saved_tensors, ctx.heads, False), None, None, None


def _rotate_both(q, k, cos, sin, heads: int, forward: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`heads` is the dimension of the heads."""
    if _one_launch(q, k, cos, sin, heads):
        return _rotate_at_once(q, k, cos, sin, heads, forward)
    cos, sin = cos.unsqueeze(heads), sin.unsqueeze(heads)
    low, high = _halves(sin)
    if forward:
        return _rotate(q, cos, low, high, -1), _rotate(k, cos, low, high, -1)
    return _rotate(q, cos, high, low, 1), _rotate(k, cos, high, low, 1)


def _one_launch(q, k, cos, sin, heads: int) -> bool:
    """Whether Triton's kernel takes them."""
    return (
        q.is_cuda
        and q.dtype == k.dtype
        and {q.dtype, cos.dtype, sin.dtype} <= {*_FLOATS}
        and _fit(q, k, cos, sin, heads)
        and calls.nothing_intercepts((q, k, cos, sin))
        and dispatch.unavailable("triton") is None
    )


def _fit(q, k, cos, sin, heads: int) -> bool:
    """Whether they are laid out as the kernel reads them; it looks at the sizes of q alone."""
    if (q.dim(), heads) not in ((4, 1), (4, 2), (3, 1)):
        return False
    rows, rows_of_k = ((*t.shape[:heads], *t.shape[heads + 1 :]) for t in (q, k))
    return (
        rows == rows_of_k
        and q.shape[-1] % 2 == 0
        and q.device == k.device == cos.device == sin.device
        and cos.shape == sin.shape
        and (cos.shape == rows or (q.dim() == 4 and cos.shape == (1, *rows[1:])))
        and q.stride(-1) == k.stride(-1) == cos.stride(-1) == sin.stride(-1) == 1
    )


def _rotate_at_once(q, k, cos, sin, heads: int, forward: bool):
    from . import kernels

    if q.dim() == 3:
        q, k = (t.transpose(0, 1).unsqueeze(0) for t in (q, k))
        ys = kernels.rotate(q, k, cos.unsqueeze(0), sin.unsqueeze(0), forward)
        return tuple(y.squeeze(0).transpose(0, 1) for y in ys)
    if heads == 1:
        return kernels.rotate(q, k, cos, sin, forward)
    ys = kernels.rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin, forward)
    return tuple(y.transpose(1, 2) for y in ys)


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x.chunk(2, dim=-1) in half of the host's time."""
    half = x.shape[-1] // 2
    return x.split_with_sizes((half, half), dim=-1)


def _rotate(x, cos, low, high, sign):
    """(x1 cos1 + sign x2 low, x2 cos2 - sign x1 high), in the dtype of x; if cos is wider, computed
    in that and rounded at the end.
    """
    x1, x2 = _halves(x)
    y = x * cos
    y1, y2 = _halves(y)
    y1.addcmul_(x2, low, value=sign)
    y2.addcmul_(x1, high, value=-sign)
    return y.to(x.dtype)
