"""Codebooks of 4-bit and 8-bit formats, and the decision thresholds that map values to codes.

A 4-bit code q stands for the value codebook[q]; a weight is codebook[q] * absmax of its block, so
all 4-bit codebooks live on [-1, 1]. Quantizing counts thresholds: rank = #{j : x > thresholds[j]},
code = order[rank]. Thresholds ascend and the comparison is strict, so a value exactly on a
threshold takes the lower rank. One rule serves every format, sorted or not, and any backend that
can compare floats reproduces it bit for bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch


def cached(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """functools.cache for tables, which must not depend on what was in force when the first caller
    came: they name their device and dtype, and what is made under a dispatch mode (FakeTensorMode),
    no ordinary tensor, is not kept. A compiler, which cannot ask for modes, keeps its own.
    """
    kept = functools.cache(make)

    @functools.wraps(make)
    def table(*args):
        watched = not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0
        return make(*args) if watched else kept(*args)

    return table


# QLoRA, appendix E: sixteen NormalFloat values; `normal_float(4)` derives them and a test shows
# equality.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# FP4 of bitsandbytes (1 sign, 2 exponent, 1 mantissa bit, with its own subnormal); the index is the
# bit pattern.
_FP4_MAGNITUDES = (0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
_FP4_BY_MAGNITUDE = (0, 1, 6, 7, 4, 5, 2, 3)
# Boundaries between neighbouring magnitudes as bitsandbytes' CUDA kernel spells them; two of them
# differ from the fp32 midpoints in the last digits.
_FP4_BOUNDARIES = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)

NAMES = ("nf4", "fp4", "nf3", "nf2")


def normal_float(bits: int) -> torch.Tensor:
    """Derive the NormalFloat codebook of `bits` bits from quantiles of the standard normal
    distribution.

    The 2^(bits-1) non-negative and 2^(bits-1) - 1 negative quantiles are spaced evenly in
    probability between 1/2 and the offset (1 - 1/2^(bits+1) + 1 - 1/(2^(bits+1) - 2)) / 2 and
    scaled so that the largest is 1; zero is exact.

    Args:
        bits: 2 to 8.

    Returns:
        fp32 tensor [2^bits], ascending, from -1 to 1.

    Raises:
        ValueError: bits is no integer or out of range.

    Source: QLoRA (Dettmers et al. 2023), section 3 and appendix E.

    Example:
        >>> lowbit.normal_float(2)
        tensor([-1.0000,  0.0000,  0.4358,  1.0000])
    """
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits must be between 2 and 8, got {bits!r}")
    from scipy.special import ndtri

    levels = 2**bits
    # Seven decimals and single precision, as the published NF4 constants were made; exact
    # arithmetic would move them by up to 8 ulp.
    offset = round((1 - 1 / (2 * levels) + 1 - 1 / (2 * levels - 2)) / 2, 7)

    def quantiles(count: int):
        steps = torch.linspace(offset, 0.5, count + 1, dtype=torch.float32, device="cpu")
        return ndtri(steps[:-1].numpy())

    positive, negative = quantiles(levels // 2), -quantiles(levels // 2 - 1)
    halves = [torch.from_numpy(half).double() for half in (positive, negative)]
    zero = torch.zeros(1, dtype=torch.float64, device="cpu")
    values = torch.cat([*halves, zero]).sort().values
    return (values / values.max()).float()


@cached
def _table(name: str) -> torch.Tensor:
    if name == "nf4":
        return torch.tensor(_NF4, dtype=torch.float32, device="cpu")
    if name == "fp4":
        magnitudes = torch.tensor(_FP4_MAGNITUDES, dtype=torch.float32, device="cpu")
        return torch.cat([magnitudes, -magnitudes])
    if name in ("nf3", "nf2"):
        values = normal_float(int(name[2]))
        return torch.cat([values, values[-1:].expand(16 - values.numel())])
    raise ValueError(
        f"quant_type must be one of {', '.join(NAMES)}, got {name!r}; "
        "pass codebook= for a table of your own"
    )


def codebook(name: str) -> torch.Tensor:
    """Return the 16 values of a 4-bit format.

    NF3 and NF2 have 8 and 4 values; the table repeats the last one up to 16 entries and their codes
    are stored one per nibble, so they save no memory over NF4. They are there to study the formats.

    Args:
        name: "nf4", "fp4", "nf3" or "nf2".

    Returns:
        fp32 tensor [16]; entry q is the value of code q. FP4 is indexed by its bit pattern, so it
        is not sorted.

    Raises:
        ValueError: unknown name.

    Source: QLoRA (Dettmers et al. 2023), appendix E, for NF4.

    Example:
        >>> lowbit.codebook("nf4")[[0, 7, 15]]
        tensor([-1.,  0.,  1.])
    """
    return _table(name).clone()


def thresholds(
    values: torch.Tensor, quant_type: str = "custom"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the decision thresholds of a 16-entry codebook.

    Args:
        values: fp32 [16] codebook.
        quant_type: "fp4" selects bitsandbytes' FP4 boundaries (sign-symmetric); everything else
            uses fp32 midpoints.

    Returns:
        (thresholds fp32 [15] ascending, order uint8 [16]): code = order[#{j : x > thresholds[j]}].
    """
    if quant_type == "fp4":
        return _fp4_thresholds()
    ascending, order = torch.sort(values.float().cpu(), stable=True)
    # A repeated value keeps the code of its first appearance, so that padding is never produced.
    first = torch.searchsorted(ascending, ascending, right=False)
    return (ascending[:-1] + ascending[1:]) * 0.5, order[first].to(torch.uint8)


@cached
def _fp4_thresholds() -> tuple[torch.Tensor, torch.Tensor]:
    boundaries = torch.tensor(_FP4_BOUNDARIES, dtype=torch.float32, device="cpu")
    below = torch.tensor(-math.inf, dtype=torch.float32, device="cpu")
    # |x| > t and x < 0 must be `not x >= -t`: step the mirrored boundary down one ulp to turn >
    # into >=.
    negative = torch.nextafter(-boundaries.flip(0), below)
    # x < 0 is -0 (code 8), x >= 0 is +0
    zero = torch.nextafter(torch.zeros(1, dtype=torch.float32, device="cpu"), below)
    order = [code + 8 for code in reversed(_FP4_BY_MAGNITUDE)] + list(_FP4_BY_MAGNITUDE)
    return torch.cat([negative, zero, boundaries]), torch.tensor(
        order, dtype=torch.uint8, device="cpu"
    )


@cached
def _dynamic_map() -> torch.Tensor:
    values = [0.0, 1.0]
    exponent_bits = 7
    for i in range(exponent_bits):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        means = (edges[:-1] + edges[1:]) / 2.0
        scale = 10.0 ** (i - exponent_bits + 1)
        values += (scale * means).tolist()
        values += (-scale * means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


@cached
def _fp8_map() -> torch.Tensor:
    every = torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).float()
    values = torch.unique(every[every.isfinite()])  # 253 values: both zeros are one
    # Three codes are left. Values above 1 keep the table strictly ascending and are never chosen.
    rest = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float32, device="cpu")
    return torch.cat([values / values.max(), rest])


def nested_codebook(name: str = "dynamic") -> torch.Tensor:
    """Return the 256 values of an 8-bit format for quantized absmax.

    Args:
        name: "dynamic" (bitsandbytes' signed dynamic map: a sign, a run of zeros that sets a power
            of ten, and linear fraction bits) or "fp8" (the finite float8 e4m3 values divided by
            448, as the QLoRA paper words it: 253 values, followed by 2, 3 and 4, which nothing is
            rounded to).

    Returns:
        fp32 tensor [256], ascending.

    Raises:
        ValueError: unknown name.

    Source: 8-bit Optimizers via Block-wise Quantization (Dettmers et al. 2022), section 2.1; QLoRA
        section 3.

    Example:
        >>> lowbit.nested_codebook("fp8")[[0, 252]]
        tensor([-1.,  1.])
    """
    if name == "dynamic":
        return _dynamic_map().clone()
    if name == "fp8":
        return _fp8_map().clone()
    raise ValueError(f'double_quant_type must be "dynamic" or "fp8", got {name!r}')


def nested_thresholds(values: torch.Tensor) -> torch.Tensor:
    """Return the 255 thresholds of an ascending 8-bit codebook: nearest value, ties to the even
    code.

    Args:
        values: fp32 [256], ascending.

    Returns:
        fp32 [255] ascending; code = #{j : x > thresholds[j]}.
    """
    middle = (values[:-1] + values[1:]) * 0.5
    below = torch.nextafter(middle, middle.new_tensor(-math.inf))
    odd = torch.arange(middle.numel(), device=values.device) % 2 == 1
    # Between an odd code and the next even one, equality goes up.
    return torch.where(odd, below, middle)
