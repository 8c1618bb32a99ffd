"""The steps of a transformer block between its products, in few launches.

    rms_norm   y = w * x / sqrt(mean x^2 + eps)
    rotary     y = x * cos + (-x2, x1) * sin          x = (x1, x2), halves of a head

As chains of torch operations these are 8 launches for a norm and 10 for the rotation of q and k,
twice as many again in backward, each a pass over memory. Here sums are fp32; a norm is rounded
once and a rotation twice, where the chains round every step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        low, high = _halves(sin)
        return _rotate(q, cos, low, high, -1), _rotate(k, cos, low, high, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        low, high = _halves(sin)
        return _rotate(dq, cos, high, low, 1), _rotate(dk, cos, high, low, 1), None, None


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


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q [batch, heads, tokens, d] and k by cos and sin [batch, tokens, d], which get no
    gradient.
    """
    return _Rotary.apply(q, k, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim))


def vision_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of q [tokens, heads, d] and k by cos and sin [tokens, d], rounded once."""
    return _Rotary.apply(q, k, cos.unsqueeze(-2).float(), sin.unsqueeze(-2).float())
