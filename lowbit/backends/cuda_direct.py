"""The compiled products of the CUDA backend without an operator around them.

An operator boxes and checks each of some twenty arguments, which costs the host more than a launch.
Here they go through ctypes as numbers, in three structures (csrc/cuda/direct.cpp): the weight, the
sizes, which `prepare` settles once for all calls of the same sizes, and the other pointers. Results
are allocated before the call.

Nothing is checked: callers answer for shapes, dtypes, devices and contiguity. A weight is taken
once its operator has accepted it with the same numbers at the same addresses. What is not served
here goes `otherwise`: to the operator, which also finds out what is wrong.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable

import torch

from .. import _library

# Places in the tables of direct.cpp.
_KERNELS = {
    "nf4_lora_gemv": 0,
    "nf4_lora_matmul_small": 1,
    "nf4_lora_matmul_mid": 2,
    "nf4_lora_matmul_large": 3,
    "nf4_lora_matmul_portable": 4,
}
_BACKWARD_KERNELS = {"nf4_lora_backward": 0, "nf4_lora_backward_large": 1}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/dtype.h
_MOST_WEIGHTS = 1 << 14
_NOTHING_LAUNCHED = 1

# The structures of direct.cpp.
_pack_weight = struct.Struct("6Q10q").pack  # the library does not read the last five
_pack_sizes = struct.Struct("7q").pack
_pack_product = struct.Struct("8Qd").pack
_pack_backward = struct.Struct("11Qqd").pack

# Weights by `packed`. A forward operator has run with them, so the library may be called at once.
accepted: set[bytes] = set()

# As torch's compiled code allocates, on the current device and at half the cost of torch.empty. It
# is no public function, so it may be gone one day; the other is not there in a torch without CUDA.
_empty_on_current = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)
_current_device = getattr(torch._C, "_cuda_getDevice", None)


@functools.cache
def _c_function(name: str) -> Callable:
    """From (weight, sizes, pointers), all bytes, to 0 if it ran. It releases the interpreter's
    lock. Without argtypes, whose conversions take as long as the rest of an empty call.
    """
    return getattr(ctypes.CDLL(str(_library.library_path("cuda"))), name)


def packed(weight) -> bytes:
    """A weight for the library, and behind it how much lies at the first five addresses."""
    (
        qweight, absmax, codebook, nested_absmax, nested_codebook, nested_offset, N, K, blocksize,
        nested_blocksize, row_blocks,
    ) = weight  # fmt: skip
    nested, lengths = (0, 0, 0), (0, 0)
    if nested_absmax is not None:
        nested = nested_absmax.data_ptr(), nested_codebook.data_ptr(), nested_offset.data_ptr()
        lengths = nested_absmax.numel(), nested_codebook.numel()
    return _pack_weight(
        qweight.data_ptr(), absmax.data_ptr(), codebook.data_ptr(), *nested, N, K, blocksize,
        nested_blocksize, row_blocks, qweight.numel(), absmax.numel(), codebook.numel(), *lengths,
    )  # fmt: skip


def _accept(weight) -> None:
    """Take a weight from now on: a forward operator has run with it. A weight whose parts do not go
    together, or which the kernels cannot read, stays with the operators.
    """
    if (weight[1].dtype is torch.uint8) != (weight[3] is not None):
        return
    if weight[0].data_ptr() % 16 or weight[1].data_ptr() % 16:
        return
    if len(accepted) >= _MOST_WEIGHTS:
        accepted.clear()
    accepted.add(packed(weight))


def _allocator(device: int) -> Callable:
    """A function that makes an uninitialized tensor on a device, of sizes, strides and a dtype."""
    if _empty_on_current is not None and _current_device() == device:
        return _empty_on_current
    return lambda sizes, strides, dtype: torch.empty_strided(
        sizes, strides, dtype=dtype, device=torch.device("cuda", device)
    )


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _is_plain(tensor: torch.Tensor | None, device: int, dtype: torch.dtype, count: int) -> bool:
    """Whether there is no tensor, or one that can be read as `count` elements in a row."""
    return tensor is None or (
        tensor.dtype is dtype
        and tensor.numel() == count
        and tensor.get_device() == device
        and tensor.is_contiguous()
    )


def cast(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A tensor, if there is one, in a dtype."""
    return tensor if tensor is None or tensor.dtype is dtype else tensor.to(dtype)


def prepare(
    operation: str,
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    N: int,
    K: int,
    r: int,
    for_backward: bool,
    otherwise: Callable,
) -> Callable:
    """Return a function that runs an operation for these sizes as `otherwise` does, in less time.

    Args:
        operation, kernel: as in dispatch.TABLE.
        device, dtype, tokens, N, K, r: of x or dy, the weight and lora_A.
        for_backward: as in dispatch.select.
        otherwise: the backend's function, which takes the same arguments.
    """
    if operation == "lora_linear_backward":
        return _prepare_backward(device.index, kernel, dtype, tokens, N, K, r, otherwise)
    if operation not in ("linear", "lora_linear", "linear_low_rank"):
        return otherwise
    code = _DTYPES[dtype]
    sizes = _pack_sizes(tokens, r, code, code, code, device.index, _KERNELS[kernel])
    y_layout = (tokens, N), (N, 1), dtype
    if operation != "lora_linear":
        return _prepare_product(device.index, sizes, y_layout, otherwise)
    z_layout = ((tokens, r), (r, 1), dtype) if for_backward else None
    return _prepare_lora_linear(device.index, sizes, y_layout, z_layout, otherwise)


def _prepare_lora_linear(device: int, sizes, y_layout, z_layout, otherwise) -> Callable:
    run, dtype = _c_function("lowbit_product"), y_layout[2]

    def direct(weight, x, lora_A, lora_B, lora_scaling, scaling, bias, y_layout=y_layout):
        if lora_A.dtype is not dtype or lora_B.dtype is not dtype:
            lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
        bias_address = 0
        if bias is not None:
            bias = cast(bias, dtype)
            bias_address = bias.data_ptr()
            if bias_address == 0:  # its storage was freed: an error, not a layer without bias
                return None
        empty = _allocator(device)
        y = empty(*y_layout)
        z = None if z_layout is None else empty(*z_layout)
        pointers = _pack_product(
            x.data_ptr(), lora_A.data_ptr(), lora_B.data_ptr(),
            0 if lora_scaling is None else lora_scaling.data_ptr(),
            bias_address, 0, 0 if z is None else z.data_ptr(), y.data_ptr(), scaling,
        )  # fmt: skip
        return (y, z) if run(weight, sizes, pointers) == 0 else None

    def lora_linear(*args):
        weight = args[1:12]
        lora_A, lora_B, lora_scaling, scaling, bias, dropout_p, _ = args[12:]
        key = packed(weight)
        if key not in accepted:
            results = otherwise(*args)
            _accept(weight)
            return results
        if dropout_p > 0.0 or not (bias is None or bias.is_contiguous()):
            return otherwise(*args)
        results = direct(key, args[0], lora_A, lora_B, lora_scaling, scaling, bias)
        return otherwise(*args) if results is None else results

    lora_linear.direct = direct
    return lora_linear


def _prepare_product(device: int, sizes, y_layout, otherwise) -> Callable:
    """linear, which has no adapter, and linear_low_rank."""
    run, dtype = _c_function("lowbit_product"), y_layout[2]

    def product(*args):
        x, weight, bias = args[0], args[1:12], args[-1]
        z, lora_B, lora_scaling, scaling = args[12:-1] or (None, None, None, 1.0)
        key = packed(weight)
        if key not in accepted:
            y = otherwise(*args)
            _accept(weight)
            return y
        if not (bias is None or (bias.is_contiguous() and bias.data_ptr())):
            return otherwise(*args)
        lora_B, bias = cast(lora_B, dtype), cast(bias, dtype)
        y = _allocator(device)(*y_layout)
        pointers = _pack_product(
            x.data_ptr(), 0, _pointer(lora_B), _pointer(lora_scaling), _pointer(bias), _pointer(z),
            0, y.data_ptr(), scaling,
        )  # fmt: skip
        return y if run(key, sizes, pointers) == 0 else otherwise(*args)

    return product


def _prepare_backward(
    device: int, kernel: str, dtype, tokens: int, N: int, K: int, r: int, otherwise: Callable
) -> Callable:
    run, code, row = _c_function("lowbit_backward"), _DTYPES[dtype], _BACKWARD_KERNELS[kernel]
    sizes = {
        (A, B): _pack_sizes(tokens, r, code, _DTYPES[A], _DTYPES[B], device, row)
        for A in (dtype, torch.float32)
        for B in (dtype, torch.float32)
    }

    A_sizes, A_strides, B_sizes, B_strides = (r, K), (K, 1), (N, r), (r, 1)
    dx_layout = (tokens, K), (K, 1), dtype

    def direct(
        weight, dy, x, z, lora_A, lora_B, lora_scaling, scaling, need_dx, need_d_lora_A,
        need_d_lora_B, need_d_bias, need_d_scaling, dx_sum=None, dx_layout=dx_layout,
    ):  # fmt: skip
        empty = _allocator(device)
        dx = d_lora_A = d_lora_B = d_bias = d_scaling = None
        to_dx = to_A = to_B = to_bias = to_scaling = 0
        if dx_sum is not None:
            to_dx = dx_sum.data_ptr()
        elif need_dx:
            dx = empty(*dx_layout)
            to_dx = dx.data_ptr()
        A_dtype, B_dtype = lora_A.dtype, lora_B.dtype
        if need_d_lora_A:
            d_lora_A = empty(A_sizes, A_strides, A_dtype)
            to_A = d_lora_A.data_ptr()
        if need_d_lora_B:
            d_lora_B = empty(B_sizes, B_strides, B_dtype)
            to_B = d_lora_B.data_ptr()
        if need_d_bias:
            d_bias = empty((N,), (1,), dtype)
            to_bias = d_bias.data_ptr()
        if need_d_scaling:
            d_scaling = empty((r,), (1,), torch.float32)
            to_scaling = d_scaling.data_ptr()
        pointers = _pack_backward(
            dy.data_ptr(), 0 if x is None else x.data_ptr(), 0 if z is None else z.data_ptr(),
            lora_A.data_ptr(), lora_B.data_ptr(),
            0 if lora_scaling is None else lora_scaling.data_ptr(),
            to_dx, to_A, to_B, to_bias, to_scaling, dx_sum is not None, scaling,
        )  # fmt: skip
        failed = run(weight, sizes[A_dtype, B_dtype], pointers)
        if failed and failed != _NOTHING_LAUNCHED:
            raise RuntimeError("lowbit: a launch of the backward pass failed halfway")
        return None if failed else (dx, d_lora_A, d_lora_B, d_bias, d_scaling)

    def serves(dy, x, z, lora_A, lora_B, lora_scaling):
        place = dy.get_device()
        return (
            (lora_A.dtype, lora_B.dtype) in sizes
            and _is_plain(dy, place, dtype, tokens * N)
            and _is_plain(x, place, dtype, tokens * K)
            and _is_plain(z, place, dtype, tokens * r)
            and _is_plain(lora_A, place, lora_A.dtype, r * K)
            and _is_plain(lora_B, place, lora_B.dtype, r * N)
            and (lora_scaling is None or _is_plain(lora_scaling, place, torch.float32, r))
        )

    def lora_linear_backward(*args, dx_sum=None):
        weight = args[3:14]
        *adapter, dropout_p, _ = args[14:20]
        tensors, needs = (*args[:3], *adapter), args[20:]
        key = packed(weight)
        gradients = None
        # The operator may not look at the weight; and hooks of saved tensors may have put anything
        # in their place.
        if key in accepted and dropout_p == 0.0 and serves(*tensors[:6]):
            gradients = direct(key, *tensors, *needs, dx_sum=dx_sum)
        return otherwise(*args, dx_sum=dx_sum) if gradients is None else gradients

    lora_linear_backward.direct = direct
    lora_linear_backward.serves = serves
    return lora_linear_backward
