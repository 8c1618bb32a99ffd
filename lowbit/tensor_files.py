"""Reading safetensors checkpoints tensor by tensor, and writing folders that are whole or not
there.

A checkpoint is one `*.safetensors` file, or a folder with `model.safetensors`, with the shards that
`model.safetensors.index.json` lists, or with any `*.safetensors` files.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .state import CheckpointError

_INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100 * 2**20  # the limit of the format's own library


class TensorSource:
    """Named tensors, read one at a time.

    Args:
        weights: path of a safetensors file or folder, a mapping name -> tensor, or an iterable of
            (name, tensor).

    Attributes:
        names: all names, or None when `weights` is an iterable that only tells while it runs.

    Raises:
        FileNotFoundError: the path does not exist.
        CheckpointError: a file is damaged; found out here, from headers and file sizes.
        TypeError: weights is none of the above.
    """

    def __init__(self, weights: str | os.PathLike | Mapping[str, torch.Tensor] | Iterable) -> None:
        self._weights = weights
        self._files: dict[Path, list[str]] | None = None
        self.names: list[str] | None = None
        if isinstance(weights, (str, os.PathLike)):
            self._files = {path: list(read_header(path)) for path in checkpoint_files(weights)}
            self.names = [name for names in self._files.values() for name in names]
        elif isinstance(weights, Mapping):
            self.names = list(weights)
        elif not isinstance(weights, Iterable):
            raise TypeError(
                "weights must be a path, a mapping name -> tensor or an iterable of "
                f"(name, tensor), got {type(weights).__name__}"
            )

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self._files is not None:
            for path, names in self._files.items():
                yield from _read_file(path, names)
        elif isinstance(self._weights, Mapping):
            for name in self._weights:
                yield name, self._weights[name]
        else:
            yield from self._weights


def _read_file(path: Path, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a file; none is kept, so each is freed before the next is read."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name in names:
            yield name, file.get_tensor(name)


def checkpoint_files(path: str | os.PathLike) -> list[Path]:
    """Return the safetensors files of a checkpoint.

    Raises:
        FileNotFoundError: nothing is there, or a shard that the index lists is missing.
        CheckpointError: the index is not valid.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"weights: there is no file or folder {path}")
    if (path / _INDEX).is_file():
        return _indexed_files(path / _INDEX)
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    files = sorted(p for p in path.glob("*.safetensors") if not p.name.startswith("adapter_"))
    if not files:
        raise FileNotFoundError(
            f"weights: folder {path} holds no *.safetensors file; convert other formats first"
        )
    return files


def _indexed_files(index: Path) -> list[Path]:
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is not a valid index of shards ({error!r})") from None
    files = [index.parent / shard for shard in shards]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{index.name} lists {file.name}, which is not in {index.parent}"
            )
    return files


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Read and check the header of a safetensors file.

    Returns:
        {name: {"dtype", "shape", "data_offsets"}} in the order of the data.

    Raises:
        CheckpointError: no valid header, or the file is too short; the message names the first
            tensor that is cut off.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{path} is no safetensors file, or it is cut off in its header")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
            ends = [(name, entry["data_offsets"][1]) for name, entry in entries]
        except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
            raise CheckpointError(f"{path} has a damaged safetensors header ({error!r})") from None
    for name, end in ends:
        if 8 + length + end > size:
            raise CheckpointError(
                f"{name} is cut off: {path} has {size} bytes and should have at least "
                f"{8 + length + ends[-1][1]}"
            )
    return dict(entries)


@contextlib.contextmanager
def atomic_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Write a folder of files so that a crash leaves no half-written file.

    Yields a temporary folder beside the target. On success its files replace those of the same name
    in `folder` (a folder that did not exist appears in one step); after an exception it is removed.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ValueError(f"folder must be a directory, but {target} is a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield scratch
        for file in scratch.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        _put_in_place(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _put_in_place(scratch: Path, target: Path) -> None:
    if not target.is_dir():
        scratch.chmod(_usual_mode(scratch))  # mkdtemp makes folders private
        try:
            scratch.rename(target)
            return
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    for file in sorted(scratch.iterdir()):
        file.replace(target / file.name)
    scratch.rmdir()


def _usual_mode(folder: Path) -> int:
    """Of new folders, seen by making one: to ask for the process's umask is to set it, for a moment
    in which other threads make files that everybody may write.
    """
    probe = Path(tempfile.mkdtemp(dir=folder)) / "probe"
    try:
        probe.mkdir()
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        shutil.rmtree(probe.parent)


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    """Write a safetensors file; tensors must be contiguous and must not share storage."""
    from safetensors.torch import save_file

    path.touch()
    usual = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(usual)  # safetensors 0.8 makes files that only their owner can read
