"""Schemas, fake implementations and autograd of the operations `torch.ops.lowbit.*`.

Every operation takes a weight as the same eleven arguments (WeightArgs in weight.py):

    qweight          uint8 packed codes, or a dense [N, K] floating weight when absmax is None
    absmax           fp32 [blocks], or uint8 [blocks] when double-quantized, or None
    codebook         fp32 [16]
    nested_absmax    fp32 [ceil(blocks / nested_blocksize)], or None: not double-quantized
    nested_codebook  fp32 [256], or None
    nested_offset    fp32 [], or None
    N, K             out_features, in_features
    blocksize, nested_blocksize, row_blocks

Activations are 2-D and contiguous here; lowbit/functional.py brings any input into that form and
checks it. The kernels are chosen in dispatch.py. Weights are frozen: no operation returns a
gradient for one.
"""

from __future__ import annotations

import torch

from . import dispatch

_WEIGHT = (
    "Tensor qweight, Tensor? absmax, Tensor? codebook, Tensor? nested_absmax, "
    "Tensor? nested_codebook, Tensor? nested_offset, "
    "int N, int K, int blocksize, int nested_blocksize, bool row_blocks"
)
_ADAPTER = "Tensor lora_A, Tensor lora_B, Tensor? lora_scaling, float scaling"
_WEIGHT_COUNT = 11

SCHEMAS = {
    "quantize_4bit": (
        "(Tensor weight, Tensor thresholds, Tensor order, Tensor? nested_codebook, int blocksize, "
        "int nested_blocksize, bool row_blocks) -> "
        "(Tensor qweight, Tensor absmax, Tensor nested_absmax, Tensor nested_offset)"
    ),
    "dequantize_4bit": f"({_WEIGHT}, ScalarType dtype) -> Tensor",
    "linear": f"(Tensor x, {_WEIGHT}, Tensor? bias) -> Tensor",
    "linear_dx": f"(Tensor dy, {_WEIGHT}) -> Tensor",
    # y = x W^T + bias + (z * s) B^T from a z that is there already. No autograd: grouped.py has it.
    "linear_low_rank": (
        f"(Tensor x, {_WEIGHT}, Tensor z, Tensor lora_B, Tensor? lora_scaling, float scaling, "
        "Tensor? bias) -> Tensor"
    ),
    "lora_linear": (
        f"(Tensor x, {_WEIGHT}, {_ADAPTER}, Tensor? bias, float dropout_p, Tensor? seed) -> "
        "(Tensor y, Tensor z)"
    ),
    "lora_linear_backward": (
        f"(Tensor dy, Tensor x, Tensor z, {_WEIGHT}, {_ADAPTER}, float dropout_p, Tensor? seed, "
        "bool need_dx, bool need_d_lora_A, bool need_d_lora_B, bool need_d_bias, "
        "bool need_d_lora_scaling) -> (Tensor dx, Tensor d_lora_A, Tensor d_lora_B, "
        "Tensor d_bias, Tensor d_lora_scaling)"
    ),
    "dropout": "(Tensor x, float p, Tensor seed) -> Tensor",
}

_library = torch.library.Library("lowbit", "DEF")


# ---- fake implementations: shapes and dtypes only


def _quantize_4bit_fake(
    weight, thresholds, order, nested_codebook, blocksize, nested_blocksize, row_blocks
):
    rows, columns = (weight.shape[0], weight.shape[1]) if row_blocks else (1, weight.numel())
    blocks = rows * (-(-columns // blocksize))
    packed = (rows, -(-columns // 2)) if row_blocks else (-(-columns // 2),)
    nested = nested_codebook is not None
    return (
        weight.new_empty(packed, dtype=torch.uint8),
        weight.new_empty(blocks, dtype=torch.uint8 if nested else torch.float32),
        weight.new_empty(-(-blocks // nested_blocksize) if nested else 0, dtype=torch.float32),
        weight.new_empty(() if nested else (0,), dtype=torch.float32),
    )


def _dequantize_4bit_fake(qweight, *rest):
    N, K, dtype = rest[5], rest[6], rest[-1]
    return qweight.new_empty((N, K), dtype=dtype)


def _linear_fake(x, qweight, *rest):
    return x.new_empty((x.shape[0], rest[5]))


def _linear_dx_fake(dy, qweight, *rest):
    return dy.new_empty((dy.shape[0], rest[6]))


def _lora_linear_fake(x, qweight, *rest):
    lora_A = rest[_WEIGHT_COUNT - 1]
    return x.new_empty((x.shape[0], rest[5])), x.new_empty((x.shape[0], lora_A.shape[0]))


def _lora_linear_backward_fake(dy, x, z, qweight, *rest):
    lora_A, lora_B = rest[_WEIGHT_COUNT - 1 : _WEIGHT_COUNT + 1]
    need_dx, need_A, need_B, need_bias, need_scaling = rest[-5:]
    fp32 = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(x.shape if need_dx else (0,)),
        lora_A.new_empty(lora_A.shape if need_A else (0,)),
        lora_B.new_empty(lora_B.shape if need_B else (0,)),
        dy.new_empty(dy.shape[1] if need_bias else 0),
        x.new_empty(lora_A.shape[0] if need_scaling else 0, dtype=fp32),
    )


def _dropout_fake(x, p, seed):
    return torch.empty_like(x)


_FAKES = {
    "quantize_4bit": _quantize_4bit_fake,
    "dequantize_4bit": _dequantize_4bit_fake,
    "linear": _linear_fake,
    "linear_dx": _linear_dx_fake,
    "linear_low_rank": _linear_fake,
    "lora_linear": _lora_linear_fake,
    "lora_linear_backward": _lora_linear_backward_fake,
    "dropout": _dropout_fake,
}


def _on_one_device(name: str):
    """The fake of an operation. It is also what runs when one of several real tensors is on the
    meta device, and then its result would be memory that nobody writes.
    """

    def run(*args):
        for argument, value in zip(_arguments(name), args, strict=True):
            if isinstance(value, torch.Tensor) and value.device != args[0].device:
                raise ValueError(
                    f"{argument} must be on {args[0].device} like {_arguments(name)[0]}, got "
                    f"{value.device}"
                )
        return _FAKES[name](*args)

    return run


def _arguments(name: str) -> list[str]:
    schema = getattr(torch.ops.lowbit, name).default._schema
    return [argument.name for argument in schema.arguments]


# ---- implementations


def _implementation(name: str):
    fake = _FAKES[name]
    sized = name not in ("quantize_4bit", "dequantize_4bit")

    def run(*args):
        # No tokens: nothing to launch, and every gradient is zero.
        if sized and args[0].shape[0] == 0:
            out = fake(*args)
            return tuple(t.zero_() for t in out) if isinstance(out, tuple) else out.zero_()
        return dispatch.select(name, args)(*args)

    def run_backward(*args):  # the kernels leave out what nobody asked for
        empty = fake(*args[:-5], *(False,) * 5)
        return tuple(e if t is None else t for t, e in zip(run(*args), empty, strict=True))

    return run_backward if name == "lora_linear_backward" else run


for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, _implementation(_name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lowbit::{_name}", _on_one_device(_name), lib=_library)


# ---- autograd


def _save_weight(ctx, weight: tuple, *others) -> None:
    """Save every tensor (so that saved-tensor hooks see it) and keep the plain numbers on the
    context.
    """
    ctx.save_for_backward(*weight[:6], *others)
    ctx.weight_numbers = tuple(weight[6:])
    ctx.set_materialize_grads(False)


def _linear_setup(ctx, inputs, output):
    _, *weight, bias = inputs
    _save_weight(ctx, tuple(weight))
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx, dy):
    none = (None,) * _WEIGHT_COUNT
    if dy is None:
        return (None, *none, None)
    dy = dy.contiguous()
    dx = d_bias = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.lowbit.linear_dx(dy, *ctx.saved_tensors, *ctx.weight_numbers)
    if ctx.needs_input_grad[-1]:
        wide = torch.promote_types(dy.dtype, torch.float32)
        d_bias = dy.sum(dim=0, dtype=wide).to(ctx.bias_dtype)
    return (dx, *none, d_bias)


def _linear_dx_setup(ctx, inputs, output):
    _save_weight(ctx, tuple(inputs[1:]))


def _linear_dx_backward(ctx, ddx):
    none = (None,) * _WEIGHT_COUNT
    if ddx is None:
        return (None, *none)
    return (
        torch.ops.lowbit.linear(ddx.contiguous(), *ctx.saved_tensors, *ctx.weight_numbers, None),
        *none,
    )


def _lora_linear_setup(ctx, inputs, output):
    x, *rest = inputs
    weight, rest = tuple(rest[:_WEIGHT_COUNT]), rest[_WEIGHT_COUNT:]
    lora_A, lora_B, lora_scaling, scaling, bias, dropout_p, seed = rest
    _save_weight(ctx, weight, x, output[1], lora_A, lora_B, lora_scaling, seed)
    ctx.scaling, ctx.dropout_p = scaling, dropout_p
    ctx.bias_dtype = None if bias is None else bias.dtype


def _lora_linear_backward(ctx, dy, dz):
    none = (None,) * _WEIGHT_COUNT
    if dy is None:
        return (None, *none, *(None,) * 7)
    *weight, x, z, lora_A, lora_B, lora_scaling, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad
    need_x, (need_A, need_B, need_scaling) = needs[0], needs[12:15]
    need_bias = needs[16]
    dx, d_A, d_B, d_bias, d_scaling = torch.ops.lowbit.lora_linear_backward(
        dy.contiguous(), x, z, *weight, *ctx.weight_numbers, lora_A, lora_B, lora_scaling,
        ctx.scaling, ctx.dropout_p, seed, need_x, need_A, need_B, need_bias, need_scaling,
    )  # fmt: skip
    return (
        dx if need_x else None,
        *none,
        d_A if need_A else None,
        d_B if need_B else None,
        d_scaling if need_scaling else None,
        None,
        d_bias.to(ctx.bias_dtype) if need_bias else None,
        None,
        None,
    )


def _no_second_derivative(ctx, *_):
    raise RuntimeError("lowbit has no second derivatives (once_differentiable)")


def _dropout_setup(ctx, inputs, output):
    _, ctx.p, seed = inputs
    ctx.save_for_backward(seed)


def _dropout_backward(ctx, dy):
    (seed,) = ctx.saved_tensors
    return torch.ops.lowbit.dropout(dy.contiguous(), ctx.p, seed), None, None


for _name, _backward, _setup in (
    ("linear", _linear_backward, _linear_setup),
    ("linear_dx", _linear_dx_backward, _linear_dx_setup),
    ("lora_linear", _lora_linear_backward, _lora_linear_setup),
    ("lora_linear_backward", _no_second_derivative, None),
    ("dropout", _dropout_backward, _dropout_setup),
):
    torch.library.register_autograd(
        f"lowbit::{_name}", _backward, setup_context=_setup, lib=_library
    )
