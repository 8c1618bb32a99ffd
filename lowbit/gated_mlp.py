"""lowbit.lora_gated_mlp: the gated MLP of Llama, Qwen, Mistral and Gemma, as one autograd function.

    g = gate(x)   u = up(x)   h = act(g) * u   y = down(h)    act: SiLU (SwiGLU) or GELU (GEGLU)
    dh: backward of down      du = dh * act(g)    dg = dh * u * act'(g)    dx: backward of gate, up

gate, up and down are adapted linear layers. Saved for backward are x, g, u and the three z: h and
act(g) are computed again, which costs one pass over g and u and saves two tensors of the size of g.
Without a gradient that passes through h, g and u are not saved either. The elementwise steps are
torch's own, rounded to x's dtype one by one as the separate modules round them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import functional
from .group_products import FIELDS, Gradients, backward, forward, unflatten
from .grouped import (
    checked_members,
    draw_seeds,
    flat_gradients,
    needs_of,
    no_autocast,
    records,
    save,
    saved,
)
from .weight import QuantizedWeight

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}
_PARTS = ("gate", "up", "down")


def activate(g: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return F.silu(g)
    return F.gelu(g, approximate=_APPROXIMATE[activation])


def _activate_backward(d_act: torch.Tensor, g: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(d_act, g)
    return torch.ops.aten.gelu_backward(d_act, g, approximate=_APPROXIMATE[activation])


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, activation, shared, *flat):
        members = unflatten(flat)
        needs = needs_of(ctx.needs_input_grad[3:])
        below = ctx.needs_input_grad[0] or any(any(need) for need in needs[:2])
        with no_autocast(x):
            (g, u), zs = forward(x, members[:2], shared)
            h = activate(g, activation).mul_(u)
            (y,), z_down = forward(h, members[2:], shared)
        keep_x = needs[0].lora_A or needs[1].lora_A
        keep_gu = below or needs[2].lora_A
        save(
            ctx, members,
            x if keep_x else None, g if keep_gu else None, u if keep_gu else None, *zs, *z_down,
        )  # fmt: skip
        ctx.activation, ctx.shared, ctx.below = activation, shared, below
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        if dy is None:
            return (None,) * (3 + 3 * FIELDS)
        (x, g, u, *zs), members = saved(ctx, 6)
        needs = needs_of(ctx.needs_input_grad[3:])
        dy = dy.contiguous()
        with no_autocast(dy):
            act = h = dx = None
            if g is not None:
                act = activate(g, ctx.activation)
                h = act * u if needs[2].lora_A else None
            dh, grads = backward([dy], h, zs[2:], members[2:], ctx.below, needs[2:], ctx.shared)
            del h
            if ctx.below:
                du = act.mul_(dh)
                dg = _activate_backward(dh.mul_(u), g, ctx.activation)
                del act, dh
                dx, first = backward(
                    [dg, du], x, zs[:2], members[:2], ctx.needs_input_grad[0], needs[:2], ctx.shared
                )
                grads = first + grads
            else:
                grads = [Gradients(), Gradients(), *grads]
        return (dx, None, None, *flat_gradients(ctx, grads))


def lora_gated_mlp(
    x: torch.Tensor,
    weights: Sequence[QuantizedWeight | torch.Tensor],
    lora_As: Sequence[torch.Tensor | None],
    lora_Bs: Sequence[torch.Tensor | None],
    scalings: float | Sequence[float | torch.Tensor],
    *,
    activation: str = "silu",
    biases: Sequence[torch.Tensor | None] | None = None,
    dropout_p: float | Sequence[float] = 0.0,
    shared_dropout: bool = False,
) -> torch.Tensor:
    """Compute a gated MLP of three adapted layers: y = down(act(gate(x)) * up(x)).

    The result is that of three `lora_matmul` calls and the activation between them, with less
    saved: x once, gate(x), up(x) and what is [M, r]; neither act(gate(x)) nor the product.

    Args:
        x: [..., K] fp32, fp16 or bf16, any strides; under autocast it is cast to the autocast
            dtype.
        weights: gate [H, K], up [H, K] and down [N, H], each a QuantizedWeight or a dense tensor in
            x's dtype.
        lora_As, lora_Bs, scalings, biases: of gate, up and down, as in `lora_matmul_group`.
        activation: "silu" (SwiGLU), "gelu" (GEGLU with the exact GELU) or "gelu_tanh".
        dropout_p: of the three low-rank branches, one number or three.
        shared_dropout: one mask for gate and up; down keeps its own.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong length, type, dtype, device or shape; the
            message names it and the layer.

    Notes:
        Gradients flow to x, lora_As, lora_Bs, biases and scaling tensors, once (no second
        derivatives); only those asked for are computed. Deterministic. Dropout seeds are drawn in
        the order gate, up, down. For dropout and its cost see `lora_matmul_group`.

    Source: GLU Variants Improve Transformer (Shazeer 2020), equation 6.

    Example:
        >>> w = [lowbit.quantize(torch.randn(n, k)) for n, k in [(96, 64), (96, 64), (64, 96)]]
        >>> A = [torch.randn(4, q.K) for q in w]
        >>> B = [torch.zeros(q.N, 4) for q in w]
        >>> lowbit.lora_gated_mlp(torch.randn(3, 64), w, A, B, scalings=2.0).shape
        torch.Size([3, 64])
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    x = functional._autocast(x)
    h = x.new_empty((0, _hidden_size(weights)))
    members = checked_members(
        (x, x, h), weights, lora_As, lora_Bs, scalings, biases, dropout_p, shared_dropout, _PARTS
    )
    members = draw_seeds(x, members[:2], shared_dropout) + draw_seeds(x, members[2:], False)
    rows = functional._rows(x)
    if records(x, members):
        flat = [field for m in members for field in m.flat()]
        y = _GatedMLP.apply(rows, activation, shared_dropout, *flat)
    else:
        with no_autocast(x):
            (g, u), _ = forward(rows, members[:2], shared_dropout, for_backward=False)
            h = activate(g, activation).mul_(u)
            (y,), _ = forward(h, members[2:], shared_dropout, for_backward=False)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def _hidden_size(weights) -> int:
    """H: what gate and up return and down takes."""
    if len(weights) != 3:
        raise ValueError(f"weights must be those of gate, up and down, got {len(weights)}")
    shapes = [tuple(getattr(w, "shape", ())) for w in weights]
    if any(len(shape) != 2 for shape in shapes):
        return 0  # the check of the members says what is wrong
    (H, _), (up, _), (_, down) = shapes
    if up != H or down != H:
        raise ValueError(
            f"up must be [H, K] and down [N, H] with gate's H = {H}, got "
            f"{list(shapes[1])} and {list(shapes[2])}"
        )
    return H
