"""Quantize and dequantize of the compiled CUDA backend against the card's copy bandwidth.

    python bench/bench_cuda_quantize.py [--layers q8b,gate8b,gate70b,odd] [--dtype bf16]
                                        [--seconds 0.4] [--json out.json]

Each case is checked first, then captured in a CUDA graph that runs over several sets of tensors,
far more than the L2 cache holds, so that every byte comes from and goes to memory; the replays are
interleaved with a large device-to-device copy. Bytes counted, and nothing else:

    quantize     weight read, packed codes written, scales written (with double quantization the
                 8-bit ones; the fp32 scales in between should stay in L2)
    dequantize   packed codes and scales read, weight written
    copy         bytes read and written; %peak of the other rows is their GB/s over its GB/s
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from common import (
    LAYERS,
    Layer,
    Row,
    geometric_mean,
    interleaved,
    print_header,
    short,
    write_json,
)

import lowbit
from lowbit import codebooks, reference
from lowbit.backends import cuda

# K is no multiple of 64: dequantize runs its vector kernel, quantize a warp per block.
ODD = Layer("odd", 14336, 4104)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BLOCKSIZE, NESTED_BLOCKSIZE = 64, 256
CHECKED_ROWS = 512
WORKING_SET_BYTES = 1 << 29  # tensors per graph; ten times the L2 of an H100
COPY_BYTES = 1 << 30


class Case:
    """One layer: its rotated weights and the operations on them."""

    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        self.layer, self.dtype = layer, dtype
        numel = layer.N * layer.K
        self.copies = max(2, math.ceil(WORKING_SET_BYTES / (numel * dtype.itemsize)))
        shape = (layer.N, layer.K)
        self.weights = [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(self.copies)]
        self.thresholds, self.order = (
            t.cuda() for t in codebooks.thresholds(lowbit.codebook("nf4"))
        )
        self.codebook = lowbit.codebook("nf4").cuda()
        self.nested_codebook = lowbit.nested_codebook().cuda()

    def quantize(self, weight: torch.Tensor, nested: bool):
        return cuda.quantize_4bit(
            weight, self.thresholds, self.order, self.nested_codebook if nested else None,
            BLOCKSIZE, NESTED_BLOCKSIZE, True,
        )  # fmt: skip

    def stored(self, weight: torch.Tensor, nested: bool) -> tuple:
        qweight, absmax, nested_absmax, offset = self.quantize(weight, nested)
        rest = (nested_absmax, self.nested_codebook, offset) if nested else (None, None, None)
        sizes = (self.layer.N, self.layer.K, BLOCKSIZE, NESTED_BLOCKSIZE, True)
        return (qweight, absmax, self.codebook, *rest, *sizes)

    def check(self) -> None:
        """The first rows of one weight, bit for bit."""
        rows, K = min(CHECKED_ROWS, self.layer.N), self.layer.K
        blocks = rows * -(-K // BLOCKSIZE)
        for nested in (False, True):
            stored = self.stored(self.weights[0], nested)
            head = self.weights[0][:rows].cpu()
            rule = (self.thresholds.cpu(), self.order.cpu())
            qweight, absmax = reference.quantize_4bit(head, *rule, BLOCKSIZE)
            assert torch.equal(stored[0][:rows].cpu(), qweight), "qweight"
            if nested:
                tables = [t.cpu() for t in stored[3:6]]
                absmax = reference.decode_absmax(stored[1].cpu(), *tables, NESTED_BLOCKSIZE)[
                    :blocks
                ]
            else:
                assert torch.equal(stored[1][:blocks].cpu(), absmax), "absmax"
            plain = (qweight, absmax, self.codebook.cpu(), None, None, None)
            expected = reference.dequantize_4bit(
                *plain, rows, K, BLOCKSIZE, NESTED_BLOCKSIZE, True, self.dtype
            )
            actual = cuda.dequantize_4bit(*stored, self.dtype)[:rows]
            assert torch.equal(actual.cpu(), expected), "dequantized weight"

    def bytes(self, nested: bool) -> float:
        """What either direction has to move."""
        N, K = self.layer.N, self.layer.K
        blocks = N * -(-K // BLOCKSIZE)
        scales = blocks + 4 * -(-blocks // NESTED_BLOCKSIZE) if nested else 4 * blocks
        return N * K * self.dtype.itemsize + N * -(-K // 2) + scales

    def contenders(self) -> dict[str, Callable[[], object]]:
        """Graph replays by name; each runs an operation once for every copy of the weight."""
        calls = {"copy": _copy()}
        for nested in (False, True):
            kind = "nested" if nested else "plain"
            stored = [self.stored(weight, nested) for weight in self.weights]
            calls[f"quantize_4bit {kind}"] = _graph(
                lambda weight, nested=nested: self.quantize(weight, nested), self.weights
            )
            calls[f"dequantize_4bit {kind}"] = _graph(
                lambda weight: cuda.dequantize_4bit(*weight, self.dtype), stored
            )
        return calls


def _copy() -> Callable[[], object]:
    source, target = (torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    return lambda: target.copy_(source)


def _graph(call: Callable, inputs: list) -> Callable[[], object]:
    """A replay of `call` on each input in turn; every output has memory of its own.

    The graph holds addresses, not tensors: the function returned keeps inputs and outputs alive.
    """
    call(inputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call(item) for item in inputs]

    def replay():
        graph.replay()
        return inputs, outputs

    return replay


def run(layer: Layer, dtype: torch.dtype, seconds: float) -> list[Row]:
    case = Case(layer, dtype)
    case.check()
    times = interleaved(case.contenders(), seconds=seconds, device="cuda")
    peak = 2 * COPY_BYTES / times["copy"][0] / 1e3
    rows = []
    for name, samples in times.items():
        operation, _, impl = name.partition(" ")
        calls, moved = (1, 2 * COPY_BYTES)
        if impl:
            calls, moved = case.copies, case.bytes(impl == "nested")
        us, p20, p80 = (value / calls for value in samples)
        percent = 100 * moved / us / 1e3 / peak
        size = (0, layer.N, layer.K, 0, short(dtype))
        rows.append(Row(operation, *size, impl, us, p20, p80, bytes=moved, percent_peak=percent))
        print(rows[-1].line(), flush=True)
    return rows


def main() -> None:
    layers = {**LAYERS, ODD.name: ODD}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", default="q8b,gate8b,gate70b,odd", help=", ".join(layers))
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--seconds", type=float, default=0.4, help="timed per contender and layer")
    parser.add_argument("--json", help="write a record for bench/results/")
    options = parser.parse_args()
    print_header(
        "quantize and dequantize, compiled CUDA backend; %peak of the copy in the same run"
    )
    rows = []
    for name in options.layers.split(","):
        rows += run(layers[name], DTYPES[options.dtype], options.seconds)
        torch.cuda.empty_cache()
    fractions = [row.percent_peak for row in rows if row.op != "copy"]
    print(f"geometric mean: {geometric_mean(fractions):.1f} % of the copy bandwidth")
    if options.json:
        write_json(options.json, "cuda_quantize", rows)


if __name__ == "__main__":
    main()
