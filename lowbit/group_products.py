"""The products of a group of adapted layers that read the same x: plain tensors in and out.

    y_i = x W_i^T + bias_i + (z_i * s_i) B_i^T        z_i = drop_i(x) A_i^T
    dx  = sum_i dy_i W_i + drop_i'(u_i A_i)           u_i = s_i * dy_i B_i
    dA_i = u_i^T drop_i(x)     dB_i = s_i * dy_i^T z_i

Two ways lead there, and dispatch.stacks chooses. Member by member, each takes the fused operations
of a layer of its own, and dx is summed as autograd sums it: the bits are those of separate layers.
Stacked, all z_i come from one product of x with the stacked lora_A, all dA_i from one product of
the stacked u_i with x, and the low-rank part of dx from one product of the two stacks. Members with
dropout have masks of their own and cannot share those three products, unless they share the mask.
Where one operator runs a member's whole backward pass and adds to dx, backward goes member by
member either way.

dx is one buffer, beside which one member's share exists at a time, if at all. Arguments are checked
already: x [M, K] contiguous, dy contiguous. Where all members are like calls that are remembered
(repeated.py), there are no checks between them and the library, and x may be [..., K].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import dispatch, repeated
from .backends.composed import mm_wide
from .calls import nothing_intercepts, run, unwatched
from .weight import WeightArgs

TRAINED = 4  # tensors of a Member that autograd looks at


class Member(NamedTuple):
    """One layer of a group; lora_A None means no adapter."""

    weight: WeightArgs
    lora_A: torch.Tensor | None  # noqa: N815  (here and below: the mathematics' name)
    lora_B: torch.Tensor | None  # noqa: N815
    lora_scaling: torch.Tensor | None  # [r], or None: `scaling` is all
    scaling: float
    bias: torch.Tensor | None
    dropout_p: float
    seed: torch.Tensor | None
    found: tuple | None = None  # what repeated.find has found; of all members or of none

    def flat(self) -> tuple:
        return (*self.weight, *self[1:-1])


class Needs(NamedTuple):
    """Which gradients of a member somebody asks for."""

    lora_A: bool  # noqa: N815
    lora_B: bool  # noqa: N815
    lora_scaling: bool
    bias: bool


class Gradients(NamedTuple):
    """Of a member; None where nobody asked."""

    lora_A: torch.Tensor | None = None  # noqa: N815
    lora_B: torch.Tensor | None = None  # noqa: N815
    lora_scaling: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def trained(members: Sequence[Member]) -> list[torch.Tensor | None]:
    """What autograd looks at, TRAINED tensors of every member in turn."""
    return [t for m in members for t in (m.lora_A, m.lora_B, m.lora_scaling, m.bias)]


def frozen(members: Sequence[Member]) -> Sequence[Member]:
    """The members without that; whole ones where nobody traces them."""
    if members[0].found is not None:
        return members
    nothing = dict.fromkeys(("lora_A", "lora_B", "lora_scaling", "bias"))
    return tuple(m._replace(**nothing) for m in members)


def whole(frozen: Sequence[Member], trained: Sequence) -> Sequence[Member]:
    """Members from their two parts."""
    if frozen[0].found is not None:
        return frozen
    members = []
    for i, m in enumerate(frozen):
        A, B, scaling, bias = trained[i * TRAINED : (i + 1) * TRAINED]
        members.append(Member(m.weight, A, B, scaling, m.scaling, bias, m.dropout_p, m.seed))
    return members


# ---- forward


def forward(x, members: list[Member], shared: bool, for_backward: bool = True):
    """(ys, zs); z is None without adapter, and may be if not `for_backward`."""
    if members[0].found is not None:
        made = [
            repeated.product(m.found, x, m.lora_A, m.lora_B, m.scaling, m.bias) for m in members
        ]
        return tuple(zip(*made, strict=True))
    zs = [None] * len(members)
    stacked = dispatch.stacks(x.device, x.shape[0], forward=True)
    if stacked:
        zs = project(x, members, shared)
    ys = []
    for i, (m, z) in enumerate(zip(members, zs, strict=True)):
        if stacked or m.lora_A is None:
            y = product(x, z, m)
        elif for_backward:
            y, zs[i] = _lora_linear(x, *m.flat())
        else:
            y, _ = run("lora_linear", x, *m.flat())
        ys.append(y)
    return ys, zs


def product(x, z, m: Member) -> torch.Tensor:
    """y of one member from a z that is there already; None without adapter."""
    if m.lora_A is None:
        return run("linear", x, *m.weight, m.bias)
    adapter = (z, m.lora_B, m.lora_scaling, m.scaling, m.bias)
    return run("linear_low_rank", x, *m.weight, *adapter)


def _lora_linear(*args):
    """run("lora_linear") that keeps z although no gradient is recorded here."""
    if nothing_intercepts(args):
        return dispatch.select("lora_linear", args, checked=True)(*args)
    return torch.ops.lowbit.lora_linear(*args)


def project(x, members: list[Member], shared: bool) -> list[torch.Tensor | None]:
    """z_i [M, r_i] in x's dtype: columns of one product where the members share what they read."""
    zs: list[torch.Tensor | None] = [None] * len(members)
    for some in _sharing(range(len(members)), members, shared):
        z = _dropped(x, members[some[0]]) @ _stack_A(members, some, x.dtype).t()
        parts = z.split([members[i].lora_A.shape[0] for i in some], dim=1)
        for i, part in zip(some, parts, strict=True):
            zs[i] = part.contiguous()
    return zs


def _sharing(candidates: Sequence[int], members: list[Member], shared: bool) -> list[list[int]]:
    """Adapted members, sorted into those whose low-rank branches read the same tensor."""
    adapted = [i for i in candidates if members[i].lora_A is not None]
    together = [i for i in adapted if shared or members[i].dropout_p == 0.0]
    alone = [[i] for i in adapted if i not in together]
    return [together, *alone] if together else alone


def _dropped(x, member: Member) -> torch.Tensor:
    if member.dropout_p == 0.0:
        return x
    return run("dropout", x, member.dropout_p, member.seed)


def _stack_A(members, some: list[int], dtype) -> torch.Tensor:
    if len(some) == 1:
        return members[some[0]].lora_A.to(dtype)
    return torch.cat([members[i].lora_A.to(dtype) for i in some])


# ---- backward


def backward(dys, x, zs, members, need_dx: bool, needs: list[Needs], shared: bool):
    """(dx or None, [Gradients]); a dy that is None contributes nothing.

    x may be None if no lora_A needs a gradient.
    """
    live = [i for i, dy in enumerate(dys) if dy is not None]
    grads = [Gradients()] * len(members)
    if not live:
        return None, grads
    if members[0].found is not None:
        return _backward_of_found(dys, x, zs, members, live, need_dx, needs)
    separate = x is not None and not dispatch.stacks(x.device, x.shape[0])
    dx = None
    us: list[torch.Tensor | None] = [None] * len(members)
    for i in reversed(live):  # as autograd does
        dy, m, need = dys[i], members[i], needs[i]
        alone = None
        if m.lora_A is not None:
            alone = _lora_linear_backward(dy, x, zs[i], m, need_dx, need, dx, separate)
        if alone is not None:
            part, grads[i] = alone
        else:
            us[i], grads[i] = _through_B(dy, zs[i], m, need, need_dx or need.lora_A)
            part = _linear_dx(dx, dy, *m.weight) if need_dx else None
        if part is not None:
            dx = part if dx is None else dx.add_(part)
        del part
    rest = [i for i in live if us[i] is not None]
    for some in _sharing(rest, members, shared):
        need_A = [needs[i].lora_A for i in some]
        for i, d_A in zip(some, _through_A(dx, x, us, members, some, need_A), strict=True):
            grads[i] = grads[i]._replace(lora_A=d_A)
    return dx, grads


def _backward_of_found(dys, x, zs, members, live: list[int], need_dx: bool, needs: list[Needs]):
    """backward of members whose forward pass needed no check; x and dy [..., K or N]."""
    results = _repeated_backward(dys, x, zs, members, live, need_dx, needs)
    if results is not None:
        return results
    leading = dys[live[0]].shape[:-1]
    dys = [None if dy is None else dy.view(-1, dy.shape[-1]) for dy in dys]
    x = None if x is None else x.reshape(-1, x.shape[-1])
    plain = [m._replace(found=None) for m in members]
    dx, grads = backward(dys, x, zs, plain, need_dx, needs, False)
    for i in live if x is not None else ():
        args = _backward_args(dys[i], x, zs[i], plain[i], need_dx, needs[i])
        repeated.remember_backward(members[i].found, args)
    return None if dx is None else dx.view(*leading, -1), grads


def _repeated_backward(dys, x, zs, members, live: list[int], need_dx: bool, needs: list[Needs]):
    """The same without a check, or None."""
    if x is None or not unwatched():
        return None
    passes = []
    for i in live:
        m = members[i]
        remembered = repeated.find_backward(m.found, dys[i], x, zs[i], m.lora_A, m.lora_B)
        if remembered is None:
            return None
        passes.append((i, m, needs[i], *remembered))
    dx, grads = None, [Gradients()] * len(members)
    for i, m, need, function, packed, x_layout in reversed(passes):  # as autograd does
        if not need_dx and not any(need):
            continue
        made = function(
            packed, dys[i], x, zs[i], m.lora_A, m.lora_B, None, m.scaling, need_dx, need.lora_A,
            need.lora_B, need.bias, False, dx, x_layout,
        )  # fmt: skip
        if made is None:
            return None
        part, d_A, d_B, d_bias, _ = made
        grads[i] = Gradients(d_A, d_B, None, d_bias)
        if part is not None:
            dx = part
    return dx, grads


def _linear_dx(dx_sum, *args):
    """dx, or None with dx added to `dx_sum` where a kernel can."""
    if dx_sum is not None and nothing_intercepts(args):
        adding = dispatch.adding_dx("linear_dx", args)
        if adding is not None:
            return adding(*args, dx_sum=dx_sum)
    return run("linear_dx", *args)


def _lora_linear_backward(dy, x, z, m: Member, need_dx: bool, need: Needs, dx_sum, separate: bool):
    """(dx, or None if it was added to `dx_sum`, Gradients) of one member by the operation of a
    single layer. Or None: a member that is not to go alone does so only if one call runs its whole
    backward pass and adds to dx; then sharing x saves less than the passes over dx cost.
    """
    if not need_dx and not any(need):
        return None, Gradients()
    args = _backward_args(dy, x, z, m, need_dx, need)
    adding = None
    if nothing_intercepts(args):
        adding = dispatch.adding_dx("lora_linear_backward", args)
    if not separate and (adding is None or m.dropout_p > 0.0):
        return None
    if adding is None:
        dx, *grads = run("lora_linear_backward", *args)
    elif need_dx and dx_sum is not None:
        dx, *grads = adding(*args, dx_sum=dx_sum)
    else:
        dx, *grads = adding(*args)
    d_A, d_B, d_bias, d_scaling = grads
    wanted = zip((d_A, d_B, d_scaling, d_bias), need, strict=True)
    return (dx if need_dx else None), Gradients(*(g if asked else None for g, asked in wanted))


def _backward_args(dy, x, z, m: Member, need_dx: bool, need: Needs) -> tuple:
    adapter = (m.lora_A, m.lora_B, m.lora_scaling, m.scaling, m.dropout_p, m.seed)
    return (
        dy, x, z, *m.weight, *adapter,
        need_dx, need.lora_A, need.lora_B, need.bias, need.lora_scaling,
    )  # fmt: skip


def _through_B(dy, z, m: Member, need: Needs, need_u: bool):
    """(u = s * dy B in dy's dtype, gradients of lora_B, scaling and bias): what reads dy."""
    d_B = d_scaling = d_bias = u = None
    if m.lora_A is not None:
        s = m.scaling if m.lora_scaling is None else m.lora_scaling * m.scaling
        if need_u or need.lora_scaling:
            wide = mm_wide(dy, m.lora_B.to(dy.dtype))
            u = (wide * s).to(dy.dtype)
        if need.lora_scaling:
            d_scaling = (wide * z).sum(dim=0) * m.scaling
        if need.lora_B:
            d_B = (mm_wide(dy.t(), z) * s).to(m.lora_B.dtype)
    if need.bias:
        d_bias = dy.sum(dim=0, dtype=torch.promote_types(dy.dtype, torch.float32))
    return u, Gradients(None, d_B, d_scaling, d_bias)


def _through_A(dx, x, us, members, some: list[int], need_A: list[bool]) -> list:
    """dA of members that read the same tensor, and dx += drop'(u A) unless dx is None."""
    first = members[some[0]]
    u = us[some[0]] if len(some) == 1 else torch.cat([us[i] for i in some], dim=1)
    if dx is not None:
        stacked = _stack_A(members, some, u.dtype)
        if first.dropout_p == 0.0:
            dx.addmm_(u, stacked)
        else:
            dx.add_(_dropped(u @ stacked, first))
    if not any(need_A):
        return [None] * len(some)
    parts = mm_wide(u.t(), _dropped(x, first)).split([members[i].lora_A.shape[0] for i in some])
    return [
        part.to(members[i].lora_A.dtype) if asked else None
        for i, part, asked in zip(some, parts, need_A, strict=True)
    ]
