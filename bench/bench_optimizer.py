"""One optimizer step on the LoRA parameters of a whole model, beside torch and bitsandbytes.

    python bench/bench_optimizer.py [--models 8b,65b] [--dtypes bf16,fp32] [--rounds 7]
                                    [--only TEXT] [--json out.json]

The parameters are lora_A [r, K] and lora_B [N, r] of every linear layer of Llama 8B (r = 16, 448
tensors, 41.9 M elements) and 65B (r = 64, 1120 tensors, 799.5 M), with random gradients. A row is
wall time from an idle card to an idle card. `evicted`: all state was moved to the host before the
step (cudaMemPrefetchAsync, not timed), as memory pressure would. No more memory is ever in use than
the card has. Each lowbit step is checked first: after three steps parameters equal torch's within a
rounding (fp32 state) or two units of 8-bit state.

`link` is the least time the state takes over the link: once in, at the rate measured in the same
run with a pinned copy. `GPU MiB` is what the state holds of the card after the step.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import environment, write_json

import lowbit.optim
from lowbit import memory

# (layers of the model, r, [(N, K) of a block's linear layers])
MODELS = {
    "8b": (
        32,
        16,
        [
            *((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)),  # q, k, v, o
            *((14336, 4096), (14336, 4096), (4096, 14336)),  # gate, up, down
        ],
    ),
    "65b": (80, 64, [(8192, 8192)] * 4 + [(22016, 8192), (22016, 8192), (8192, 22016)]),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
COLUMNS = (
    f"{'parameters':<12} {'optimizer':<36} {'ms':>9} {'p20':>9} {'p80':>9} {'link ms':>8} "
    f"{'GPU MiB':>8} {'host MiB':>8}"
)


@dataclass
class Row:
    parameters: str
    optimizer: str
    ms: float
    p20: float
    p80: float
    link_ms: float | None
    device_mib: float
    host_mib: float

    def line(self) -> str:
        link = "-" if self.link_ms is None else f"{self.link_ms:.1f}"
        return (
            f"{self.parameters:<12} {self.optimizer:<36} {self.ms:>9.2f} {self.p20:>9.2f} "
            f"{self.p80:>9.2f} {link:>8} {self.device_mib:>8.0f} {self.host_mib:>8.0f}"
        )


def lora_parameters(model: str, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    layers, r, shapes = MODELS[model]
    sizes = [size for _ in range(layers) for N, K in shapes for size in ((r, K), (N, r))]
    parameters = []
    for size in sizes:
        parameter = torch.nn.Parameter(0.02 * torch.randn(size, device="cuda", dtype=dtype))
        parameter.grad = 1e-3 * torch.randn(size, device="cuda", dtype=dtype)
        parameters.append(parameter)
    return parameters


def wall_ms(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


def time_steps(optimizer, rounds: int, before: Callable[[], object] | None) -> list[float]:
    optimizer.step()
    optimizer.step()
    samples = []
    for _ in range(rounds):
        if before is not None:
            before()
        samples.append(wall_ms(optimizer.step))
    return sorted(samples)


def link_gbps() -> float:
    """Pinned host memory to the device."""
    pinned = memory.empty((1 << 28,), torch.uint8, kind="pinned")
    target = torch.empty_like(pinned, device="cuda")
    stream = torch.cuda.current_stream()
    times = [wall_ms(lambda: memory.copy_async(target, pinned, stream)) for _ in range(5)]
    return pinned.nbytes / min(times) / 1e6


def contenders() -> dict[str, tuple[Callable, str | None]]:
    """name -> (constructor, how to move state out before a step)."""
    optim = lowbit.optim
    found: dict[str, tuple[Callable, str | None]] = {
        "torch AdamW fused": (lambda p: torch.optim.AdamW(p, fused=True), None),
        "torch AdamW foreach": (lambda p: torch.optim.AdamW(p, foreach=True), None),
        "lowbit PagedAdamW": (optim.PagedAdamW, None),
        "lowbit PagedAdamW evicted": (optim.PagedAdamW, "evict"),
        "lowbit PagedAdamW zero_copy": (
            lambda p: optim.PagedAdamW(p, policy="zero_copy"),
            None,
        ),
        "lowbit PagedAdamW pinned": (lambda p: optim.PagedAdamW(p, paging="pinned"), None),
        "lowbit AdamW8bit": (optim.AdamW8bit, None),
        "lowbit PagedAdamW8bit": (optim.PagedAdamW8bit, None),
        "lowbit PagedAdamW8bit evicted": (optim.PagedAdamW8bit, "evict"),
        "lowbit PagedAdamW8bit zero_copy": (
            lambda p: optim.PagedAdamW8bit(p, policy="zero_copy"),
            None,
        ),
        "lowbit PagedLion": (optim.PagedLion, None),
    }
    try:
        import bitsandbytes.optim as bnb
    except ImportError:
        return found
    for name in ("AdamW32bit", "PagedAdamW32bit", "AdamW8bit", "PagedAdamW8bit"):
        found[f"bitsandbytes {name}"] = (getattr(bnb, name), None)
        if name.startswith("Paged"):
            found[f"bitsandbytes {name} evicted"] = (getattr(bnb, name), "bitsandbytes")
    return found


def evictor(optimizer, how: str | None) -> Callable[[], object] | None:
    if how == "evict":
        return optimizer.evict
    if how == "bitsandbytes":
        return lambda: evict_bitsandbytes(optimizer)
    return None


def evict_bitsandbytes(optimizer) -> None:
    """Its paged tensors call themselves CPU tensors; their addresses are managed memory."""
    functions, stream = memory._functions(), torch.cuda.current_stream().cuda_stream
    for state in optimizer.state.values():
        for tensor in state.values():
            if getattr(tensor, "is_paged", False):
                error = functions.lowbit_prefetch(tensor.data_ptr(), tensor.nbytes, -1, stream)
                assert error == 0, "prefetch to the host"


def held_mib(optimizer) -> tuple[float, float]:
    """MiB of state on the device and on the host."""
    if isinstance(optimizer, lowbit.optim.base.PackedOptimizer):
        held = optimizer.state_bytes()
        return held["device"] / 2**20, held["host"] / 2**20
    tensors = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    unique = {t.data_ptr(): t for t in tensors if t.numel() > 1}.values()
    paged = sum(t.nbytes for t in unique if getattr(t, "is_paged", False))
    return (sum(t.nbytes for t in unique) - paged) / 2**20, paged / 2**20


def check(dtype: torch.dtype) -> None:
    """Three steps of each lowbit optimizer beside torch's, on a few tensors."""
    sizes = [(16, 4096), (1024, 16), (7, 33)]
    for cls, limit in ((lowbit.optim.PagedAdamW, 1e-6), (lowbit.optim.PagedAdamW8bit, 5e-4)):
        ours = [torch.nn.Parameter(torch.randn(s, device="cuda", dtype=dtype)) for s in sizes]
        theirs = [torch.nn.Parameter(p.detach().clone().float()) for p in ours]
        a, b = cls(ours, lr=1e-3), torch.optim.AdamW(theirs, lr=1e-3)
        for _ in range(3):
            for p, q in zip(ours, theirs, strict=True):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone().float()
            a.step()
            b.step()
        rounding = 0.0 if dtype == torch.float32 else 3 * 2.0**-8
        for p, q in zip(ours, theirs, strict=True):
            error = (p.float() - q).abs() - rounding * (q.abs() + 3e-3)  # 3e-3: the way it went
            assert error.max() < limit, f"{cls.__name__}: {error.max()}"


def run(model: str, dtype: str, rounds: int, only: str, gbps: float) -> list[Row]:
    parameters = lora_parameters(model, DTYPES[dtype])
    label, rows = f"{model} {dtype}", []
    count = sum(p.numel() for p in parameters)
    print(f"# {label}: {len(parameters)} tensors, {count / 1e6:.1f} M elements")
    for name, (make, how) in contenders().items():
        if only not in name:
            continue
        optimizer = make(parameters)
        samples = time_steps(optimizer, rounds, evictor(optimizer, how))
        device, host = held_mib(optimizer)
        link = None
        if how or host:
            link = (device + host) * 2**20 / gbps / 1e6
        last = len(samples) - 1
        p20, p80 = samples[round(0.2 * last)], samples[round(0.8 * last)]
        rows.append(Row(label, name, statistics.median(samples), p20, p80, link, device, host))
        print(rows[-1].line(), flush=True)
        del optimizer
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="8b,65b", help=", ".join(MODELS))
    parser.add_argument("--dtypes", default="bf16,fp32", help=", ".join(DTYPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="optimizers whose name holds this text")
    parser.add_argument("--json", help="write a record for bench/results/")
    options = parser.parse_args()
    gbps = link_gbps()
    print("# optimizer steps on LoRA parameters")
    print("# " + ", ".join(f"{k} {v}" for k, v in environment().items() if v is not None))
    print(f"# pinned copy to the device: {gbps:.1f} GB/s")
    print(COLUMNS)
    rows = []
    for model in options.models.split(","):
        for dtype in options.dtypes.split(","):
            check(DTYPES[dtype])
            rows += run(model, dtype, options.rounds, options.only, gbps)
            torch.cuda.empty_cache()
    if options.json:
        write_json(options.json, "optimizer", rows, link_gbps=gbps)


if __name__ == "__main__":
    main()
