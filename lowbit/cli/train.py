"""The training loop: AdamW on the adapters, token-weighted accumulation, learning-rate schedule,
forward and backward as CUDA graphs where batches are small, exact resume.

One optimizer step adds up the summed losses of `accumulate` batches and divides by the number of
their answer tokens, so that a token weighs the same whatever batch it is in. The place in the data
is a function of the step number and the seed; together with the optimizer's and the generators'
state that makes a resumed run repeat the uninterrupted one.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from .. import optim
from ..capture import CapturedBackward, backward
from .encode import Batch, Encoded, collate, epoch_order, sorted_batches, widened
from .errors import CliError
from .loss import AnswerLoss, answer_places
from .settings import Settings

# Batches of more tokens keep a GPU busy without a graph; padding them to a graph's shape would only
# cost time.
GRAPH_TOKENS = 4096


@dataclass
class Step:
    """What one optimizer step did. `tokens` are real tokens, `seconds` its wall time."""

    step: int
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float


@dataclass
class History:
    """Losses of a run so far; `held_out` holds [step, loss] pairs."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    held_out: list[list[float]] = field(default_factory=list)


def learning_rate(settings: Settings, step: int, total: int) -> float:
    """Learning rate of step `step` (from 0) of `total`: linear warm-up, then the schedule, down
    to 0 after the last.
    """
    warm = math.ceil(settings.warmup * total)
    if step < warm:
        return settings.learning_rate * (step + 1) / (warm + 1)
    progress = (step - warm) / max(1, total - warm)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[settings.schedule]
    return settings.learning_rate * factor


def graph_shape(rows: int, width: int, answers: int) -> tuple[int, int]:
    """(width, answer places) to which a batch is filled up, so that few shapes occur: a multiple of
    64 tokens (of 128 from 512 on), and quarters of all its places.
    """
    step = 64 if width <= 512 else 128
    width = -(-width // step) * step
    quarter = rows * width // 4
    return width, -(-answers // quarter) * quarter


def memory_bytes(device: torch.device) -> int:
    """Memory in use: allocated on the GPU, or the resident set of this process on a CPU (0 where
    unknown).
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * 4096
    except OSError:
        return 0


def _optimizer(
    settings: Settings, parameters: list[nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """torch's AdamW, or lowbit's with 8-bit state, with state that pages, or with both."""
    numbers = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **numbers, fused=device.type in ("cpu", "cuda"))
    chosen = {
        "adamw-8bit": optim.AdamW8bit,
        "paged-adamw": optim.PagedAdamW,
        "paged-adamw-8bit": optim.PagedAdamW8bit,
    }[settings.optimizer]
    return chosen(parameters, **numbers, seed=settings.seed)


class Trainer:
    """Trains the parameters of `model` that require gradients.

    Args:
        model: a prepared causal language model on `device`.
        train, held_out: encoded examples; held_out may be empty.
        settings: options of the run.
        pad_id: token id for padding.
        device: where batches go.
    """

    def __init__(
        self,
        model: nn.Module,
        train: list[Encoded],
        held_out: list[Encoded],
        settings: Settings,
        *,
        pad_id: int,
        device: torch.device,
    ) -> None:
        self.model, self.train_set, self.held_out = model, train, held_out
        self.settings, self.pad_id, self.device = settings, pad_id, device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise CliError("the model has no trainable parameter; check --targets")
        self.optimizer = _optimizer(settings, self.parameters, device)
        self.loss = AnswerLoss(model)
        self.captured = CapturedBackward(self.loss.of, self.parameters) if self._graphs() else None
        self.lengths = [len(item) for item in train]
        batches = math.ceil(len(train) / settings.batch)
        self.steps_per_epoch = math.ceil(batches / settings.accumulate)
        self.total = settings.steps or max(1, math.ceil(settings.epochs * self.steps_per_epoch))
        self.step = 0
        self.history = History()
        self.peak_bytes = 0

    def _graphs(self) -> bool:
        """Whether forward and backward run as CUDA graphs. Gradient checkpointing sets back torch's
        generator to repeat a dropout mask, which a graph cannot.
        """
        settings = self.settings
        repeats = settings.gradient_checkpointing and settings.dropout > 0
        return settings.graphs and self.device.type == "cuda" and not repeats

    # ---- state -----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything except the adapter itself that is needed to go on."""
        rng: dict[str, Any] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "rng": rng,
            "history": asdict(self.history),
            "settings": self.settings.to_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up a saved state; the adapter's weights must have been loaded before."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.history = History(**state["history"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)

    # ---- loop ------------------------------------------------------------------------------------

    def run(
        self,
        *,
        on_step: Callable[[Step], None],
        save: Callable[[], None],
        should_stop: Callable[[], bool],
    ) -> bool:
        """Train up to the last step. Returns False if `should_stop` ended it early."""
        every, check = self.settings.save_every, self.settings.eval_every
        while self.step < self.total:
            if should_stop():
                return False
            record = self._one_step(self._group(self.step))
            self.history.steps.append(asdict(record))
            if check and self.step % check == 0 and self.step < self.total:
                self.evaluate()
            on_step(record)
            if every and self.step % every == 0 and self.step < self.total:
                save()
        return True

    def _group(self, step: int) -> list[Batch]:
        """The batches of one optimizer step."""
        settings = self.settings
        epoch, index = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.lengths, settings.batch, settings.seed, epoch)
        chosen = order[index * settings.accumulate : (index + 1) * settings.accumulate]
        return [collate([self.train_set[i] for i in batch], self.pad_id) for batch in chosen]

    def _one_step(self, group: list[Batch]) -> Step:
        begin = time.perf_counter()
        rate = learning_rate(self.settings, self.step, self.total)
        answers = sum(batch.answers for batch in group)
        self.model.train()
        loss = torch.zeros((), device=self.device)
        if self.captured is not None:
            self.captured.zero()
        for batch in group:
            loss += self._backward(batch)
        mean = loss.item() / answers
        norm = self._update(rate, answers)
        self.step += 1
        if not (math.isfinite(mean) and math.isfinite(norm)):
            raise CliError(
                f"the loss is no longer a number at step {self.step} (loss {mean}, gradient norm "
                f"{norm}); try a smaller --learning-rate"
            )
        self.peak_bytes = max(self.peak_bytes, memory_bytes(self.device))
        return Step(
            step=self.step,
            epoch=self.step / self.steps_per_epoch,
            loss=mean,
            learning_rate=rate,
            gradient_norm=norm,
            tokens=sum(batch.tokens for batch in group),
            seconds=time.perf_counter() - begin,
        )

    def _backward(self, batch: Batch) -> torch.Tensor:
        """Add a batch's gradients; returns its loss."""
        rows, width = batch.ids.shape
        width, places = graph_shape(rows, width, batch.answers)
        if self.captured is None:
            loss = self.loss(batch, self.device)
            backward(loss)
            return loss.detach()
        whole = rows == self.settings.batch  # the last of an epoch may be smaller
        if not whole or rows * width > GRAPH_TOKENS:
            inputs = (batch.ids, *answer_places(batch))
            return self.captured.eager(*(tensor.to(self.device) for tensor in inputs))
        batch = widened(batch, width, self.pad_id)
        inputs = (batch.ids, *answer_places(batch, places))
        return self.captured(*(tensor.to(self.device) for tensor in inputs))

    def _update(self, rate: float, answers: int) -> float:
        """Divide the gradients by the token count, clip, step; returns the gradient norm before
        clipping.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_div_(gradients, answers)
        norm = nn.utils.get_total_norm(gradients)
        if self.settings.clip > 0:
            nn.utils.clip_grads_with_norm_(self.parameters, self.settings.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        value = norm.item()
        if math.isfinite(value):
            self.optimizer.step()
        if self.captured is None:
            self.optimizer.zero_grad(set_to_none=True)
        return value

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Held-out loss per answer token, recorded in the history; None without held-out data."""
        if not self.held_out:
            return None
        self.model.eval()
        total, answers = 0.0, 0
        for batch in self._held_out_batches():
            total += self.loss(batch, self.device).item()
            answers += batch.answers
        self.history.held_out.append([self.step, total / answers])
        return total / answers

    def _held_out_batches(self) -> Iterator[Batch]:
        # Without gradients a batch needs little memory; fewer, larger ones are faster.
        size = 2 * self.settings.batch
        for indices in sorted_batches([len(item) for item in self.held_out], size):
            yield collate([self.held_out[i] for i in indices], self.pad_id)
