"""What every benchmark shares: real layer shapes, interleaved timing, one row format, JSON records.

A benchmark checks its result before it times. All contenders of a case are timed in turn, round by
round, so that a clock change or a noisy neighbour meets all of them alike; a row shows the median
and the 20th and 80th percentile.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import lowbit


@dataclass(frozen=True)
class Layer:
    """A linear layer that exists: N = out_features, K = in_features."""

    name: str
    N: int
    K: int


LAYERS = {
    layer.name: layer
    for layer in (
        Layer("q8b", 4096, 4096),  # Llama 3 8B attention
        Layer("gate8b", 14336, 4096),  # Llama 3 8B MLP, wide
        Layer("down8b", 4096, 14336),  # Llama 3 8B MLP, deep
        Layer("gate70b", 28672, 8192),  # Llama 3 70B MLP
        Layer("q135m", 576, 576),  # SmolLM2 135M, the demo model
        Layer("gate135m", 1536, 576),
        Layer("down135m", 576, 1536),
    )
}


@dataclass
class Row:
    """One timed case. us, p20 and p80 are microseconds; bytes and flops are what the mathematics
    needs.
    """

    op: str
    M: int
    N: int
    K: int
    r: int
    dtype: str
    impl: str
    us: float
    p20: float
    p80: float
    flops: float = 0.0
    bytes: float = 0.0
    percent_peak: float | None = None
    vs_dense: float | None = None

    def line(self) -> str:
        tflops = self.flops / self.us / 1e6 if self.flops else None
        gbps = self.bytes / self.us / 1e3 if self.bytes else None
        cells = [f"{self.op:<22}", f"{self.M:>6}", f"{self.N:>6}", f"{self.K:>6}", f"{self.r:>3}"]
        cells += [f"{self.dtype:>5}", f"{self.impl:<14}"]
        cells += [f"{value:>10.1f}" for value in (self.us, self.p20, self.p80)]
        cells += [
            f"{value:>8.2f}" if value is not None else " " * 7 + "-" for value in (tflops, gbps)
        ]
        peak = f"{self.percent_peak:>5.0f}%" if self.percent_peak is not None else "     -"
        ratio = f"{self.vs_dense:>8.2f}" if self.vs_dense is not None else " " * 7 + "-"
        return " ".join([*cells, peak, ratio])


COLUMNS = (
    f"{'op':<22} {'M':>6} {'N':>6} {'K':>6} {'r':>3} {'dtype':>5} {'impl':<14} {'us':>10} "
    f"{'p20':>10} {'p80':>10} {'TFLOP/s':>8} {'GB/s':>8} {'%peak':>6} {'vs dense':>8}"
)


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def environment() -> dict:
    """Card, processor, versions, commit and date of this run."""
    cuda = torch.cuda.is_available()
    record = {
        "card": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "driver": _driver() if cuda else None,
        "cpu": _cpu_model(),
        "cpu_isa": torch.ops.lowbit_cpu.isa()
        if lowbit.dispatch.unavailable("cpu") is None
        else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "bitsandbytes": _version("bitsandbytes"),
        "lowbit": _version("lowbit"),
        "commit": os.environ.get("LOWBIT_COMMIT") or _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    return record


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[
            0
        ]
    except (OSError, subprocess.TimeoutExpired):
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), ""
    )


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        out = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True
        )
    except OSError:
        return None
    return out.stdout.strip() or None


def print_header(title: str) -> None:
    env = environment()
    print(f"# {title}")
    print("# " + ", ".join(f"{key} {value}" for key, value in env.items() if value is not None))
    print(COLUMNS, flush=True)


def interleaved(
    contenders: dict[str, Callable[[], object]],
    *,
    seconds: float = 0.6,
    rounds: int = 7,
    device: str = "cpu",
) -> dict[str, tuple[float, float, float]]:
    """Time callables in turn: {name: (median, p20, p80)} in microseconds per call.

    Each round runs every contender often enough to fill its share of `seconds`, at least once. On
    CUDA the calls of a round sit between two events; the caller rotates its inputs so that they do
    not stay in the cache.
    """
    clock = _cuda_seconds if device == "cuda" else _cpu_seconds
    repeats = {}
    for name, call in contenders.items():
        call()
        repeats[name] = max(1, int(seconds / rounds / max(clock(call, 1), 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            samples[name].append(clock(call, repeats[name]) / repeats[name] * 1e6)
    return {name: _percentiles(values) for name, values in samples.items()}


def _percentiles(values: list[float]) -> tuple[float, float, float]:
    ordered = sorted(values)
    last = len(ordered) - 1
    return statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]


def _cpu_seconds(call: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - start


def _cuda_seconds(call: Callable[[], object], times: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def write_json(path: str | Path, name: str, rows: list[Row], **extra) -> None:
    """Write a record for bench/results/."""
    record = {
        "benchmark": name,
        "environment": environment(),
        **extra,
        "rows": [asdict(row) for row in rows],
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(record, indent=1) + "\n")
