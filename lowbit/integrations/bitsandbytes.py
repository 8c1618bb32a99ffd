"""Weights of bitsandbytes as weights of lowbit and back, without a copy.

Both libraries store the same bytes, so a conversion only hands tensors over:
`from_bnb(to_bnb(qw))` has the storage of `qw`. bitsandbytes itself is needed for `to_bnb` only,
which builds its QuantState.
"""

from __future__ import annotations

from typing import Any

import torch

from ..state import fits_bitsandbytes
from ..weight import QuantizedWeight


def from_bnb(weight: torch.Tensor, quant_state: Any = None) -> QuantizedWeight:
    """Wrap a 4-bit weight of bitsandbytes.

    Args:
        weight: a bitsandbytes Params4bit that is quantized already, or its packed data (any
            quant_storage dtype).
        quant_state: the bitsandbytes QuantState; default `weight.quant_state`.

    Returns:
        QuantizedWeight that shares the storage of the packed data, absmax and codebooks.

    Raises:
        TypeError: weight is no tensor.
        ValueError: there is no quantization state (Params4bit quantizes on the first
            `.to(device)`), the weight was repacked for bitsandbytes' AVX-512 kernels or is not
            contiguous, or the state is not a 4-bit one.

    Source: bitsandbytes 0.50, functional.py (QuantState) and nn/modules.py (Params4bit).

    Example:
        >>> import bitsandbytes as bnb
        >>> layer = bnb.nn.Linear4bit(128, 64, quant_type="nf4").to("cpu")
        >>> lowbit.QuantizedWeight.from_bnb(layer.weight).shape
        (64, 128)
    """
    if not isinstance(weight, torch.Tensor):
        raise TypeError(
            f"weight must be a Params4bit or a packed tensor, got {type(weight).__name__}"
        )
    state = getattr(weight, "quant_state", None) if quant_state is None else quant_state
    if state is None:
        raise ValueError(
            "weight has no quant_state: move the bitsandbytes layer to a device first, which "
            "quantizes it, or pass quant_state="
        )
    _check_state(state)
    shape, blocksize = tuple(state.shape), state.blocksize
    nested = state.state2
    return QuantizedWeight(
        _bytes_of(weight),
        state.absmax,
        state.code,
        shape=shape,
        blocksize=blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
        nested_absmax=None if nested is None else nested.absmax,
        nested_codebook=None if nested is None else nested.code,
        nested_offset=None if nested is None else state.offset,
        nested_blocksize=256 if nested is None else nested.blocksize,
        row_blocks=shape[-1] % blocksize == 0,
    )


def _check_state(state: Any) -> None:
    if getattr(state, "packing_format_for_cpu", False):
        # Undoing it re-quantizes the scales of a double-quantized weight, so it would not be the
        # same weight.
        raise ValueError(
            "weight was repacked by a bitsandbytes forward on a CPU with AVX-512; convert the "
            "layer before its first call in eval mode, or load it again"
        )
    if getattr(state, "quant_type", None) not in ("nf4", "fp4"):
        got = getattr(state, "quant_type", type(state).__name__)
        raise ValueError(f"quant_state must be of type nf4 or fp4, got {got!r}")
    if state.shape is None:
        raise ValueError("quant_state must know the shape of the weight, got None")


def _bytes_of(weight: torch.Tensor) -> torch.Tensor:
    """The packed bytes as a plain uint8 tensor [bytes, 1] on the same storage."""
    data = weight.data.as_subclass(torch.Tensor)
    if not data.is_contiguous():
        raise ValueError(
            f"weight must be contiguous, got strides {data.stride()} for shape {list(data.shape)}"
        )
    return data.view(-1).view(torch.uint8).view(-1, 1)


def to_bnb(qw: QuantizedWeight) -> tuple[torch.Tensor, Any]:
    """Return the packed tensor and the bitsandbytes QuantState of a weight.

    Args:
        qw: QuantizedWeight of type nf4 or fp4.

    Returns:
        (uint8 [bytes, 1], bitsandbytes.functional.QuantState), both sharing the storage of `qw`.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: bitsandbytes cannot express the weight: another codebook, or row-aligned blocks
            with K no multiple of blocksize.

    Example:
        >>> import bitsandbytes as bnb
        >>> packed, state = lowbit.quantize(torch.randn(64, 128)).to_bnb()
        >>> bnb.functional.dequantize_4bit(packed, state).shape
        torch.Size([64, 128])
    """
    if not fits_bitsandbytes(qw):
        raise ValueError(
            f"qw must be nf4 or fp4 with flat blocks to be a bitsandbytes weight, got {qw!r}; "
            'quantize with layout="flat" for bitsandbytes'
        )
    from bitsandbytes.functional import QuantState

    nested = None
    if qw.double_quant:
        nested = QuantState(
            absmax=qw.nested_absmax,
            code=qw.nested_codebook,
            blocksize=qw.nested_blocksize,
            dtype=torch.float32,
        )
    state = QuantState(
        absmax=qw.absmax,
        shape=torch.Size(qw.shape),
        code=qw.codebook,
        blocksize=qw.blocksize,
        quant_type=qw.quant_type,
        dtype=qw.dtype,
        offset=None if nested is None else qw.nested_offset,
        state2=nested,
    )
    return qw.qweight.reshape(-1, 1), state
