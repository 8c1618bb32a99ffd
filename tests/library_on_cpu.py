"""The CUDA library's C functions on a CPU: they find their arguments by address, as it does, and
compute what the CPU backend computes, for layers that its kernels serve. So everything around the
library is tested without a GPU.
"""

import ctypes
import functools
import math
import struct

import torch

from lowbit import dispatch, repeated
from lowbit.backends import cpu, cuda_direct
from lowbit.dispatch_table import Layer

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KERNELS = {"lora_linear": "nf4_lora_matmul_small", "lora_linear_backward": "nf4_lora_backward"}


def _at(address: int, dtype: torch.dtype, *shape: int) -> torch.Tensor | None:
    if address == 0:
        return None
    size = math.prod(shape) * dtype.itemsize
    return torch.frombuffer((ctypes.c_byte * size).from_address(address), dtype=dtype).view(shape)


def _weight(structure: bytes) -> tuple:
    *addresses, N, K, blocksize, nested_blocksize, row_blocks, bytes_, blocks, _, _, _ = (
        struct.unpack("6Q10q", structure)
    )
    nested = -(-blocks // nested_blocksize)
    kinds = [(torch.uint8, bytes_), (torch.float32, blocks), (torch.float32, 16)]
    kinds += [(torch.float32, nested), (torch.float32, 256), (torch.float32,)]
    if addresses[3]:
        kinds[1] = torch.uint8, blocks
    tensors = [_at(a, *kind) for a, kind in zip(addresses, kinds, strict=True)]
    if row_blocks:
        tensors[0] = tensors[0].view(N, -1)
    return *tensors, N, K, blocksize, nested_blocksize, bool(row_blocks)


class Library:
    """Installed while a test runs.

    Attributes:
        refuses: whether calls come back as not served.
        calls: the names of the functions that were called.
    """

    def __init__(self, monkeypatch) -> None:
        self.refuses = False
        self.calls: list[str] = []
        functions = {"lowbit_product": self._product, "lowbit_backward": self._backward}
        monkeypatch.setattr(repeated, "possible", lambda x: True)
        monkeypatch.setattr(cuda_direct, "_c_function", functions.__getitem__)
        monkeypatch.setattr(cuda_direct, "_allocator", lambda device: _empty)
        select = dispatch.select
        prepared = functools.cache(self._prepare)

        def select_prepared(operation, args, for_backward=True, checked=False):
            function = select(operation, args, for_backward, checked)
            first = args[0]
            if dispatch.forced() or not checked or operation not in _KERNELS or not first.is_cpu:
                return function
            at = 3 if operation == "lora_linear_backward" else 1
            if first.dtype not in _DTYPES or args[at + 1] is None:
                return function
            N, K, blocksize, r = *args[at + 6 : at + 9], args[at + 11].shape[0]
            if not Layer(N, K, blocksize, r=r).whole_blocks():
                return function
            sizes = first.shape[0], N, K, r
            return prepared(operation, first.dtype, *sizes, for_backward, function)

        monkeypatch.setattr(dispatch, "select", select_prepared)

    @staticmethod
    def _prepare(operation, dtype, tokens, N, K, r, for_backward, function):
        def otherwise(*args, dx_sum=None):
            assert dx_sum is None
            return function(*args)

        device = torch.device("cuda", 0)
        kernel = _KERNELS[operation]
        return cuda_direct.prepare(
            operation, kernel, device, dtype, tokens, N, K, r, for_backward, otherwise
        )

    def _product(self, weight: bytes, sizes: bytes, pointers: bytes) -> int:
        if self.refuses:
            return 1
        self.calls.append("product")
        weight = _weight(weight)
        M, r, code, *_ = struct.unpack("7q", sizes)
        N, K, dtype = *weight[6:8], _DTYPES[code]
        x, A, B, vector, bias, _, z_out, y_out, scaling = struct.unpack("8Qd", pointers)
        adapter = _at(A, dtype, r, K), _at(B, dtype, N, r), _at(vector, torch.float32, r), scaling
        bias = _at(bias, dtype, N)
        y, z = cpu.lora_linear(_at(x, dtype, M, K), *weight, *adapter, bias, 0.0, None)
        _at(y_out, dtype, M, N).copy_(y)
        if z_out:
            _at(z_out, dtype, M, r).copy_(z)
        return 0

    def _backward(self, weight: bytes, sizes: bytes, pointers: bytes) -> int:
        if self.refuses:
            return 1
        self.calls.append("backward")
        weight = _weight(weight)
        M, r, *codes, _, _ = struct.unpack("7q", sizes)
        N, K, (dtype, A_dtype, B_dtype) = *weight[6:8], (_DTYPES[c] for c in codes)
        dy, x, z, A, B, vector, *outputs, adds, scaling = struct.unpack("11Qqd", pointers)
        vector = _at(vector, torch.float32, r)
        adapter = _at(A, A_dtype, r, K), _at(B, B_dtype, N, r), vector, scaling
        tensors = _at(dy, dtype, M, N), _at(x, dtype, M, K), _at(z, dtype, M, r)
        needs = [address != 0 for address in outputs]
        made = cpu.lora_linear_backward(*tensors, *weight, *adapter, 0.0, None, *needs)
        shapes = (dtype, M, K), (A_dtype, r, K), (B_dtype, N, r), (dtype, N), (torch.float32, r)
        if adds:
            made = (_at(outputs[0], *shapes[0]) + made[0], *made[1:])
        for address, shape, gradient in zip(outputs, shapes, made, strict=True):
            if address:
                _at(address, *shape).copy_(gradient)
        return 0


def _empty(sizes, strides, dtype):
    return torch.empty_strided(sizes, strides, dtype=dtype)
