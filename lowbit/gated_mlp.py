"""lowbit.lora_gated_mlp: the gated MLP of Llama, Qwen, Mistral and Gemma, as one autograd function.

    g = gate(x)   u = up(x)   h = act(g) * u   y = down(h)    act: SiLU (SwiGLU) or GELU (GEGLU)
    dh: backward of down      du = dh * act(g)    dg = dh * u * act'(g)    dx: backward of gate, up

gate, up and down are adapted linear layers. Saved for backward are x, g, u and the three z: h and
act(g) are computed again, which costs one pass over g and u and saves two tensors of the size of g.
Without a gradient that passes through h, g and u are not saved either. The elementwise steps are
rounded to x's dtype one by one as the separate modules round them.

Where many tokens share products (dispatch.stacks) and hooks take what is saved, y is computed by a
second function, which saves nothing: non-reentrant gradient checkpointing stops recomputing once
everything saved is there, and so never computes y = down(h) again, a quarter of a block's forward
arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from . import calls, dispatch, functional, keeping
from .group_products import (
    TRAINED,
    Gradients,
    backward,
    forward,
    product,
    project,
    whole,
)
from .grouped import (
    apply,
    check_sequence,
    checked_members,
    draw_seeds,
    flat_gradients,
    found_members,
    needs_of,
    no_autocast,
    records,
    remember,
    repeatable,
    save,
    saved,
)
from .weight import QuantizedWeight

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}
_PARTS = ("gate", "up", "down")
ONE_PASS_ELEMENTS = 1 << 24  # from here on a GPU takes longer for the steps than their launches


def activate(g: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return F.silu(g)
    return F.gelu(g, approximate=_APPROXIMATE[activation])


def _activate_backward(d_act: torch.Tensor, g: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(d_act, g)
    return torch.ops.aten.gelu_backward(d_act, g, approximate=_APPROXIMATE[activation])


def _gate(g: torch.Tensor, u: torch.Tensor, activation: str) -> torch.Tensor:
    """h = act(g) * u."""
    if _one_pass(g, activation):
        return _kernels().silu_mul_fwd(g, u)
    return activate(g, activation).mul_(u)


def _gate_backward(dh, g, u, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(dg, du); dh is overwritten."""
    if _one_pass(g, activation):
        return _kernels().silu_mul_bwd(dh, g, u)
    du = activate(g, activation).mul_(dh)
    return _activate_backward(dh.mul_(u), g, activation), du


def _one_pass(g: torch.Tensor, activation: str) -> bool:
    """Whether the steps are one Triton launch: its launch costs the host more than torch's."""
    return (
        activation == "silu"
        and g.is_cuda
        and g.numel() >= ONE_PASS_ELEMENTS
        and g.dtype != torch.float64
        and calls.nothing_intercepts((g,))
        and dispatch.unavailable("triton") is None
    )


def _kernels():
    from . import kernels

    return kernels


class _GatedMLP(torch.autograd.Function):
    """y, or if `split` (a stand-in for y, h, z of down), from which _Down makes y."""

    @staticmethod
    def forward(ctx, x, activation, shared, split, frozen, *trained):
        members = whole(frozen, trained)
        needs = needs_of(ctx.needs_input_grad[5:])
        below = ctx.needs_input_grad[0] or any(any(need) for need in needs[:2])
        with no_autocast(x):
            (g, u), zs = forward(x, members[:2], shared)
            h = _gate(g, u, activation)
            if split:
                z_down = project(h, members[2:], False)
            else:
                (y,), z_down = forward(h, members[2:], False)
        keep_x = needs[0].lora_A or needs[1].lora_A
        keep_gu = below or needs[2].lora_A
        save(
            ctx, members,
            x if keep_x else None, g if keep_gu else None, u if keep_gu else None, *zs, *z_down,
        )  # fmt: skip
        ctx.activation, ctx.shared, ctx.below = activation, shared, below
        if not split:
            return y
        ctx.mark_non_differentiable(h, *(z for z in z_down if z is not None))
        return x.new_empty(()).expand(x.shape[0], members[2].weight[6]), h, *z_down

    @staticmethod
    @calls.once_differentiable
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * (5 + 3 * TRAINED)
        (x, g, u, *zs), members = saved(ctx, 6)
        needs = needs_of(ctx.needs_input_grad[5:])
        dy = dy.contiguous()
        with no_autocast(dy):
            h = _gate(g, u, ctx.activation) if needs[2].lora_A else None
            dh, grads = backward([dy], h, zs[2:], members[2:], ctx.below, needs[2:], ctx.shared)
            del h
            dx, first = None, [Gradients(), Gradients()]
            if ctx.below:
                dg, du = _gate_backward(dh, g, u, ctx.activation)
                del dh
                dx, first = backward(
                    [dg, du], x, zs[:2], members[:2], ctx.needs_input_grad[0], needs[:2], ctx.shared
                )
        return (dx, None, None, None, None, *flat_gradients(ctx, first + grads))


class _Down(torch.autograd.Function):
    """y = down(h) in place of the stand-in that _GatedMLP returned, which gets its gradient."""

    @staticmethod
    def forward(ctx, stand_in, h, z, member):
        with no_autocast(h):
            return product(h, z, member)

    @staticmethod
    def backward(ctx, dy):
        return dy, None, None, None


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
            dtype. Also fp64, for comparisons: plain torch computes it, on any device.
        weights: gate [H, K], up [H, K] and down [N, H], each a QuantizedWeight or a dense tensor in
            x's dtype.
        lora_As, lora_Bs, scalings, biases: of gate, up and down, as in `lora_matmul_group`.
        activation: "silu" (SwiGLU), "gelu" (GEGLU with the exact GELU) or "gelu_tanh".
        dropout_p: of the three low-rank branches, one number or three.
        shared_dropout: one mask for gate and up, which then must have the same dropout_p; down
            keeps its own.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong length, type, dtype, device or shape; the
            message names it and the layer.

    Notes:
        Gradients flow to x, lora_As, lora_Bs, biases and scaling tensors, once (no second
        derivatives); only those asked for are computed. Deterministic, but on a GPU with 65 to 1024
        tokens the last bit of y depends on whether hooks take what is saved (non-reentrant gradient
        checkpointing): then z of down comes from a product of its own. Dropout seeds are drawn in
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
    widths = (None, None, _hidden_size(weights))
    arguments = (weights, lora_As, lora_Bs, scalings, biases, dropout_p)
    again = repeatable(x)
    members = found_members(x, *arguments, widths) if again else None
    if members is not None:
        return _product(x, members, activation, shared_dropout)
    members = checked_members(x, *arguments, shared_dropout, _PARTS, widths)
    members = draw_seeds(x, members[:2], shared_dropout) + draw_seeds(x, members[2:], False)
    y = _product(functional._rows(x), members, activation, shared_dropout)
    if again:
        remember(x, members, lora_As, lora_Bs, widths)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def _product(x, members: list, activation: str, shared: bool) -> torch.Tensor:
    if not records(x, members):
        with no_autocast(x):
            (g, u), _ = forward(x, members[:2], shared, for_backward=False)
            (y,), _ = forward(_gate(g, u, activation), members[2:], shared, for_backward=False)
        return y
    # With hooks, somebody may stop before y.
    split = keeping.hooked() and dispatch.stacks(x.device, x.shape[0])
    y = apply(_GatedMLP, members, x, activation, shared, split)
    return _Down.apply(*y, members[2]) if split else y


def _hidden_size(weights) -> int:
    """H: what gate and up return and down takes."""
    check_sequence(weights, "weights")
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
