"""Where the slabs of an optimizer lie, and how they reach the kernels.

    Pager         ordinary memory of the device, updated in place
    ManagedPager  managed memory: the driver moves it to the host when the card runs full
    PinnedPager   pinned host memory and explicit copies, where managed memory does not page

A slab in managed memory is updated in one of three ways:

    resident   it is on the device, or is brought back for good, slab i + 1 while slab i updates
    prefetch   it passes through the device, and moves back to the host behind the update
    zero_copy  the GPU updates it in place in host memory; the link carries it once each way

"auto" keeps slabs on the device while memory is plentiful, moves them out when it is short, and
then takes the faster of the other two by the link's speed, which every pass measures. Nothing waits
for the device. Rates at the start are an H100's over PCIe 5 (2026-11): 46 GB/s prefetched to the
device, 10 back, 40 each way at once in place.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch

from .. import memory
from .packing import Slab

POLICIES = ("auto", "resident", "prefetch", "zero_copy")
# (slab, its values, its scales): launch the update; a last argument True if nothing but the update
# of another slab is in front of it in the stream, so that the two may overlap.
Update = Callable[..., None]

# Memory of the card to leave alone: state moves out below half of it, and back only above it.
RESERVE_BYTES, RESERVE_FRACTION = 2 << 30, 1 / 32
# A pass over device memory that is slower than this runs over the link: the driver moved pages.
LINK_BYTES_PER_S = 100e9
TIMED_BYTES = 64 << 20
STAGES = 3  # one filled, one updated, one drained


@contextlib.contextmanager
def _or_stay() -> Iterator[None]:
    """A move that is refused within a step, too late to take it back, is a warning: the GPU reaches
    state wherever it lies.
    """
    try:
        yield
    except memory.PagedMemoryError as error:
        warnings.warn(f"state was updated where it lay, and stays there: {error}", stacklevel=3)


class Pager:
    """State in the ordinary memory of a device."""

    def __init__(self, device: torch.device):
        self.device = device

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def place(self, slab: Slab) -> None:
        """Put a new slab where it is going to be used."""

    def begin(self, slabs: Sequence[Slab]) -> str:
        """Decide how to update slabs, and do all that may fail. Nothing has been launched yet."""
        return "resident"

    def run(self, slabs: Sequence[Slab], how: str, update: Update) -> None:
        """Update every slab on the current stream, as `begin` decided."""
        follows = False
        for slab in slabs:
            update(slab, slab.values, slab.scales, follows)
            follows = slab.chunks > 0  # nothing is launched for empty tensors

    def evict(self, slabs: Sequence[Slab]) -> None:
        """Move slabs to the host, if they can be moved."""

    def release(self, slabs: Sequence[Slab]) -> None:
        """Move slabs to the host and give the device's memory back; waits for the device."""

    def bring_back(self, slabs: Sequence[Slab]) -> None:
        """Move slabs to the device."""


def available_bytes(device: torch.device, paged: int = 0) -> int:
    """Memory of the card, or of the share of it torch may use, that nobody holds; `paged` bytes of
    that share are taken by paged memory, which torch does not count.
    """
    free, total = torch.cuda.mem_get_info(device)
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)
    if fraction < 1.0:
        free = min(free, int(total * fraction) - torch.cuda.memory_reserved(device) - paged)
    return free


class ManagedPager(Pager):
    """State in managed memory; `policy` is one of POLICIES."""

    def __init__(self, device: torch.device, policy: str):
        super().__init__(device)
        self.policy = policy
        self.copies = torch.cuda.Stream(device)
        self.write_backs = torch.cuda.Stream(device)
        total = torch.cuda.get_device_properties(device).total_memory
        self.reserve = min(RESERVE_BYTES, int(total * RESERVE_FRACTION))
        # seconds per byte of state
        self.costs = {"prefetch": 1 / 46e9 + 1 / 10e9, "zero_copy": 1 / 40e9}
        # (how, begin, end, bytes, slabs) of a pass that is under way; state that was replaced by
        # loaded one must not wait for the next.
        self._timed: tuple | None = None
        self._slabs: weakref.WeakSet[Slab] = weakref.WeakSet()

    def _available(self) -> int:
        return available_bytes(
            self.device, sum(slab.nbytes for slab in self._slabs if slab.was_on_device)
        )

    def allocate(self, shape, dtype):
        tensor = memory.empty(shape, dtype, self.device)
        memory.advise(tensor, "accessed_by", self.device)  # no faults, wherever the pages are
        return tensor

    def place(self, slab):
        fits = self._available() > slab.nbytes + self.reserve
        to_host = self.policy in ("prefetch", "zero_copy") or (self.policy == "auto" and not fits)
        self._move(slab, to_host, torch.cuda.current_stream(self.device))

    def _move(self, slab: Slab, to_host: bool, stream: torch.cuda.Stream) -> None:
        for tensor in slab.tensors:
            memory.prefetch(tensor, memory.HOST if to_host else self.device, stream)
        slab.on_host = to_host
        slab.was_on_device |= not to_host
        self._slabs.add(slab)

    # ---- policy ----------------------------------------------------------------------------------

    def _plan(self, slabs: Sequence[Slab]) -> str:
        """How to update the slabs that are on the host, after a look at memory."""
        if self.policy != "auto":
            return self.policy
        on_host = [s for s in slabs if s.on_host]
        # The driver keeps the device pages of what was moved out, and gives them to whoever asks.
        kept = sum(s.nbytes for s in on_host if s.was_on_device)
        free = self._available() + kept
        if free < self.reserve // 2:
            return min(self.costs, key=self.costs.get)
        if sum(s.nbytes for s in on_host) + self.reserve < free:
            return "resident"
        return min(self.costs, key=self.costs.get)

    def _short_of_memory(self) -> bool:
        return self.policy == "auto" and self._available() < self.reserve // 2

    def _learn(self) -> None:
        """Take the time of the last timed pass, if it is over."""
        if self._timed is None or not self._timed[2].query():
            return
        how, begin, end, nbytes, slabs = self._timed
        self._timed = None
        seconds = begin.elapsed_time(end) / 1e3
        if how != "resident":
            self.costs[how] = seconds / nbytes
        elif seconds > nbytes / LINK_BYTES_PER_S:
            for slab in slabs:
                slab.on_host = True

    # ---- a step ----------------------------------------------------------------------------------

    def begin(self, slabs):
        if torch.cuda.is_current_stream_capturing():
            return "in_place"
        self._learn()
        on_host = [slab for slab in slabs if slab.on_host]
        how = self._plan(slabs) if on_host or self.policy != "auto" else "resident"
        if how == "zero_copy" or not (on_host or how == "prefetch"):
            return "in_place" if how == "resident" else how
        if on_host:
            self.copies.wait_stream(torch.cuda.current_stream(self.device))
            self.copies.wait_stream(self.write_backs)
            self._move(on_host[0], False, self.copies)
        return how

    def run(self, slabs, how, update):
        stream = torch.cuda.current_stream(self.device)
        capturing = torch.cuda.is_current_stream_capturing()
        nbytes = sum(slab.nbytes for slab in slabs)
        timed = not capturing and self._timed is None and how != "resident"
        timed = timed and nbytes >= TIMED_BYTES
        if timed:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
        if how in ("resident", "prefetch"):
            self._run_moving(slabs, update, stream, back=how == "prefetch")
        else:
            super().run(slabs, how, update)
        if timed:
            end.record(self.write_backs if how == "prefetch" else stream)
            what = "resident" if how == "in_place" else how
            self._timed = (what, begin, end, nbytes, weakref.WeakSet(slabs))
        if how in ("resident", "in_place") and not capturing and self._short_of_memory():
            with _or_stay():
                self.evict(slabs)

    def _run_moving(self, slabs, update, stream, back: bool) -> None:
        """Bring each slab in while the one before it updates; move it out again behind it. `begin`
        has moved the first.
        """
        for slab in slabs:
            if slab.on_host:
                with _or_stay():
                    self._move(slab, False, self.copies)
            stream.wait_stream(self.copies)
            update(slab, slab.values, slab.scales)
            if back:
                self.write_backs.wait_stream(stream)
                with _or_stay():
                    self._move(slab, True, self.write_backs)

    # ---- on request ------------------------------------------------------------------------------

    def evict(self, slabs):
        # The driver moves pages out with much work of its own; two moves at once make 16 instead of
        # 13 GB/s (H100, 2026-11).
        streams = (self.write_backs, self.copies)
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream(self.device))
        for i, slab in enumerate(slabs):
            self._move(slab, True, streams[i % 2])

    def release(self, slabs):
        # Pages that were on the device once stay the driver's until somebody wants them; memory
        # that never was there holds none.
        stream = torch.cuda.current_stream(self.device)
        for slab in slabs:
            fresh = [self.allocate(tuple(t.shape), t.dtype) for t in slab.tensors]
            for to, source in zip(fresh, slab.tensors, strict=True):
                memory.prefetch(to, memory.HOST, stream)
                memory.copy_async(to, source, stream)
            stream.synchronize()
            slab.values, slab.scales = (*fresh, None)[:2]
            slab.on_host, slab.was_on_device = True, False

    def bring_back(self, slabs):
        stream = torch.cuda.current_stream(self.device)
        for slab in slabs:
            self._move(slab, False, stream)


class PinnedPager(Pager):
    """State in pinned host memory; policy "zero_copy" updates it there, the others copy it."""

    def __init__(self, device: torch.device, policy: str):
        super().__init__(device)
        self.policy = policy
        self.fills, self.drains = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def allocate(self, shape, dtype):
        return memory.empty(shape, dtype, self.device, kind="pinned")

    def place(self, slab):
        slab.on_host = True

    def run(self, slabs, how, update):
        stages = None if self.policy == "zero_copy" else self._stages(slabs)
        if stages is None:
            return super().run(slabs, how, update)
        stream = torch.cuda.current_stream(self.device)
        self.fills.wait_stream(stream)
        drained: list[torch.cuda.Event | None] = [None] * len(stages)
        for i, slab in enumerate(slabs):
            at = i % len(stages)
            pairs = zip(stages[at], slab.tensors, strict=True)
            stage = [buffer[: t.numel()].view(t.shape) for buffer, t in pairs]
            if drained[at] is not None:
                self.fills.wait_event(drained[at])
            for to, source in zip(stage, slab.tensors, strict=True):
                memory.copy_async(to, source, self.fills)
            stream.wait_stream(self.fills)
            update(slab, stage[0], stage[1] if len(stage) > 1 else None)
            self.drains.wait_stream(stream)
            for to, source in zip(slab.tensors, stage, strict=True):
                memory.copy_async(to, source, self.drains)
            drained[at] = self.drains.record_event()
        stream.wait_stream(self.drains)  # also before the stages are anybody else's

    def _stages(self, slabs) -> list[list[torch.Tensor]] | None:
        """Device buffers for the largest slab, None when memory is too short even for them."""
        if not slabs:
            return None
        columns = list(zip(*(slab.tensors for slab in slabs), strict=True))
        largest = [max(column, key=torch.Tensor.numel) for column in columns]
        try:
            return [
                [torch.empty(t.numel(), dtype=t.dtype, device=self.device) for t in largest]
                for _ in range(min(STAGES, len(slabs)))
            ]
        except torch.OutOfMemoryError:
            return None


def make_pager(device: torch.device, paging: str | None, policy: str) -> Pager:
    """The pager for a device; paging None, "auto", "managed" or "pinned"."""
    if device.type != "cuda" or paging is None:
        return Pager(device)
    if paging == "pinned" or (paging == "auto" and not memory.can_page(device)):
        return PinnedPager(device, policy)
    return ManagedPager(device, policy)
