"""The compiled CUDA backend: `torch.ops.lowbit_cuda.*` of `_C_cuda.so`, and cuBLAS.

Quantize and dequantize are one launch each. A forward product is one operator of the library, which
decodes the weight inside the product and adds the low-rank term there; dispatch.py says which.

The backward pass is one operator, too: a pass over dy for u = s dy B, dB and the gradients of bias
and scaling, a pass over x for dA, and the product that decodes the weight again and adds u A. Two
operators differ in that product.

Callers that have checked their arguments get both without the operators: cuda_direct.py.

Every other product goes by panels: it dequantizes a panel of the weight, at most PANEL_BYTES,
multiplies with it through torch.mm and goes on to the next: nothing of the weight's size is ever
written. y takes panels of whole rows and dx panels of whole columns, so that every
output element comes out of one product with fp32 accumulation and is rounded once; the low-rank
term is added by a second product.

The panel comes from torch's caching allocator and goes back to it after the call. That is what
makes it safe: the allocator reuses the block on the same stream only, per device, and inside a
graph's own pool. cuBLAS's workspace is torch's, one for each stream: graphs recorded on the same
stream must not run at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .. import _library, dispatch, reference  # noqa: F401  _library loads _C_cuda.so
from . import composed
from .cuda_direct import cast, prepare  # noqa: F401  dispatch.py calls prepare

_ops = torch.ops.lowbit_cuda
_WEIGHT_COUNT = 11

# Large enough for cuBLAS to fill the card, small enough that the panel is still in L2 (50 MB on an
# H100) when it is read.
PANEL_BYTES = 16 << 20
# Panels of fewer columns would leave the fast kernel, which decodes 64 at a time, and tensor cores.
MIN_PANEL_COLUMNS = 64


def quantize_4bit(
    weight, thresholds, order, nested_codebook, blocksize, nested_blocksize, row_blocks
):
    return _ops.quantize_4bit(
        weight, thresholds, order, nested_codebook, blocksize, nested_blocksize, row_blocks
    )


def dequantize_4bit(*weight_and_dtype):
    *weight, dtype = weight_and_dtype
    if _is_dense(weight):
        return weight[0].to(dtype)
    return _ops.dequantize_4bit(*weight, dtype)


def dropout(x, p, seed):
    """Triton's kernel if there is one: plain torch makes about a hundred passes over x."""
    if dispatch.unavailable("triton") is None:
        from .. import kernels

        return kernels.dropout_fwd(x, p, seed)
    return reference.dropout(x, p, seed)


# ---- panels


def _is_dense(weight) -> bool:
    return weight[1] is None


def _panel_length(total: int, other: int, element_size: int, least: int = 1) -> int:
    """Rows (or columns) of a panel: all, or the largest power of two that fits PANEL_BYTES."""
    fitting = PANEL_BYTES // (other * element_size)
    if total <= max(fitting, least):
        return total
    return max(least, 1 << max(fitting.bit_length() - 1, 0))


def _row_panels(weight, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (rows, W[rows]) over all of N; the panel's memory is reused from one to the next."""
    qweight, N, K = weight[0], weight[6], weight[7]
    length = _panel_length(N, K, dtype.itemsize)
    buffer = torch.empty((length, K), dtype=dtype, device=qweight.device)
    for begin in range(0, N, length):
        panel = buffer[: min(length, N - begin)]
        _ops.dequantize_4bit_out(*weight, begin, panel)
        yield slice(begin, begin + panel.shape[0]), panel


def _column_panels(weight, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (columns, W[:, columns]) over all of K."""
    qweight, N, K = weight[0], weight[6], weight[7]
    length = _panel_length(K, N, dtype.itemsize, MIN_PANEL_COLUMNS)
    buffer = torch.empty(N * length, dtype=dtype, device=qweight.device)
    for begin in range(0, K, length):
        columns = min(length, K - begin)
        panel = buffer[: N * columns].view(N, columns)
        _ops.dequantize_4bit_out(*weight, 0, panel, begin)
        yield slice(begin, begin + columns), panel


# ---- products


def _readable(weight) -> bool:
    """Whether the kernels' wide loads can read the weight; a view into a larger tensor may start
    anywhere, and is then multiplied by panels. (Of the other arguments the operators copy such
    views.)
    """
    return weight[0].data_ptr() % 16 == 0 and weight[1].data_ptr() % 16 == 0


def _fused_linear(kernel, x, weight, bias):
    bias = cast(bias, x.dtype)
    return getattr(_ops, kernel)(x, *weight, None, None, None, 1.0, bias, None, None)


def _fused_lora_linear(
    kernel, for_backward, x, weight, lora_A, lora_B, lora_scaling, scaling, bias, dropout_p, seed
):
    dtype = x.dtype
    lora_A, lora_B, bias = cast(lora_A, dtype), cast(lora_B, dtype), cast(bias, dtype)
    op = getattr(_ops, kernel)
    if dropout_p > 0:
        z = dropout(x, dropout_p, seed) @ lora_A.t()
        return op(x, *weight, None, lora_B, lora_scaling, scaling, bias, z, None), z
    z = x.new_empty((x.shape[0], lora_A.shape[0])) if for_backward else None
    return op(x, *weight, lora_A, lora_B, lora_scaling, scaling, bias, None, z), z


def linear(x, *weight_and_bias, kernel="panels"):
    *weight, bias = weight_and_bias
    if kernel != "panels" and _readable(weight):
        return _fused_linear(kernel, x, weight, bias)
    bias = None if bias is None else bias.to(x.dtype)
    if _is_dense(weight):
        return F.linear(x, weight[0].to(x.dtype), bias)
    y = x.new_empty((x.shape[0], weight[6]))
    for rows, panel in _row_panels(weight, x.dtype):
        if bias is None:
            torch.mm(x, panel.t(), out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, panel.t(), out=y[:, rows])
    return y


def linear_low_rank(x, *rest, kernel="panels"):
    """From a z that is there already: [M, r] in x's dtype, unscaled."""
    weight, (z, lora_B, lora_scaling, scaling, bias) = rest[:_WEIGHT_COUNT], rest[_WEIGHT_COUNT:]
    if kernel == "panels" or not _readable(weight):
        return composed.linear_low_rank(x, *rest)
    dtype = x.dtype
    return getattr(_ops, kernel)(
        x, *weight, None, cast(lora_B, dtype), lora_scaling, scaling, cast(bias, dtype), z, None
    )


def _dx_operator(kernel: str):
    """The product that a kernel of the backward pass computes dx with."""
    return getattr(_ops, kernel.replace("backward", "matmul_dx"))


def linear_dx(dy, *weight, kernel="panels", dx_sum=None):
    """dx, or None with dx added to `dx_sum`."""
    if kernel != "panels" and _readable(weight):
        return _dx_operator(kernel)(dy, *weight, dx_sum)
    if _is_dense(weight):
        return _added(dy @ weight[0].to(dy.dtype), dx_sum)
    dx = dy.new_empty((dy.shape[0], weight[7]))
    for columns, panel in _column_panels(weight, dy.dtype):
        torch.mm(dy, panel, out=dx[:, columns])
    return _added(dx, dx_sum)


def _added(dx, dx_sum):
    if dx_sum is None:
        return dx
    dx_sum.add_(dx)
    return None


def lora_linear(x, *rest, kernel="panels", for_backward=True):
    """(y, z); without `for_backward` z may be None."""
    weight, rest = rest[:_WEIGHT_COUNT], rest[_WEIGHT_COUNT:]
    if kernel != "panels" and _readable(weight):
        return _fused_lora_linear(kernel, for_backward, x, weight, *rest)
    lora_A, lora_B, lora_scaling, scaling, bias, dropout_p, seed = rest
    dropped = dropout(x, dropout_p, seed) if dropout_p > 0 else x
    z = dropped @ lora_A.to(x.dtype).t()
    del dropped  # [M, K]: free before y is made
    y = composed.add_low_rank(linear(x, *weight, bias), z, lora_B, lora_scaling, scaling)
    return y, z


def lora_linear_backward(dy, x, z, *rest, kernel="panels", dx_sum=None):
    """(dx, d_lora_A, d_lora_B, d_bias, d_lora_scaling); None is what is not asked for, and dx if it
    was added to `dx_sum`.
    """
    weight, rest = rest[:_WEIGHT_COUNT], rest[_WEIGHT_COUNT:]
    lora_A, lora_B, lora_scaling, scaling, dropout_p, seed, *needs = rest
    adapter = (lora_A, lora_B, lora_scaling, scaling)
    if kernel == "panels" or not _readable(weight):
        return _backward_by_panels(dy, x, z, weight, adapter, dropout_p, seed, needs, dx_sum)
    if dropout_p == 0:
        return getattr(_ops, kernel)(dy, x, z, *weight, *adapter, dx_sum, *needs)
    # The mask is on the low-rank term alone, which the product cannot tell from its other terms.
    need_dx, need_d_lora_A, *others = needs
    dropped = dropout(x, dropout_p, seed) if need_d_lora_A else None
    u, *gradients = _ops.lora_grads(dy, dropped, z, *adapter, need_dx, need_d_lora_A, *others)
    del dropped  # [M, K]: free before dx is made
    if not need_dx:
        return None, *gradients
    dx = _dx_operator(kernel)(dy, *weight, dx_sum)
    target = dx_sum if dx is None else dx
    _add_low_rank(target, u[:, : lora_A.shape[0]], lora_A.to(dy.dtype), dropout_p, seed)
    return dx, *gradients


def _backward_by_panels(dy, x, z, weight, adapter, dropout_p, seed, needs, dx_sum):
    lora_A, lora_B, lora_scaling, scaling = adapter
    need_dx, need_d_lora_A, need_d_lora_B, need_d_bias, need_d_scaling = needs
    s = scaling if lora_scaling is None else lora_scaling * scaling
    dx = d_lora_A = d_lora_B = d_bias = d_scaling = None
    if need_dx or need_d_lora_A or need_d_scaling:
        u = composed.mm_wide(dy, lora_B.to(dy.dtype))  # [M, r]
        scaled = (u * s).to(dy.dtype)
    if need_dx:
        dx = linear_dx(dy, *weight)
        _add_low_rank(dx, scaled, lora_A.to(dy.dtype), dropout_p, seed)
        dx = _added(dx, dx_sum)
    if need_d_lora_A:
        dropped = dropout(x, dropout_p, seed) if dropout_p > 0 else x
        d_lora_A = composed.mm_wide(scaled.t(), dropped).to(lora_A.dtype)
    if need_d_lora_B:
        d_lora_B = (composed.mm_wide(dy.t(), z) * s).to(lora_B.dtype)
    if need_d_bias:
        d_bias = dy.sum(dim=0, dtype=torch.float32).to(dy.dtype)
    if need_d_scaling:
        d_scaling = (u * z).sum(dim=0) * scaling
    return dx, d_lora_A, d_lora_B, d_bias, d_scaling


def _add_low_rank(dx, scaled, lora_A, dropout_p, seed) -> None:
    """dx += drop'(scaled lora_A), the mask of the forward pass regenerated from its seed."""
    if dropout_p > 0:
        dx += dropout(scaled @ lora_A, dropout_p, seed)
    else:
        dx.addmm_(scaled, lora_A)
