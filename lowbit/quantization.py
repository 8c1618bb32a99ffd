"""Public quantize, dequantize, pack and unpack."""

from __future__ import annotations

import torch

from . import codebooks, ops, reference  # noqa: F401  (ops registers torch.ops.lowbit)
from .weight import QuantizedWeight

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def quantize(
    weight: torch.Tensor,
    *,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    nested_blocksize: int = 256,
    double_quant_type: str = "dynamic",
    layout: str = "rows",
    codebook: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Quantize a weight to 4 bits, blockwise.

    Each block of `blocksize` elements is divided by its absolute maximum and every element is
    replaced by the nearest of 16 values; with `double_quant` the maxima are stored in 8 bits too.

    Args:
        weight: [..., K] fp32, fp16 or bf16 on any device; K is the reduction dimension of a linear
            layer.
        quant_type: "nf4", "fp4", "nf3" or "nf2"; ignored when `codebook` is given.
        blocksize: 32, 64, ... 4096 elements.
        double_quant: store absmax in 8 bits: 4.127 instead of 4.5 bits per weight at blocksize 64.
        nested_blocksize: blocks per nested scale, a power of two from 32 to 4096.
        double_quant_type: "dynamic" (bitsandbytes) or "fp8" (e4m3, as the paper words it).
        layout: "rows" restarts blocks and bytes with every row; "flat" runs over the flattened
            weight as bitsandbytes does. They are the same bytes when K is a multiple of blocksize.
        codebook: your own 16 values, fp32 [16] in [-1, 1], containing 0; any order.

    Returns:
        QuantizedWeight on the weight's device.

    Raises:
        TypeError: weight is not a dense floating tensor of a supported dtype, or codebook no
            tensor.
        ValueError: an option is out of range, or the weight has NaN or Inf (the message says how
            many and where).

    Notes:
        Bit-identical on every backend, and to bitsandbytes for fp16 and bf16 weights. With double
        quantization the offset is a mean over all blocks whose last bits depend on the device's
        order of summation.

    Source: QLoRA (Dettmers et al. 2023), sections 3 and appendix E.

    Example:
        >>> w = torch.randn(128, 256)
        >>> q = lowbit.quantize(w)
        >>> (q.dequantize() - w).abs().max() < 0.2 * w.abs().max()
        tensor(True)
    """
    _check_quantize(weight, blocksize, nested_blocksize, layout)
    table, quant_type = _choose_codebook(codebook, quant_type)
    device = weight.device
    bounds, order = (t.to(device) for t in codebooks.thresholds(table, quant_type))
    nested = codebooks.nested_codebook(double_quant_type).to(device) if double_quant else None
    # Where the two layouts coincide there is one name for them.
    rows = layout == "rows" or weight.shape[-1] % blocksize == 0
    matrix = weight.detach().reshape(-1, weight.shape[-1]).contiguous()
    qweight, absmax, nested_absmax, nested_offset = torch.ops.lowbit.quantize_4bit(
        matrix, bounds, order, nested, blocksize, nested_blocksize, rows
    )
    _require_finite(weight, nested_offset if double_quant else absmax)
    return QuantizedWeight(
        qweight,
        absmax,
        table.to(device),
        shape=weight.shape,
        blocksize=blocksize,
        quant_type=quant_type,
        dtype=weight.dtype,
        nested_absmax=nested_absmax if double_quant else None,
        nested_codebook=nested,
        nested_offset=nested_offset if double_quant else None,
        nested_blocksize=nested_blocksize,
        row_blocks=rows,
    )


def _check_quantize(weight, blocksize, nested_blocksize, layout) -> None:
    check_floating(weight, "weight")
    if weight.dim() == 0 or weight.numel() == 0:
        raise ValueError(f"weight must be [..., K] and not empty, got {list(weight.shape)}")
    if weight.layout != torch.strided:
        raise TypeError(f"weight must be a dense tensor, got {weight.layout}")
    check_blocksize(blocksize, "blocksize")
    check_blocksize(nested_blocksize, "nested_blocksize")
    if layout not in ("rows", "flat"):
        raise ValueError(f'layout must be "rows" or "flat", got {layout!r}')


def check_floating(weight, name: str) -> None:
    if not isinstance(weight, torch.Tensor) or weight.dtype not in _FLOATS:
        got = weight.dtype if isinstance(weight, torch.Tensor) else type(weight).__name__
        cure = "; cast it" if got == torch.float64 else ""
        raise TypeError(f"{name} must be a float32, float16 or bfloat16 tensor, got {got}{cure}")


def check_blocksize(value, name: str) -> None:
    if not isinstance(value, int) or value not in BLOCKSIZES:
        raise ValueError(f"{name} must be one of {BLOCKSIZES}, got {value!r}")


def _choose_codebook(codebook, quant_type) -> tuple[torch.Tensor, str]:
    if codebook is None:
        return codebooks.codebook(quant_type), quant_type
    if not isinstance(codebook, torch.Tensor):
        raise TypeError(f"codebook must be a tensor [16], got {type(codebook).__name__}")
    table = codebook.detach().float().cpu()
    if table.shape != (16,):
        raise ValueError(
            f"codebook must be a tensor [16], got {list(codebook.shape)}; "
            "repeat a value to fill it up"
        )
    if not (table.isfinite().all() and (table.abs() <= 1).all() and (table == 0).any()):
        raise ValueError(f"codebook must hold values in [-1, 1] and a 0, got {table.tolist()}")
    return table, "custom"


def _require_finite(weight: torch.Tensor, witness: torch.Tensor) -> None:
    """NaN and Inf reach the scales, so a look at the (much smaller) scales decides."""
    if weight.is_meta or torch.isfinite(witness).all():
        return
    bad = ~torch.isfinite(weight)
    count = int(bad.sum())
    if count == 0:  # finite weights whose absmax sum overflowed fp32
        raise ValueError(
            "weight is too large to double-quantize: the mean of its absmax overflows; rescale it"
        )
    first = tuple(int(i) for i in bad.nonzero()[0])
    raise ValueError(
        f"weight has {count} NaN or Inf value{'s' if count > 1 else ''} of {weight.numel()}, "
        f"the first at {first}; "
        "repair it before quantizing"
    )


def dequantize(qw: QuantizedWeight, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Read a quantized weight back: RN(codebook[q] * absmax), one fp32 product and one rounding.

    Args:
        qw: QuantizedWeight.
        dtype: fp32, fp16 or bf16; default the dtype that was quantized.

    Returns:
        Tensor of qw.shape on qw.device, without gradient.

    Raises:
        TypeError: qw is no QuantizedWeight, or dtype is not supported.

    Notes:
        Bit-identical on every backend and to bitsandbytes.

    Source: QLoRA (Dettmers et al. 2023), equation 6.

    Example:
        >>> lowbit.dequantize(lowbit.quantize(torch.ones(2, 64)), torch.bfloat16).dtype
        torch.bfloat16
    """
    if not isinstance(qw, QuantizedWeight):
        raise TypeError(
            f"qw must be a QuantizedWeight, got {type(qw).__name__}; make one with lowbit.quantize"
        )
    dtype = qw.dtype if dtype is None else dtype
    if dtype not in _FLOATS:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    return torch.ops.lowbit.dequantize_4bit(*qw.args(), dtype).view(qw.shape)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Pack 4-bit codes two per byte, the first of a pair in the high nibble.

    Args:
        codes: integer tensor [..., n] with values 0 to 15.

    Returns:
        uint8 [..., ceil(n/2)]; odd n leaves the last low nibble 0.

    Raises:
        TypeError: codes is not an integer tensor.
        ValueError: codes is a scalar, or a code is outside 0..15.

    Example:
        >>> lowbit.pack(torch.tensor([1, 15])).tolist()
        [31]
    """
    if not isinstance(codes, torch.Tensor):
        raise TypeError(f"codes must be an integer tensor, got {type(codes).__name__}")
    if codes.is_floating_point() or codes.is_complex():
        raise TypeError(f"codes must be an integer tensor, got {codes.dtype}; quantize first")
    if codes.dim() == 0:
        raise ValueError("codes must be [..., n], got a scalar")
    if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) <= 15):
        raise ValueError(f"codes must lie in 0..15, got {int(codes.min())}..{int(codes.max())}")
    return reference.pack(codes)


def unpack(packed: torch.Tensor, n: int | None = None) -> torch.Tensor:
    """Separate the nibbles of packed bytes.

    Args:
        packed: uint8 [..., b].
        n: codes to return per row, at most 2b; default 2b.

    Returns:
        uint8 [..., n] with values 0 to 15.

    Raises:
        TypeError: packed is not a uint8 tensor, or n no integer.
        ValueError: packed is a scalar, or n is larger than 2b.

    Example:
        >>> lowbit.unpack(torch.tensor([0x1F], dtype=torch.uint8)).tolist()
        [1, 15]
    """
    if isinstance(packed, QuantizedWeight):
        raise TypeError("packed must be a uint8 tensor, got a QuantizedWeight; pass its .qweight")
    if not isinstance(packed, torch.Tensor) or packed.dtype != torch.uint8:
        got = packed.dtype if isinstance(packed, torch.Tensor) else type(packed).__name__
        raise TypeError(f"packed must be a uint8 tensor, got {got}")
    if packed.dim() == 0:
        raise ValueError("packed must be [..., b], got a scalar")
    if n is not None and not isinstance(n, int):
        raise TypeError(f"n must be an integer, got {type(n).__name__}")
    if n is not None and not 0 <= n <= 2 * packed.shape[-1]:
        raise ValueError(f"n must be between 0 and {2 * packed.shape[-1]}, got {n}")
    return reference.unpack(packed, n)
