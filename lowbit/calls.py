"""The way to the kernels past the operators of ops.py, where nothing could intercept: an operator
registered from Python costs the host more time than a small layer's arithmetic. Arguments are
checked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from . import dispatch, keeping, ops  # noqa: F401  (ops registers torch.ops.lowbit)

# Asked in every call, so looked up once.
_is_compiling = torch.compiler.is_compiling
_active_modes = torch._C._len_torch_dispatch_stack
_active_transforms = torch._C._are_functorch_transforms_active
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_tracing_state = torch._C._get_tracing_state
_is_key_included = torch._C._dispatch_tls_is_dispatch_key_included
# What torch.autograd.grad(is_grads_batched=True) runs backward under.
_VMAP_MODE = torch._C._parse_dispatch_key("VmapMode")
_GRAD = torch._C._functorch.TransformType.Grad
_NOT_FUNCTIONAL = (
    "torch.func's transforms (grad, vjp, jacrev; vmap of grouped layers that train) do not reach "
    "lowbit's gradients; use torch.autograd.grad, with is_grads_batched=True for many at once"
)
_PLAIN_TYPES = frozenset((torch.Tensor, torch.nn.Parameter, type(None), int, float, bool))


def unwatched() -> bool:
    """No graph is traced, and no mode or transform is active."""
    return not (
        _is_compiling()
        or _active_modes() > 0
        or _active_transforms()
        or _is_key_included(_VMAP_MODE)
        or _tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def nothing_intercepts(args: tuple) -> bool:
    """The same; there are tokens, and all tensors are plain ones."""
    if not unwatched():
        _refuse_tangents(args)
        if not _is_compiling() and _differentiating() and records(args):
            raise NotImplementedError(_NOT_FUNCTIONAL)
        return False
    x = args[0]
    return x.shape[0] > 0 and not x.is_meta and plain(args)


def _refuse_tangents(args: tuple) -> None:
    """torch takes a custom operator's result for a constant in forward mode, without a word. What
    a transform has wrapped may have a tangent of an outer level, which cannot be seen.
    """
    if forward_ad._current_level < 0:
        return
    for arg in args:
        if not isinstance(arg, torch.Tensor):
            continue
        if _is_wrapped(arg) or forward_ad.unpack_dual(arg).tangent is not None:
            raise NotImplementedError("lowbit has no derivatives in forward mode (jvp)")


def _differentiating() -> bool:
    """Whether torch.func differentiates in reverse mode, at whatever level."""
    return _active_transforms() and any(
        level.key() == _GRAD for level in torch._C._functorch.get_interpreter_stack()
    )


def refuse_transforms() -> None:
    """For functions with a backward pass that are no operators: these know not even vmap."""
    if _active_transforms():
        raise NotImplementedError(_NOT_FUNCTIONAL)


def plain(args: tuple) -> bool:
    """Whether all tensors among them are plain ones or parameters."""
    return _PLAIN_TYPES.issuperset(map(type, args))


def recording() -> bool:
    """Whether gradients are recorded: not in inference mode, whatever else says so."""
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def records(args: tuple) -> bool:
    """Whether a gradient is recorded for any tensor among them."""
    if recording():
        for arg in args:
            if isinstance(arg, torch.Tensor) and arg.requires_grad:
                return True
    return False


def run(operation: str, *args):
    """torch.ops.lowbit.<operation>, or its kernel at once if nothing between the two has work to
    do.
    """
    if nothing_intercepts(args) and not records(args):
        return dispatch.select(operation, args, for_backward=False, checked=True)(*args)
    return getattr(torch.ops.lowbit, operation)(*args)


def once_differentiable(backward: Callable) -> Callable:
    """For functions whose gradients depend on more inputs than dy. torch's own of this name lets
    gradients pass for constants where dy is one; here it is an error to differentiate them.
    """

    @functools.wraps(backward)
    def run(ctx, *dys):
        if not torch.is_grad_enabled():  # only create_graph leaves it on
            return backward(ctx, *dys)
        with torch.no_grad():
            gradients = backward(ctx, *dys)
        constant = not any(dy is not None and dy.requires_grad for dy in dys)
        if constant and sum(ctx.needs_input_grad) == 1:  # the gradient does not depend on its input
            return gradients
        refuse = torch._C._functions.DelayedError(
            b"lowbit has no second derivatives (once_differentiable)", len(gradients)
        )
        return refuse(*(None if d is None else d.detach().requires_grad_() for d in gradients))

    return run


def compiled_key(ctx) -> tuple:
    """What compiled autograd asks of a function that is no torch.autograd.Function."""
    return (ctx._autograd_function_id,)


def lora_linear(x, weight, lora_A, lora_B, vector, scaling, bias, dropout_p, seed):
    """y of torch.ops.lowbit.lora_linear; with gradients, if nothing intercepts, by _LoraLinear."""
    args = (x, *weight, lora_A, lora_B, vector, scaling, bias, dropout_p, seed)
    if not nothing_intercepts(args):
        return torch.ops.lowbit.lora_linear(*args)[0]
    trained = x, lora_A, lora_B, vector, bias
    if records(trained):
        return _LoraLinear.apply(*trained, args)
    return dispatch.select("lora_linear", args, for_backward=False, checked=True)(*args)[0]


class _LoraLinear(_SingleLevelFunction):
    """What ops.py registers for lora_linear, without the operator around it, which costs the host
    more than all the rest. The first five inputs are those of `args` that can have gradients. Not
    torch.autograd.Function, whose apply looks for functorch's transforms once more.
    """

    @staticmethod
    def forward(ctx, x, lora_A, lora_B, vector, bias, args):
        y, z = dispatch.select("lora_linear", args, checked=True)(*args)
        ctx.weight = weight = args[1:12]
        ctx.numbers = args[15:18:2]
        # Not a packed weight: offloading what its module keeps would free nothing.
        keeping.save(ctx, x, z, lora_A, lora_B, vector, args[18], keeping.dense(weight))
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _gradients(ctx, dy)

    _compiled_autograd_key = staticmethod(compiled_key)


def _gradients(ctx, dy):
    x, z, lora_A, lora_B, vector, seed, _ = keeping.saved(ctx)
    scaling, dropout_p = ctx.numbers
    need_x, need_A, need_B, need_scaling, need_bias, _ = ctx.needs_input_grad
    dx, d_A, d_B, d_bias, d_scaling = gradients(
        dy.contiguous(), x, z, *ctx.weight, lora_A, lora_B, vector, scaling, dropout_p, seed,
        need_x, need_A, need_B, need_bias, need_scaling,
    )  # fmt: skip
    return dx, d_A, d_B, d_scaling, d_bias.to(ctx.bias_dtype) if need_bias else None, None


def gradients(*args):
    """torch.ops.lowbit.lora_linear_backward, or its kernels at once; None is what is not needed."""
    if nothing_intercepts(args):
        function = dispatch.select("lora_linear_backward", args, checked=True)
    else:
        function = torch.ops.lowbit.lora_linear_backward
    return tuple(d if need else None for d, need in zip(function(*args), args[-5:], strict=True))
