"""Calls of lora_matmul like an earlier one, without its checks; likewise the members of a group or
of a gated MLP, each of which is such a call (grouped.py).

To check a layer's arguments and to choose its kernels takes the host longer than to call them. So
what a call that has been through both, and ended in the CUDA library without an operator
(backends/cuda_direct.py), has found out is remembered under all that it depends on: `_forward_key`
for the forward pass, `_backward_key` for the backward pass. A later call that finds its own key
needs no more if

- no mode, transform or tracer is active (calls.unwatched), and all tensors, the weight's included,
  are plain ones;
- they are contiguous;
- an operator has accepted a weight of the same numbers at the same addresses;
- the library, which looks at the alignment of every pointer, takes the call.

Nothing is kept of tensors but what the keys say, and addresses are read in every call, so they may
be replaced, moved, resized and changed at will between calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch.autograd.function import _SingleLevelFunction

from . import calls, dispatch, keeping
from .backends import cuda_direct
from .weight import QuantizedWeight, WeightArgs

_MOST_CALLS = 4096


@dataclasses.dataclass(slots=True)
class Call:
    """What has been settled for calls of the same key.

    Attributes:
        run: cuda_direct's forward function.
        x_layout, y_layout: sizes, strides and dtype of x and y.
        bias_dtype: None without a bias.
        records: whether a gradient is recorded.
        backward: key and cuda_direct's function of a backward pass; None until one was checked.
    """

    run: Callable
    x_layout: tuple
    y_layout: tuple
    bias_dtype: torch.dtype | None
    records: bool
    backward: tuple[tuple, Callable] | None = None


_calls: dict[tuple, Call | None] = {}  # None: the library does not serve them


def _layout(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple:
    return sizes, torch.empty(sizes, device="meta").stride(), dtype


def _forward_key(shape, x, weight: WeightArgs, lora_A, lora_B, bias, records: bool) -> tuple:
    """What the checks, kernels and layouts of a call depend on, x being of that shape."""
    return (
        shape, x.dtype, x.device,
        lora_A.shape, lora_A.dtype, lora_A.device,
        lora_B.shape, lora_B.dtype, lora_B.device,
        None if bias is None else (bias.shape, bias.dtype, bias.device),
        weight[0].device, weight[6:], records, dispatch.forced(),
    )  # fmt: skip


def _backward_key(dy, x, z, lora_A, lora_B) -> tuple:
    """The same of a backward pass; what depends on the weight and scaling is its forward pass's."""
    return (
        dy.numel(), dy.dtype, dy.device, x.numel(), x.shape[-1], x.dtype, x.device,
        z.shape, z.dtype, z.device, lora_A.shape, lora_A.dtype, lora_A.device,
        lora_B.shape, lora_B.dtype, lora_B.device, dispatch.forced(),
    )  # fmt: skip


def possible(x: torch.Tensor) -> bool:
    """Whether the library could serve x."""
    return x.is_cuda


def find(shape, x, w, lora_A, lora_B, bias, records: bool | None = None) -> tuple | None:
    """(Call, packed weight, WeightArgs) for a tensor of `shape`, otherwise like x, if such a call
    is remembered. Nothing intercepts (calls.unwatched). `records`: whether a gradient is recorded;
    None: if any of these needs one.
    """
    if type(w) is WeightArgs:
        weight = w
    elif type(w) is QuantizedWeight and len(w.shape) == 2:
        weight = w.args()
    else:
        return None
    if weight.absmax is None or lora_A is None or lora_B is None:
        return None
    if not calls.plain((x, lora_A, lora_B, bias, *weight[:6])):
        return None
    if records is None:
        records = calls.recording() and (
            x.requires_grad
            or lora_A.requires_grad
            or lora_B.requires_grad
            or (bias is not None and bias.requires_grad)
        )
    call = _calls.get(_forward_key(shape, x, weight, lora_A, lora_B, bias, records))
    if call is None:
        return None
    packed = cuda_direct.packed(weight)
    if (
        packed in cuda_direct.accepted
        and x.is_contiguous()
        and lora_A.is_contiguous()
        and lora_B.is_contiguous()
        and (bias is None or bias.is_contiguous())
    ):
        return call, packed, weight
    return None


def lora_matmul(x, w, lora_A, lora_B, scaling: float, bias) -> torch.Tensor | None:
    """y, or None if no such call is remembered. Nothing intercepts (calls.unwatched)."""
    found = find(x.shape, x, w, lora_A, lora_B, bias)
    if found is None:
        return None
    call, packed, _ = found
    if call.records:
        return _LoraMatmul.apply(x, lora_A, lora_B, bias, (found, scaling))
    results = call.run(packed, x, lora_A, lora_B, None, scaling, bias, call.y_layout)
    return None if results is None else results[0]


def remember(
    shape, x, weight: WeightArgs, lora_A, lora_B, scaling: float, bias, records: bool
) -> None:
    """Find calls like this one from now on, which was checked and has run. For `shape` and
    `records` see `find`.
    """
    rows = x.view(-1, x.shape[-1])
    args = (rows, *weight, lora_A, lora_B, None, scaling, bias, 0.0, None)
    if not calls.nothing_intercepts(args):  # or there are no tokens
        return
    key = _forward_key(shape, x, weight, lora_A, lora_B, bias, records)
    if key in _calls:
        return
    if len(_calls) >= _MOST_CALLS:
        _calls.clear()
    function = dispatch.select("lora_linear", args, for_backward=records, checked=True)
    if not hasattr(function, "direct"):
        _calls[key] = None
        return
    _calls[key] = Call(
        function.direct,
        _layout(tuple(shape), x.dtype),
        _layout((*shape[:-1], weight.N), x.dtype),
        None if bias is None else bias.dtype,
        records,
    )


def product(found: tuple, x, lora_A, lora_B, scaling: float, bias) -> tuple:
    """(y, z) of what `find` has found."""
    call, packed, weight = found
    results = call.run(packed, x, lora_A, lora_B, None, scaling, bias, call.y_layout)
    if results is None:
        return _by_operator(x, weight, lora_A, lora_B, scaling, bias)
    return results


def find_backward(found: tuple, dy, x, z, lora_A, lora_B) -> tuple | None:
    """(function, packed weight, layout of dx) of a backward pass of what `find` has found, if one
    like it is remembered. Hooks of saved tensors may have put anything in the place of what was
    kept. Nothing intercepts.
    """
    call, _, weight = found
    remembered = call.backward
    if (
        remembered is not None
        and calls.plain((dy, x, z, lora_A, lora_B))
        and remembered[0] == _backward_key(dy, x, z, lora_A, lora_B)
        and x.is_contiguous()
        and z.is_contiguous()
        and lora_A.is_contiguous()
        and lora_B.is_contiguous()
    ):
        packed = cuda_direct.packed(weight)
        if packed in cuda_direct.accepted:
            return remembered[1], packed, call.x_layout
    return None


def remember_backward(found: tuple, args: tuple) -> None:
    """Find backward passes with arguments like these of lora_linear_backward from now on, which
    were checked.
    """
    if calls.nothing_intercepts(args):
        function = dispatch.select("lora_linear_backward", args, checked=True)
        tensors = (*args[:3], *args[14:16])
        if hasattr(function, "direct") and function.serves(*tensors, None):
            call, _, _ = found
            call.backward = _backward_key(*tensors), function.direct


class _LoraMatmul(_SingleLevelFunction):
    """calls.lora_linear for x [..., K]."""

    @staticmethod
    def forward(ctx, x, lora_A, lora_B, bias, rest):
        found, scaling = ctx.rest = rest
        y, z = product(found, x, lora_A, lora_B, scaling, bias)
        # Hooks see what they see of the checked call: gradient checkpointing may compare the two.
        seen = x if x.dim() == 2 or not keeping.hooked() else x.view(-1, x.shape[-1])
        keeping.save(ctx, seen, z, lora_A, lora_B)
        return y

    @staticmethod
    @calls.once_differentiable
    def backward(ctx, dy):
        """The parts of the weight are the forward pass's."""
        found, scaling = ctx.rest
        dy = dy.contiguous()
        x, z, lora_A, lora_B = keeping.saved(ctx)
        need_x, need_A, need_B, need_bias, _ = ctx.needs_input_grad
        gradients = remembered = None
        if calls.unwatched():
            remembered = find_backward(found, dy, x, z, lora_A, lora_B)
        if remembered is not None:
            run, packed, x_layout = remembered
            gradients = run(
                packed, dy, x, z, lora_A, lora_B, None, scaling, need_x, need_A, need_B, need_bias,
                False, None, x_layout,
            )  # fmt: skip
        if gradients is None:
            tensors = dy, x, z, lora_A, lora_B
            needs = need_x, need_A, need_B, need_bias, False
            gradients = _checked_gradients(found, tensors, scaling, needs)
        dx, d_A, d_B, d_bias, _ = gradients
        if d_bias is not None:
            d_bias = d_bias.to(found[0].bias_dtype)
        return dx, d_A, d_B, d_bias, None

    _compiled_autograd_key = staticmethod(calls.compiled_key)


def _by_operator(x, weight: WeightArgs, lora_A, lora_B, scaling: float, bias):
    """(y, z) where the library refuses."""
    rows = x.view(-1, weight.K)
    args = (rows, *weight, lora_A, lora_B, None, scaling, bias, 0.0, None)
    y, z = dispatch.select("lora_linear", args)(*args)
    # Autograd lets nobody change a view in place that was made within a function.
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.N).clone(), z


def _checked_gradients(found: tuple, tensors: tuple, scaling: float, needs: tuple):
    """Of x, lora_A, lora_B and bias, and None. Passes like this need no check from now on.

    `tensors` are dy, x or its rows, z, lora_A and lora_B.
    """
    call, _, weight = found
    dy, x, z, *adapter = tensors
    rows = x if x.dim() == 2 else x.reshape(-1, weight.K)
    args = (
        dy.view(-1, weight.N), rows, z, *weight, *adapter, None, scaling, 0.0, None, *needs
    )  # fmt: skip
    dx, *others = calls.gradients(*args)
    remember_backward(found, args)
    return dx if dx is None else dx.view(call.x_layout[0]), *others
