"""The one place that decides which kernel runs.

TABLE is read from the top; the first row whose conditions hold and whose backend is present wins. A
row names the operations it serves, the device type, the least compute capability, the dtypes of the
activation (or weight), the range of M it is for, and why it is there. Nothing else in lowbit tests
architectures or sizes to choose a kernel.

A backend can be forced with the environment variable LOWBIT_BACKEND or, for a while, with `force`:

    with lowbit.dispatch.force("reference"):
        y = layer(x)
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

BACKENDS = ("cuda", "triton", "cpu", "reference")
_QUANTIZE = ("quantize_4bit", "dequantize_4bit")
_MATMUL = ("linear", "linear_dx", "lora_linear", "lora_linear_backward", "dropout")
OPERATIONS = _QUANTIZE + _MATMUL
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Row:
    """One line of the table: where it applies, what it chooses, and why."""

    operations: tuple[str, ...]
    device: str  # device type, or "*"
    backend: str
    reason: str
    capability: tuple[int, int] = (0, 0)
    dtypes: tuple[torch.dtype, ...] = _FLOATS
    max_tokens: int | None = None  # largest M served; None for all


TABLE = (
    Row(_QUANTIZE, "cuda", "cuda", "one launch at copy bandwidth", (8, 0)),
    Row(_MATMUL, "cuda", "cuda", "dequantize by panels, cuBLAS", (8, 0)),
    Row(OPERATIONS, "cuda", "triton", "no compiled library: Triton compiles on the spot", (8, 0)),
    Row(OPERATIONS, "cpu", "cpu", "vectorized C++, fused decode and low-rank update"),
    Row(
        OPERATIONS,
        "*",
        "reference",
        "plain torch runs everywhere",
        dtypes=(*_FLOATS, torch.float64),
    ),
)

_forced: list[str] = []


@contextlib.contextmanager
def force(backend: str) -> Iterator[None]:
    """Use one backend for every operation inside the context.

    Args:
        backend: "cuda", "triton", "cpu" or "reference".

    Raises:
        ValueError: unknown backend.
        RuntimeError: at the first operation, when the backend is not there or does not serve the
            device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    _forced.append(backend)
    try:
        yield
    finally:
        _forced.pop()


def forced() -> str | None:
    """The backend every operation must use, or None."""
    if _forced:
        return _forced[-1]
    name = os.environ.get("LOWBIT_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"LOWBIT_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@functools.cache
def _module(backend: str):
    return importlib.import_module(f".backends.{backend}", __package__)


@functools.cache
def unavailable(backend: str) -> str | None:
    """Why a backend cannot run here, or None if it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        return _triton_unavailable()
    from . import _library

    if _library.available(backend):
        return None
    return _library.load_errors.get(backend, "not compiled")


def _triton_unavailable() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton is not installed ({error})"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not interpreted:
        return "triton needs a CUDA device (or TRITON_INTERPRET=1 to interpret on a CPU)"
    return None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _serves(
    row: Row, operation: str, device: torch.device, dtype: torch.dtype, tokens: int
) -> bool:
    if operation not in row.operations or row.device not in ("*", device.type):
        return False
    if dtype not in row.dtypes or (row.max_tokens is not None and tokens > row.max_tokens):
        return False
    if device.type == "cuda" and row.capability > (0, 0):
        index = torch.cuda.current_device() if device.index is None else device.index
        return _capability(index) >= row.capability
    return True


def choose(operation: str, device: torch.device, dtype: torch.dtype, tokens: int = 1) -> Row:
    """Return the row that serves an operation.

    Args:
        operation: one of OPERATIONS.
        device: where the tensors are.
        dtype: dtype of the activation, or of the weight for quantize and dequantize.
        tokens: M.

    Raises:
        RuntimeError: a forced backend is not there.
        TypeError: no row serves the dtype.
    """
    name = forced()
    if name is not None:
        why = unavailable(name)
        if why is not None:
            raise RuntimeError(f"backend {name!r} was forced but cannot run here: {why}")
        return Row(OPERATIONS, device.type, name, "forced")
    for row in TABLE:
        if _serves(row, operation, device, dtype, tokens) and unavailable(row.backend) is None:
            return row
    raise TypeError(f"lowbit::{operation} does not support {dtype} on {device.type}")


def select(operation: str, args: tuple) -> Callable:
    """Return the function that runs an operation on these arguments."""
    first = args[0]
    dtype = args[-1] if operation == "dequantize_4bit" else first.dtype
    row = choose(operation, first.device, dtype, first.shape[0])
    return getattr(_module(row.backend), operation)
