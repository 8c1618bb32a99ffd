"""Folders on disk that are either complete or not there: the output of a run and its checkpoints.

A run collects everything in `<output>.unfinished` and renames it to `<output>` at the end.
Checkpoints inside are renamed into place one by one, so a run that is killed leaves its last
complete checkpoint and nothing half-written.

    <output>/adapter_model.safetensors, adapter_config.json     the adapter, PEFT format
    <output>/run.json, loss.png                                 what happened
    <output>/checkpoints/step-000040/                           adapter + trainer.pt
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import CliError, first_sentence

RUN_FILE = "run.json"
TRAINER_FILE = "trainer.pt"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
CHECKPOINTS = "checkpoints"


def is_ours(folder: Path) -> bool:
    """True if lowbit wrote this folder, so that --overwrite may replace it."""
    return any((folder / name).exists() for name in (RUN_FILE, CHECKPOINTS, "lowbit_merge.json"))


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output path that cannot or must not be written; called before any work is done."""
    if output.exists() and not output.is_dir():
        raise CliError(f"output {output} is a file; name a folder")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise CliError(
                f"output folder {output} exists and is not empty; name another, or pass --overwrite"
            )
        if not is_ours(output):
            raise CliError(
                f"output folder {output} was not written by lowbit; --overwrite does not replace it"
            )
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise CliError(f"output {output} cannot be made: {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CliError(f"output {output} cannot be made: no permission to write in {parent}")


def replace_folder(new: Path, final: Path) -> None:
    """Move a complete folder to its final name; an older one there goes away only after that."""
    final.parent.mkdir(parents=True, exist_ok=True)
    if not final.exists():
        new.rename(final)
        return
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{final.name}.old-") as attic:
        final.rename(Path(attic) / "old")
        new.rename(final)


@contextlib.contextmanager
def folder_at_once(final: Path) -> Iterator[Path]:
    """Give a temporary folder beside `final`; it gets that name if the block succeeds and
    vanishes if it fails.
    """
    made = [parent for parent in final.absolute().parents if not parent.exists()]
    final.parent.mkdir(parents=True, exist_ok=True)
    # That folder is private; what is made in it is an ordinary one.
    private = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.new-"))
    try:
        temporary = private / final.name
        temporary.mkdir()
        yield temporary
        replace_folder(temporary, final)
        private.rmdir()
    except BaseException:
        shutil.rmtree(private, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


class Staging:
    """The folder `<output>.unfinished` of a running job."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(output.name + ".unfinished")

    def begin(self, *, resume: Path | None, overwrite: bool) -> None:
        """Refuse to mix with an earlier unfinished run, unless it is the one being resumed."""
        if self.folder.is_dir() and not self._holds(resume):
            if list_checkpoints(self.folder) and not overwrite:
                raise CliError(
                    f"{self.folder} holds an unfinished run; continue it with "
                    f"--resume {self.folder}, or pass --overwrite to drop it"
                )
            shutil.rmtree(self.folder)
        for unfinished in (self.folder / CHECKPOINTS).glob(".*.new-*"):  # of a run that was killed
            shutil.rmtree(unfinished, ignore_errors=True)

    def _holds(self, checkpoint: Path | None) -> bool:
        return checkpoint is not None and self.folder.resolve() in checkpoint.resolve().parents

    def checkpoint(self, step: int) -> Path:
        return self.folder / CHECKPOINTS / f"step-{step:06d}"

    def finish(self) -> None:
        """Give the complete folder its final name."""
        replace_folder(self.folder, self.output)

    def discard_if_empty(self) -> None:
        """After a failure: keep complete checkpoints, remove everything else."""
        if not self.folder.is_dir():
            return
        if not list_checkpoints(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for item in self.folder.iterdir():
            if item.name != CHECKPOINTS:
                shutil.rmtree(item) if item.is_dir() else item.unlink()


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run folder, oldest first."""
    return sorted((folder / CHECKPOINTS).glob("step-*"))


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that --resume names: a checkpoint folder, or the newest one of a run."""
    folder = Path(path)
    if not folder.is_dir():
        raise CliError(f"--resume: {folder} is no folder")
    if not (folder / TRAINER_FILE).exists():
        inside = list_checkpoints(folder)
        if not inside:
            raise CliError(
                f"--resume: {folder} is neither a checkpoint nor a run with checkpoints "
                "(see --save-every)"
            )
        folder = inside[-1]
    missing = [name for name in (TRAINER_FILE, *ADAPTER_FILES) if not (folder / name).exists()]
    if missing:
        raise CliError(f"--resume: checkpoint {folder} lacks {missing[0]}")
    return folder


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Load trainer.pt; only tensors and plain values are accepted, so a foreign file cannot run
    code.
    """
    import torch

    try:
        state = torch.load(checkpoint / TRAINER_FILE, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or {"step", "settings", "optimizer", "rng"} - set(state):
            raise ValueError("not a lowbit trainer state")
    except Exception as error:
        reason = first_sentence(error, limit=120)
        raise CliError(f"--resume: {checkpoint / TRAINER_FILE} cannot be read: {reason}") from None
    return state


def read_run(adapter: Path) -> dict[str, Any]:
    """The run.json beside an adapter, or {} for adapters that another tool wrote.

    Raises CliError if it is damaged: without it, the base would be quantized in another way.
    """
    path = adapter / RUN_FILE
    if not path.exists():
        return {}
    try:
        run = json.loads(path.read_text())
        if isinstance(run, dict) and isinstance(run.get("settings", {}), dict):
            return run
    except ValueError:
        pass
    raise CliError(f"{path} is damaged; remove it to go by the options alone")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=True) + "\n")
