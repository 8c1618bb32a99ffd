"""Memory that the GPU works on but that may lie on the host: `paged()`, moving it, asking where it
is.

Paged tensors are ordinary CUDA tensors in managed memory (cudaMallocManaged). The driver moves
their pages to the host when the card runs full, and `prefetch` moves them on purpose; the GPU reads
and writes them wherever they are. They do not come out of torch's caching allocator: a memory pool
with a pluggable allocator keeps the memory of freed tensors, even through empty_cache(), while the
pool lives, and counts it against the card (bench/NOTES.md). A paged tensor's memory goes back to
the system with the last reference to it, and torch.cuda.memory_allocated() does not see it.

    with lowbit.memory.paged():
        optimizer.step()                      # whatever state this creates is paged
    lowbit.memory.prefetch(tensor, "cpu")     # now it takes no memory of the card
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import _library

HOST = torch.device("cpu")

_HOST_INDEX, _UNKNOWN = -1, -2
# Not ctypes.pythonapi.PyCapsule_New, whose types would be set for every library of the process.
_new_capsule = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
)(("PyCapsule_New", ctypes.pythonapi))
_ADVICE = {"preferred_location": 0, "accessed_by": 1, "read_mostly": 2}


class PagedMemoryError(RuntimeError):
    """Paged memory could not be had, or could not be moved."""


# ---- the library's C interface -------------------------------------------------------------------


@functools.cache
def _functions() -> ctypes.CDLL:
    """The compiled functions (csrc/cuda/paged_memory.h), with their argument types."""
    if "cuda" in _library.load_errors:
        raise PagedMemoryError(
            f"paged memory needs lowbit's CUDA library: {_library.load_errors['cuda']}"
        )
    library = ctypes.CDLL(str(_library.library_path("cuda")))
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.lowbit_new_tensor.argtypes = [number, size, number, ctypes.POINTER(pointer)]
    library.lowbit_prefetch.argtypes = [pointer, size, number, pointer]
    library.lowbit_advise.argtypes = [pointer, size, number, number, number]
    library.lowbit_last_location.argtypes = [pointer, size, ctypes.POINTER(number)]
    library.lowbit_copy.argtypes = [pointer, pointer, size, pointer]
    library.lowbit_pages.argtypes = [number, ctypes.POINTER(number)]
    library.lowbit_error_text.argtypes = [number]
    library.lowbit_error_text.restype = ctypes.c_char_p
    return library


def _check(error: int, what: str) -> None:
    if error:
        text = _functions().lowbit_error_text(error).decode()
        raise PagedMemoryError(f"{what}: {text} (CUDA error {error})")


def _call(what: str, device: torch.device, function: str, *args) -> None:
    """Call one of the functions with a device current, which every device's default stream needs:
    all have the same number.
    """
    with torch.cuda.device(device):
        error = getattr(_functions(), function)(*args)
    _check(error, what)


def _device(device: torch.device | str | int | None) -> torch.device:
    """A CUDA device with its index."""
    device = torch.device("cuda" if device is None else device)
    if device.type != "cuda":
        raise ValueError(f"device must be a CUDA device, got {device}")
    if not torch.cuda.is_available():
        raise PagedMemoryError("paged and pinned memory are a CUDA device's, and there is none")
    return torch.device(
        "cuda", torch.cuda.current_device() if device.index is None else device.index
    )


def _location(where: torch.device | str | int) -> int:
    """The C interface's number for a device or for the host."""
    where = torch.device(where) if not isinstance(where, torch.device) else where
    return _HOST_INDEX if where.type == "cpu" else _device(where).index


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Address and bytes of the part of its storage that a tensor covers."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"tensor must be a paged CUDA tensor, got {type(tensor).__name__}")
    if not tensor.is_cuda:
        raise ValueError(f"tensor must be a paged CUDA tensor, got one on {tensor.device}")
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


# ---- allocation ----------------------------------------------------------------------------------


def can_page(device: torch.device | str | int | None = None) -> bool:
    """Tell whether a device can share managed memory with the host while both run.

    False under WSL and Windows, without a GPU, and without lowbit's CUDA library.
    """
    if not torch.cuda.is_available() or "cuda" in _library.load_errors:
        return False
    return _can_page(_device(device).index)


@functools.cache
def _can_page(device: int) -> bool:
    yes = ctypes.c_int()
    _check(_functions().lowbit_pages(device, ctypes.byref(yes)), "can_page")
    return bool(yes.value)


def _new_bytes(count: int, device: torch.device, managed: bool) -> torch.Tensor:
    """uint8 [count] outside of torch's allocator."""
    managed_tensor = ctypes.c_void_p()
    kind = "paged" if managed else "pinned"
    what = f"{count / 2**20:.0f} MiB of {kind} memory cannot be had for {device}"
    made = ctypes.byref(managed_tensor)
    _call(what, device, "lowbit_new_tensor", managed, count, device.index, made)
    return torch.utils.dlpack.from_dlpack(_new_capsule(managed_tensor, b"dltensor", None))


def empty(
    size: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | int | None = None,
    *,
    kind: str = "managed",
) -> torch.Tensor:
    """Return an uninitialized contiguous CUDA tensor in managed or in pinned host memory.

    Args:
        size: shape.
        dtype: any dtype.
        device: CUDA device whose kernels will use it; the current one by default.
        kind: "managed" pages between host and device; "pinned" stays on the host, where the GPU
            reaches it through the link.

    Raises:
        PagedMemoryError: the system cannot give the memory, or the device cannot page.
        ValueError: unknown kind, or a device that is not a CUDA device.
    """
    if kind not in ("managed", "pinned"):
        raise ValueError(f'kind must be "managed" or "pinned", got {kind!r}')
    device = _device(device)
    if kind == "managed" and not can_page(device):
        raise PagedMemoryError(
            f"{device} cannot page: its driver lacks concurrent access to managed memory "
            '(WSL, Windows); use pinned host memory (kind="pinned")'
        )
    count = math.prod(size)
    if count == 0:
        return torch.empty(tuple(size), dtype=dtype, device=device)
    data = _new_bytes(count * dtype.itemsize, device, kind == "managed")
    return data.view(dtype).view(tuple(size))


_FILLED = {"empty": None, "zeros": 0, "ones": 1}
_FACTORIES = {
    f"{prefix}{name}{suffix}": value
    for name, value in _FILLED.items()
    for prefix, suffix in (("", ""), ("", "_like"), ("new_", ""))
} | {"empty_strided": None, "new_empty_strided": None}


class _Paged(TorchDispatchMode):
    """Gives every new CUDA tensor of the operations in its context paged memory."""

    def __init__(self, device: torch.device | None):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _FACTORIES and "out" not in kwargs:
            return self._factory(func, args, kwargs, _FACTORIES[name])
        results = func(*args, **kwargs)
        fresh = [r.alias_info is None for r in func._schema.returns]
        if isinstance(results, torch.Tensor):
            return self._moved(results) if fresh[0] else results
        if type(results) not in (tuple, list):
            return results
        if len(fresh) != len(results):  # one declared result that is a list
            fresh = fresh[:1] * len(results)
        pairs = zip(results, fresh, strict=True)
        return type(results)(self._moved(r) if new else r for r, new in pairs)

    def _pages(self, device: torch.device) -> bool:
        return device.type == "cuda" and (self.device is None or device == self.device)

    def _factory(self, func, args, kwargs, value):
        like = next((a for a in args if isinstance(a, torch.Tensor)), None)
        device = kwargs.get("device") or (HOST if like is None else like.device)
        device = torch.device(device)
        if device.type == "cuda":
            device = _device(device)
        if not self._pages(device):
            return func(*args, **kwargs)
        form = func(*args, **{**kwargs, "device": "meta", "pin_memory": False})
        out = self._paged_like(form, device)
        return out if value is None else out.fill_(value)

    def _paged_like(self, form: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A paged tensor of the same shape, strides and dtype."""
        extent = sum((n - 1) * s for n, s in zip(form.shape, form.stride(), strict=True)) + 1
        flat = empty((extent if form.numel() else 0,), form.dtype, device)
        return flat.as_strided(form.shape, form.stride())

    def _moved(self, result):
        if not isinstance(result, torch.Tensor) or not self._pages(result.device):
            return result
        if result.layout != torch.strided:
            return result
        return self._paged_like(result, result.device).copy_(result)


def paged(device: torch.device | str | int | None = None) -> TorchDispatchMode:
    """Return a context in which new CUDA tensors get paged memory.

    Whatever the code inside allocates is an ordinary CUDA tensor afterwards, usable by any torch
    code, and frees its memory with the last reference to it. torch.empty, zeros, ones and their
    `_like` and `new_` forms allocate paged memory at once; the result of any other operation is
    computed in device memory and copied, so it must fit there once. Tensors that exist already,
    views and in-place operations are left alone, and so are other threads (the backward pass).

    Args:
        device: the CUDA device whose tensors are paged; all by default.

    Raises:
        PagedMemoryError: (inside) the system cannot give the memory, or the device cannot page.
    """
    return _Paged(None if device is None else _device(device))


# ---- moving and asking ---------------------------------------------------------------------------


def prefetch(
    tensor: torch.Tensor,
    to: torch.device | str | int,
    stream: torch.cuda.Stream | None = None,
) -> None:
    """Queue the move of a paged tensor's memory to a device or to the host; nothing waits for it.

    Args:
        tensor: paged tensor, or a view of one. Whole pages move.
        to: "cpu" or a CUDA device.
        stream: of the tensor's device; the current one by default.

    Raises:
        PagedMemoryError: the driver refuses, for instance because the memory is not managed.
        TypeError, ValueError: `tensor` is no CUDA tensor, or `to` neither "cpu" nor a CUDA device.
    """
    data, count = _span(tensor)
    if count == 0:
        return
    stream = torch.cuda.current_stream(tensor.device) if stream is None else stream
    what = f"prefetch of {count / 2**20:.1f} MiB to {to}"
    location = _location(to)
    _call(what, tensor.device, "lowbit_prefetch", data, count, location, stream.cuda_stream)


def advise(
    tensor: torch.Tensor, advice: str, where: torch.device | str | int = "cpu", *, set: bool = True
) -> None:
    """Tell the driver how a paged tensor will be used.

    Args:
        tensor: paged tensor, or a view of one.
        advice: "preferred_location" (pages go there when nothing else decides), "accessed_by" (the
            device keeps a mapping of the pages wherever they are, so that it never faults), or
            "read_mostly" (reading makes copies; `where` means nothing).
        where: "cpu" or a CUDA device.
        set: False withdraws the advice.

    Raises:
        PagedMemoryError: the driver refuses.
        TypeError, ValueError: unknown advice, or `tensor` is no CUDA tensor.
    """
    if advice not in _ADVICE:
        raise ValueError(f"advice must be one of {', '.join(_ADVICE)}, got {advice!r}")
    data, count = _span(tensor)
    if count:
        what = f"advice {advice} for {count / 2**20:.1f} MiB"
        rest = _ADVICE[advice], set, _location(where)
        _call(what, tensor.device, "lowbit_advise", data, count, *rest)


def residency(tensor: torch.Tensor) -> torch.device | None:
    """Return where a paged tensor was last prefetched to, None if parts differ or never were.

    The driver may have moved pages since, under pressure or on demand.

    Raises:
        TypeError, ValueError: `tensor` is no CUDA tensor.
    """
    data, count = _span(tensor)
    if count == 0:
        return None
    location = ctypes.c_int()
    found = ctypes.byref(location)
    _call("residency", tensor.device, "lowbit_last_location", data, count, found)
    if location.value == _UNKNOWN:
        return None
    return HOST if location.value == _HOST_INDEX else torch.device("cuda", location.value)


def copy_async(to: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream) -> None:
    """Queue a copy between two contiguous tensors of equal size, wherever their memory lies.

    Tensor.copy_ takes a tensor's word for its memory being on the card. The stream is one of the
    tensors' device.

    Raises:
        PagedMemoryError: the driver refuses.
        ValueError: the sizes differ, or a tensor is not contiguous.
    """
    if to.nbytes != source.nbytes or not (to.is_contiguous() and source.is_contiguous()):
        raise ValueError(
            f"to and source must be contiguous and of equal size, got {to.nbytes} bytes with "
            f"strides {to.stride()} and {source.nbytes} with {source.stride()}"
        )
    what = f"copy of {source.nbytes / 2**20:.1f} MiB"
    addresses = to.data_ptr(), source.data_ptr()
    _call(what, stream.device, "lowbit_copy", *addresses, source.nbytes, stream.cuda_stream)
