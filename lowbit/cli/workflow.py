"""One fine-tuning run from options to report: check, load, quantize, train, compare, save.

Everything that can be wrong with the input is checked before the model is loaded, and the model
before anything is written. Output is collected in a staging folder (checkpoint.py) and named at the
end.
"""

import contextlib
import datetime
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from . import adapt, checkpoint, device, report, source
from .answer import answer_questions
from .data import Example
from .encode import Renderer, encode_all
from .errors import EXIT_INTERRUPTED, CliError, explain
from .settings import Settings, fingerprint
from .train import Step, Trainer, memory_bytes


class StopRequest:
    """First Ctrl-C (or SIGTERM): asks the loop to stop after the current step. A second one
    interrupts at once.
    """

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        return self.asked

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        def ask(number: int, _frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        previous = {
            number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def split_examples(
    examples: list[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Set aside a random fraction (at least one) for evaluation; both parts keep the file's
    order.
    """
    if fraction == 0:
        return examples, []
    count = max(1, round(fraction * len(examples)))
    if count >= len(examples):
        raise CliError(
            f"--eval-fraction {fraction} of {len(examples)} examples leaves nothing to train on"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = set(torch.randperm(len(examples), generator=generator)[:count].tolist())
    train = [example for i, example in enumerate(examples) if i not in chosen]
    return train, [examples[i] for i in sorted(chosen)]


class FineTune:
    """A run; `execute` does all of it."""

    def __init__(
        self,
        settings: Settings,
        examples: list[Example],
        held_out: list[Example] | None,
        resume: Path | None = None,
    ) -> None:
        self.settings, self.resume = settings, resume
        if held_out is None:
            examples, held_out = split_examples(examples, settings.eval_fraction, settings.seed)
        self.train_examples, self.held_out_examples = examples, held_out
        self.console = report.make_console()
        self.output = Path(settings.output)
        self.staging = checkpoint.Staging(self.output)
        self.seconds: dict[str, float] = {}
        self.state: dict[str, Any] = {}
        self.progressed = False

    def execute(self) -> None:
        started = time.perf_counter()
        self._check_resume()
        self.staging.begin(resume=self.resume, overwrite=self.settings.overwrite)
        try:
            self._load()
            self._before()
            finished = self._train()
            if not finished:
                self._stop_early()
            self._after()
            self._save(time.perf_counter() - started)
        except BaseException as error:
            self._abandon(error)
            raise
        self._report(time.perf_counter() - started)

    def _abandon(self, error: BaseException) -> None:
        """Clean up after a failure; if checkpoints remain, the sentence says how to go on."""
        self.staging.discard_if_empty()
        remaining = checkpoint.list_checkpoints(self.staging.folder)
        if remaining and self.progressed:
            code, sentence = explain(error)
            if isinstance(error, KeyboardInterrupt):
                sentence = "interrupted"
            way = f"continue with: lowbit finetune --resume {self.staging.folder}"
            raise CliError(f"{sentence}; {way}", code) from error

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    # ---- phases ----------------------------------------------------------------------------------

    def _check_resume(self) -> None:
        self.data_hash = fingerprint(self.settings.data)
        if self.resume is None:
            return
        self.state = checkpoint.read_state(self.resume)
        self.settings.check_resumable(Settings.from_dict(self.state["settings"]), self.resume)
        if self.state.get("data_sha256") != self.data_hash:
            raise CliError(
                f"checkpoint {self.resume} was made with other data than {self.settings.data}"
            )

    def _load(self) -> None:
        settings = self.settings
        self.device = device.resolve_device(settings.device)
        dtype = device.resolve_dtype(settings.dtype, self.device)
        # Recorded as chosen: what "auto" means elsewhere must not change what this adapter fits.
        settings.dtype = str(dtype).removeprefix("torch.")
        self.source = source.resolve(settings.model)
        with self._phase("load model"):
            self.tokenizer = source.load_tokenizer(self.source)
            self.renderer = Renderer(
                self.tokenizer, system=settings.system, use_template=settings.chat_template
            )
            self.train_set, dropped = encode_all(
                self.renderer, self.train_examples, settings.max_length
            )
            self.held_out = (
                encode_all(self.renderer, self.held_out_examples, settings.max_length)[0]
                if self.held_out_examples
                else []
            )
            model = source.load_model(self.source, dtype)
        self._describe(dtype, dropped)
        counter = adapt.SizeCounter(model)
        with self._phase("quantize"):
            torch.manual_seed(settings.seed)
            model = adapt.prepare_model(model, settings, self.device, rank=settings.rank)
            device.synchronize(self.device)
        self.sizes = counter.after(model)
        self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        report.note(
            self.console,
            "adapters",
            f"rank {settings.rank}, alpha {settings.alpha:g}: {self.trainable:,} trainable "
            f"parameters on {settings.targets}",
        )
        if settings.fuse and self.device.type == "cuda":  # on a CPU it takes 6 % longer
            report.note(self.console, "fused", adapt.fuse(model).removeprefix("fused "))
        self._make_trainer(model)

    def _make_trainer(self, model: Any) -> None:
        if self.resume:
            model = adapt.load_adapter(model, self.resume, trainable=True)
        if self.settings.gradient_checkpointing:
            adapt.checkpoint_activations(model)
        self.model = model
        self.trainer = Trainer(
            model,
            self.train_set,
            self.held_out,
            self.settings,
            pad_id=self.tokenizer.pad_token_id,
            device=self.device,
        )
        if self.resume:
            self.trainer.load_state(self.state)
            if self.trainer.step >= self.trainer.total:
                raise CliError(
                    f"checkpoint {self.resume} is at step {self.trainer.step} of "
                    f"{self.trainer.total}; nothing is left to train, give more --epochs or --steps"
                )
        else:
            torch.manual_seed(self.settings.seed)

    def _describe(self, dtype: torch.dtype, dropped: int) -> None:
        answers = sum(item.answers for item in self.train_set)
        text = f"{len(self.train_set)} examples, {answers:,} answer tokens"
        text += f"; {len(self.held_out)} held out"
        if dropped:
            text += f"; {dropped} skipped: no answer within {self.settings.max_length} tokens"
        report.note(self.console, "model", self.source.name)
        report.note(self.console, "device", device.describe(self.device, dtype))
        report.note(self.console, "data", text)

    def _before(self) -> None:
        """Answers and held-out loss of the base model: with lora_B zero the adapters add
        nothing.
        """
        self.shown = self._choose_shown()
        if self.resume:
            self.base_answers = list(self.state.get("base_answers", []))
            return
        with self._phase("base answers"):
            self.base_answers = self._answers()
        with self._phase("evaluate"):
            loss = self.trainer.evaluate()
        if loss is not None:
            report.note(self.console, "held-out", f"loss {loss:.3f} before training")

    def _choose_shown(self) -> list[Example]:
        """A few held-out examples, spread over the file, that ask something."""
        asking = [example for example in self.held_out_examples if example.messages]
        count = min(self.settings.show, len(asking))
        return [asking[i * len(asking) // count] for i in range(count)]

    def _answers(self) -> list[str]:
        questions = [example.question for example in self.shown]
        return answer_questions(
            self.model, self.renderer, questions, max_tokens=self.settings.show_tokens
        )

    def _train(self) -> bool:
        trainer = self.trainer
        with (
            self._phase("train"),
            StopRequest().listening() as stop,
            report.TrainingProgress(self.console, trainer.total, trainer.step) as progress,
        ):
            finished = trainer.run(
                on_step=lambda step: self._on_step(progress, step),
                save=self._save_checkpoint,
                should_stop=stop,
            )
            self.speed = progress.speed
        return finished

    def _on_step(self, progress: report.TrainingProgress, step: Step) -> None:
        self.progressed = True
        progress.update(step, memory_bytes(self.device))

    def _save_checkpoint(self) -> None:
        folder = self.staging.checkpoint(self.trainer.step)
        with checkpoint.folder_at_once(folder) as temporary:
            adapt.save_adapter(self.model, temporary, self.settings.model)
            extra = {"data_sha256": self.data_hash, "base_answers": self.base_answers}
            torch.save(self.trainer.state() | extra, temporary / checkpoint.TRAINER_FILE)

    def _stop_early(self) -> None:
        if self.trainer.step == 0:
            raise CliError(
                "interrupted before the first step; nothing was written", EXIT_INTERRUPTED
            )
        self._save_checkpoint()
        step, total = self.trainer.step, self.trainer.total
        raise CliError(f"interrupted after step {step} of {total}", EXIT_INTERRUPTED)

    def _after(self) -> None:
        with self._phase("evaluate"):
            self.trainer.evaluate()
        with self._phase("tuned answers"):
            tuned = self._answers()
        self.rows = [
            {
                "question": example.question[-1]["content"] if example.question else "",
                "base": base,
                "tuned": answer,
                "reference": example.answer,
            }
            for example, base, answer in zip(self.shown, self.base_answers, tuned, strict=False)
        ]

    def _save(self, total_seconds: float) -> None:
        folder = self.staging.folder
        with self._phase("save"):
            folder.mkdir(parents=True, exist_ok=True)
            adapt.save_adapter(self.model, folder, self.settings.model)
            self.plotted = self._plot(folder / "loss.png")
        checkpoint.write_json(folder / checkpoint.RUN_FILE, self._log(total_seconds))
        self.staging.finish()

    def _plot(self, path: Path) -> bool:
        try:
            from .plot import plot_losses
        except ImportError:
            return False
        name = Path(self.settings.model).name
        plot_losses(
            self.trainer.history,
            path,
            f"{name}, {self.settings.quant_type}, rank {self.settings.rank}",
        )
        return True

    def _log(self, total_seconds: float) -> dict[str, Any]:
        history = self.trainer.history
        return {
            "lowbit": __version__,
            "torch": torch.__version__,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "settings": self.settings.to_dict(),
            "data_sha256": self.data_hash,
            "device": device.describe(self.device, next(self.model.parameters()).dtype),
            "sizes": self.sizes,
            "trainable_parameters": self.trainable,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()}
            | {"total": round(total_seconds, 3)},
            "tokens_per_second": round(self.speed, 1),
            "peak_memory_bytes": device.peak_bytes(self.device, self.trainer.peak_bytes),
            "held_out": [{"step": step, "loss": loss} for step, loss in history.held_out],
            "answers": self.rows,
            "steps": history.steps,
        }

    def _report(self, total_seconds: float) -> None:
        console = self.console
        report.answers_table(console, self.rows)
        report.size_table(console, self.sizes)
        report.losses_line(console, self.trainer.history.held_out)
        times = ", ".join(
            f"{name} {value:.0f} s" for name, value in self.seconds.items() if value >= 0.5
        )
        report.note(console, "time", f"{total_seconds:.0f} s ({times})")
        peak = report.megabytes(device.peak_bytes(self.device, self.trainer.peak_bytes))
        report.note(console, "speed", f"{self.speed:,.0f} tokens/s, peak memory {peak}")
        captured = self.trainer.captured
        if captured is not None and (captured.shapes or captured.failure):
            how = captured.failure or f"{captured.shapes} shapes of batches recorded"
            report.note(console, "CUDA graphs", how)
        report.note(console, "adapter", f"{self.output} (PEFT format)")
        if self.plotted:
            report.note(console, "loss curve", str(self.output / "loss.png"))
        else:
            report.note(console, "loss curve", "not drawn: pip install matplotlib")
        report.note(console, "run log", str(self.output / checkpoint.RUN_FILE))
        report.note(console, "next", f'lowbit generate --adapter {self.output} --prompt "..."')
