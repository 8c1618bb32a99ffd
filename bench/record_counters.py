"""Read the card's counters with ncu, of lowbit's products and of cuBLAS's beside them.

    python bench/record_counters.py bench/results/counters_h200.json

One call of every case runs under ncu with cold caches at the card's own clocks, lowbit's layer
(rank 16, double-quantized) and the 16-bit layer without an adapter. The record holds, per kernel,
its time under the profiler and how busy the memory, the tensor pipes, the issue slots and the L1
with shared memory were, in percent of their peaks; times under the profiler are not those of the
benchmarks. Needs the right to read counters.
"""

from __future__ import annotations

import argparse
import csv
import functools
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import LAYERS, environment

from lowbit.benchmarks.implementations import IMPLEMENTATIONS, Weights

RANK, DTYPE = 16, torch.bfloat16
PERCENT = ".avg.pct_of_peak_sustained_elapsed"
METRICS = {  # name in the record: (ncu's, times what)
    "us": ("gpu__time_duration.sum", 1e-3),
    "cycles": ("sm__cycles_elapsed.max", 1),
    "tensor_percent": (f"sm__pipe_tensor_op_hmma_cycles_active{PERCENT}", 1),
    "issue_percent": (f"sm__issue_active{PERCENT}", 1),
    "dram_percent": (f"dram__throughput{PERCENT}", 1),
    "l2_percent": (f"lts__throughput{PERCENT}", 1),
    "l1_percent": (f"l1tex__throughput{PERCENT}", 1),
    "dram_read_bytes": ("dram__bytes_read.sum", 1),
    "dram_written_bytes": ("dram__bytes_write.sum", 1),
}
FORWARD = {"gate70b": (1, 8, 64, 256, 1024, 4096, 16384), "q8b": (1, 16, 64, 256, 1024, 4096)}
# Of 256 tokens, ncu 2025.3 cannot replay the adapter's gradients: a cooperative launch of clusters.
BACKWARD = {"q8b": (1024,), "gate8b": (4096,)}
CONTENDERS = ("dense", "lowbit")
RANGE = re.compile(r"case ([\w ]+) end")
LIMIT_S = 300


def run_cases() -> None:
    """Every case once, each call in a range of its own that ncu sees."""
    torch.autograd.set_multithreading_enabled(False)  # a range holds what its own thread launches
    for wanted, backward in ((FORWARD, False), (BACKWARD, True)):
        for name, tokens in wanted.items():
            weights = Weights(LAYERS[name].N, LAYERS[name].K, RANK, DTYPE, "cuda", 1)
            calls = {name: IMPLEMENTATIONS[name].build(weights).call for name in CONTENDERS}
            leaves = [weights.A[0], weights.B[0]]
            for M in tokens:
                x = torch.randn(M, LAYERS[name].K, dtype=DTYPE, device="cuda")
                for tensor in (x, *leaves):
                    tensor.requires_grad_(backward)
                for contender, call in calls.items():
                    call = functools.partial(call, x, 0)
                    _profiled(f"{name} {M} {contender}", call, [x, *leaves] if backward else None)


def _profiled(name: str, call: Callable[[], torch.Tensor], leaves: list | None) -> None:
    """Under the profiler one call, or the backward pass of one."""
    y = call()  # what happens only once happens here
    direction, what = "forward", call
    if leaves is not None:
        dy = torch.randn_like(y)
        direction = "backward"
        what = functools.partial(torch.autograd.grad, y, leaves, dy, allow_unused=True)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    torch.cuda.nvtx.range_push(f"case {name} {direction} end")
    what()
    torch.cuda.synchronize()
    torch.cuda.nvtx.range_pop()
    torch.cuda.cudart().cudaProfilerStop()


def profiler() -> str:
    """ncu's path: from PATH, or where CUDA is usually installed."""
    found = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if found is None:
        raise SystemExit("ncu was not found; it comes with the CUDA toolkit")
    return found


def read(table: str) -> list[dict]:
    """Rows of the record from ncu's raw page as CSV; its second line holds units."""
    lines = [line for line in table.splitlines() if line.startswith('"')]
    header, units, *kernels = csv.reader(io.StringIO("\n".join(lines)))
    at = {title: i for i, title in enumerate(header)}
    rows = []
    for values in kernels:
        case = RANGE.search(" ".join(values))
        if case is None:
            raise SystemExit(f"ncu named no case: {dict(zip(header, values, strict=False))}")
        layer, M, contender, direction = case[1].split()
        row = {"layer": layer, "M": int(M), "impl": contender, "pass": direction}
        kernel = values[at["Kernel Name"]]
        own = re.search(r"\w+_kernel\b", kernel)
        row["kernel"] = own[0] if own else kernel
        for name, (metric, factor) in METRICS.items():
            value = float(values[at[metric]].replace(",", ""))
            row[name] = round(value * factor * _base(units[at[metric]]), 2)
        rows.append(row)
    return rows


def _base(unit: str) -> float:
    """What a value must be multiplied with where ncu chose a larger unit than bytes or ns."""
    prefixes = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    times = {"us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6, "s": 1e9, "second": 1e9}
    return prefixes.get(unit[0], 1) if unit.endswith("byte") else times.get(unit, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("record", nargs="?", type=Path, help="the JSON file to write")
    parser.add_argument("--run", action="store_true", help="run the cases in this process and stop")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs an NVIDIA GPU")
    if arguments.run:
        run_cases()
        return 0
    if arguments.record is None:
        parser.error("name the record to write")
    metrics = ",".join(metric for metric, _ in METRICS.values())
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        options = ["--clock-control", "none", "--profile-from-start", "off", "--nvtx", "--csv"]
        options += ["--page", "raw", "--log-file", str(log), "--metrics", metrics]
        own = [sys.executable, __file__, "--run"]
        done = subprocess.run([profiler(), *options, *own], timeout=LIMIT_S)
        table = log.read_text() if log.exists() else ""
    if done.returncode:
        raise SystemExit(f"ncu ended with {done.returncode}:\n{table[-2000:]}")
    record = {"benchmark": "counters", "environment": environment(), "rows": read(table)}
    arguments.record.parent.mkdir(parents=True, exist_ok=True)
    arguments.record.write_text(json.dumps(record, indent=1) + "\n")
    for row in record["rows"]:
        print(*row.values())
    return 0


if __name__ == "__main__":
    sys.exit(main())
