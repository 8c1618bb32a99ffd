"""One optimizer step on the LoRA parameters of a whole model, beside torch and bitsandbytes.

    python bench/bench_optimizer.py [--models 8b,65b] [--dtypes bf16,fp32] [--rounds 7]
                                    [--only TEXT] [--json out.json]

The parameters are lora_A [r, K] and lora_B [N, r] of every linear layer of Llama 8B (r = 16, 448
tensors, 41.9 M elements) and 65B (r = 64, 1120 tensors, 799.5 M), with random gradients. A row is
wall time from an idle card to an idle card. Where its state is:

    (nothing)        on the card, or where the library puts it
    evicted          all of it was moved to the host before the step (cudaMemPrefetchAsync, timed
                     apart: `evict ms`), as memory pressure would; there is room to come back
    under pressure   torch may use no more of the card than it does (its memory fraction): there is
                     no room, so the policy itself moves state out and then updates it over the link
    pinned           always on the host

No more memory is ever in use than the card has. Each lowbit step is checked first: after three
steps parameters equal torch's within a rounding (fp32 state) or two units of 8-bit state.

`link ms` is the least time the state takes over the link, at the rates of plain copies of pinned
memory in the same run: once in where it comes back to stay, else in and out at the same time.
`GPU MiB` is what the state holds of the card after the step. The record is written anew after every
row: a run that is cut short leaves what it measured.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

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
    f"{'parameters':<12} {'optimizer':<38} {'ms':>9} {'p20':>9} {'p80':>9} {'link ms':>8} "
    f"{'evict ms':>8} {'GPU MiB':>8} {'host MiB':>8}"
)


@dataclass
class Row:
    parameters: str
    optimizer: str
    ms: float
    p20: float
    p80: float
    link_ms: float | None
    evict_ms: float | None
    device_mib: float
    host_mib: float

    def line(self) -> str:
        link, evict = ("-" if t is None else f"{t:.1f}" for t in (self.link_ms, self.evict_ms))
        return (
            f"{self.parameters:<12} {self.optimizer:<38} {self.ms:>9.2f} {self.p20:>9.2f} "
            f"{self.p80:>9.2f} {link:>8} {evict:>8} {self.device_mib:>8.0f} {self.host_mib:>8.0f}"
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


@dataclass
class Link:
    """GB/s of pinned copies: to the device alone, and in each direction while both run."""

    to_device: float
    each_way: float

    def ms(self, nbytes: float, moves: str | None) -> float | None:
        """Least time for state that moves "in" or "both" ways."""
        rate = {"in": self.to_device, "both": self.each_way}.get(moves)
        return None if rate is None else nbytes / rate / 1e6


def measure_link() -> Link:
    first, second = (memory.empty((1 << 28,), torch.uint8, kind="pinned") for _ in range(2))
    target, source = (torch.empty_like(first, device="cuda") for _ in range(2))
    stream, other = torch.cuda.current_stream(), torch.cuda.Stream()

    def both() -> None:
        other.wait_stream(stream)
        memory.copy_async(target, first, stream)
        memory.copy_async(second, source, other)

    def gbps(call: Callable[[], object]) -> float:
        return first.nbytes / min(wall_ms(call) for _ in range(5)) / 1e6

    return Link(gbps(lambda: memory.copy_async(target, first, stream)), gbps(both))


# ---- who is measured -----------------------------------------------------------------------------


@dataclass
class Contender:
    make: Callable  # of the parameters
    before: Callable | None = None  # of the optimizer, ahead of every step, not timed
    moves: str | None = None  # of the state over the link in a step: "in", "both" or None
    pressed: bool = False  # no more of the card than is in use


def contenders() -> dict[str, Contender]:
    optim = lowbit.optim
    found = {
        "torch AdamW fused": Contender(lambda p: torch.optim.AdamW(p, fused=True)),
        "lowbit PagedAdamW": Contender(optim.PagedAdamW),
        "lowbit PagedAdamW pinned": Contender(
            lambda p: optim.PagedAdamW(p, paging="pinned"), moves="both"
        ),
        "lowbit AdamW8bit": Contender(optim.AdamW8bit),
        "lowbit PagedAdamW8bit": Contender(optim.PagedAdamW8bit),
        "lowbit PagedLion": Contender(optim.PagedLion),
    }
    for cls in (optim.PagedAdamW, optim.PagedAdamW8bit):
        name = f"lowbit {cls.__name__}"
        found |= {
            f"{name} evicted": Contender(cls, cls.evict, moves="in"),
            f"{name} under pressure": Contender(cls, moves="both", pressed=True),
        }
    try:
        import bitsandbytes.optim as bnb
    except ImportError:
        return found
    for name in ("AdamW32bit", "PagedAdamW32bit", "AdamW8bit", "PagedAdamW8bit"):
        found[f"bitsandbytes {name}"] = Contender(getattr(bnb, name))
        if name.startswith("Paged"):
            evicted = Contender(getattr(bnb, name), evict_bitsandbytes, moves="in")
            found[f"bitsandbytes {name} evicted"] = evicted
    return found


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


# ---- measurement ---------------------------------------------------------------------------------


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


def time_steps(contender: Contender, optimizer, rounds: int) -> tuple[list[float], list[float]]:
    """Sorted milliseconds of steps, and of what comes before them."""
    optimizer.step()
    optimizer.step()
    if contender.pressed:
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
        optimizer.step()
    samples, before = [], []
    try:
        for _ in range(rounds):
            if contender.before is not None:
                before.append(wall_ms(lambda: contender.before(optimizer)))
            samples.append(wall_ms(optimizer.step))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return sorted(samples), sorted(before)


def run(model: str, dtype: str, rounds: int, only: str, link: Link) -> Iterator[Row]:
    parameters = lora_parameters(model, DTYPES[dtype])
    label = f"{model} {dtype}"
    count = sum(p.numel() for p in parameters)
    print(f"# {label}: {len(parameters)} tensors, {count / 1e6:.1f} M elements")
    for name, contender in contenders().items():
        if only not in name:
            continue
        optimizer = contender.make(parameters)
        samples, before = time_steps(contender, optimizer, rounds)
        device, host = held_mib(optimizer)
        least = link.ms((device + host) * 2**20, contender.moves)
        last = len(samples) - 1
        p20, p80 = samples[round(0.2 * last)], samples[round(0.8 * last)]
        median, evict = statistics.median(samples), statistics.median(before) if before else None
        yield Row(label, name, median, p20, p80, least, evict, device, host)
        del optimizer
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="8b,65b", help=", ".join(MODELS))
    parser.add_argument("--dtypes", default="bf16,fp32", help=", ".join(DTYPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="optimizers whose name holds this text")
    parser.add_argument("--json", help="write a record for bench/results/")
    options = parser.parse_args()
    link = measure_link()
    print("# optimizer steps on LoRA parameters")
    print("# " + ", ".join(f"{k} {v}" for k, v in environment().items() if v is not None))
    print(f"# pinned copies: {link.to_device:.1f} GB/s in, {link.each_way:.1f} each way at once")
    print(COLUMNS)
    rows = []
    for model in options.models.split(","):
        for dtype in options.dtypes.split(","):
            check(DTYPES[dtype])
            for row in run(model, dtype, options.rounds, options.only, link):
                print(row.line(), flush=True)
                rows.append(row)
                if options.json:
                    write_json(options.json, "optimizer", rows, link=asdict(link))
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
