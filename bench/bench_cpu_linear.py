"""The CPU products (csrc/cpu/linear.cpp, lora_linear.cpp) against dense layers and bitsandbytes.

    python bench/bench_cpu_linear.py --dtype fp32 bf16 --layer q8b --M 1 64 512
    python bench/bench_cpu_linear.py --threads 2 --all-isa --json bench/results/cpu_linear.json

    linear          y = x W^T, frozen: lowbit.matmul, F.linear, bitsandbytes.matmul_4bit
    lora_linear     with the low-rank branch, forward
    lora fwd+bwd    the same and the gradients of x, lora_A and lora_B through autograd

Weights are NF4, blocksize 64, double-quantized; adapters have the activation's dtype. `dense` is a
weight of the activation's dtype, with LoRA spelled as F.linear(x, W) + (x A^T * s) B^T; `dequant`
reads the weight back with lowbit.dequantize and goes on as `dense`. All of it is called as a user
calls it: Python and autograd are in the time.

TFLOP/s counts 2 M N K for each product with W and 2 M r (N + K) for each of the low-rank ones.
GB/s counts the weight once per product with it, in the form in which it is stored. `vs dense` is
the time of `dense` over that of the row: above 1 is faster.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.nn.functional as F
from common import LAYERS, Row, geometric_mean, interleaved, print_header, short, write_json

import lowbit
from lowbit import reference

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ISA_LEVELS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")
SCALING = 2.0
CHECKED_ROWS = 32  # of x; a row's result does not depend on the others


class Case:
    """One layer, its inputs, and every way to compute it."""

    def __init__(self, M: int, N: int, K: int, r: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.size = (M, N, K, r)
        self.w = (torch.randn(N, K) * 0.02).to(dtype)
        self.q = lowbit.quantize(self.w)
        self.x = torch.randn(M, K).to(dtype).requires_grad_()
        self.dy = torch.randn(M, N).to(dtype)
        self.A = (torch.randn(r, K) / K**0.5).to(dtype).requires_grad_()
        self.B = (torch.randn(N, r) * 0.02).to(dtype).requires_grad_()

    def lowbit(self, lora: bool) -> torch.Tensor:
        if not lora:
            return lowbit.matmul(self.x, self.q)
        return lowbit.lora_matmul(self.x, self.q, self.A, self.B, SCALING)

    def dense(self, lora: bool) -> torch.Tensor:
        return self._branch(F.linear(self.x, self.w), lora)

    def dequant(self, lora: bool) -> torch.Tensor:
        return self._branch(F.linear(self.x, self.q.dequantize()), lora)

    def bitsandbytes(self) -> Callable[[bool], torch.Tensor] | None:
        try:
            import bitsandbytes as bnb
        except ImportError:
            return None
        packed, state = bnb.functional.quantize_4bit(
            self.w, compress_statistics=True, quant_type="nf4"
        )
        return lambda lora: self._branch(bnb.matmul_4bit(self.x, packed.t(), state), lora)

    def _branch(self, y: torch.Tensor, lora: bool) -> torch.Tensor:
        return y + (self.x @ self.A.t() * SCALING) @ self.B.t() if lora else y

    def check(self) -> None:
        """Forward and gradients against float64, error at most 3x that of the dense formula."""
        rows = self.x.detach()[:CHECKED_ROWS]
        w64 = reference.dequantize_4bit(*self.q.args(), torch.float32).double()
        parts = (rows, self.dy[:CHECKED_ROWS], self.A.detach(), self.B.detach())
        exact = _gradients(*(t.double() for t in parts), lambda x: F.linear(x, w64))
        w = w64.to(rows.dtype)
        dense = _gradients(*parts, lambda x: F.linear(x, w))
        x, dy, A, B = (t.clone() for t in parts)
        leaves = [t.requires_grad_() for t in (x, A, B)]
        y = lowbit.lora_matmul(x, self.q, A, B, SCALING)
        ours = (y.detach(), *torch.autograd.grad(y, leaves, dy))
        step = torch.finfo(rows.dtype).eps
        names = ("y", "dx", "d_lora_A", "d_lora_B")
        for name, got, low, want in zip(names, ours, dense, exact, strict=True):
            error, allowed = _rms(got - want, want), 3 * _rms(low - want, want) + step
            assert error <= allowed, f"{name}: relative error {error:.3g}, allowed {allowed:.3g}"

    def train(self, forward: Callable[[bool], torch.Tensor]) -> None:
        torch.autograd.grad(forward(True), (self.x, self.A, self.B), self.dy)


def _gradients(x, dy, A, B, product) -> tuple[torch.Tensor, ...]:
    x, A, B = (t.clone().requires_grad_() for t in (x, A, B))
    y = product(x) + (x @ A.t() * SCALING) @ B.t()
    return (y.detach(), *torch.autograd.grad(y, (x, A, B), dy))


def _rms(error: torch.Tensor, scale: torch.Tensor) -> float:
    return float(error.double().square().mean().sqrt() / scale.double().square().mean().sqrt())


def levels(all_isa: bool) -> list[str]:
    highest = torch.ops.lowbit_cpu.isa()
    return list(ISA_LEVELS[: ISA_LEVELS.index(highest) + 1]) if all_isa else [highest]


def at_level(level: str, call: Callable[[], object]) -> Callable[[], object]:
    def run():
        torch.ops.lowbit_cpu.set_isa(level)
        return call()

    return run


def bench_case(case: Case, dtype: torch.dtype, args: argparse.Namespace) -> list[Row]:
    isas = levels(args.all_isa)
    forwards = {f"lowbit-{level}": (level, case.lowbit) for level in isas}
    forwards["dense"] = (isas[-1], case.dense)
    forwards["dequant"] = (isas[-1], case.dequant)
    bnb = case.bitsandbytes()
    if bnb is not None:
        forwards["bitsandbytes"] = (isas[-1], bnb)
    for level in isas:
        at_level(level, case.check)()

    @torch.no_grad()
    def infer(forward, lora):
        return forward(lora)

    groups = {
        "linear": lambda forward: infer(forward, False),
        "lora_linear": lambda forward: infer(forward, True),
        "lora fwd+bwd": case.train,
    }
    M, N, K, r = case.size
    rows = []
    for op, run in groups.items():
        products = 2 if op == "lora fwd+bwd" else 1
        thin = {"linear": 0, "lora_linear": 1, "lora fwd+bwd": 3}[op]
        flops = 2.0 * M * (products * N * K + thin * r * (N + K))
        calls = {
            name: at_level(level, lambda forward=forward, run=run: run(forward))
            for name, (level, forward) in forwards.items()
        }
        times = interleaved(calls, seconds=args.seconds, rounds=args.rounds)
        for impl, (us, p20, p80) in times.items():
            stored = case.q.nbytes if impl != "dense" else N * K * dtype.itemsize
            rows.append(
                Row(op, M, N, K, r, short(dtype), impl, us, p20, p80, flops, products * stored)
            )
            rows[-1].vs_dense = times["dense"][0] / us
            print(rows[-1].line(), flush=True)
    return rows


def geometric_means(rows: list[Row]) -> None:
    """Speed of every implementation over dense, over all cases of an operation."""
    for op, impl in dict.fromkeys((row.op, row.impl) for row in rows):
        mean = geometric_mean(row.vs_dense for row in rows if (row.op, row.impl) == (op, impl))
        print(f"geometric mean, {op:<14} {impl:<19} {mean:6.2f} x dense")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--layer", nargs="+", choices=list(LAYERS), default=["q8b", "gate135m"])
    parser.add_argument("--M", nargs="+", type=int, default=[1, 64, 512])
    parser.add_argument("--N", type=int, help="out_features, instead of --layer")
    parser.add_argument("--K", type=int, help="in_features, instead of --layer")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--threads", type=int, help="of torch; default as torch chooses")
    parser.add_argument("--all-isa", action="store_true", help="every instruction set of this CPU")
    parser.add_argument("--seconds", type=float, default=4.0, help="time per group of contenders")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds in that time")
    parser.add_argument("--csv", help="write the rows to this file")
    parser.add_argument("--json", help="write rows and environment to this file")
    args = parser.parse_args()
    if (args.N is None) != (args.K is None):
        parser.error("--N and --K go together")
    return args


def main() -> None:
    args = parse_args()
    if lowbit.dispatch.unavailable("cpu") is not None:
        raise SystemExit(f"no CPU library: {lowbit.dispatch.unavailable('cpu')}")
    if args.threads:
        torch.set_num_threads(args.threads)
    shapes = [(args.N, args.K)] if args.N else [(LAYERS[n].N, LAYERS[n].K) for n in args.layer]
    print_header("products with a 4-bit weight on the CPU, with and without LoRA")
    rows: list[Row] = []
    for dtype, (N, K), M in itertools.product(args.dtype, shapes, args.M):
        rows += bench_case(Case(M, N, K, args.r, DTYPES[dtype]), DTYPES[dtype], args)
    geometric_means(rows)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, asdict(rows[0]).keys())
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    if args.json:
        write_json(args.json, "cpu_linear", rows)


if __name__ == "__main__":
    main()
