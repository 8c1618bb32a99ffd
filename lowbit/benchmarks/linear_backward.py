"""Forward and backward of a linear layer with a LoRA adapter: `lowbit bench linear --backward`.

As in linear.py, with dx, d_lora_A and d_lora_B from a dy [M, N] after every forward; `dense` has no
adapter and returns dx alone. What is counted, per layer:

    flops   2 M (2 N K + 3 r (N + K)), without the second term for `dense`
    bytes   the weight as it is stored, x, A and B twice, y, dy, dx and the gradients of A and B
    MiB     device memory at the peak beyond y and the gradients

With --eager also, for M up to 256: the wall time of one layer between two synchronizations, and
where N = K the time of the host per layer in a chain of layers that does not wait for the card.
Both twice: as torch does it, with backward in a thread of autograd's own, and with backward in the
calling thread, as in lowbit's training loop (capture.py). All are times of calls in a row of the
same contender, whose code is in the processor's caches by then; the first after other work takes
up to 1.9 times as long (timing.py). How fast a host is, is most of these times. So they have one
contender more, the `empty function`: one of autograd's in Python that takes the same tensors,
returns results that are there already, and launches nothing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch

from .. import dispatch
from ..weight import QuantizedWeight
from . import linear, timing
from .checks import GRADIENT_FACTOR, gradient_errors
from .implementations import PANELS, Implementation, Prepared, Weights, lowbit_kernel
from .linear import Contender
from .records import Row
from .shapes import Layer

OP = "forward+backward"
WALL_OP = "forward+backward wall"
HOST_OP = "forward+backward host"
CALLER_WALL_OP = "f+b wall, calling thread"
CALLER_HOST_OP = "f+b host, calling thread"
EAGER_MAX_TOKENS = 256
WALL_ROUNDS, HOST_ROUNDS = 60, 25
EMPTY = "empty function"


class _Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, B, y, gradients):
        ctx.gradients = gradients
        return y.detach()

    @staticmethod
    def backward(ctx, dy):
        return *ctx.gradients, None, None


class Backward(linear.Benchmark):
    """The run of linear.py with another work per layer."""

    op = OP
    record = "linear_backward"
    title = "forward and backward"
    error_factor = GRADIENT_FACTOR

    def build(self, weights: Weights, layer: Layer) -> list[Contender]:
        for tensor in (*weights.A, *weights.B):
            tensor.requires_grad_()
        return super().build(weights, layer)

    def inputs(self, layer: Layer, M: int) -> torch.Tensor:
        self.dy = torch.randn(M, layer.N, dtype=self.options.dtype, device=linear.DEVICE)
        return super().inputs(layer, M).requires_grad_()

    def calls(self, contender: Contender, x: torch.Tensor) -> list[Callable[[], object]]:
        copies = range(contender.weights.copies)
        return [functools.partial(self.step, contender, x, (i,)) for i in copies]

    def step(self, contender: Contender, x: torch.Tensor, chain: tuple[int, ...]):
        """(y, dx, gradients of the adapters) of the copies in `chain`, one after the other."""
        if contender.name != "lowbit-panels":
            return self._step(contender, x, chain)
        with dispatch.force(PANELS):  # the call itself forces its forward pass alone
            return self._step(contender, x, chain)

    @torch.enable_grad()
    def _step(self, contender: Contender, x: torch.Tensor, chain: tuple[int, ...]):
        y, leaves = x, [x]
        for i in chain:
            y = contender.prepared.call(y, i)
            if contender.implementation.lora:
                leaves += [contender.weights.A[i], contender.weights.B[i]]
        return y.detach(), *torch.autograd.grad(y, leaves, self.dy)

    def errors(self, contender: Contender, x: torch.Tensor) -> tuple[float, float]:
        _, *gradients = self.step(contender, x, (0,))
        return gradient_errors(gradients, contender.prepared, contender.weights, x, self.dy)

    def kernel(self, q: QuantizedWeight, M: int) -> str:
        forward = super().kernel(q, M)
        backward = lowbit_kernel("lora_linear_backward", q, self.options.r, M)
        return forward if forward == backward else f"{forward}, {backward}"

    def needed(self, layer: Layer, M: int, r: int, weight_bytes: int) -> tuple[float, float]:
        return needed(layer, M, r, weight_bytes, self.options.dtype.itemsize)

    def host_rows(
        self, contenders: list[Contender], rows: dict[str, Row], x: torch.Tensor
    ) -> list[Row]:
        if x.shape[0] > EAGER_MAX_TOKENS:
            return []
        row, weights = next(iter(rows.values())), contenders[0].weights
        contenders = [self.empty(weights, x), *contenders]
        single = {c.name: _in_turn(self.calls(c, x)) for c in contenders}
        chain = tuple(range(weights.copies))
        chains = {c.name: functools.partial(self.step, c, x, chain) for c in contenders}
        measured = []
        for own_thread, wall, host in (
            (True, WALL_OP, HOST_OP),
            (False, CALLER_WALL_OP, CALLER_HOST_OP),
        ):
            with torch.autograd.set_multithreading_enabled(own_thread):
                times = timing.wall_times(single, rounds=WALL_ROUNDS)
                measured += _rows(row, wall, "wall, in a row", times)
                if x.shape[1] != self.dy.shape[1]:
                    continue
                times = timing.host_times(chains, calls=1, rounds=HOST_ROUNDS)
                per_layer = {name: tuple(t / len(chain) for t in ts) for name, ts in times.items()}
                measured += _rows(row, host, "host, in a row", per_layer)
        return measured

    def empty(self, weights: Weights, x: torch.Tensor) -> Contender:
        """The empty function for these tensors."""
        y = torch.empty_like(self.dy)
        gradients = tuple(torch.empty_like(t) for t in (x, weights.A[0], weights.B[0]))

        def call(x, i):
            return _Empty.apply(x, weights.A[i], weights.B[i], y, gradients)

        prepared = Prepared(call, lambda rows: y.new_zeros(len(rows), weights.K), 0)
        return Contender(Implementation(EMPTY, "no work", lambda _: prepared), prepared, weights)


def _in_turn(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """The next of them each time: a weight does not stay in the cache."""
    forever = itertools.cycle(calls)
    return lambda: next(forever)()


def _rows(row: Row, op: str, kind: str, times: dict[str, timing.Times]) -> list[Row]:
    return [
        Row(
            op, row.M, row.N, row.K, row.r, row.dtype, name, *us, layer=row.layer, timing=kind
        )
        for name, us in times.items()
    ]  # fmt: skip


def needed(
    layer: Layer, M: int, r: int, weight_bytes: int, itemsize: int = 2
) -> tuple[float, float]:
    """Flops, and bytes, of forward and backward; r = 0 without an adapter."""
    N, K = layer.N, layer.K
    flops = 2.0 * M * (2 * N * K + 3 * r * (N + K))
    activations = M * (3 * K + 2 * N)  # x twice and dx; y and dy
    return flops, 2 * weight_bytes + itemsize * float(activations + 3 * r * (N + K))


def run(options: linear.Options) -> list[Row]:
    """linear.run, forward and backward."""
    return linear.run(options, Backward)
