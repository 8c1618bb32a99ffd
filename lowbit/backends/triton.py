"""The Triton backend: the kernels of kernels/triton under the operations' signatures
(lowbit/ops.py).

Runs on CUDA devices, and on CPU tensors when Triton was imported under TRITON_INTERPRET=1. A dense
weight (absmax None) without adapter is an ordinary matmul and goes to torch; with one it takes the
same kernels as a 4-bit weight, since the low-rank term then joins the accumulator instead of
rereading y.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import kernels
from ..codebooks import nested_thresholds

_WEIGHT_COUNT = 11


def _require_runnable(tensor: torch.Tensor) -> None:
    if not tensor.is_cuda and not kernels.INTERPRETED:
        raise ValueError(
            f"the triton backend needs CUDA tensors, got one on {tensor.device}; move it, choose "
            "another backend with LOWBIT_BACKEND, or set TRITON_INTERPRET=1 before triton is "
            "imported to interpret the kernels"
        )


def _is_dense(weight) -> bool:
    return weight[1] is None


def quantize_4bit(
    weight, thresholds, order, nested_codebook, blocksize, nested_blocksize, row_blocks
):
    _require_runnable(weight)
    qweight, absmax = kernels.quantize_fwd(weight, thresholds, order, blocksize, row_blocks)
    if nested_codebook is None:
        return qweight, absmax, absmax.new_empty(0), absmax.new_empty(0)
    bounds = nested_thresholds(nested_codebook)
    return qweight, *kernels.quantize_absmax_fwd(absmax, bounds, nested_blocksize)


def dequantize_4bit(*weight_and_dtype):
    *weight, dtype = weight_and_dtype
    if _is_dense(weight):
        return weight[0].to(dtype)
    _require_runnable(weight[0])
    return kernels.dequantize_fwd(weight, dtype)


def linear(x, *weight_and_bias):
    *weight, bias = weight_and_bias
    if _is_dense(weight):
        return F.linear(x, weight[0].to(x.dtype), None if bias is None else bias.to(x.dtype))
    _require_runnable(x)
    return kernels.matmul_fwd(x, weight, bias)


def linear_dx(dy, *weight):
    if _is_dense(weight):
        return dy @ weight[0].to(dy.dtype)
    _require_runnable(dy)
    return kernels.matmul_dx(dy, weight)


def lora_linear(x, *rest):
    *weight, lora_A, lora_B, lora_scaling, scaling, bias, dropout_p, seed = rest
    _require_runnable(x)
    z = kernels.project(x, lora_A, 1, x.dtype, dropout_p, seed)
    y = kernels.matmul_fwd(x, weight, bias, z, lora_B, lora_scaling, scaling)
    return y, z


def linear_low_rank(x, *rest):
    *weight, z, lora_B, lora_scaling, scaling, bias = rest
    _require_runnable(x)
    return kernels.matmul_fwd(x, weight, bias, z, lora_B, lora_scaling, scaling)


def lora_linear_backward(dy, x, z, *rest):
    weight, rest = rest[:_WEIGHT_COUNT], rest[_WEIGHT_COUNT:]
    lora_A, lora_B, lora_scaling, scaling, dropout_p, seed, *needs = rest
    need_dx, need_d_lora_A, need_d_lora_B, need_d_bias, need_d_scaling = needs
    _require_runnable(dy)
    dx = dy.new_empty(0)
    d_lora_A = lora_A.new_empty(lora_A.shape if need_d_lora_A else (0,))
    d_lora_B = lora_B.new_empty(lora_B.shape if need_d_lora_B else (0,))
    d_bias = dy.new_empty(dy.shape[1] if need_d_bias else 0)
    d_scaling = dy.new_empty(0, dtype=torch.float32)
    if need_dx or need_d_lora_A or need_d_scaling:
        u = kernels.project(dy, lora_B, 0, torch.float32)  # fp32: it is scaled before it is rounded
    if need_dx:
        dx = kernels.matmul_dx(dy, weight, u, lora_A, lora_scaling, scaling, dropout_p, seed)
    if need_d_lora_A:
        kernels.reduce_tokens(u, x, d_lora_A, 0, lora_scaling, scaling, dropout_p, seed)
    if need_d_lora_B:
        column_sum = d_bias if need_d_bias else None
        kernels.reduce_tokens(z, dy, d_lora_B, 1, lora_scaling, scaling, column_sum=column_sum)
    elif need_d_bias:
        d_bias = dy.sum(dim=0, dtype=torch.float32).to(dy.dtype)
    if need_d_scaling:
        d_scaling = kernels.scaling_grad(u, z, scaling)
    return dx, d_lora_A, d_lora_B, d_bias, d_scaling


def dropout(x, p, seed):
    _require_runnable(x)
    return kernels.dropout_fwd(x, p, seed)
