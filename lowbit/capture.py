"""Forward and backward of a model as a CUDA graph, for steps in which the host is slower than the
GPU.

A training step of a few hundred tokens is thousands of launches of a few microseconds each. A graph
launches all of them at once. What it computes is fixed: the shapes, the addresses, and everything
that Python decided while it was recorded; so there is one graph for every shape of the inputs.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# Eager and recorded runs make the same launches; cuBLAS may choose another kernel while recording.
LOSS_TOLERANCE = 1e-3


def backward(loss: torch.Tensor) -> None:
    """loss.backward() in the calling thread: one of autograd's own would find what the forward pass
    left in another core's caches, which takes a host-bound step a fifth of its time.
    """
    with torch.autograd.set_multithreading_enabled(False):
        loss.backward()


@dataclass
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    loss: torch.Tensor


class CapturedBackward:
    """Compute a loss and add its gradients to `.grad`, as a CUDA graph where that has been
    recorded.

    The graph adds into the `.grad` tensors that the parameters had when it was recorded: the caller
    sets them to zero (`zero()`) instead of None, and they stay where they are. Clipping and the
    optimizer's step are the caller's, so that learning rates, paging and a skipped step remain
    ordinary Python.

    Args:
        loss: function of tensors that returns the loss, a scalar. It must not read values back from
            the GPU, and its shapes must follow from those of the inputs.
        parameters: those that get gradients, all on one CUDA device, which need not be the current
            one; with several devices everything runs eagerly.
        limit: the most shapes to record; further ones run eagerly.

    Notes:
        A shape runs eagerly the first time, which also warms up what is initialized lazily, and is
        recorded the second time. The graphs share one memory pool: they never run at the same time.
        Those of another instance may: each records on a stream of its own, since torch keeps
        cuBLAS's workspace by stream (pytorch issue 193402).
        No autograd graph of an earlier step may be alive when a shape is recorded (a loss that was
        kept): what it holds belongs to another stream. If a loss cannot be recorded, or its first
        replay does not return the loss that the eager run of the same inputs returned, everything
        runs eagerly from then on and `failure` says why. Graphs are recorded again when somebody
        has set a gradient to None.

    Example:
        >>> captured = CapturedBackward(lambda ids: model(ids).loss, parameters)  # doctest: +SKIP
        >>> captured.zero()  # doctest: +SKIP
        >>> loss = captured(ids)  # doctest: +SKIP
    """

    def __init__(
        self,
        loss: Callable[..., torch.Tensor],
        parameters: Sequence[torch.Tensor],
        limit: int = 8,
    ) -> None:
        self._loss, self._parameters, self._limit = loss, list(parameters), limit
        self._seen: set[tuple] = set()
        self._recorded: dict[tuple, _Recorded] = {}
        self._pool: tuple | None = None
        self._warm_up_stream = self._recording_stream = None
        self._zeroed = False  # nothing was added to the gradients since zero()
        self.failure: str | None = None
        devices = dict.fromkeys(str(p.device) for p in self._parameters)
        if len(devices) > 1:
            self.failure = f"the parameters are on {' and '.join(devices)}"

    @property
    def shapes(self) -> int:
        """How many shapes have been recorded."""
        return len(self._recorded)

    def zero(self) -> None:
        """Set all gradients to zero, in place where they exist."""
        missing = [p for p in self._parameters if p.grad is None]
        if missing:
            self._recorded.clear()  # graphs add into tensors that are gone
        for parameter in missing:
            parameter.grad = torch.zeros_like(parameter)
        if len(missing) < len(self._parameters):
            torch._foreach_zero_([p.grad for p in self._parameters])
        self._zeroed = True

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Add the gradients of loss(*inputs); returns the loss, which the next call overwrites."""
        key = tuple((tuple(t.shape), t.dtype) for t in inputs)
        recorded = self._recorded.get(key)
        if recorded is None and self._may_record(key):
            recorded = self._record(key, inputs)
            if recorded is not None:  # the replay that checked it has done the work
                return recorded.loss
        if recorded is None:
            return self.eager(*inputs)
        self._zeroed = False
        for mine, given in zip(recorded.inputs, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        recorded.graph.replay()
        return recorded.loss

    def eager(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The same without a graph, and without remembering the shape."""
        self._zeroed = False
        return self._eager(inputs)

    def _may_record(self, key: tuple) -> bool:
        """Whether a shape that has no graph gets one now."""
        if self.failure is not None or len(self._recorded) >= self._limit or not self._zeroed:
            return False
        known = key in self._seen
        self._seen.add(key)
        return known

    def _eager(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        loss = self._loss(*inputs)
        backward(loss)
        return loss.detach()

    def _record(self, key: tuple, inputs: Sequence[torch.Tensor]) -> _Recorded | None:
        """Record a shape and replay it once; the gradients were zero and are its own then.

        With the parameters' device current: streams are made on the current device, and a graph
        recorded on another one's would be empty, without an error.
        """
        with torch.cuda.device(self._parameters[0].device):
            return self._record_here(key, inputs)

    def _record_here(self, key: tuple, inputs: Sequence[torch.Tensor]) -> _Recorded | None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._warm_up_stream, self._recording_stream = torch.cuda.Stream(), torch.cuda.Stream()
        gc.collect()  # graphs in reference cycles: checkpointing makes some
        static = [t.clone() for t in inputs]
        generator = torch.cuda.default_generators[self._parameters[0].device.index]
        start = generator.get_state()
        expected = self._warm_up(static)
        generator.set_state(start)  # the replay drops out what the warm-up did
        torch.cuda.empty_cache()  # the graph has memory of its own
        graph = torch.cuda.CUDAGraph()
        before = generator.clone_state()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._recording_stream):
                loss = self._eager(static)
        except RuntimeError as error:
            # torch 2.11 leaves the generator behind as if it were still recording.
            generator.graphsafe_set_state(before)
            self._give_up(_first_cause(error))
            return None
        graph.replay()
        got = loss.item()
        if not abs(got - expected) <= LOSS_TOLERANCE * max(1.0, abs(expected)):
            self._give_up(f"the graph's loss is {got:g}, the eager one {expected:g}")
            return None
        self._zeroed = False
        self._recorded[key] = _Recorded(graph, static, loss)
        return self._recorded[key]

    def _warm_up(self, inputs: Sequence[torch.Tensor]) -> float:
        """The loss, computed on a side stream as recording does it."""
        side = self._warm_up_stream
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loss = self._eager(inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.zero()
        return loss.item()

    def _give_up(self, why: str) -> None:
        self.failure = why
        self._recorded.clear()
        self.zero()
        warnings.warn(f"training runs without CUDA graphs: {why}", stacklevel=5)


def _first_cause(error: BaseException) -> str:
    """What went wrong first; ending the recording then fails as well."""
    while error.__context__ is not None:
        error = error.__context__
    return " ".join(str(error).split())[:200] or type(error).__name__
