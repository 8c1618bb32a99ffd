"""How paged state is moved, on a machine without a GPU: the pagers over a pretended card.

Streams are logs, memory is the CPU's, and the pretended driver says how much is free. What the real
driver does is tested in test_optim_paging.py.
"""

import types
import weakref

import pytest
import torch
from helpers import assert_bitwise_equal

import lowbit.optim as optim
from lowbit import memory
from lowbit.optim import base, packing, paging

GIB = 1 << 30


class Card:
    """Free memory, streams that log what is queued on them, a clock that only passes move."""

    def __init__(self):
        self.free, self.total, self.reserved, self.fraction = 64 * GIB, 80 * GIB, 0, 1.0
        self.log, self.fails_after, self.seconds_per_pass = [], None, None
        self.main = self.stream("main")

    def stream(self, name):
        def wait_stream(other):
            self.log.append((name, "waits for", other.name))

        return types.SimpleNamespace(
            name=name,
            wait_stream=wait_stream,
            wait_event=lambda event: self.log.append((name, "waits for event", event)),
            record_event=lambda: name,
            synchronize=lambda: self.log.append((name, "is waited for")),
        )

    def prefetch(self, tensor, to, stream):
        if self.fails_after is not None:
            if self.fails_after == 0:
                raise memory.PagedMemoryError("prefetch: no more (CUDA error 4)")
            self.fails_after -= 1
        self.log.append((stream.name, "moves to", str(to)))

    def copy(self, to, source, stream):
        to.copy_(source)
        self.log.append((stream.name, "copies", source.nbytes))

    def event(self, enable_timing=False):
        return types.SimpleNamespace(
            record=lambda stream: None,
            query=lambda: self.seconds_per_pass is not None,
            elapsed_time=lambda end: 1e3 * self.seconds_per_pass,
        )


def _pretended_pager(device, kind, policy):
    cls = paging.PinnedPager if kind == "pinned" else paging.ManagedPager
    return cls(device, policy)


@pytest.fixture
def card(monkeypatch):
    card = Card()
    names = iter(["copies", "write-backs"] * 9)
    cuda = {
        "Stream": lambda device: card.stream(next(names)),
        "current_stream": lambda device: card.main,
        "is_current_stream_capturing": lambda: False,
        "Event": card.event,
        "mem_get_info": lambda device: (card.free, card.total),
        "memory_reserved": lambda device: card.reserved,
        "get_per_process_memory_fraction": lambda device: card.fraction,
        "get_device_properties": lambda device: types.SimpleNamespace(total_memory=card.total),
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)
    monkeypatch.setattr(memory, "prefetch", card.prefetch)
    monkeypatch.setattr(memory, "copy_async", card.copy)
    monkeypatch.setattr(memory, "advise", lambda *a, **k: None)
    monkeypatch.setattr(
        memory, "empty", lambda size, dtype, device, kind="managed": torch.empty(size, dtype=dtype)
    )
    monkeypatch.setattr(packing, "SLAB_BYTES", 1 << 14)
    monkeypatch.setattr(paging, "TIMED_BYTES", 1)
    monkeypatch.setattr(base, "make_pager", _pretended_pager)
    return card


def _train(cls=optim.PagedAdamW, steps=3, evict=False, **options):
    generator = torch.Generator().manual_seed(1)
    parameters = [torch.nn.Parameter(torch.randn(3000, generator=generator)) for _ in range(9)]
    optimizer = cls(parameters, lr=1e-2, **options)
    for _ in range(steps):
        _step(optimizer, parameters, generator)
        if evict:
            optimizer.evict()
    return parameters, optimizer, generator


def _step(optimizer, parameters, generator):
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("evict", [False, True], ids=["left", "evicted"])
@pytest.mark.parametrize("paging_kind", ["managed", "pinned"])
@pytest.mark.parametrize("policy", paging.POLICIES)
@pytest.mark.parametrize("cls", [optim.PagedAdamW, optim.PagedAdamW8bit, optim.PagedLion8bit])
def test_results_are_those_of_plain_memory(cls, policy, paging_kind, evict, card, monkeypatch):
    actual, optimizer, _ = _train(cls, evict=evict, policy=policy, paging=paging_kind)
    assert len(optimizer._packs[0].slabs) > 1
    monkeypatch.setattr(base, "make_pager", lambda device, *_: paging.Pager(device))
    expected, _, _ = _train(cls)
    for p, q in zip(actual, expected, strict=True):
        assert_bitwise_equal(p.detach(), q.detach())


@pytest.mark.parametrize("policy", paging.POLICIES)
def test_replaced_state_is_freed_while_a_pass_is_timed(policy, card):
    """Its memory is needed for the state that was loaded."""
    _, optimizer, _ = _train(policy=policy)
    replaced = [weakref.ref(slab) for slab in optimizer._packs[0].slabs]
    state = optimizer.state_dict()
    del state["state"][0]
    optimizer.load_state_dict(state)
    assert not any(slab() for slab in replaced)


def test_plenty_of_memory_keeps_state_on_the_device(card):
    parameters, optimizer, generator = _train()
    assert optimizer.state_bytes()["host"] == 0
    card.log.clear()
    _step(optimizer, parameters, generator)
    assert card.log == []


def test_evicted_state_comes_back_slab_by_slab(card):
    parameters, optimizer, generator = _train()
    slabs = len(optimizer._packs[0].slabs)
    optimizer.evict()
    assert optimizer.state_bytes()["device"] == 0
    card.log.clear()
    _step(optimizer, parameters, generator)
    moved = [entry for entry in card.log if entry[1] == "moves to"]
    assert [entry[0] for entry in moved] == ["copies"] * slabs
    first_move = card.log.index(moved[0])
    for other in ("main", "write-backs"):  # which may be moving it out
        assert card.log.index(("copies", "waits for", other)) < first_move
    assert card.log.count(("main", "waits for", "copies")) == slabs
    assert optimizer.state_bytes()["host"] == 0


def test_what_passes_through_moves_back_behind_its_update(card):
    parameters, optimizer, generator = _train(policy="prefetch")
    card.log.clear()
    _step(optimizer, parameters, generator)
    back = [entry[1:] for entry in card.log if entry[0] == "write-backs"]
    slabs = len(optimizer._packs[0].slabs)
    assert back == [("waits for", "main"), ("moves to", str(memory.HOST))] * slabs


def test_a_full_card_has_its_state_on_the_host(card):
    card.free = GIB
    parameters, optimizer, generator = _train()
    assert optimizer.state_bytes()["device"] == 0
    card.log.clear()
    _step(optimizer, parameters, generator)
    assert card.log == []  # updated where it is: nothing moves, nothing waits


def test_state_makes_room_when_memory_runs_short_and_comes_back(card):
    parameters, optimizer, generator = _train()
    card.free = GIB // 2
    _step(optimizer, parameters, generator)
    assert optimizer.state_bytes()["device"] == 0
    _step(optimizer, parameters, generator)
    assert optimizer.state_bytes()["device"] == 0
    card.free = 8 * GIB
    _step(optimizer, parameters, generator)
    assert optimizer.state_bytes()["host"] == 0


def test_released_state_is_new_memory_with_the_same_values(card):
    parameters, optimizer, generator = _train(optim.PagedAdamW8bit)
    before = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in parameters]
    old = optimizer.state[parameters[0]]["state1"].data_ptr()
    optimizer.evict(release=True)
    assert optimizer.state_bytes()["device"] == 0
    assert optimizer.state[parameters[0]]["state1"].data_ptr() != old
    card.fraction = 0.5
    (pager,) = optimizer._pagers.values()
    assert pager._available() == 40 * GIB  # none of it is the card's
    for p, entry in zip(parameters, before, strict=True):
        for key, value in optimizer.state[p].items():
            assert_bitwise_equal(value, entry[key], key)
    _step(optimizer, parameters, generator)
    assert not torch.equal(optimizer.state[parameters[0]]["state1"], before[0]["state1"])


def test_torchs_memory_fraction_is_a_smaller_card(card):
    card.fraction, card.reserved = 0.1, 8 * GIB - 1
    _, optimizer, _ = _train()
    assert optimizer.state_bytes()["device"] == 0


def test_paged_state_counts_in_torchs_memory_fraction(card):
    """Half of the state fits beside what torch reserved; the rest is placed on the host."""
    _, unlimited, _ = _train()
    whole = unlimited.state_bytes()["device"]
    pager = next(iter(unlimited._pagers.values()))
    card.fraction = 0.1
    card.reserved = int(card.total * card.fraction) - pager.reserve - whole // 2 - 1
    _, optimizer, _ = _train()
    held = optimizer.state_bytes()
    slab = max(s.nbytes for pack in optimizer._packs for s in pack.slabs)
    assert whole // 2 - slab <= held["device"] <= whole // 2
    assert held["device"] + held["host"] == whole


def test_the_faster_way_by_measured_rates(card):
    card.free = GIB
    _, optimizer, _ = _train()
    pager = next(iter(optimizer._pagers.values()))
    slabs = optimizer._packs[0].slabs
    assert pager.begin(slabs) == "zero_copy"
    card.seconds_per_pass = 1.0  # in place turns out to crawl
    assert pager.begin(slabs) == "prefetch"


def test_pages_that_the_driver_took_are_fetched_again(card):
    parameters, optimizer, generator = _train()
    card.seconds_per_pass = 1.0
    card.log.clear()
    _step(optimizer, parameters, generator)
    assert [entry for entry in card.log if entry[1] == "moves to"]


def test_a_driver_error_changes_nothing(card):
    parameters, optimizer, generator = _train()
    before = [p.detach().clone() for p in parameters]
    optimizer.evict()
    card.fails_after = 0
    with pytest.raises(memory.PagedMemoryError, match=r"parameter 0 of group 0 .* nothing was"):
        _step(optimizer, parameters, generator)
    for p, old in zip(parameters, before, strict=True):
        assert_bitwise_equal(p.detach(), old)
    assert optimizer.state[parameters[0]]["step"] == 3


def test_a_driver_error_halfway_is_a_warning(card):
    parameters, optimizer, generator = _train()
    optimizer.evict()
    card.fails_after = 2
    with pytest.warns(UserWarning, match="state was updated where it lay"):
        _step(optimizer, parameters, generator)
    assert all(optimizer.state[p]["step"] == 4 for p in parameters)
    assert optimizer.state_bytes()["host"] > 0


def test_a_write_back_that_fails_is_a_warning(card, monkeypatch):
    parameters, optimizer, generator = _train(policy="prefetch")
    slabs = len(optimizer._packs[0].slabs)
    card.fails_after = 3  # the first slab's way in and out and the second's way in
    with pytest.warns(UserWarning, match="stays there: prefetch: no more"):
        _step(optimizer, parameters, generator)
    assert [s.on_host for s in optimizer._packs[0].slabs] == [True, False] + [True] * (slabs - 2)
    monkeypatch.setattr(base, "make_pager", lambda device, *_: paging.Pager(device))
    expected, _, _ = _train(steps=4)
    for p, q in zip(parameters, expected, strict=True):
        assert_bitwise_equal(p.detach(), q.detach())


def test_state_that_cannot_make_room_after_a_step_is_a_warning(card):
    parameters, optimizer, generator = _train()
    card.free, card.fails_after = GIB // 2, 0
    with pytest.warns(UserWarning, match="stays there: prefetch: no more"):
        _step(optimizer, parameters, generator)
    assert all(optimizer.state[p]["step"] == 4 for p in parameters)


def test_memory_that_cannot_be_had_names_the_parameter(card, monkeypatch):
    def refuse(*_, **__):
        raise memory.PagedMemoryError("1 MiB of paged memory cannot be had")

    monkeypatch.setattr(memory, "empty", refuse)
    with pytest.raises(memory.PagedMemoryError, match=r"parameter 0 of group 0 .* cannot be made"):
        _train()


@pytest.mark.parametrize("call", ["evict", "bring_back"])
def test_a_move_that_is_refused_names_the_parameter(call, card):
    _, optimizer, _ = _train()
    card.fails_after = 0
    with pytest.raises(memory.PagedMemoryError, match=r"parameter 0 of group 0 .* cannot be moved"):
        getattr(optimizer, call)()


def test_what_was_released_before_an_error_is_the_state(card):
    parameters, optimizer, _ = _train()
    card.fails_after = 2
    with pytest.raises(memory.PagedMemoryError, match="cannot be moved to the host"):
        optimizer.evict(release=True)
    first = optimizer._packs[0].slabs[0]
    assert first.on_host
    shown = optimizer.state[parameters[0]]["exp_avg"]
    assert shown.untyped_storage().data_ptr() == first.values.untyped_storage().data_ptr()


def test_pinned_state_is_filled_and_drained_on_streams_of_its_own(card):
    parameters, optimizer, generator = _train(paging="pinned")
    slabs = len(optimizer._packs[0].slabs)
    card.log.clear()
    _step(optimizer, parameters, generator)
    copies = [entry[0] for entry in card.log if entry[1] == "copies"]
    assert copies == ["copies", "write-backs"] * slabs
    reused = [entry for entry in card.log if entry[1] == "waits for event"]
    assert len(reused) == max(0, slabs - paging.STAGES)
    assert card.log[-1] == ("main", "waits for", "write-backs")
    assert optimizer.state_bytes()["device"] == 0
