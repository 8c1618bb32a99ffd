"""The plain-torch backend: lowbit/reference.py under the operations' signatures. Runs on any
device, in any dtype.
"""

from __future__ import annotations

import torch

from .. import reference


def quantize_4bit(
    weight, thresholds, order, nested_codebook, blocksize, nested_blocksize, row_blocks
):
    qweight, absmax = reference.quantize_4bit(weight, thresholds, order, blocksize, row_blocks)
    if nested_codebook is None:
        return qweight, absmax, absmax.new_empty(0), absmax.new_empty(0)
    return qweight, *reference.quantize_absmax(absmax, nested_codebook, nested_blocksize)


dequantize_4bit = reference.dequantize_4bit


def linear(x, *weight_and_bias):
    *weight, bias = weight_and_bias
    return reference.linear(x, dequantize_4bit(*weight, x.dtype), bias)


def linear_dx(dy, *weight):
    return dy @ dequantize_4bit(*weight, dy.dtype)


def lora_linear(x, *rest):
    *weight, lora_A, lora_B, lora_scaling, scaling, bias, dropout_p, seed = rest
    dense = dequantize_4bit(*weight, x.dtype)
    return reference.lora_linear(
        x, dense, lora_A, lora_B, lora_scaling, scaling, bias, dropout_p, seed
    )


def linear_low_rank(x, *rest):
    *weight, z, lora_B, lora_scaling, scaling, bias = rest
    dense = dequantize_4bit(*weight, x.dtype)
    return reference.linear_low_rank(x, dense, z, lora_B, lora_scaling, scaling, bias)


def lora_linear_backward(dy, x, z, *rest):
    *weight, lora_A, lora_B, lora_scaling, scaling, dropout_p, seed = rest[:-5]
    dense = dequantize_4bit(*weight, dy.dtype)
    with torch.autocast(dy.device.type, enabled=False):  # it would cast the fp32 products
        gradients = reference.lora_linear_backward(
            dy, x, z, dense, lora_A, lora_B, lora_scaling, scaling, dropout_p, seed
        )
    return tuple(
        g if need else g.new_empty(0) for g, need in zip(gradients, rest[-5:], strict=True)
    )


def dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    return reference.dropout(x, p, seed)
