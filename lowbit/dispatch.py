"""The one place that decides which kernel runs.

TABLE (dispatch_table.py) is read from the top; the first row whose conditions hold and whose
backend is present wins. A row names the operations it serves, the device type, the compute
capability, the dtypes of the activation (or weight), the range of M and the weights it is for, and
why it is there. Nothing else in lowbit tests architectures or sizes to choose a kernel.

A backend, or one kernel of it, can be forced with the environment variable LOWBIT_BACKEND or, for a
while, with `force`:

    with lowbit.dispatch.force("reference"):
        y = layer(x)
    with lowbit.dispatch.force("cuda:panels"):
        y = layer(x)
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from .dispatch_table import (
    BACKENDS,
    BACKWARD_KERNELS,
    KERNEL_OPERATIONS,
    OPERATIONS,
    TABLE,
    Layer,
    Row,
)

_NAMES = (*BACKENDS, *(f"{row.backend}:{row.kernel}" for row in TABLE if row.kernel))


@dataclass(eq=False)
class _Forced:
    """A context that is open; no two are equal."""

    name: str


_forced: list[_Forced] = []
_environment = os.environ.get("LOWBIT_BACKEND") or None  # read once: a lookup costs a microsecond


@contextlib.contextmanager
def force(backend: str) -> Iterator[None]:
    """Use one backend for every operation of the process while the context is open: also in other
    threads, of which autograd's compute the backward pass. Of several contexts the last one opened
    counts, whichever is left first.

    Args:
        backend: "cuda", "triton", "cpu" or "reference"; "cuda:panels" (any kernel a row of TABLE
            names) leaves only that kernel.

    Raises:
        ValueError: unknown backend.
        RuntimeError: at the first operation, when the backend is not there or does not serve the
            device.
    """
    _check_name(backend, "backend")
    mine = _Forced(backend)
    _forced.append(mine)
    try:
        yield
    finally:
        _forced.remove(mine)


def forced() -> str | None:
    """The backend every operation must use, or None."""
    if _forced:
        return _forced[-1].name
    if _environment is not None:
        _check_name(_environment, "LOWBIT_BACKEND")
    return _environment


def _check_name(name: str, argument: str) -> None:
    if name not in _NAMES:
        raise ValueError(f"{argument} must be one of {', '.join(_NAMES)}, got {name!r}")


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
def _card(index: int) -> tuple[tuple[int, int], int]:
    """Compute capability and number of SMs."""
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.multi_processor_count


def _card_of(device: torch.device) -> tuple[tuple[int, int], int]:
    return _card(torch.cuda.current_device() if device.index is None else device.index)


def obstacle(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device, or None if it can."""
    why = unavailable(backend)
    if why is not None or backend != "cuda" or device.type != "cuda":
        return why
    from . import _library

    return _library.missing_code(_card_of(device)[0])


def _serves(
    row: Row,
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    layer: Layer | None,
) -> bool:
    if operation not in row.operations or row.device not in ("*", device.type):
        return False
    least, most = row.tokens
    if dtype not in row.dtypes or tokens < least or (most is not None and tokens > most):
        return False
    if row.serves is not None and (layer is None or not row.serves(layer)):
        return False
    if device.type == "cuda" and row.capability > (0, 0):
        capability, sms = _card_of(device)
        known = row.newest is None or capability <= row.newest
        return known and capability >= row.capability and sms >= row.sms
    return True


def choose(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int = 1,
    layer: Layer | None = None,
) -> Row:
    """Return the row that serves an operation.

    Args:
        operation: one of OPERATIONS.
        device: where the tensors are.
        dtype: dtype of the activation, or of the weight for quantize and dequantize.
        tokens: M.
        layer: the weight and rank; without it, rows that depend on them are passed over.

    Raises:
        RuntimeError: a forced backend is not there, or its kernel does not serve the layer.
        TypeError: no row serves the dtype.
    """
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())  # answers are kept by device
    return _choose(operation, device, dtype, tokens, layer, forced())


@functools.lru_cache(maxsize=4096)
def _choose(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    layer: Layer | None,
    name: str | None,
) -> Row:
    if name is None:
        for row in TABLE:
            served = _serves(row, operation, device, dtype, tokens, layer)
            if served and row.suits is not None:
                served = row.suits(tokens, layer, _card_of(device)[1])
            if served and obstacle(row.backend, device) is None:
                return row
        raise TypeError(f"lowbit::{operation} does not support {dtype} on {device.type}")
    backend, _, kernel = name.partition(":")
    why = obstacle(backend, device)
    if why is not None:
        raise RuntimeError(f"backend {backend!r} was forced but cannot run here: {why}")
    rows = [row for row in TABLE if row.backend == backend and operation in row.operations]
    named = [row for row in rows if row.kernel == kernel] if kernel else []
    for row in named or rows:  # of an operation that the kernel is not for, any
        # Forced by name, a kernel also runs where another one is faster.
        at = row.tokens[0] if named else tokens
        if _serves(row, operation, device, dtype, at, layer):
            return replace(row, reason="forced")
    if named:
        raise RuntimeError(
            f"kernel {kernel!r} was forced but does not serve {operation} here "
            f"({dtype}, M = {tokens}, {layer})"
        )
    return Row(OPERATIONS, device.type, backend, "forced")


# Layers that read the same x share products with their stacked lora_A (group_products.py) on these
# devices, from this many tokens on. Elsewhere each runs its own fused operation, which reads x once
# more but does not pass over y again. On a CPU stacking was no faster in fp32 and slower in bf16 (2
# Zen 3 cores, K = 1536, M = 64 and 512, 2026-11-24); on an H100 it makes no difference to a step of
# an 8B model at M = 512 (60.9 ms without, 61.6 with). The number of tokens is where a layer stops
# waiting for its weight; smaller ones are not measured.
STACKED_DEVICES = ("cuda",)
STACKED_TOKENS = 65
# Forward, z_i: the stacked product is a concatenation, a product and a copy for each member, which
# keep the host longer than the projections inside the members' own calls. An eager step of an 8B
# model with 512 tokens took 276 and 274 ms stacked, 257 and 282 not; the least of 8 steps 248 and
# 248, 222 and 193 (H100, 2026-11-24).
STACKED_FORWARD_TOKENS = 1025


def stacks(device: torch.device, tokens: int, forward: bool = False) -> bool:
    """Whether a group of layers shares its low-rank products, or those of its forward pass."""
    least = STACKED_FORWARD_TOKENS if forward else STACKED_TOKENS
    return device.type in STACKED_DEVICES and tokens >= least


def select(
    operation: str, args: tuple, for_backward: bool = True, checked: bool = False
) -> Callable:
    """Return the function that runs an operation on these arguments.

    Args:
        operation: one of OPERATIONS.
        args: those of torch.ops.lowbit.<operation>.
        for_backward: False allows a forward kernel to leave out what only backward reads (z).
        checked: the caller answers for shapes, dtypes, devices and contiguity of the arguments, so
            that a compiled kernel may be called without the checks of its operator.
    """
    first = args[0]
    if operation in KERNEL_OPERATIONS:
        # Where the weight begins, and the rank: of lora_A [r, K] or z [M, r].
        at = 3 if operation == "lora_linear_backward" else 1
        r = 0
        if operation == "linear_low_rank":
            r = args[at + 11].shape[1]
        elif operation not in ("linear", "linear_dx"):
            r = args[at + 11].shape[0]
        blocksize = args[at + 8] if args[at + 1] is not None else 0
        return _kernel_function(
            operation, first.device, first.dtype, first.shape[0], args[at + 6], args[at + 7],
            blocksize, args[at + 10], r, for_backward, checked, forced(),
        )  # fmt: skip
    dtype = args[-1] if operation == "dequantize_4bit" else first.dtype
    row = choose(operation, first.device, dtype, first.shape[0])
    return _function(row.backend, operation)


def adding_dx(operation: str, args: tuple) -> Callable | None:
    """The function that runs an operation of the backward pass and can add dx to `dx_sum` instead
    of making a new tensor, or None where another pass has to add. The arguments are checked.
    """
    function = select(operation, args, checked=True)
    return function if hasattr(function, "adds_dx") else None


def _function(backend: str, operation: str) -> Callable:
    """A backend's function; what it leaves out is composed of its others."""
    function = getattr(_module(backend), operation, None)
    return getattr(_module("composed"), operation) if function is None else function


@functools.lru_cache(maxsize=4096)
def _kernel_function(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    N: int,
    K: int,
    blocksize: int,
    row_blocks: bool,
    r: int,
    for_backward: bool,
    checked: bool,
    name: str | None,
) -> Callable:
    row = _choose(operation, device, dtype, tokens, Layer(N, K, blocksize, row_blocks, r), name)
    function = _function(row.backend, operation)
    if not row.kernel:
        return function
    options = {"kernel": row.kernel}
    if operation == "lora_linear" and not for_backward:
        options["for_backward"] = False
    run = functools.partial(function, **options)
    if checked and row.kernel != "panels":
        run = _module(row.backend).prepare(
            operation, row.kernel, device, dtype, tokens, N, K, r, for_backward, otherwise=run
        )
    if row.kernel in BACKWARD_KERNELS:
        run.adds_dx = True
    return run
