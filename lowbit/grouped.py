"""lowbit.lora_matmul_group: several adapted layers that read the same x, as one autograd function.

q, k and v of attention, gate and up of an MLP. The products are in group_products.py; x is saved
once for all members.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from . import calls, dispatch, functional, keeping, repeated
from .group_products import (
    TRAINED,
    Gradients,
    Member,
    Needs,
    backward,
    forward,
    frozen,
    trained,
    whole,
)
from .weight import QuantizedWeight

# ---- autograd


def no_autocast(x: torch.Tensor):
    """The dtypes are settled; autocast must not cast the fp32 products of a backward pass."""
    if functional._casts(x):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def needs_of(flags: Sequence[bool]) -> list[Needs]:
    """From needs_input_grad of what `trained` returned."""
    return [Needs(*flags[i : i + TRAINED]) for i in range(0, len(flags), TRAINED)]


def save(ctx, members: list[Member], *others) -> None:
    """Save what a forward pass computed and what is trained, and keep the rest on the context.

    Packed weights belong to their modules, whatever hooks do to saved tensors: offloading them
    would free nothing, and gradient checkpointing pays for every saved tensor in host time. The
    bias is not needed in backward, but for its dtype.
    """
    tensors = list(others)
    for m in members:
        tensors += [m.lora_A, m.lora_B, m.lora_scaling, m.seed, keeping.dense(m.weight)]
    keeping.save(ctx, *tensors)
    ctx.set_materialize_grads(False)
    ctx.frozen = tuple((m.weight, m.scaling, m.dropout_p, m.found) for m in members)
    ctx.bias_dtypes = tuple(None if m.bias is None else m.bias.dtype for m in members)


def saved(ctx, others: int) -> tuple[tuple, list[Member]]:
    """What `save` saved: (others, members without bias)."""
    tensors = keeping.saved(ctx)
    members, at = [], others
    for weight, scaling, dropout_p, found in ctx.frozen:
        lora_A, lora_B, lora_scaling, seed, _ = tensors[at : at + 5]
        members.append(
            Member(weight, lora_A, lora_B, lora_scaling, scaling, None, dropout_p, seed, found)
        )
        at += 5
    return tensors[:others], members


def flat_gradients(ctx, grads: list[Gradients]) -> list:
    """Gradients of what `trained` returned."""
    out = []
    for g, dtype in zip(grads, ctx.bias_dtypes, strict=True):
        out += [*g[:3], None if g.bias is None else g.bias.to(dtype)]
    return out


class _Group(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shared, frozen, *trained):
        members = whole(frozen, trained)
        needs = needs_of(ctx.needs_input_grad[3:])
        with no_autocast(x):
            ys, zs = forward(x, members, shared)
        save(ctx, members, x if any(need.lora_A for need in needs) else None, *zs)
        ctx.shared = shared
        if not ctx.needs_input_grad[0]:  # an output that depends on nothing that needs a gradient
            fixed = [y for y, need in zip(ys, needs, strict=True) if not any(need)]
            if fixed:
                ctx.mark_non_differentiable(*fixed)
        return tuple(ys)

    @staticmethod
    @calls.once_differentiable
    def backward(ctx, *dys):
        (x, *zs), members = saved(ctx, 1 + len(ctx.frozen))
        needs = needs_of(ctx.needs_input_grad[3:])
        if all(dy is None for dy in dys):
            return (None,) * (3 + TRAINED * len(members))
        dys = [None if dy is None else dy.contiguous() for dy in dys]
        with no_autocast(next(dy for dy in dys if dy is not None)):
            dx, grads = backward(dys, x, zs, members, ctx.needs_input_grad[0], needs, ctx.shared)
        return (dx, None, None, *flat_gradients(ctx, grads))


# ---- public


def lora_matmul_group(
    x: torch.Tensor,
    weights: Sequence[QuantizedWeight | torch.Tensor],
    lora_As: Sequence[torch.Tensor | None],
    lora_Bs: Sequence[torch.Tensor | None],
    scalings: float | Sequence[float | torch.Tensor],
    *,
    biases: Sequence[torch.Tensor | None] | None = None,
    dropout_p: float | Sequence[float] = 0.0,
    shared_dropout: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Multiply one x by several frozen weights with low-rank updates, as q, k and v of attention
    do: y_i = x W_i^T + bias_i + (drop_i(x) A_i^T * scaling_i) B_i^T.

    The results are those of one `lora_matmul` per member. On a GPU many tokens are read once for
    all lora_A; x is saved once, and its gradient is accumulated in one buffer.

    Args:
        x: [..., K] fp32, fp16 or bf16, any strides; under autocast it is cast to the autocast
            dtype. Also fp64, for comparisons: plain torch computes it, on any device.
        weights: one QuantizedWeight [N_i, K], or dense tensor in x's dtype, per member.
        lora_As, lora_Bs: [r_i, K] and [N_i, r_i] in x's dtype or fp32; None in both for a member
            without adapter.
        scalings: one number for all, or per member a number or vector [r_i].
        biases: [N_i] or None per member; None for no bias at all.
        dropout_p: probability of dropping an element of x in the low-rank branch, for all or per
            member, 0 <= p < 1.
        shared_dropout: use one mask for all members, which then must have the same dropout_p.

    Returns:
        A tuple of tensors [..., N_i] in x's dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong length, type, dtype, device or shape; the
            message names it and the member.

    Notes:
        Gradients flow to x, lora_As, lora_Bs, biases and scaling tensors, once (no second
        derivatives); only those asked for are computed. Deterministic. Where the order of additions
        differs from separate calls, so may the last bit. Each member draws its own dropout seed, in
        order, as separate calls and PEFT do; a member with dropout then reads x in passes of its
        own, with a dropped copy of x during each. shared_dropout draws one seed and keeps the
        shared passes: the same distribution for each member, but not independent between them.

    Source: LoRA (Hu et al. 2021) section 4.1; QLoRA (Dettmers et al. 2023) equation 5.

    Example:
        >>> q, k = (lowbit.quantize(torch.randn(n, 256)) for n in (128, 64))
        >>> A, B = [torch.randn(8, 256)] * 2, [torch.zeros(128, 8), torch.zeros(64, 8)]
        >>> [y.shape[1] for y in lowbit.lora_matmul_group(torch.randn(3, 256), [q, k], A, B, 2.0)]
        [128, 64]
    """
    x = functional._autocast(x)
    arguments = (weights, lora_As, lora_Bs, scalings, biases, dropout_p)
    again = repeatable(x)
    members = found_members(x, *arguments) if again else None
    if members is not None:
        return tuple(_products(x, members, shared_dropout))
    members = checked_members(x, *arguments, shared_dropout)
    members = draw_seeds(x, members, shared_dropout)
    ys = _products(functional._rows(x), members, shared_dropout)
    if again:
        remember(x, members, lora_As, lora_Bs)
    if x.dim() == 2:
        return tuple(ys)
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)


def _products(x, members: list[Member], shared: bool) -> Sequence[torch.Tensor]:
    if records(x, members):
        return apply(_Group, members, x, shared)
    with no_autocast(x):
        return forward(x, members, shared, for_backward=False)[0]


def apply(function, members: list[Member], *args):
    """function.apply of args and members. torch.autograd.Function's own looks for transforms first,
    of which there are none where members are found.
    """
    args = (*args, frozen(members), *trained(members))
    if members[0].found is None:
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)


# ---- calls like earlier ones (repeated.py)


def repeatable(x: torch.Tensor) -> bool:
    """Whether members that read x could go without checks. Not where hooks take what is saved: they
    may compare the tensors of two calls, and a checked one saves [M, K].
    """
    return (
        repeated.possible(x)
        and calls.unwatched()
        and not keeping.hooked()
        and not dispatch.stacks(x.device, x.shape[:-1].numel(), forward=True)
    )


def found_members(
    x, weights, lora_As, lora_Bs, scalings, biases, dropout_p, widths=None
) -> list[Member] | None:
    """What `checked_members` returns, but for x [..., K] as it is, if calls of all members are
    remembered; else None.
    """
    try:
        count = len(weights)
        none = (None,) * count
        scalings, ps = _for_each(scalings, count), _for_each(dropout_p, count)
        biases = none if biases is None else biases
        widths = none if widths is None else widths
        columns = (weights, lora_As, lora_Bs, scalings, biases, ps, widths)
        if count == 0 or {*map(len, columns)} != {count}:
            return None
    except TypeError:  # something is no list; the checks say what
        return None
    records = calls.records((x, *lora_As, *lora_Bs, *biases))
    members = []
    for w, lora_A, lora_B, scaling, bias, p, width in zip(*columns, strict=True):
        if type(scaling) is not float or p != 0.0:
            return None
        shape = _shape_of_read(x, width)
        found = repeated.find(shape, x, w, lora_A, lora_B, bias, records)
        if found is None:
            return None
        members.append(Member(found[2], lora_A, lora_B, None, scaling, bias, 0.0, None, found))
    return members


def remember(x, members: list[Member], lora_As, lora_Bs, widths=None) -> None:
    """Find members like these from now on, which were checked and have run. All are found or none,
    so none is remembered beside one that `found_members` refuses.
    """
    if not x.is_contiguous():
        return
    for m, lora_A, lora_B in zip(members, lora_As, lora_Bs, strict=True):
        plain = m.lora_A is not None and m.lora_scaling is None and m.dropout_p == 0.0
        if not plain or m.lora_A is not lora_A or m.lora_B is not lora_B:
            return
    recorded = records(x, members)
    for i, m in enumerate(members):
        shape = _shape_of_read(x, None if widths is None else widths[i])
        repeated.remember(shape, x, m.weight, m.lora_A, m.lora_B, m.scaling, m.bias, recorded)


def _shape_of_read(x: torch.Tensor, width: int | None) -> tuple[int, ...]:
    """Of what a member reads: x, or another tensor like x of that width."""
    return x.shape if width is None else (*x.shape[:-1], width)


def records(x: torch.Tensor, members: list[Member]) -> bool:
    """Whether a gradient is recorded."""
    if members[0].found is not None:
        call, _, _ = members[0].found
        return call.records
    compiling = torch.compiler.is_compiling()  # then nobody may ask for inference mode
    if not (torch.is_grad_enabled() if compiling else calls.recording()):
        return False
    if not any(t is not None and t.requires_grad for t in (x, *trained(members))):
        return False
    if not compiling:
        calls.refuse_transforms()
    return True


def checked_members(
    x, weights, lora_As, lora_Bs, scalings, biases, dropout_p, shared: bool, names=None, widths=None
) -> list[Member]:
    """Check everything; no seeds yet.

    Args:
        x: what all members read.
        shared: whether those that read x share one mask.
        names: of the members, for messages; default numbers.
        widths: for each member, that of what it reads, or None: it reads x.
    """
    check_sequence(weights, "weights")
    count = len(weights)
    if count == 0:
        raise ValueError("weights must have at least one member, got none")
    biases = (None,) * count if biases is None else biases
    scalings, ps = _for_each(scalings, count), _for_each(dropout_p, count)
    arguments = {"lora_As": lora_As, "lora_Bs": lora_Bs, "scalings": scalings, "biases": biases}
    for name, values in (*arguments.items(), ("dropout_p", ps)):
        check_sequence(values, name)
        if len(values) != count:
            raise ValueError(f"{name} must have one entry per weight, {count}, got {len(values)}")
    widths = (None,) * count if widths is None else widths
    sharing = [p for p, width in zip(ps, widths, strict=True) if width is None]
    if shared and len(set(sharing)) > 1:
        raise ValueError(f"shared_dropout needs one dropout_p for all, got {sharing}")
    members = []
    for i in range(count):
        try:
            members.append(
                _checked_member(
                    x, widths[i], weights[i], lora_As[i], lora_Bs[i], scalings[i], biases[i], ps[i]
                )
            )
        except (TypeError, ValueError) as error:
            name = f"member {i}" if names is None else names[i]
            raise type(error)(f"{name}: {error}") from error
    return members


def draw_seeds(x, members: list[Member], shared: bool) -> list[Member]:
    """One seed per member with dropout, or the first one's for all."""
    if not any(m.dropout_p for m in members):
        return members
    seeded: list[Member] = []
    first = None
    for m in members:
        seed = first if shared and first is not None else functional._seed(x, m.dropout_p)
        first = seed if first is None else first
        seeded.append(m._replace(seed=seed))
    return seeded


def check_sequence(values, name: str) -> None:
    if not hasattr(values, "__len__"):
        got = type(values).__name__
        raise TypeError(f"{name} must be a list with one entry per member, got {got}")


def _for_each(value, count: int) -> Sequence:
    return value if isinstance(value, (list, tuple)) else (value,) * count


def _checked_member(x, width, w, lora_A, lora_B, scaling, bias, dropout_p) -> Member:
    functional.check_probability(dropout_p, "dropout_p")
    weight = functional._weight_args(x, w, width)
    bias = functional._bias(x, weight, bias)
    if lora_A is None or lora_B is None:
        if lora_A is not lora_B:
            raise ValueError("lora_A and lora_B must both be given, or both be None")
        return Member(weight, None, None, None, 1.0, bias, 0.0, None)
    lora_A, lora_B = functional._adapter(x, weight, lora_A, lora_B)
    vector, scalar = functional._scaling(x, scaling, lora_A.shape[0])
    return Member(weight, lora_A, lora_B, vector, scalar, bias, dropout_p, None)
