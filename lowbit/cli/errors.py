"""How the command line fails: one sentence on stderr and an exit code, never a traceback.

Exit codes: 2 wrong input or too little memory, 130 interrupted, 1 a fault of lowbit itself
(LOWBIT_TRACEBACK=1 shows it).
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator

EXIT_WRONG_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_INTERNAL = 1


class CliError(Exception):
    """An end with one sentence for the user: a mistake that can be corrected, or an interrupt."""

    def __init__(self, sentence: str, code: int = EXIT_WRONG_INPUT) -> None:
        super().__init__(sentence)
        self.code = code


def first_sentence(error: BaseException, *, limit: int = 300) -> str:
    """The message of an exception on one line, cut to `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def is_out_of_memory(error: BaseException) -> bool:
    """True for the several ways in which torch, CUDA and Python report that memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    signs = (
        "out of memory",
        "can't allocate memory",
        "cannot allocate memory",
        "cublas_status_alloc_failed",
    )
    return isinstance(error, (RuntimeError, OSError)) and any(sign in text for sign in signs)


def is_failed_write(error: BaseException) -> bool:
    """True for what safetensors and torch.save raise when a disk is full; it is no OSError."""
    signs = ("I/O error", "PytorchStreamWriter failed writing", "inline_container.cc")
    return any(sign in str(error) for sign in signs)


def raised_by_lowbit(error: BaseException) -> bool:
    """True if a ValueError or TypeError is one of lowbit's own checks, whose message is written
    for users.
    """
    if not isinstance(error, (ValueError, TypeError)):
        return False
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and str(frames[-1][0].f_globals.get("__name__", "")).startswith("lowbit")


def explain(error: BaseException) -> tuple[int, str]:
    """Translate an exception into (exit code, sentence)."""
    if isinstance(error, CliError):
        return error.code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted; nothing was written"
    if is_out_of_memory(error):
        advice = "use a smaller --batch or --max-length, or --gradient-checkpointing"
        return EXIT_WRONG_INPUT, f"out of memory ({first_sentence(error, limit=160)}); {advice}"
    if is_failed_write(error):
        return EXIT_WRONG_INPUT, f"cannot write the output: {first_sentence(error)}"
    if raised_by_lowbit(error):
        return EXIT_WRONG_INPUT, first_sentence(error)
    if isinstance(error, BrokenPipeError):  # the reader (head, less) has gone; nothing to tell it
        return EXIT_INTERNAL, "output was cut off"
    if isinstance(error, OSError) and error.filename is not None:
        return EXIT_WRONG_INPUT, f"{error.filename}: {error.strerror}"
    what = f"{type(error).__name__}: {first_sentence(error)}"
    return EXIT_INTERNAL, f"unexpected fault ({what}); set LOWBIT_TRACEBACK=1 to see where"


@contextlib.contextmanager
def guard() -> Iterator[None]:
    """Run a command body; turn every exception into one line on stderr and the right exit code."""
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        import typer

        if isinstance(error, typer.Exit):
            raise
        if os.environ.get("LOWBIT_TRACEBACK") == "1":
            traceback.print_exc()
        code, sentence = explain(error)
        print(f"lowbit: {sentence}", file=sys.stderr)
        raise typer.Exit(code) from None
