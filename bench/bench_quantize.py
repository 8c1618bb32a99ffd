"""Quantize, dequantize and dropout against bitsandbytes, torch and a plain copy.

    python bench/bench_quantize.py                     CPU, and CUDA where there is a card
    python bench/bench_quantize.py --device cpu --all-isa --layer q8b gate8b --json out.json

Rows: `quantize` and `dequantize` call the public functions (NF4, double quantization unless
--plain), so Python and the search for NaN are in the time. `copy` writes the weight to memory that
is already there: the floor of moving it. `clone` does so into fresh memory, as any function that
returns a new tensor must.

GB/s counts the bytes the mathematics needs: a quantized weight is N * K / 2 bytes of codes and its
scales; quantize reads the weight and writes that, dequantize the reverse, dropout, copy and clone
read and write the tensor once. %peak is this rate over that of `copy` in the same run. `vs dense`
is the time of `clone` over the time of the row: above 1 is faster than duplicating the weight.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from common import LAYERS, Row, geometric_mean, interleaved, print_header, short, write_json

import lowbit
from lowbit import dispatch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHECKED_ROWS = 256  # the check against the reference takes this many rows of the weight
ROTATED_BYTES = 256 << 20  # on CUDA: distinct inputs of this size together, beyond any L2
DROPOUT_P = 0.1


@dataclass(frozen=True)
class Contender:
    """A backend of lowbit, on a CPU at one instruction-set level (None: the highest)."""

    backend: str
    isa: str | None = None

    @property
    def name(self) -> str:
        return f"lowbit-{self.isa or self.backend}"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        before = torch.ops.lowbit_cpu.isa() if self.isa else None
        with dispatch.force(self.backend):
            if self.isa:
                torch.ops.lowbit_cpu.set_isa(self.isa)
            try:
                yield
            finally:
                if self.isa:
                    torch.ops.lowbit_cpu.set_isa(before)

    def wrap(self, call: Callable[[], object]) -> Callable[[], object]:
        def run():
            with self.active():
                return call()

        return run


def contenders(device: str, all_isa: bool) -> list[Contender]:
    backends = [b for b in ("cuda", "triton", "cpu") if (b == "cpu") == (device == "cpu")]
    present = [Contender(b) for b in backends if dispatch.unavailable(b) is None]
    if device == "cpu" and present:
        levels = ["generic", "avx2", "avx512"]
        highest = torch.ops.lowbit_cpu.isa()
        best = levels.index(highest) if highest in levels else len(levels) - 1
        names = levels[: best + 1] if all_isa else levels[best : best + 1]
        present = [Contender("cpu", name) for name in names]
    return present


def check(weight: torch.Tensor, options: dict, contender: Contender) -> None:
    """Bit equality with lowbit/reference.py; the offset of a GPU's mean only nearly."""
    slab = weight[:CHECKED_ROWS]
    with dispatch.force("reference"):
        expected = lowbit.quantize(slab.cpu(), **options)
    with contender.active():
        got = lowbit.quantize(slab, **options)
        back = lowbit.dequantize(got)
    assert torch.equal(got.qweight.cpu(), expected.qweight), f"{contender.name}: codes differ"
    if weight.device.type == "cpu" or not options["double_quant"]:
        assert torch.equal(got.absmax.cpu(), expected.absmax), f"{contender.name}: absmax differs"
    with dispatch.force("reference"):
        assert torch.equal(back.cpu(), lowbit.dequantize(got.cpu())), f"{contender.name}: W differs"


def check_dropout(x: torch.Tensor, seed: torch.Tensor, contender: Contender) -> None:
    slab = x[:CHECKED_ROWS]
    with contender.active():
        got = torch.ops.lowbit.dropout(slab, DROPOUT_P, seed)
    with dispatch.force("reference"):
        expected = torch.ops.lowbit.dropout(slab.cpu(), DROPOUT_P, seed.cpu())
    assert torch.equal(got.cpu(), expected), f"{contender.name}: dropout differs"


def rotating(call: Callable[[object], object], inputs: list) -> Callable[[], object]:
    turn = itertools.cycle(inputs)
    return lambda: call(next(turn))


def quantize_calls(weights, options, present) -> dict[str, Callable[[], object]]:
    calls = {
        c.name: c.wrap(rotating(lambda w: lowbit.quantize(w, **options), weights)) for c in present
    }
    bnb = _bitsandbytes()
    if bnb is not None:
        nested, blocksize = options["double_quant"], options["blocksize"]
        calls["bitsandbytes"] = rotating(
            lambda w: bnb.quantize_4bit(
                w, blocksize=blocksize, compress_statistics=nested, quant_type="nf4"
            ),
            weights,
        )
    return calls


def dequantize_calls(weights, options, present) -> dict[str, Callable[[], object]]:
    quantized = [lowbit.quantize(w, **options) for w in weights]
    calls = {c.name: c.wrap(rotating(lowbit.dequantize, quantized)) for c in present}
    bnb = _bitsandbytes()
    if bnb is not None:
        states = [
            bnb.quantize_4bit(
                w,
                blocksize=options["blocksize"],
                compress_statistics=options["double_quant"],
                quant_type="nf4",
            )
            for w in weights
        ]
        calls["bitsandbytes"] = rotating(lambda s: bnb.dequantize_4bit(*s), states)
    return calls


def dropout_calls(weights, present) -> dict[str, Callable[[], object]]:
    seed = torch.tensor([1], device=weights[0].device)
    drop = torch.ops.lowbit.dropout
    calls = {c.name: c.wrap(rotating(lambda w: drop(w, DROPOUT_P, seed), weights)) for c in present}
    calls["torch"] = rotating(lambda w: torch.nn.functional.dropout(w, DROPOUT_P), weights)
    return calls


def _bitsandbytes():
    try:
        import bitsandbytes.functional as functional
    except ImportError:
        return None
    return functional


def packed_bytes(N: int, K: int, options: dict) -> float:
    blocks = N * math.ceil(K / options["blocksize"])
    scales = blocks * (1 + 4 / 256) if options["double_quant"] else 4 * blocks
    return N * math.ceil(K / 2) + scales


def bench_case(N, K, dtype, device, options, args) -> list[Row]:
    torch.manual_seed(0)
    dense_bytes = N * K * dtype.itemsize
    copies = math.ceil(ROTATED_BYTES / dense_bytes) if device == "cuda" else 1
    weights = [(torch.randn(N, K, device=device) * 0.02).to(dtype) for _ in range(copies)]
    target = torch.empty_like(weights[0])
    present = contenders(device, args.all_isa)
    seed = torch.tensor([1], device=device)
    for contender in present:
        check(weights[0], options, contender)
        check_dropout(weights[0], seed, contender)

    small = packed_bytes(N, K, options)
    groups = {
        "quantize": (quantize_calls(weights, options, present), dense_bytes + small),
        "dequantize": (dequantize_calls(weights, options, present), dense_bytes + small),
        "dropout": (dropout_calls(weights, present), 2 * dense_bytes),
    }
    baselines = {
        "clone": rotating(torch.clone, weights),
        "copy": rotating(target.copy_, weights),
    }
    rows = []
    for op, (calls, moved) in groups.items():
        times = interleaved({**calls, **baselines}, seconds=args.seconds, device=device)
        copy_rate = 2 * dense_bytes / times["copy"][0]
        for impl, (us, p20, p80) in times.items():
            count = 2 * dense_bytes if impl in baselines else moved
            rows.append(
                Row(
                    op=f"{op} ({device})",
                    M=0,
                    N=N,
                    K=K,
                    r=0,
                    dtype=short(dtype),
                    impl=impl,
                    us=us,
                    p20=p20,
                    p80=p80,
                    bytes=count,
                    percent_peak=100 * count / us / copy_rate,
                    vs_dense=times["clone"][0] / us,
                )
            )
    return rows


def geometric_means(rows: list[Row]) -> None:
    """Speed of every implementation of lowbit over clone and over the peer, over all cases."""
    times = {((row.op, row.N, row.K, row.dtype), row.impl): row.us for row in rows}
    ours = [row for row in rows if row.impl.startswith("lowbit")]
    for op, impl in dict.fromkeys((row.op, row.impl) for row in ours):
        for peer in ("clone", "bitsandbytes", "torch"):
            ratios = [
                times[case, peer] / us
                for (case, name), us in times.items()
                if case[0] == op and name == impl and (case, peer) in times
            ]
            if ratios:
                mean = geometric_mean(ratios)
                print(f"geometric mean, {op:<18} {impl:<15} {mean:6.2f} x {peer}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["bf16"])
    parser.add_argument("--layer", nargs="+", choices=list(LAYERS), default=["q8b", "gate8b"])
    parser.add_argument("--N", type=int, help="out_features, instead of --layer")
    parser.add_argument("--K", type=int, help="in_features, instead of --layer")
    parser.add_argument("--blocksize", type=int, default=64)
    parser.add_argument("--plain", action="store_true", help="fp32 scales: no double quantization")
    parser.add_argument("--all-isa", action="store_true", help="every instruction set of this CPU")
    parser.add_argument("--seconds", type=float, default=4.0, help="time per group of contenders")
    parser.add_argument("--csv", help="write the rows to this file")
    parser.add_argument("--json", help="write rows and environment to this file")
    args = parser.parse_args()
    if (args.N is None) != (args.K is None):
        parser.error("--N and --K go together")
    return args


def main() -> None:
    args = parse_args()
    shapes = [(args.N, args.K)] if args.N else [(LAYERS[n].N, LAYERS[n].K) for n in args.layer]
    devices = ["cpu", "cuda"] if args.device == "auto" else [args.device]
    if args.device == "auto" and not torch.cuda.is_available():
        devices.remove("cuda")
    options = {"blocksize": args.blocksize, "double_quant": not args.plain}
    print_header("quantize, dequantize, dropout" + (" (plain scales)" if args.plain else ""))
    rows: list[Row] = []
    for device, dtype, (N, K) in itertools.product(devices, args.dtype, shapes):
        for row in bench_case(N, K, DTYPES[dtype], device, options, args):
            print(row.line(), flush=True)
            rows.append(row)
    geometric_means(rows)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, asdict(rows[0]).keys())
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    if args.json:
        write_json(args.json, "quantize", rows, options=options, devices=devices)


if __name__ == "__main__":
    main()
