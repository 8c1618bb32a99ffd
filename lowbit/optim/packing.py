"""Packs the state of many parameters into few slabs, and steps all of them with a few launches.

A Pack holds the parameters of one device and dtype that got their state together. Their moments lie
one after another in slabs of about SLAB_BYTES, padded to blocks of 256 elements each, so that a
slab is updated, moved and freed as a whole. The kernels find a parameter through three tables:

    rows      int64 [tensors, 5]  offset in the slab, elements, first chunk, group, position
    pointers  int64 [tensors, 2]  addresses of parameter and gradient, 0 without a gradient
    groups    int64 [groups, 8]   the bits of lr, beta1, beta2, eps, weight_decay, sign as doubles

Rows stay; pointers and groups are written anew for every step and go to the device in one copy. The
step counts live on the device, so that nothing waits for it (found_inf of a GradScaler included)
and a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .. import _library, dispatch
from . import reference, tables

ALGORITHMS = {"adamw": 0, "lion": 1}
STATES = {"adamw": 2, "lion": 1}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

SLAB_BYTES = 128 << 20
CHUNK = 4096  # the kernels' kStepChunk
ROW, POINTER, GROUP, NUMBERS = 5, 2, 8, 12


@dataclass(eq=False)
class Slab:
    """State of neighbouring parameters: values [states, elements], scales [states, blocks]."""

    first: int  # rows [first, last) of the pack
    last: int
    chunks: int
    values: torch.Tensor
    scales: torch.Tensor | None
    on_host: bool = False
    was_on_device: bool = False  # its device memory is kept by the driver until somebody wants it

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.values] if self.scales is None else [self.values, self.scales]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)


@dataclass
class StepInputs:
    """What a step depends on besides parameters and groups."""

    found_inf: torch.Tensor | None = None
    grad_scale: torch.Tensor | None = None
    stochastic: bool = False
    seed: int = 0


@dataclass
class Layout:
    """Where each parameter of a pack goes; no memory yet."""

    counts: list[int]
    states: int
    coded: bool
    slab_bytes: int
    offsets: list[int] = field(default_factory=list)
    first_chunks: list[int] = field(default_factory=list)
    # (first, last, chunks, elements)
    slabs: list[tuple[int, int, int, int]] = field(default_factory=list)

    def __post_init__(self):
        limit = self.slab_bytes // (self.states * (1 if self.coded else 4))
        first = chunks = elements = 0
        for row, count in enumerate(self.counts):
            padded = -(-count // tables.BLOCK) * tables.BLOCK
            if elements and elements + padded > limit:
                self.slabs.append((first, row, chunks, elements))
                first, chunks, elements = row, 0, 0
            self.offsets.append(elements)
            self.first_chunks.append(chunks)
            elements += padded
            chunks += -(-count // CHUNK)
        if self.counts:
            self.slabs.append((first, len(self.counts), chunks, elements))


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether a tensor is made of others (DTensor), so that it has no memory for kernels."""
    return hasattr(tensor, "__tensor_flatten__")


def operators(device: torch.device):
    """The compiled operators for a device, None where the plain reference has to do."""
    if device.type not in _library.LIBRARIES or dispatch.obstacle(device.type, device) is not None:
        return None
    return torch.ops.lowbit_cuda if device.type == "cuda" else torch.ops.lowbit_cpu


class Pack:
    """Parameters with their packed state."""

    def __init__(self, parameters, places, rule, coded, pager):
        self.parameters: list[torch.Tensor] = list(parameters)
        self.device, self.dtype = self.parameters[0].device, self.parameters[0].dtype
        self.rule, self.coded, self.pager = rule, coded, pager
        self.states = STATES[rule]
        counts = [p.numel() for p in self.parameters]
        self.layout = layout = Layout(counts, self.states, coded, SLAB_BYTES)
        self.groups, self.positions = (list(column) for column in zip(*places, strict=True))
        self.counts = torch.tensor(counts, dtype=torch.int64, device="cpu")
        columns = (layout.offsets, counts, layout.first_chunks, self.groups, self.positions)
        rows = torch.tensor(columns, dtype=torch.int64, device="cpu")
        self.rows = rows.t().contiguous().to(self.device)
        floats = {"dtype": torch.float32, "device": self.device}
        self.steps = torch.zeros(len(counts), **floats)
        self.numbers = torch.zeros((len(counts), NUMBERS), **floats)
        self.tables = tables.state_tables(self.states).to(self.device)
        self.slabs = [self._new_slab(*place) for place in layout.slabs]
        self.slab_of = [i for i, s in enumerate(self.slabs) for _ in range(s.first, s.last)]
        self.every_slot = torch.arange(len(counts), device="cpu")
        self._captured: list[torch.Tensor] = []

    def _new_slab(self, first, last, chunks, elements) -> Slab:
        shape = (self.states, elements)
        values = self.pager.allocate(shape, torch.uint8 if self.coded else torch.float32)
        scales = None
        if self.coded:
            scales = self.pager.allocate((self.states, elements // tables.BLOCK), torch.float32)
        slab = Slab(first, last, chunks, values, scales)
        self.pager.place(slab)
        for state, row in enumerate(values):  # padding too: a loaded scale must leave it at 0
            row.fill_(tables.zero_code(state) if self.coded else 0)
        if scales is not None:
            scales.zero_()
        return slab

    # ---- one parameter's state -------------------------------------------------------------------

    def moments(self, row: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Views (values shaped as the parameter, scales or None) of each moment."""
        slab, parameter = self.slabs[self.slab_of[row]], self.parameters[row]
        begin, count = self.layout.offsets[row], self.layout.counts[row]
        blocks = slice(begin // tables.BLOCK, begin // tables.BLOCK + -(-count // tables.BLOCK))
        return [
            (
                slab.values[state, begin : begin + count].view(parameter.shape),
                None if slab.scales is None else slab.scales[state, blocks],
            )
            for state in range(self.states)
        ]

    # ---- a step ----------------------------------------------------------------------------------

    def table(self, slots, parameters, gradients, groups) -> tuple[torch.Tensor, int]:
        """The step's host table, and the index of the first pair that cannot be stepped or -1."""
        pointers = POINTER * len(self.parameters)
        on_gpu = self.device.type == "cuda"
        table = host_table(pointers + groups.numel(), on_gpu)
        table[pointers:] = groups
        index = self.device.index if on_gpu else -1
        bad = operators(self.device).optimizer_table(
            parameters, gradients, slots, self.counts, self.dtype, index, table
        )
        return table, bad

    def step(self, table: torch.Tensor, how: str, inputs: StepInputs) -> None:
        """Queue the step that a table describes; `how` is what the pager's `begin` said."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured.append(table)  # a graph reads it again at every replay
        table, split = table.to(self.device, non_blocking=True), POINTER * len(self.parameters)
        pointers, groups = table[:split], table[split:]
        algorithm, ops = ALGORITHMS[self.rule], operators(self.device)
        found_inf, grad_scale = (
            None if t is None else t.to(self.device, torch.float32, non_blocking=True)
            for t in (inputs.found_inf, inputs.grad_scale)
        )
        ops.optimizer_advance(
            self.rows, pointers, groups, found_inf, algorithm, self.steps, self.numbers
        )

        def update(slab: Slab, values, scales, follows_step: bool = False) -> None:
            ops.optimizer_step(
                self.rows[slab.first : slab.last],
                pointers[POINTER * slab.first : POINTER * slab.last],
                self.numbers[slab.first : slab.last],
                slab.chunks, values, scales, self.tables, found_inf, grad_scale, algorithm,
                self.dtype, inputs.stochastic, inputs.seed, follows_step,
            )  # fmt: skip

        self.pager.run(self.slabs, how, update)

    def plain_step(self, slots: Sequence[int], gradients, groups, inputs: StepInputs) -> None:
        """The same through lowbit/optim/reference.py, one parameter at a time."""
        if inputs.found_inf is not None and inputs.found_inf.item():
            return
        for row, gradient in zip(slots, gradients, strict=True):
            parameter, group = self.parameters[row], groups[self.groups[row]]
            self.steps[row] += 1
            step = int(self.steps[row])
            g = gradient.float()
            if inputs.grad_scale is not None:
                g = g / inputs.grad_scale.to(g.device)
            if group["maximize"]:
                g = -g
            views = self.moments(row)
            moments = [self._decoded(i, *view) for i, view in enumerate(views)]
            new = reference.RULES[self.rule](parameter.float(), g, moments, step, group)
            if inputs.stochastic and self.dtype == torch.bfloat16:
                new = reference.round_randomly(new, inputs.seed, step, self.positions[row])
            parameter.copy_(new)
            for state, (view, moment) in enumerate(zip(views, moments, strict=True)):
                write_moment(view, state, moment)

    @staticmethod
    def _decoded(state, values, scales) -> torch.Tensor:
        if scales is None:
            return values
        return tables.dequantize_state(values, scales, state).view(values.shape)


def write_moment(view, state: int, moment: torch.Tensor) -> None:
    """Store an fp32 moment in its view, quantizing it where the view is coded."""
    values, scales = view
    if scales is None:
        values.copy_(moment)
        return
    codes, new_scales = tables.quantize_state(moment.reshape(-1), state)
    values.copy_(codes.view(values.shape))
    scales.copy_(new_scales)


def host_table(count: int, pinned: bool) -> torch.Tensor:
    """Uninitialized int64 [count], whatever torch's default device is."""
    return torch.empty(count, dtype=torch.int64, device="cpu", pin_memory=pinned)


def group_numbers(groups: Sequence[dict]) -> torch.Tensor:
    """The bits of every group's numbers, int64 [groups * 8]."""
    rows = []
    for group in groups:
        sign = -1.0 if group["maximize"] else 1.0
        numbers = (group["lr"], *group["betas"], group.get("eps", 0.0), group["weight_decay"], sign)
        rows.append([*map(float, numbers), 0.0, 0.0])
    return torch.tensor(rows, dtype=torch.float64, device="cpu").view(-1).view(torch.int64)


def block_starts(counts: Sequence[int]) -> list[int]:
    """Positions of tensors' first elements when each starts a new block of 256."""
    padded = (-(-count // tables.BLOCK) * tables.BLOCK for count in counts)
    return list(itertools.accumulate(padded, initial=0))[:-1]
