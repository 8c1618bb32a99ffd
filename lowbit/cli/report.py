"""What the user sees of a run: phases, a progress bar, tables. The only module that writes to
the terminal.
"""

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .train import Step

PLAIN_WIDTH = 110  # of tables when the output is a file or a pipe
PLAIN_LINES = 10  # progress lines of a whole run when there is no terminal


def make_console() -> Console:
    """Console on stdout; wide enough for tables when that is no terminal."""
    terminal = sys.stdout.isatty()
    return Console(width=None if terminal else PLAIN_WIDTH, highlight=False, soft_wrap=False)


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB" if count < 1e10 else f"{count / 1e9:,.1f} GB"


def note(console: Console, name: str, text: str) -> None:
    """One line of the run's head: a name in a column, then what is."""
    console.print(Text.assemble((f"{name:<12}", "bold cyan"), text))


class TrainingProgress:
    """A progress bar with loss, speed and memory; without a terminal, one line every tenth of
    the run.
    """

    def __init__(self, console: Console, total: int, done: int) -> None:
        self.console, self.total = console, total
        self.loss: float | None = None
        self.tokens, self.seconds = 0, 0.0
        self.bar = Progress(
            TextColumn("[bold cyan]training"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("epoch {task.fields[epoch]:.1f}"),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TextColumn("{task.fields[memory]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        start: dict[str, Any] = {"epoch": 0.0, "loss": float("nan"), "speed": 0.0, "memory": ""}
        self.task = self.bar.add_task("training", total=total, completed=done, **start)

    def __enter__(self) -> "TrainingProgress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    @property
    def speed(self) -> float:
        """Tokens per second since the start."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def update(self, step: Step, memory: int) -> None:
        # A running mean: single batches of a few short answers jump about.
        self.loss = step.loss if self.loss is None else 0.8 * self.loss + 0.2 * step.loss
        self.tokens += step.tokens
        self.seconds += step.seconds
        self.bar.update(
            self.task,
            completed=step.step,
            epoch=step.epoch,
            loss=self.loss,
            speed=self.speed,
            memory=megabytes(memory),
        )
        every = max(1, self.total // PLAIN_LINES)
        if not self.console.is_terminal and (step.step % every == 0 or step.step == self.total):
            self.console.print(
                f"  step {step.step:>4}/{self.total}  epoch {step.epoch:5.2f}  "
                f"loss {self.loss:.4f}  {self.speed:8,.0f} tokens/s  {megabytes(memory)}"
            )


def answers_table(console: Console, rows: Sequence[dict[str, str]]) -> None:
    """Base and tuned answers side by side."""
    if not rows:
        return
    table = Table(
        title="Answers to held-out questions", title_justify="left", show_lines=True, expand=True
    )
    table.add_column("question", ratio=2)
    table.add_column("base model, 4-bit", ratio=3, style="red")
    table.add_column("tuned", ratio=3, style="green")
    table.add_column("answer in the data", ratio=3, style="dim")
    for row in rows:
        table.add_row(*(Text(row[name]) for name in ("question", "base", "tuned", "reference")))
    console.print(table)


def size_table(console: Console, sizes: dict[str, dict[str, float]]) -> None:
    """Parameters and bytes before and after quantization."""
    table = Table(title="Size of the base model", title_justify="left")
    table.add_column("")
    for name in ("parameters", "before", "after", "bytes/parameter", "bits/parameter"):
        table.add_column(name, justify="right")
    for name, size in sizes.items():
        count = size["parameters"]
        before, after = size["bytes_before"] / count, size["bytes_after"] / count
        table.add_row(
            name,
            f"{count:,.0f}",
            megabytes(size["bytes_before"]),
            megabytes(size["bytes_after"]),
            f"{before:.2f} -> {after:.3f}",
            f"{8 * before:.0f} -> {8 * after:.3f}",
        )
    console.print(table)


def losses_line(console: Console, held_out: Sequence[Sequence[float]]) -> None:
    """Held-out loss at the start and at the end."""
    if len(held_out) < 2:
        return
    first, last = held_out[0][1], held_out[-1][1]
    console.print(
        Text.assemble(
            ("held-out loss ", "bold"),
            f"{first:.3f} -> ",
            (f"{last:.3f}", "bold green" if last < first else "bold red"),
        )
    )
