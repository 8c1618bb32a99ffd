"""Run the CUDA kernels under compute-sanitizer and record what it says for bench/results.

    python bench/record_sanitizers.py bench/results/sanitizers_h200.json

Each case runs once per tool (memcheck, racecheck with all its reports, synccheck), in a process of
its own, several at a time; only lowbit's kernels are instrumented. A case compares its results with
plain torch, so that clean means clean and right. The record holds what each tool reported and which
of the kernels in csrc/cuda the cases launched. The exit code is 1 if a tool reported anything, a
case failed, or a kernel was not launched.

    python bench/record_sanitizers.py --case large      one case alone, for a tool of your choice
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common import environment

import lowbit
from lowbit import dispatch

TOOLS = {
    "memcheck": [],
    "racecheck": ["--racecheck-report", "all"],
    "synccheck": [],
}
SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
LIMIT_S = 300  # for one case under one tool
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: .*")
CLEAN = re.compile(r"SUMMARY: 0 (?:errors|hazards displayed \(0 errors, 0 warnings\))$")
# Of the results against the same formulas in fp32; plain torch in 16 bits is off by 1 to 4e-3.
MOST_ERROR = 1e-2
BF16, FP16 = torch.bfloat16, torch.float16
PORTABLE = "nf4_lora_matmul_portable"  # which cards that have others do not choose


def _randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(shape, device="cuda") / shape[-1] ** 0.5).to(dtype)


def _check(results: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    for name, (actual, expected) in results.items():
        error = ((actual.float() - expected).norm() / expected.norm()).item()
        if not error <= MOST_ERROR:
            raise AssertionError(f"{name} is off by {error:.2g}, relative")


# ---- cases ---------------------------------------------------------------------------------------


def layer(
    M: int,
    N: int,
    K: int,
    r: int = 16,
    dtype: torch.dtype = BF16,
    *,
    masters: bool = False,
    double_quant: bool = True,
    vector: bool = False,
    kernel: str = "",
) -> None:
    """Forward and backward of an adapted layer with bias; all gradients. kernel: forward's."""
    q = lowbit.quantize(_randn(N, K, dtype=dtype), double_quant=double_quant)
    adapter = torch.float32 if masters else dtype
    x, dy, bias = _randn(M, K, dtype=dtype), _randn(M, N, dtype=dtype), _randn(N, dtype=dtype)
    A, B = _randn(r, K, dtype=adapter), _randn(N, r, dtype=adapter)
    s = torch.rand(r, device="cuda") + 0.5 if vector else torch.tensor(0.5, device="cuda")
    leaves = [x, A, B, bias, s] if vector else [x, A, B, bias]
    for leaf in leaves:
        leaf.requires_grad_()
    with dispatch.force(f"cuda:{kernel}") if kernel else contextlib.nullcontext():
        y = lowbit.lora_matmul(x, q, A, B, s if vector else 0.5, bias=bias)
    gradients = torch.autograd.grad(y, leaves, dy)
    with torch.no_grad():
        fx, fdy, fA, fB, W = (t.float() for t in (x, dy, A, B, lowbit.dequantize(q)))
        z, u = fx @ fA.T, fdy @ fB
        expected = (
            fdy @ W + u * s @ fA, (u * s).T @ fx, fdy.T @ (z * s), fdy.sum(0), (u * z).sum(0),
        )  # fmt: skip
        names = ("dx", "d_lora_A", "d_lora_B", "d_bias", "d_lora_scaling")
        pairs = zip(gradients, expected[: len(leaves)], strict=True)
        _check(
            {
                "y": (y, fx @ W.T + z * s @ fB.T + bias.float()),
                **dict(zip(names, pairs, strict=False)),
            }
        )


def product(M: int, N: int, K: int) -> None:
    """Forward of a layer without an adapter."""
    x, q = _randn(M, K, dtype=BF16), lowbit.quantize(_randn(N, K, dtype=BF16))
    with torch.no_grad():
        _check({"y": (lowbit.matmul(x, q), x.float() @ lowbit.dequantize(q).float().T)})


def members(M: int) -> None:
    """What q, k and v take from the library: y from a z that is there, and one dx for all three.

    Not lora_matmul_group itself: racecheck of CUDA 13.0 ends in an internal error on the product of
    torch that makes z of many tokens.
    """
    K, Ns, r = 512, (512, 144, 144), 16
    x, z = _randn(M, K, dtype=BF16), _randn(M, r, dtype=BF16)
    dx = torch.zeros_like(x)
    expected = torch.zeros(M, K, device="cuda")
    for N in Ns:
        q = lowbit.quantize(_randn(N, K, dtype=BF16))
        weight, W = tuple(q.args()), lowbit.dequantize(q).float()
        A, B, dy = (_randn(*s, dtype=BF16) for s in ((r, K), (N, r), (M, N)))
        args = (x, *weight, z, B, None, 0.5, None)
        y = dispatch.select("linear_low_rank", args)(*args)
        needs = True, True, True, False, False
        args = (dy, x, z, *weight, A, B, None, 0.5, 0.0, None, *needs)
        dispatch.select("lora_linear_backward", args)(*args, dx_sum=dx)
        _check({"y": (y, x.float() @ W.T + 0.5 * z.float() @ B.float().T)})
        expected += dy.float() @ (W + 0.5 * B.float() @ A.float())
    _check({"dx": (dx, expected)})


def quantization() -> None:
    """Whole and ragged rows, with and without double quantization, both ways."""
    for dtype in (BF16, FP16, torch.float32):
        for shape, options in (
            ((300, 1024), {}),
            ((300, 1024), {"double_quant": False, "blocksize": 128}),
            ((64, 1000), {}),
            ((30, 1001), {}),
            ((30, 1000), {"double_quant": False, "layout": "flat"}),
        ):
            w = _randn(*shape, dtype=dtype)
            q, host = lowbit.quantize(w, **options), lowbit.quantize(w.cpu(), **options)
            same = torch.equal(q.qweight.cpu(), host.qweight)
            back = lowbit.dequantize(q).cpu()
            if not (same and torch.equal(back, lowbit.dequantize(q.to("cpu")))):
                raise AssertionError(f"{shape}, {options}: other bits than on the CPU")


def optimizers() -> None:
    """Each optimizer against itself on the CPU, with clipping."""
    start = [torch.randn(700, 300), torch.randn(33)]
    gradients = [torch.randn_like(t) for t in start]
    for name in ("PagedAdamW", "PagedAdamW8bit", "AdamW8bit", "PagedLion", "PagedLion8bit"):
        results = []
        for device in ("cuda", "cpu"):
            parameters = [torch.nn.Parameter(t.to(device)) for t in start]
            optimizer = getattr(lowbit.optim, name)(parameters, lr=1e-2)
            for _ in range(2):
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient.to(device)
                lowbit.optim.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
            results.append([p.detach().cpu() for p in parameters])
        for i, (actual, expected) in enumerate(zip(*results, strict=True)):
            _check({f"{name}: parameter {i}": (actual, expected)})


CASES: dict[str, Callable[[], None]] = {
    "gemv": lambda: layer(1, 528, 4672),
    "gemv 64": lambda: layer(1, 272, 4672, 40, FP16, vector=True),
    "gemv, many rows": lambda: layer(1, 9216, 192, 24),
    "small": lambda: layer(8, 272, 1024, 8, FP16),
    "small 64": lambda: layer(64, 528, 704, 64, masters=True),
    "small 33": lambda: layer(33, 272, 1856, vector=True),
    "small 16": lambda: layer(16, 4096, 1024, 40),
    "mid": lambda: layer(300, 528, 704, double_quant=False),
    "mid split": lambda: layer(128, 1024, 2048),
    "mid shared": lambda: layer(1100, 272, 1024, 16, FP16, vector=True),
    "mid, all SMs": lambda: layer(3000, 1536, 512),
    "mid 64": lambda: layer(300, 528, 704, 64),
    "mid 64, in a row": lambda: layer(129, 5248, 1536, 64),
    "mid 64, wide groups": lambda: layer(300, 8064, 256, 64),
    "mid, no adapter": lambda: product(128, 1024, 2048),
    "mid, projection in passes": lambda: layer(1030, 4096, 2048),
    "dx, pairs share N": lambda: layer(100, 4112, 1088),
    "dx, four pairs": lambda: layer(90, 6144, 576, 8, FP16, masters=True),
    "dx with d_lora_A": lambda: layer(200, 1024, 2048, 5),
    "dx with d_lora_A 64": lambda: layer(200, 1024, 2048, 64),
    "dx, gradients by wgmma": lambda: layer(90, 1040, 2112, 40, masters=True),
    "large": lambda: layer(4096, 2048, 640, 64),
    "large padded": lambda: layer(4100, 640, 512, 5),
    "large with gradients": lambda: layer(4200, 640, 2048, masters=True),
    "many parts": lambda: layer(51200, 144, 64, 64),
    "portable": lambda: layer(8, 272, 1024, 8, FP16, kernel=PORTABLE),
    "portable 16": lambda: layer(16, 528, 704, double_quant=False, vector=True, kernel=PORTABLE),
    "portable 40": lambda: layer(40, 528, 704, 64, masters=True, kernel=PORTABLE),
    "members, one token": lambda: members(1),
    "members, few tokens": lambda: members(24),
    "members": lambda: members(200),
    "members, mid": lambda: members(1200),
    "members, large": lambda: members(4096),
    "quantization": quantization,
    "optimizers": optimizers,
}


# ---- running them --------------------------------------------------------------------------------


def run_case(name: str) -> set[str]:
    """Run a case; the names of the kernels it launched, of those in csrc/cuda."""
    from torch.profiler import ProfilerActivity, profile

    torch.manual_seed(0)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as trace:
        CASES[name]()
        torch.cuda.synchronize()
    names = " ".join(event.key for event in trace.key_averages())
    return {kernel for kernel in own_kernels() if re.search(rf"\b{kernel}\b", names)}


def own_kernels() -> set[str]:
    """The __global__ functions of csrc/cuda."""
    kernel = re.compile(r"__global__[^;{]*?\b(\w+_kernel)\(", re.DOTALL)
    text = "\n".join(p.read_text() for p in sorted(SOURCES.glob("*.cu*")))
    return set(kernel.findall(text))


def sanitize(tool: str, name: str) -> dict:
    """One case under one tool."""
    own = [sys.executable, __file__, "--case", name]
    options = ["--tool", tool, "--kernel-name", "kns=lowbit", *TOOLS[tool]]
    try:
        done = subprocess.run(
            [sanitizer(), *options, *own], capture_output=True, text=True, timeout=LIMIT_S
        )
        output, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired:
        output, code = f"stopped after {LIMIT_S} s", None
    found = SUMMARY.findall(output)
    summary = found[-1].strip() if found else "no summary"
    clean = code == 0 and bool(CLEAN.search(summary))
    row = {"case": name, "tool": tool, "clean": clean, "summary": summary}
    return row if clean else {**row, "exit_code": code, "output": output[:4000]}


def sanitizer() -> str:
    """The tool's path: from PATH, or where CUDA is usually installed."""
    found = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if found is None:
        raise SystemExit("compute-sanitizer was not found; it comes with the CUDA toolkit")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("record", nargs="?", type=Path, help="the JSON file to write")
    parser.add_argument("--case", choices=CASES, help="run one case in this process and stop")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs an NVIDIA GPU")
    if arguments.case:
        CASES[arguments.case]()
        torch.cuda.synchronize()
        return 0
    if arguments.record is None:
        parser.error("name the record to write, or a --case")
    sanitizer()  # before anything else takes time
    launched = set().union(*(run_case(name) for name in CASES))
    missing = sorted(own_kernels() - launched)
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        pairs = [(tool, name) for name in CASES for tool in TOOLS]
        rows = list(pool.map(lambda pair: sanitize(*pair), pairs))
    bad = [row for row in rows if not row["clean"]]
    record = {
        "benchmark": "sanitizers",
        "environment": environment(),
        "clean": len(rows) - len(bad),
        "not_clean": len(bad),
        "kernels": sorted(launched),
        "kernels_not_launched": missing,
        "rows": rows,
    }
    arguments.record.parent.mkdir(parents=True, exist_ok=True)
    arguments.record.write_text(json.dumps(record, indent=1) + "\n")
    for row in bad:
        print(f"{row['case']}, {row['tool']}: {row['summary']}\n{row['output']}")
    print(f"{len(rows) - len(bad)} of {len(rows)} runs clean; kernels not launched: {missing}")
    return int(bool(bad or missing))


if __name__ == "__main__":
    sys.exit(main())
