"""What every benchmark prints and writes: one row format, the environment, JSON records."""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .. import dispatch


@dataclass
class Row:
    """One timed case. us, p20 and p80 are microseconds; bytes and flops are what the mathematics
    needs.

    vs_dense is the time of the dense layer over that of the row: above 1 is faster. vs_floor is the
    time of the row over floor_us, the least the card could take: 1 is perfect.
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
    layer: str | None = None
    floor_us: float | None = None
    extra_bytes: int | None = None  # device memory at the peak of a call, its result not counted
    error: float | None = None  # relative RMS against float64
    # "graph", "eager", "host" for the time of the host, or "wall" for that of host and card. A
    # graph is "sustained" where it ran for a while before, the last two are "in a row" where calls
    # of the same contender did.
    timing: str | None = None
    in_turn_us: float | None = None  # of a sustained graph: with the others every few milliseconds
    kernel: str | None = None  # what lowbit's dispatch table chose

    @property
    def vs_floor(self) -> float | None:
        return self.us / self.floor_us if self.floor_us else None

    def line(self) -> str:
        tflops = self.flops / self.us / 1e6 if self.flops else None
        gbps = self.bytes / self.us / 1e3 if self.bytes else None
        extra = self.extra_bytes / 2**20 if self.extra_bytes is not None else None
        cells = [f"{self.op:<24}", f"{self.M:>6}", f"{self.N:>6}", f"{self.K:>6}", f"{self.r:>3}"]
        cells += [f"{self.dtype:>5}", f"{self.impl:<14}"]
        cells += [f"{value:>10.1f}" for value in (self.us, self.p20, self.p80)]
        cells += [_cell(value, 8, 2) for value in (tflops, gbps)]
        cells.append("     -" if self.percent_peak is None else f"{self.percent_peak:>5.0f}%")
        cells += [_cell(self.vs_dense, 8, 2), _cell(self.vs_floor, 8, 2), _cell(extra, 8, 1)]
        return " ".join(cells)


COLUMNS = (
    f"{'op':<24} {'M':>6} {'N':>6} {'K':>6} {'r':>3} {'dtype':>5} {'impl':<14} {'us':>10} "
    f"{'p20':>10} {'p80':>10} {'TFLOP/s':>8} {'GB/s':>8} {'%peak':>6} {'vs dense':>8} "
    f"{'x floor':>8} {'MiB':>8}"
)


def _cell(value: float | None, width: int, digits: int) -> str:
    return "-".rjust(width) if value is None else f"{value:>{width}.{digits}f}"


def short(dtype: torch.dtype) -> str:
    """fp32, fp16 or bf16."""
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean logarithm."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def environment() -> dict:
    """Card, processor, versions, commit and date of this run."""
    cuda = torch.cuda.is_available()
    record = {
        "card": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "driver": _driver() if cuda else None,
        "cpu": _cpu_model(),
        "cpu_isa": torch.ops.lowbit_cpu.isa() if dispatch.unavailable("cpu") is None else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "bitsandbytes": _version("bitsandbytes"),
        "lowbit": _version("lowbit"),
        "commit": os.environ.get("LOWBIT_COMMIT") or _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    return record


@functools.cache  # nvidia-smi takes a second
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
    """The commit of the checkout this file belongs to; an installed copy has none of its own."""
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / ".git").exists():
        return None
    try:
        out = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True
        )
    except OSError:
        return None
    return out.stdout.strip() or None


def print_header(title: str, notes: Iterable[str] = ()) -> None:
    """Print title, environment, notes and the names of the columns."""
    env = environment()
    print(f"# {title}")
    print("# " + ", ".join(f"{key} {value}" for key, value in env.items() if value is not None))
    for note in notes:
        print(f"# {note}")
    print(COLUMNS, flush=True)


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


def say(line: str) -> None:
    """Print at once, also into a pipe: measurements take minutes."""
    print(line, flush=True)
