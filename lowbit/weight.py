"""QuantizedWeight: a 4-bit weight with everything needed to read it back."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class WeightArgs(NamedTuple):
    """The eleven arguments by which every operation takes a weight; see lowbit/ops.py."""

    qweight: torch.Tensor
    absmax: torch.Tensor | None
    codebook: torch.Tensor | None
    nested_absmax: torch.Tensor | None
    nested_codebook: torch.Tensor | None
    nested_offset: torch.Tensor | None
    N: int
    K: int
    blocksize: int
    nested_blocksize: int
    row_blocks: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.N, self.K


_TENSORS = ("qweight", "absmax", "codebook", "nested_absmax", "nested_codebook", "nested_offset")


class QuantizedWeight:
    """A weight of any shape stored in 4 bits: W[n, k] = codebook[q[n, k]] * absmax[block(n, k)].

    The last dimension is K, all others together are N.

    Attributes:
        qweight: uint8, packed codes, element 2i of a row in the high nibble of byte i; [N,
            ceil(K/2)] with row-aligned blocks, [ceil(N*K/2)] with flat ones.
        absmax: fp32 [blocks], or uint8 [blocks] codes when double-quantized.
        codebook: fp32 [16].
        nested_absmax, nested_codebook, nested_offset: fp32 [ceil(blocks/nested_blocksize)], fp32
            [256] and fp32 [] when double-quantized, else None: absmax = nested_codebook[code] *
            nested_absmax + nested_offset.
        shape: the original shape.
        blocksize, nested_blocksize: elements per block, blocks per nested block.
        quant_type: "nf4", "fp4", "nf3", "nf2" or "custom".
        dtype: dtype of the original weight, and the default of `dequantize`.
        row_blocks: whether blocks and bytes restart with each row (lowbit's default) or run flat
            (bitsandbytes). The two layouts have the same bytes when K is a multiple of blocksize.

    The object holds tensors and numbers only: it can be pickled (torch.load then needs
    weights_only=False), deep-copied and captured by torch.compile. It never takes part in autograd;
    a 4-bit weight is frozen.
    """

    __slots__ = (
        *_TENSORS,
        "shape",
        "blocksize",
        "nested_blocksize",
        "quant_type",
        "dtype",
        "row_blocks",
    )

    def __init__(
        self,
        qweight: torch.Tensor,
        absmax: torch.Tensor,
        codebook: torch.Tensor,
        *,
        shape: tuple[int, ...] | torch.Size,
        blocksize: int = 64,
        quant_type: str = "nf4",
        dtype: torch.dtype = torch.bfloat16,
        nested_absmax: torch.Tensor | None = None,
        nested_codebook: torch.Tensor | None = None,
        nested_offset: torch.Tensor | None = None,
        nested_blocksize: int = 256,
        row_blocks: bool = True,
    ) -> None:
        self.qweight = qweight
        self.absmax = absmax
        self.codebook = codebook
        self.nested_absmax = nested_absmax
        self.nested_codebook = nested_codebook
        self.nested_offset = nested_offset
        self.shape = tuple(shape)
        self.blocksize = blocksize
        self.nested_blocksize = nested_blocksize
        self.quant_type = quant_type
        self.dtype = dtype
        self.row_blocks = row_blocks

    @property
    def N(self) -> int:
        """Rows: the product of all dimensions but the last."""
        shape = self.shape
        return shape[0] if len(shape) == 2 else math.prod(shape[:-1])

    @property
    def K(self) -> int:
        """Columns: the last dimension."""
        return self.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.qweight.device

    @property
    def double_quant(self) -> bool:
        return self.nested_absmax is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, the codebooks included."""
        tensors = (getattr(self, name) for name in _TENSORS)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    @property
    def bits_per_param(self) -> float:
        """Stored bits over weights, without the two constant codebooks: 4.127 for blocksize 64,
        double-quantized.
        """
        tables = sum(
            t.numel() * t.element_size()
            for t in (self.codebook, self.nested_codebook)
            if t is not None
        )
        return 8.0 * (self.nbytes - tables) / max(1, math.prod(self.shape))

    def args(self) -> WeightArgs:
        """The weight arguments of every operation."""
        shape = self.shape
        return WeightArgs(
            self.qweight,
            self.absmax,
            self.codebook,
            self.nested_absmax,
            self.nested_codebook,
            self.nested_offset,
            shape[0] if len(shape) == 2 else self.N,
            shape[-1],
            self.blocksize,
            self.nested_blocksize,
            self.row_blocks,
        )

    def to(
        self, device=None, dtype: torch.dtype | None = None, *, non_blocking: bool = False
    ) -> QuantizedWeight:
        """Move to a device; `dtype` changes what `dequantize` returns, never the stored tensors.

        Args:
            device: target device, or None to stay.
            dtype: floating dtype, or None to keep.
            non_blocking: as in torch.Tensor.to.

        Returns:
            A new QuantizedWeight; tensors already there are shared.

        Raises:
            TypeError: dtype is not floating point, or device is no device.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if device is not None:
            device = torch.device(device)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
        moved = object.__new__(QuantizedWeight)
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, torch.Tensor) and device is not None:
                value = value.to(device, non_blocking=non_blocking)
            setattr(moved, name, value)
        if dtype is not None:
            moved.dtype = dtype
        return moved

    def cpu(self) -> QuantizedWeight:
        return self.to("cpu")

    def cuda(self, device: int | str | torch.device | None = None) -> QuantizedWeight:
        if isinstance(device, int):
            device = torch.device("cuda", device)
        return self.to("cuda" if device is None else device)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read the weight back; see `lowbit.dequantize`."""
        from .quantization import dequantize

        return dequantize(self, dtype)

    @classmethod
    def from_bnb(cls, weight: torch.Tensor, quant_state=None) -> QuantizedWeight:
        """Wrap a bitsandbytes Params4bit, or packed data and its QuantState, without a copy."""
        from .integrations.bitsandbytes import from_bnb

        return from_bnb(weight, quant_state)

    def to_bnb(self):
        """(packed data [bytes, 1], bitsandbytes QuantState) sharing this weight's storage."""
        from .integrations.bitsandbytes import to_bnb

        return to_bnb(self)

    def __getstate__(self) -> dict:
        return {name: getattr(self, name) for name in self.__slots__}

    def __setstate__(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def __repr__(self) -> str:
        nested = f", double-quantized by {self.nested_blocksize}" if self.double_quant else ""
        layout = "" if self.row_blocks else ", flat blocks"
        return (
            f"QuantizedWeight({list(self.shape)}, {self.quant_type}, "
            f"blocksize {self.blocksize}{nested}{layout}, "
            f"{self.bits_per_param:.3f} bits per weight, {self.dtype}, {self.device})"
        )
