"""The forward linear layer with a LoRA adapter on a GPU: `lowbit bench linear`.

Every implementation is checked against float64 and then timed as a CUDA graph that runs over
several copies of the weight, together larger than twice the L2 cache: weights come from memory, as
in a model, and no launch gap counts. Activations may stay in the cache, as in a model too. Where
arithmetic is the limit, a time is the one that a contender keeps up at the card's power limit
(timing.py); for up to some hundred tokens a row also has the time in turn with the others. What is
counted, per layer:

    flops   2 M (N K + r (N + K)), without the second term for `dense`
    bytes   the weight as it is stored, x, y, and for LoRA A and B, each once
    floor   max(bytes / copy bandwidth, flops / product rate) of the 4-bit layer with its adapter,
            both rates measured in the same run; the same floor for every implementation
    MiB     device memory at the peak of a call beyond its result, with buffers kept between calls
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..weight import QuantizedWeight
from . import timing
from .checks import ERROR_FACTOR, check, errors
from .implementations import (
    IMPLEMENTATIONS,
    PANELS,
    Implementation,
    Prepared,
    Weights,
    lowbit_kernel,
)
from .records import Row, geometric_mean, print_header, say, short, write_json
from .shapes import Layer

OP = "lora_linear"
HOST_OP = "lora_linear host"  # time of the host per call, with --eager
DENSE = "dense"  # what `vs dense` is relative to

ROTATED_BYTES = 120_000_000  # of the packed copies together: 2.4 times the L2 of an H100
MIN_COPIES = 4
DEVICE = "cuda"
CASE_SECONDS = 1.0  # of GPU time for the timed rounds of one layer and M
IN_TURN_MAX_TOKENS = 256  # above, a call takes longer than a change of the card's clock
# A graph repeats its copies until a replay would take this long at the floor: the gap between two
# replays, a few microseconds, then does not count.
REPLAY_US = 500.0
MAX_PASSES = 8
HOST_MAX_TOKENS = 64  # above, the card is slower than the host and the loop waits for it
HOST_CALLS, HOST_ROUNDS = 25, 9


@dataclass
class Options:
    """What `lowbit bench linear` was asked for."""

    layers: Sequence[Layer]
    tokens: Sequence[int]
    r: int = 16
    dtype: torch.dtype = torch.bfloat16
    implementations: Sequence[str] = tuple(IMPLEMENTATIONS)
    backward: bool = False  # linear_backward.py's run
    rounds: int = 8
    eager: bool = False
    json: Path | None = None
    plot: Path | None = None


# ---- arithmetic ----------------------------------------------------------------------------------


def needed_flops(M: int, N: int, K: int, r: int) -> float:
    """Multiply-adds of y, counted as two; r = 0 without an adapter."""
    return 2.0 * M * (N * K + r * (N + K))


def needed_bytes(M: int, N: int, K: int, r: int, weight_bytes: int, itemsize: int = 2) -> float:
    """The stored weight, x, y and the adapter, each moved once."""
    return weight_bytes + itemsize * float(M * (N + K) + r * (N + K))


def floor_us(moved: float, flops: float, ceilings: timing.Ceilings) -> float:
    """The least time in microseconds: nothing is moved or multiplied faster than measured."""
    return max(moved / ceilings.copy_gbps / 1e3, flops / ceilings.matmul_tflops / 1e6)


def own_seconds(moved: float, flops: float, ceilings: timing.Ceilings) -> float:
    """What a contender runs before it is timed: where arithmetic is the limit, so is power."""
    by_arithmetic = flops / ceilings.matmul_tflops > 1e3 * moved / ceilings.copy_gbps
    return timing.SUSTAINED_SECONDS if by_arithmetic else 0.0


def copies_for(weight_bytes: int, l2_bytes: int = 0) -> int:
    """Copies of a packed weight that together exceed the cache twice."""
    return max(MIN_COPIES, math.ceil(max(ROTATED_BYTES, 2 * l2_bytes) / weight_bytes))


def _l2_bytes() -> int:
    return torch.cuda.get_device_properties().L2_cache_size


def passes_for(floor: float, copies: int) -> int:
    """How often a graph runs over its copies."""
    return min(MAX_PASSES, max(1, math.ceil(REPLAY_US / (floor * copies))))


def finish(rows: list[Row]) -> list[Row]:
    """Fill in the ratios of the rows of one case."""
    dense = {row.op: row.us for row in rows if row.impl == DENSE}
    for row in rows:
        if row.op in dense:
            row.vs_dense = dense[row.op] / row.us
        if row.floor_us:
            row.percent_peak = 100 * row.floor_us / row.us
    return rows


def summary(rows: list[Row], op: str = OP) -> list[str]:
    """One line per implementation: geometric means over all cases."""
    lines = []
    for impl in dict.fromkeys(row.impl for row in rows if row.op == op):
        mine = [row for row in rows if (row.op, row.impl) == (op, impl)]
        cases = f"{len(mine)} case{'s' if len(mine) > 1 else ''}"
        parts = [f"geometric mean over {cases}, {impl:<14}"]
        if all(row.vs_dense for row in mine):
            parts.append(f"{geometric_mean(row.vs_dense for row in mine):6.2f} x dense")
        if all(row.vs_floor for row in mine):
            parts.append(f"{geometric_mean(row.vs_floor for row in mine):6.2f} x floor")
        lines.append(" ".join(parts))
    return lines


# ---- one case ------------------------------------------------------------------------------------


@dataclass
class Contender:
    """An implementation with the weights of one layer."""

    implementation: Implementation
    prepared: Prepared
    weights: Weights

    @property
    def name(self) -> str:
        return self.implementation.name


@dataclass
class Benchmark:
    """The whole run: options, the card's ceilings, and what has been measured so far.

    What is done with a layer, and what it costs at least, is in the methods under `a layer's work`.
    """

    op = OP
    record = "linear"
    title = "forward"
    error_factor = ERROR_FACTOR

    options: Options
    ceilings: timing.Ceilings
    skipped: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def layer(self, layer: Layer) -> None:
        """Quantize a layer once and measure it at every M."""
        o = self.options
        copies = copies_for(layer.N * layer.K // 2, _l2_bytes())
        weights = Weights(layer.N, layer.K, o.r, o.dtype, DEVICE, copies)
        contenders = self.build(weights, layer)
        for M in o.tokens:
            rows = self.case(layer, contenders, self.inputs(layer, M))
            for row in rows:
                say(row.line())
            self.rows += rows
            torch.cuda.empty_cache()

    def save_unfinished(self) -> None:
        """Write what there is beside the record, so that a run that is cut short leaves it."""
        if self.options.json is not None:
            extra = {"ceilings": asdict(self.ceilings), "skipped": self.skipped}
            write_json(unfinished(self.options.json), self.record, self.rows, **extra)

    def build(self, weights: Weights, layer: Layer) -> list[Contender]:
        """Contenders of a layer; a library that cannot hold the weight is named and left out."""
        contenders = []
        for name in self.options.implementations:
            implementation = IMPLEMENTATIONS[name]
            try:
                prepared = implementation.build(weights)
            except Exception as error:
                if name.startswith("lowbit"):
                    raise
                say(f"# {name} skipped for {layer.name}: {_sentence(error)}")
                continue
            contenders.append(Contender(implementation, prepared, weights))
        return contenders

    # ---- a layer's work

    def inputs(self, layer: Layer, M: int) -> torch.Tensor:
        return torch.randn(M, layer.K, dtype=self.options.dtype, device=DEVICE)

    def calls(self, contender: Contender, x: torch.Tensor) -> list[Callable[[], object]]:
        """One call for every copy of the weight."""
        copies = range(contender.weights.copies)
        return [functools.partial(contender.prepared.call, x, i) for i in copies]

    def errors(self, contender: Contender, x: torch.Tensor) -> tuple[float, float]:
        return errors(contender.implementation, contender.prepared, contender.weights, x)

    def kernel(self, q: QuantizedWeight, M: int) -> str:
        """What lowbit runs."""
        return lowbit_kernel("lora_linear", q, self.options.r, M)

    def needed(self, layer: Layer, M: int, r: int, weight_bytes: int) -> tuple[float, float]:
        """Flops, and bytes."""
        N, K = layer.N, layer.K
        itemsize = self.options.dtype.itemsize
        return needed_flops(M, N, K, r), needed_bytes(M, N, K, r, weight_bytes, itemsize)

    # ---- measuring it

    @torch.no_grad()
    def case(self, layer: Layer, contenders: list[Contender], x: torch.Tensor) -> list[Row]:
        """Check, then measure, every contender at one M."""
        where = f"{layer.name}, M {x.shape[0]}"
        rows: dict[str, Row] = {}
        for contender in contenders:
            row = self.checked(layer, contender, x, where)
            if row is not None:
                rows[contender.name] = row
        if not rows:
            return []
        shown = ", ".join(f"{name} {row.error:.2g}" for name, row in rows.items())
        say(f"# {where}: relative RMS error {shown}")
        if "lowbit" in rows:
            say(f"# {where}: lowbit runs {rows['lowbit'].kernel}")
        present = [contender for contender in contenders if contender.name in rows]
        replays = self.replays(present, x, where, next(iter(rows.values())).floor_us)
        needed_flops, needed_bytes = self.needed(
            layer, x.shape[0], self.options.r, contenders[0].weights.quantized[0].nbytes
        )
        own = own_seconds(needed_bytes, needed_flops, self.ceilings)
        measured = timing.time_replays(
            replays, seconds=CASE_SECONDS, rounds=self.options.rounds, own_seconds=own
        )
        if own and x.shape[0] <= IN_TURN_MAX_TOKENS:
            in_turn = timing.time_replays(replays, seconds=CASE_SECONDS, rounds=self.options.rounds)
            for name, times in in_turn.items():
                rows[name].in_turn_us = times[0]
        in_graph = "graph, sustained" if own else "graph"
        for name, times in measured.items():
            rows[name].us, rows[name].p20, rows[name].p80 = times
            rows[name].timing = "eager" if replays[name].eager else in_graph
        result = list(rows.values())
        if self.options.eager:
            result += self.host_rows(present, rows, x)
        return finish(result)

    def checked(
        self, layer: Layer, contender: Contender, x: torch.Tensor, where: str
    ) -> Row | None:
        """A row without times, or None if the library of a peer cannot compute this case."""
        name = contender.name
        kernel = None
        if name.startswith("lowbit"):
            kernel = self.kernel(contender.weights.quantized[0], x.shape[0])
        if name == "lowbit-panels":
            if kernel == PANELS:
                say(f"# {name} left out at {where}: lowbit itself runs it")
                return None
            kernel = PANELS
        try:
            error, plain = self.errors(contender, x)
            extra = timing.extra_bytes(self.calls(contender, x)[0])
        except Exception as failure:
            if name.startswith("lowbit"):
                raise
            say(f"# {name} skipped at {where}: {_sentence(failure)}")
            return None
        check(name, error, plain, where, self.error_factor)
        M, r = x.shape[0], self.options.r
        own_r = r if contender.implementation.lora else 0
        needed_flops, needed_bytes = self.needed(layer, M, r, contender.weights.quantized[0].nbytes)
        flops, moved = self.needed(layer, M, own_r, contender.prepared.weight_bytes)
        return Row(
            self.op, M, layer.N, layer.K, r, short(x.dtype), name, math.nan, math.nan, math.nan,
            flops=flops,
            bytes=moved,
            layer=layer.name,
            floor_us=floor_us(needed_bytes, needed_flops, self.ceilings),
            extra_bytes=extra + contender.prepared.held_bytes,
            error=error,
            kernel=kernel,
        )  # fmt: skip

    def replays(
        self, contenders: list[Contender], x: torch.Tensor, where: str, floor: float
    ) -> dict[str, timing.Replay]:
        """A graph of every contender; eager calls, at the end, of what cannot be captured."""
        graphs, uncaptured = {}, {}
        pool = torch.cuda.graph_pool_handle()  # they run one after the other and keep no result
        for contender in contenders:
            calls = self.calls(contender, x)
            for call in calls:  # everything that happens only once happens here
                call()
            try:
                passes = passes_for(floor, contender.weights.copies)
                graphs[contender.name] = timing.capture(calls * passes, pool)
            except RuntimeError as error:
                reason = _sentence(error)
                say(f"# {contender.name} at {where} is timed eagerly, no graph: {reason}")
                uncaptured[contender.name] = timing.eager(calls)
        return graphs | uncaptured

    def host_rows(
        self, contenders: list[Contender], rows: dict[str, Row], x: torch.Tensor
    ) -> list[Row]:
        """Host time per call of a loop that does not wait for the card."""
        if x.shape[0] > HOST_MAX_TOKENS:
            return []
        calls = {contender.name: self.calls(contender, x)[0] for contender in contenders}
        times = timing.host_times(calls, calls=HOST_CALLS, rounds=HOST_ROUNDS)
        return [
            Row(
                HOST_OP, row.M, row.N, row.K, row.r, row.dtype, name, *times[name],
                layer=row.layer, timing="host, in a row",
            )
            for name, row in rows.items()
        ]  # fmt: skip


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


# ---- the run -------------------------------------------------------------------------------------


def present(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Which implementations can run here, and why not the others."""
    reasons = {name: IMPLEMENTATIONS[name].missing() for name in names}
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    return [name for name in names if name not in skipped], skipped


def unfinished(path: Path) -> Path:
    """Where the record is until the run is complete."""
    return path.with_name(path.name + ".unfinished")


def notes(options: Options, ceilings: timing.Ceilings, skipped: dict[str, str]) -> list[str]:
    """Lines between the environment and the table."""
    product = f"{short(options.dtype)} product of {timing.MATMUL_SIZE}^3"
    return [
        f"measured in this run: copy {ceilings.copy_gbps / 1e3:.2f} TB/s (read + written), "
        f"{product} {ceilings.matmul_tflops:.0f} TFLOP/s",
        "floor: max(bytes / copy, flops / product) of the 4-bit layer; %peak: floor / time; "
        "x floor: time / floor; vs dense: dense time / time, above 1 is faster",
        *(f"{name}: {IMPLEMENTATIONS[name].title}" for name in options.implementations),
        *(f"{name} skipped: {reason}" for name, reason in skipped.items()),
    ]


def run(options: Options, kind: type[Benchmark] = Benchmark) -> list[Row]:
    """Measure everything that was asked for on the current CUDA device; print rows as they come.

    Raises:
        checks.CheckError: lowbit's result is wrong.
        ValueError: none of the wished implementations is there.
    """
    options.implementations, skipped = present(options.implementations)
    if not options.implementations:
        why = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise ValueError(f"--impl: none of them can run here ({why})")
    torch.manual_seed(0)
    benchmark = kind(options, timing.measure_ceilings(options.dtype), skipped)
    torch.cuda.empty_cache()
    title = f"a linear layer with a LoRA adapter, {kind.title}, r {options.r}, us per layer"
    print_header(title, notes(options, benchmark.ceilings, skipped))
    for layer in options.layers:
        benchmark.layer(layer)
        torch.cuda.empty_cache()
        benchmark.save_unfinished()
    for line in summary(benchmark.rows, kind.op):
        print(line)
    if options.json is not None:
        unfinished(options.json).replace(options.json)
        print(f"written: {options.json}")
    if options.plot is not None:
        from .plots import plot_linear

        for path in plot_linear(benchmark.rows, options.plot, op=kind.op, name=kind.record):
            print(f"written: {path}")
    return benchmark.rows
