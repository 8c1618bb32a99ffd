"""A training step of a whole model: `lowbit bench model`.

transformers' own model code with random weights; every linear layer of the blocks is 4-bit and
adapted, the adapters are 16-bit, gradients are clipped. Each contender first shows that it trains:
the losses of the warm-up steps, all on one batch, are finite and fall. Then whole steps are timed,
from an idle GPU to an idle GPU. What is counted:

    tokens/s     batch x sequence over the median time of a step
    peak         torch.cuda.max_memory_allocated: without paged state and what torch cannot see
    in use       memory of the card that is taken at the end, as nvidia-smi counts it, with the CUDA
                 context and what torch's allocator keeps
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from .checks import CheckError
from .model_configs import PAPER_FULL_GB, PAPER_QLORA_GB, ModelConfig
from .model_contenders import DTYPE, Contender, build_lowbit, build_peft
from .model_inputs import draw
from .model_profile import Profile, profile_step
from .records import environment, say, write_json
from .timing import percentiles

DEVICE = "cuda"
WARM_UP, MIN_STEPS = 5, 3  # a captured step is recorded in its second
GIB = 2**30
PEERS = ("peft-bnb",)


@dataclass
class Options:
    """What `lowbit bench model` was asked for."""

    config: ModelConfig
    rank: int = 16
    batch: int = 1
    seq: int = 512
    image: int | None = None  # pixels of the edge of a square image in each sequence
    optimizer: str = "paged-adamw"
    graph: bool = False
    fuse: bool = True
    checkpointing: bool = True
    compare: Sequence[str] = ()
    profile: bool = False
    memory_limit: float | None = None  # GiB of the card that lowbit may use; peers have all of it
    seconds: float = 4.0
    json: Path | None = None


@dataclass
class Row:
    """One contender. Times are milliseconds of a step, sizes bytes; `memory` adds up to in_use."""

    config: str
    impl: str
    r: int
    batch: int
    seq: int
    image: int | None
    optimizer: str
    graph: bool
    fuse: bool
    checkpointing: bool
    ms: float
    p20: float
    p80: float
    first_loss: float
    last_loss: float
    tflop: float
    build_s: float
    memory_limit: float | None
    peak_bytes: int
    in_use_bytes: int
    host_bytes: int
    memory: dict[str, int] = field(default_factory=dict)
    profile: Profile | None = None

    @property
    def tokens_per_s(self) -> float:
        return self.batch * self.seq / self.ms * 1e3

    def line(self) -> str:
        shape = f"{self.batch} x {self.seq}"
        return (
            f"{self.config:<12} {self.impl:<22} {self.r:>3} {shape:>9} {self.tokens_per_s:>9.0f} "
            f"{self.ms:>9.1f} {self.p20:>9.1f} {self.p80:>9.1f} {self.tflop / self.ms * 1e3:>8.0f} "
            f"{self.peak_bytes / GIB:>9.2f} {self.in_use_bytes / GIB:>9.2f}"
        )


COLUMNS = (
    f"{'model':<12} {'impl':<22} {'r':>3} {'b x seq':>9} {'tokens/s':>9} {'ms':>9} {'p20':>9} "
    f"{'p80':>9} {'TFLOP/s':>8} {'peak GiB':>9} {'used GiB':>9}"
)


# ---- measuring -----------------------------------------------------------------------------------


def _on_gpu() -> bool:
    return DEVICE == "cuda"


def _synchronize() -> None:
    if _on_gpu():
        torch.cuda.synchronize()


def in_use_bytes() -> int:
    """Memory of the card that anybody holds."""
    if not _on_gpu():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def warm_up(contender: Contender) -> tuple[float, float]:
    """Train on the one batch; returns the first and the last loss.

    Raises:
        CheckError: a loss is no number, or the last is not below the first.
    """
    losses = [contender.step().item() for _ in range(WARM_UP)]
    if not all(map(math.isfinite, losses)) or not losses[-1] < losses[0]:
        shown = ", ".join(f"{loss:.4f}" for loss in losses)
        raise CheckError(f"{contender.name} does not train; losses on one batch: {shown}")
    return losses[0], losses[-1]


def time_steps(contender: Contender, seconds: float) -> list[float]:
    """Milliseconds of each step, from idle to idle, for about `seconds`."""
    times: list[float] = []
    while len(times) < MIN_STEPS or sum(times) < seconds * 1e3:
        _synchronize()
        begin = time.perf_counter()
        contender.step()
        _synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return times


def memory(contender: Contender, peak: int, in_use: int) -> dict[str, int]:
    """What the memory in use is for; the parts add up to it.

    Activations and workspace are the peak of torch's allocator beyond what stays; `context and
    cache` is the rest: CUDA itself, its libraries, and what the allocator keeps free.
    """
    trained = {id(p) for p in contender.parameters}
    tensors = {id(t): t for t in (*contender.model.parameters(), *contender.model.buffers())}
    for parameter in list(tensors.values()):  # bitsandbytes keeps its scales beside the weight
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            for value in vars(part).values() if part is not None else ():
                if isinstance(value, torch.Tensor):
                    tensors[id(value)] = value
    adapters = sum(p.nbytes for p in contender.parameters)
    base = sum(t.nbytes for t in tensors.values() if id(t) not in trained)
    embeddings = sum(
        t.nbytes for t in tensors.values() if id(t) not in trained and t.dtype == DTYPE
    )
    state = contender.state_bytes()["device"]
    unseen = state if type(contender.optimizer).__name__.startswith("Paged") else 0
    parts = {
        "base, 4-bit": base - embeddings,
        "base, 16-bit": embeddings,
        "adapters": adapters,
        "gradients": contender.gradient_bytes(),
        "optimizer": state,
    }
    parts["activations, workspace"] = max(0, peak - (sum(parts.values()) - unseen))
    parts["context and cache"] = max(0, in_use - sum(parts.values()))
    return parts


def measure(o: Options, contender: Contender, build_s: float, graph: bool, foreign: int = 0) -> Row:
    """Check and time one contender; the row. `foreign` bytes of the card are somebody else's."""
    if _on_gpu():
        torch.cuda.reset_peak_memory_stats()
    first, last = warm_up(contender)
    failure = contender.captured.failure if contender.captured is not None else None
    if failure is not None:
        print(f"# {contender.name}: no graph, {failure}")
    times = time_steps(contender, o.seconds)
    peak = torch.cuda.max_memory_allocated() if _on_gpu() else 0
    in_use = in_use_bytes() - foreign
    profile = profile_step(contender.step) if o.profile and _on_gpu() else None
    flops = o.config.step_flops(o.batch, o.seq, o.rank, o.checkpointing, o.image)
    return Row(
        o.config.name,
        contender.name + (", graph" if graph and failure is None else ""),
        o.rank, o.batch, o.seq, o.image, o.optimizer, graph and failure is None,
        o.fuse and contender.name == "lowbit", o.checkpointing, *percentiles(times), first, last,
        flops / 1e12, build_s, o.memory_limit, peak, in_use, contender.state_bytes()["host"],
        memory(contender, peak, in_use), profile,
    )  # fmt: skip


# ---- the run -------------------------------------------------------------------------------------


def run(o: Options, rows: list[Row] | None = None) -> list[Row]:
    """Measure lowbit and what it is compared with on the current CUDA device; print the rows.

    Args:
        o: what to measure.
        rows: takes each row once it is there, also if a later one fails; default a new list.

    Returns:
        The rows of this run.

    Raises:
        CheckError: a contender does not train.
    """
    rows = [] if rows is None else rows
    before = len(rows)
    say(f"# a training step of {o.config.name}, random weights, {_settings(o)}")
    say("# " + ", ".join(f"{k} {v}" for k, v in environment().items() if v is not None))
    say(COLUMNS)
    if _on_gpu():
        torch.zeros(1, device=DEVICE)  # the context takes memory that torch does not count
    start = in_use_bytes()
    with _limited(o.memory_limit):
        _contender(o, "lowbit", build_lowbit, start, rows)
    if "peft-bnb" in o.compare:
        _contender(replace(o, memory_limit=None), "peft-bnb", build_peft, start, rows)
    for line in memory_table(o, rows[before:]):
        say(line)
    if o.json is not None:
        write_record(o.json, rows)
        say(f"written: {o.json}")
    return rows[before:]


def write_record(path: Path, rows: Sequence[Row]) -> None:
    write_json(path, "model", rows, paper={"full_gb": PAPER_FULL_GB, "gb": PAPER_QLORA_GB})


@contextlib.contextmanager
def _limited(gib: float | None) -> Iterator[None]:
    """Pretend that the card has this much memory, for torch's allocator and for paged state."""
    if gib is None or not _on_gpu():
        yield
        return
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (gib * GIB - context) / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _contender(o: Options, name: str, build: Callable, start: int, rows: list[Row]) -> None:
    """Build, measure eagerly, and as a graph if that was asked for; then free everything.

    What an earlier contender left behind (bitsandbytes keeps paged memory) is not counted.
    """
    batch = draw(o.config, o.batch, o.seq, o.image, DEVICE)
    foreign = max(0, in_use_bytes() - start)
    begin = time.perf_counter()
    contender = build(o, batch)
    _release()  # what building needed besides
    build_s = time.perf_counter() - begin
    rows.append(measure(o, contender, build_s, graph=False, foreign=foreign))
    _show(rows[-1])
    if o.graph and name == "lowbit":
        contender.capture()
        _release()
        rows.append(measure(o, contender, build_s, graph=True, foreign=foreign))
        _show(rows[-1])
    del contender
    _release()


def _release() -> None:
    """Give memory that nobody needs back to the card."""
    gc.collect()
    if _on_gpu():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _show(row: Row) -> None:
    say(row.line())
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in row.memory.items())
    host = f"; on the host {row.host_bytes / GIB:.2f}" if row.host_bytes else ""
    say(f"#   loss {row.first_loss:.3f} -> {row.last_loss:.3f}, built in {row.build_s:.0f} s; "
         f"GiB: {parts}{host}")  # fmt: skip
    for line in row.profile.lines() if row.profile is not None else ():
        say(f"#   {line}")


def _settings(o: Options) -> str:
    kind = "gradient checkpointing" if o.checkpointing else "no checkpointing"
    limit = "" if o.memory_limit is None else f", {o.memory_limit:g} GiB of the card"
    tokens = f"{o.batch} x {o.seq} tokens"
    if o.image is not None:
        count = o.config.vision.tokens(o.image)
        tokens += f" of which {count} are an image of {o.image} x {o.image} pixels"
    return f"rank {o.rank}, {tokens}, bf16, {o.optimizer}, {kind}{limit}"


def memory_table(o: Options, rows: Sequence[Row]) -> list[str]:
    """The memory of every row, by purpose, beside the paper's figures where it has some."""
    if not rows:
        return []
    full = o.config.full_bytes / 1e9
    lines = ["# memory of the card in GiB" + "".join(f"  {row.impl:>16}" for row in rows)]
    for part in rows[0].memory:
        cells = "".join(f"  {row.memory[part] / GIB:>16.2f}" for row in rows)
        lines.append(f"#   {part:<24}{cells}")
    totals = "".join(f"  {row.in_use_bytes / GIB:>16.2f}" for row in rows)
    lines.append(f"#   {'in use':<24}{totals}")
    lines.append(
        f"# 16-bit fine-tuning of all {o.config.parameters / 1e9:.1f} G parameters would take "
        f"{full:.0f} GB for weights, gradients and Adam's moments alone"
    )
    if o.config.name == "llama-65b":
        lines.append(
            f"# the QLoRA paper for this model: from more than {PAPER_FULL_GB} GB to less than "
            f"{PAPER_QLORA_GB} GB; here {min(row.in_use_bytes for row in rows) / 1e9:.1f} GB"
        )
    return lines
