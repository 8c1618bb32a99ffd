"""Clocks. All contenders of a case are timed in turn, round by round, so that a clock change or a
noisy neighbour meets all of them alike; results are (median, p20, p80).

A kernel of a few microseconds is shorter than the time to launch it. A `Replay` is therefore a CUDA
graph of many launches, and `time_replays` queues all rounds before it waits: the card never waits
for the host.

A card at its power limit takes tenths of a second to come to rest: a product then takes up to 20 %
longer than after a pause, or after a contender that waits for memory (H200, 2026-11). So where
arithmetic is the limit, a contender is timed after it has run for that long, and for a third as
long: its time is the one it keeps up. After 0.1 s the ratio of two products was still up to 3 % off
what a second of each gives, after 0.3 s up to 1 %.
"""

from __future__ import annotations

import contextlib
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

Times = tuple[float, float, float]  # median, p20, p80

MIN_ROUNDS = 3
ROUND_SAMPLES = 3  # one after the other, at least
SUSTAINED_SECONDS = 0.3  # for the card to come to rest
SAMPLED_PART = 1 / 3  # of that time
# Of host and wall times: rounds that are not counted, samples of a contender in a row, and how many
# of these, the first, are not.
WARM_ROUNDS, IN_A_ROW, COLD = 3, 6, 2
COPY_BYTES = 1 << 30  # moved to measure the bandwidth; twenty times the L2 of an H100
MATMUL_SIZE = 8192  # of the square product that measures the arithmetic


def percentiles(values: Sequence[float]) -> Times:
    """Median, 20th and 80th percentile."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]


# ---- calls as they are ---------------------------------------------------------------------------


def interleaved(
    contenders: dict[str, Callable[[], object]],
    *,
    seconds: float = 0.6,
    rounds: int = 7,
    device: str = "cpu",
) -> dict[str, Times]:
    """Time callables in turn: {name: (median, p20, p80)} in microseconds per call.

    Each round runs every contender often enough to fill its share of `seconds`, at least once. On
    CUDA the calls of a round sit between two events; the caller rotates its inputs so that they do
    not stay in the cache.
    """
    clock = cuda_seconds if device == "cuda" else cpu_seconds
    repeats = {}
    for name, call in contenders.items():
        call()
        repeats[name] = max(1, int(seconds / rounds / max(clock(call, 1), 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            samples[name].append(clock(call, repeats[name]) / repeats[name] * 1e6)
    return {name: percentiles(values) for name, values in samples.items()}


def cpu_seconds(call: Callable[[], object], times: int) -> float:
    """Wall time of `times` calls; work left on a GPU is not waited for."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - start


def cuda_seconds(call: Callable[[], object], times: int) -> float:
    """Time of `times` calls on the current stream, launch gaps included."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def host_times(
    contenders: dict[str, Callable[[], object]], *, calls: int, rounds: int
) -> dict[str, Times]:
    """Microseconds of host time per call: a loop that does not wait for the card.

    `calls` must be few enough for the launch queue (1024 entries) not to fill up.
    """

    def sample(call: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        us = cpu_seconds(call, calls) / calls * 1e6
        torch.cuda.synchronize()
        return us

    return _host_samples(contenders, sample, rounds)


def wall_times(contenders: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, Times]:
    """Microseconds from the call until the card has done its work, with nothing before it."""

    def sample(call: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e6

    return _host_samples(contenders, sample, rounds)


def _host_samples(
    contenders: dict[str, Callable[[], object]],
    sample: Callable[[Callable[[], object]], float],
    rounds: int,
) -> dict[str, Times]:
    """Each round in an order of its own; in its turn a contender is sampled IN_A_ROW times, and the
    first COLD samples are not counted.

    What ran before has filled the processor's caches with code and data of its own. On one host a
    first call after seven other contenders took up to 1.9 times as long as the sixth in a row, and
    where the others were two, from 39 % less to 23 % more; the sixth then took 2 to 9 % less
    (bench/NOTES.md). So what is counted is the time of a layer among others of its kind. One that
    runs between other work takes the longer time.

    Without the garbage collector, whose pauses would meet whoever happens to run. What else takes
    the host's time only adds: of the three results p20 depends on it least.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names, order = list(contenders), random.Random(0)
    with _no_collections():
        for i in range(WARM_ROUNDS + rounds):
            order.shuffle(names)
            for name in names:
                in_a_row = [sample(contenders[name]) for _ in range(IN_A_ROW)]
                if i >= WARM_ROUNDS:
                    samples[name] += in_a_row[COLD:]
    return {name: percentiles(values) for name, values in samples.items()}


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


# ---- CUDA graphs ---------------------------------------------------------------------------------


@dataclass
class Replay:
    """`launches` calls of one contender that run as a whole."""

    run: Callable[[], object]
    launches: int
    eager: bool = False  # not captured: every launch comes from the host


def capture(calls: Sequence[Callable[[], object]], pool: object = None) -> Replay:
    """Capture calls, one after the other, in a CUDA graph.

    Results are dropped, so that the graph needs the memory of one call. What the calls read must
    stay alive: a graph holds addresses. Graphs that never run at the same time may share a pool.

    Raises:
        RuntimeError: a call does what cannot be captured, a synchronization for instance.
    """
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        for call in calls:
            call()
    return Replay(graph.replay, len(calls))


def eager(calls: Sequence[Callable[[], object]]) -> Replay:
    """The same calls from the host, for what cannot be captured."""

    def run() -> None:
        for call in calls:
            call()

    return Replay(run, len(calls), eager=True)


def rounds_that_fit(estimates: Sequence[float], seconds: float, most: int) -> int:
    """Rounds of contenders that take `estimates` seconds each: MIN_ROUNDS to `most`."""
    fitting = int(seconds / max(sum(estimates), 1e-9))
    return max(min(MIN_ROUNDS, most), min(most, fitting))


def samples_of(estimate: float, own_seconds: float) -> int:
    """Samples of a contender in a round, one after the other, that take `estimate` seconds each."""
    return max(ROUND_SAMPLES, math.ceil(own_seconds * SAMPLED_PART / max(estimate, 1e-9)))


def time_replays(
    replays: dict[str, Replay], *, seconds: float, rounds: int, own_seconds: float = 0.0
) -> dict[str, Times]:
    """Time replays in turn: {name: (median, p20, p80)} in microseconds per launch.

    Args:
        replays: by name; eager ones run last in a round, since the card idles before them.
        seconds: GPU time to spend on all of them together.
        rounds: the most rounds of ROUND_SAMPLES samples or more; fewer, to MIN_ROUNDS, when they
            would take longer than `seconds`.
        own_seconds: how long a contender runs before its samples of a round, which take a third of
            that; a graph at least once.
    """
    for replay in replays.values():
        replay.run()
    estimates = {name: cuda_seconds(replay.run, 1) for name, replay in replays.items()}
    untimed = {
        name: max(not replay.eager, math.ceil(own_seconds / max(estimates[name], 1e-9)))
        for name, replay in replays.items()
    }
    samples = {name: samples_of(estimate, own_seconds) for name, estimate in estimates.items()}
    in_a_round = [estimates[name] * (untimed[name] + samples[name]) for name in replays]
    events: dict[str, list] = {name: [] for name in replays}
    captured = [name for name, replay in replays.items() if not replay.eager]
    others = [name for name, replay in replays.items() if replay.eager]
    order = random.Random(0)  # the same in every run
    for _ in range(rounds_that_fit(in_a_round, seconds, rounds)):
        order.shuffle(captured)
        for name in (*captured, *others):
            replay = replays[name]
            if replay.eager:
                torch.cuda.synchronize()
            for _ in range(untimed[name]):
                replay.run()
            for _ in range(samples[name]):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                replay.run()
                end.record()
                events[name].append((begin, end))
    torch.cuda.synchronize()
    return {
        name: percentiles([_us(pair) / replays[name].launches for pair in pairs])
        for name, pairs in events.items()
    }


def _us(pair: tuple) -> float:
    return pair[0].elapsed_time(pair[1]) * 1e3


# ---- what the card can do ------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """Measured rates: GB/s of a large copy, read and written; TFLOP/s of a large square product."""

    copy_gbps: float
    matmul_tflops: float


def measure_ceilings(dtype: torch.dtype, rounds: int = 4) -> Ceilings:
    """Copy bandwidth and product rate that the current device keeps up."""
    source, target = (torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    copy = Replay(lambda: target.copy_(source), 1)
    n = MATMUL_SIZE
    a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    y = torch.empty_like(a)
    product = Replay(lambda: torch.mm(a, b, out=y), 1)
    times = time_replays(
        {"copy": copy, "product": product},
        seconds=1.0,
        rounds=rounds,
        own_seconds=SUSTAINED_SECONDS,
    )
    return Ceilings(2 * COPY_BYTES / times["copy"][0] / 1e3, 2 * n**3 / times["product"][0] / 1e6)


def extra_bytes(call: Callable[[], torch.Tensor | tuple[torch.Tensor, ...]]) -> int:
    """Device memory a call takes at its peak beyond what was there and beyond its results."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before - result_bytes(result))


def result_bytes(result: torch.Tensor | tuple[torch.Tensor, ...]) -> int:
    """Bytes of what a call returned."""
    results = (result,) if isinstance(result, torch.Tensor) else result
    return sum(tensor.nbytes for tensor in results)
