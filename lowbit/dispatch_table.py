"""The table of lowbit/dispatch.py: which kernel serves what, and why.

Rows are read from the top. Figures beside them are from bench/results and bench/NOTES.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

BACKENDS = ("cuda", "triton", "cpu", "reference")
_QUANTIZE = ("quantize_4bit", "dequantize_4bit")
_FORWARD = ("linear", "lora_linear", "linear_low_rank")
_BACKWARD = ("linear_dx", "lora_linear_backward")
KERNEL_OPERATIONS = (*_FORWARD, *_BACKWARD)
_MATMUL = (*KERNEL_OPERATIONS, "dropout")
OPERATIONS = _QUANTIZE + _MATMUL
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_HALVES = (torch.float16, torch.bfloat16)


class Layer(NamedTuple):
    """What a kernel's choice may depend on besides M: the weight and the rank."""

    N: int = 0
    K: int = 0
    blocksize: int = 0  # 0: a dense weight
    row_blocks: bool = True
    r: int = 0  # 0: no adapter

    def whole_blocks(self) -> bool:
        """Whether tiles of 16 rows by 64 columns never meet an edge or half a block."""
        return (
            self.blocksize >= 64
            and self.K % max(self.blocksize, 64) == 0
            and self.N % 16 == 0
            and self.N * self.K < 1 << 37  # blocks are counted in 32 bits
            and self.r <= 64
        )

    def one_token(self) -> bool:
        """The same, and all of x and what a CTA keeps of its rows fit shared memory, on any whole
        card with these kernels (an H20 has 78 SMs).
        """
        fits = self.K <= 1 << 15 and self.N <= 1 << 19 and self.N * self.K < 1 << 31
        return self.whole_blocks() and fits

    def short_factor(self) -> bool:
        """The same, and where rows of lora_B must be padded (to 16 or 64), as its rank is no
        multiple of 8, the copy fits the workspace beside s z of 2^17 tokens.
        """
        padded = 16 if self.r <= 16 else 64
        return self.whole_blocks() and (self.r % 8 == 0 or self.N * padded <= 1 << 21)

    def whole_lines(self) -> bool:
        """Whether the kernels of the backward pass, which read W by columns, serve the layer."""
        return (
            self.blocksize >= 64
            and self.K % max(self.blocksize, 64) == 0
            and self.K <= 1 << 18  # a 16-bit copy of lora_A takes 32 MiB
            and self.N % 8 == 0
            and self.N <= 1 << 20
            and self.r <= 64
        )

    def narrow_lines(self) -> bool:
        """The same, and a 16-bit copy of lora_A fits the workspace beside the ring."""
        return self.whole_lines() and self.K <= 1 << 16


@dataclass(frozen=True)
class Row:
    """One line of the table: where it applies, what it chooses, and why."""

    operations: tuple[str, ...]
    device: str  # device type, or "*"
    backend: str
    reason: str
    kernel: str = ""  # of the backend's kernels for the operation, where it has several
    capability: tuple[int, int] = (0, 0)  # least
    newest: tuple[int, int] | None = None  # greatest capability, for one family's instructions
    dtypes: tuple[torch.dtype, ...] = _FLOATS
    tokens: tuple[int, int | None] = (1, None)  # least and greatest M
    serves: Callable[[Layer], bool] | None = None
    sms: int = 0  # least
    # Of M, the layer and the SMs: where another row that serves it, below, is faster. Not asked of
    # a row that is forced by name.
    suits: Callable[[int, Layer, int], bool] | None = None


def _fused(
    kernel: str,
    tokens: tuple[int, int | None],
    reason: str,
    serves: Callable[[Layer], bool] = Layer.whole_blocks,
    sms: int = 0,
    suits: Callable[[int, Layer, int], bool] | None = None,
) -> Row:
    return Row(
        _FORWARD, "cuda", "cuda", reason, kernel, (9, 0), (9, 0), _HALVES, tokens, serves, sms,
        suits,
    )  # fmt: skip


def _backward(
    kernel: str, least: int, serves: Callable[[Layer], bool], reason: str, sms: int = 0
) -> Row:
    return Row(
        _BACKWARD, "cuda", "cuda", reason, kernel, (9, 0), (9, 0), _HALVES, (least, 1 << 19),
        serves, sms,
    )  # fmt: skip


# The large kernels need nine clusters of two SMs at once. The least slices of an H100 have 16 SMs,
# the next ones 32.
_LARGE_SMS = 24


def full_waves(tokens: int, layer: Layer, sms: int) -> bool:
    """Whether the jobs of the large forward kernel, tiles of 256 x 256 and one of z for two tiles
    of tokens, fill its waves to 97 %.

    Where they do it was faster than mid in all of 10 cases, by 1 to 26 %, elsewhere slower or even
    in all of 9 (four layers, 2560 to 6144 tokens; H200, 2026-11-30). Narrower layers and more
    tokens go by tokens alone.
    """
    if layer.N < 4096 or tokens > 6144:
        return tokens >= 4096
    tiles, clusters = -(-tokens // 256), sms // 2
    jobs = tiles * -(-layer.N // 256) + -(-tiles // 2)
    return jobs >= 0.97 * clusters * -(-jobs // clusters)


# Of lora_linear_backward; linear_dx is the product in them.
BACKWARD_KERNELS = ("nf4_lora_backward", "nf4_lora_backward_large")

# Rates of the fused rows: 28672 x 8192, r 16, bf16, of the 4.25 TB/s and 671 TFLOP/s that the same
# H200 keeps up (bench/results/linear_h200.json, 2026-11-30; linear_h100.json has an H100). By ncu,
# cold, same layer, busy of the peak and in brackets cuBLAS with a 16-bit weight
# (counters_h200.json): gemv, M = 1: DRAM 71 % (80), issue slots 57; small, M = 8: DRAM 57 (80),
# issue slots 56; M = 64: L1 and shared memory 70, tensor pipes 45 (26), DRAM 37 (79); mid, M = 256:
# tensor pipes 68 (78), L1 78; M = 1024: 89 (94) and 75; large, M = 4096: tensor pipes 93 (96),
# M = 16384: 96 (98). Backward: tensor pipes 71 (83) at 4096 x 4096, M = 1024, 93 (95) at
# 14336 x 4096, M = 4096.
TABLE = (
    Row(_QUANTIZE, "cuda", "cuda", "one launch at copy bandwidth", capability=(8, 0)),
    _fused("nf4_lora_gemv", (1, 1), "one launch; 88 % of copy bandwidth", Layer.one_token, 78),
    _fused("nf4_lora_matmul_small", (1, 64), "equal shares of W; 70 % of copy bandwidth at 8"),
    # Beyond their last M, s z may not fit the workspace.
    _fused(
        "nf4_lora_matmul_large",
        (2304, 1 << 17),
        "W decoded once; 98 % of peak at 4096",
        Layer.short_factor,
        _LARGE_SMS,
        full_waves,
    ),
    _fused("nf4_lora_matmul_mid", (65, 1 << 16), "two CTAs share a decode; 97 % of peak at 1024"),
    # Up to 64 tokens, where an H200 has it 1.5 to 6.7 times as fast as panels; at 128 it is 1.2 to
    # 1.5 times. It is bound by issue slots and shared memory, panels by bandwidth, launches and
    # tensor cores, of which other cards have more or less beside their SMs: further on it is not
    # sure.
    Row(
        _FORWARD,
        "cuda",
        "cuda",
        "one pass over W in 4 bits; at 64 tokens twice as fast as panels",
        "nf4_lora_matmul_portable",
        (8, 0),
        dtypes=_HALVES,
        tokens=(1, 64),
        serves=Layer.whole_blocks,
    ),
    _backward(
        "nf4_lora_backward_large",
        2048,
        Layer.narrow_lines,
        "W decoded once; forward + backward 1.05 to 1.08 x dense at 4096",
        _LARGE_SMS,
    ),
    _backward(
        "nf4_lora_backward", 1, Layer.whole_lines, "one call; dx up to twice as fast as by panels"
    ),
    Row(_MATMUL, "cuda", "cuda", "dequantize by panels, cuBLAS", "panels", (8, 0)),
    Row(
        OPERATIONS,
        "cuda",
        "triton",
        "no compiled library for the card: Triton compiles on the spot",
        capability=(8, 0),
    ),
    Row(OPERATIONS, "cpu", "cpu", "vectorized C++, fused decode and low-rank update"),
    Row(
        OPERATIONS,
        "*",
        "reference",
        "plain torch runs everywhere",
        dtypes=(*_FLOATS, torch.float64),
    ),
)
