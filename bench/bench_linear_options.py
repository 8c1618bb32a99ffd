"""What the options of an adapted 4-bit layer cost in its forward pass on a GPU.

    python bench/bench_linear_options.py --json bench/results/linear_options_h200.json

Beside the usual layer (rank 16, double-quantized, no bias) the same with a bias, with fp32 scales
and with rank 64, each checked against float64 and timed in turn, as CUDA graphs over rotated
weights. A bias and double quantization should cost nothing that can be measured, rank 64 at most
its multiply-adds and one more read of x.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from common import Row, print_header, short, write_json

from lowbit import lora_matmul, quantize
from lowbit.benchmarks import shapes, timing
from lowbit.benchmarks.checks import check, errors
from lowbit.benchmarks.implementations import (
    BLOCKSIZE,
    IMPLEMENTATIONS,
    SCALING,
    Prepared,
    Weights,
    clone,
    exact_rows,
)
from lowbit.benchmarks.linear import (
    copies_for,
    floor_us,
    needed_bytes,
    needed_flops,
    own_seconds,
    passes_for,
)

OP = "lora_linear options"
RANK, LARGE_RANK = 16, 64
DTYPE = torch.bfloat16
TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
SECONDS, ROUNDS = 0.6, 8  # of timed replays of a case, and at most


def variants(layer: shapes.Layer) -> dict[str, tuple[Weights, torch.Tensor | None]]:
    """The weights of each variant, and its bias."""
    copies = copies_for(layer.N * layer.K // 2, torch.cuda.get_device_properties().L2_cache_size)
    make = functools.partial(Weights, layer.N, layer.K, dtype=DTYPE, device="cuda", copies=copies)
    plain, fp32_scales = make(r=RANK), make(r=RANK)
    q = quantize(fp32_scales.original, blocksize=BLOCKSIZE, double_quant=False)
    fp32_scales.quantized = [q, *(clone(q) for _ in range(copies - 1))]
    bias = torch.randn(layer.N, device="cuda").to(DTYPE)
    return {
        "lowbit": (plain, None),
        "lowbit, bias": (plain, bias),
        "lowbit, fp32 scales": (fp32_scales, None),
        f"lowbit, rank {LARGE_RANK}": (make(r=LARGE_RANK), None),
    }


def checked(name: str, weights: Weights, bias: torch.Tensor | None, x: torch.Tensor) -> float:
    """The relative RMS error against float64, which is at most twice that of the plain formula."""

    def without_bias(x: torch.Tensor, i: int) -> torch.Tensor:
        y = _layer(weights, bias, x, i)
        return y if bias is None else y.float() - bias

    q = weights.quantized[0]
    prepared = Prepared(without_bias, functools.partial(exact_rows, q), q.nbytes)
    error, plain = errors(IMPLEMENTATIONS["lowbit"], prepared, weights, x)
    check(name, error, plain, f"M {x.shape[0]}")
    return error


def _layer(weights: Weights, bias, x: torch.Tensor, i: int) -> torch.Tensor:
    return lora_matmul(x, weights.quantized[i], weights.A[i], weights.B[i], SCALING, bias=bias)


@torch.no_grad()
def case(layer: shapes.Layer, contenders: dict, M: int, ceilings: timing.Ceilings) -> list[Row]:
    x = torch.randn(M, layer.K, dtype=DTYPE, device="cuda")
    rows, replays = {}, {}
    for name, (weights, bias) in contenders.items():
        error = checked(name, weights, bias, x)
        flops = needed_flops(M, layer.N, layer.K, weights.r)
        moved = needed_bytes(M, layer.N, layer.K, weights.r, weights.quantized[0].nbytes)
        floor = floor_us(moved, flops, ceilings)
        rows[name] = Row(
            OP, M, layer.N, layer.K, weights.r, short(DTYPE), name, math.nan, math.nan, math.nan,
            flops=flops, bytes=moved, layer=layer.name, floor_us=floor, error=error,
            timing="graph",
        )  # fmt: skip
        calls = [functools.partial(_layer, weights, bias, x, i) for i in range(weights.copies)]
        replays[name] = timing.capture(calls * passes_for(floor, weights.copies))
    own = max(own_seconds(row.bytes, row.flops, ceilings) for row in rows.values())
    measured = timing.time_replays(replays, seconds=SECONDS, rounds=ROUNDS, own_seconds=own)
    for name, times in measured.items():
        rows[name].us, rows[name].p20, rows[name].p80 = times
        print(rows[name].line(), flush=True)
    return list(rows.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shapes", type=shapes.parse_shapes, default="q8b,gate8b")
    parser.add_argument("--m", type=int, nargs="+", default=TOKENS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs an NVIDIA GPU")
    ceilings = timing.measure_ceilings(DTYPE)
    print_header("options of an adapted layer, forward", [str(ceilings)])
    rows: list[Row] = []
    for layer in options.shapes:
        contenders = variants(layer)
        for M in options.m:
            rows += case(layer, contenders, M, ceilings)
            torch.cuda.empty_cache()
        if options.json is not None:
            write_json(options.json, "linear_options", rows, ceilings=asdict(ceilings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
