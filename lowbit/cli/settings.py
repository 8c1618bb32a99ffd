"""The settings of one fine-tuning run: what the options mean, what a checkpoint must agree with."""

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CliError

SCHEDULES = ("linear", "cosine", "constant")
OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit")
QUANT_TYPES = ("nf4", "fp4", "nf3", "nf2")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")

# A resumed run repeats the uninterrupted one only if these are the same.
FIXED_ON_RESUME = (
    "model",
    "system",
    "chat_template",
    "rank",
    "alpha",
    "dropout",
    "targets",
    "quant_type",
    "blocksize",
    "double_quant",
    "optimizer",
    "batch",
    "accumulate",
    "max_length",
    "eval_fraction",
    "seed",
)


@dataclass
class Settings:
    """Options of `lowbit finetune`; field names are the option names with underscores."""

    model: str = ""
    data: str = ""
    output: str = ""
    eval_data: str | None = None
    eval_fraction: float = 0.0
    system: str | None = None
    chat_template: bool = True
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str = "all-linear"
    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    optimizer: str = "adamw"
    learning_rate: float = 2e-4
    schedule: str = "linear"
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    epochs: float = 3.0
    steps: int | None = None
    batch: int = 4
    accumulate: int = 1
    max_length: int = 1024
    gradient_checkpointing: bool = False
    fuse: bool = True
    graphs: bool = True
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    save_every: int = 0
    eval_every: int = 0
    show: int = 5
    show_tokens: int = 60
    overwrite: bool = False
    demo: bool = False

    def check(self) -> None:
        """Raise CliError for values that the option types alone cannot refuse."""
        for name in ("model", "data", "output"):
            if not getattr(self, name):
                raise CliError(f"--{name} is missing (or use --demo, which needs no other option)")
        self.check_model()
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        for name, low, high in (("dropout", 0, 1), ("eval_fraction", 0, 1), ("warmup", 0, 1)):
            if not low <= getattr(self, name) < high:
                option = name.replace("_", "-")
                raise CliError(
                    f"--{option} must be at least {low} and below {high}, got {getattr(self, name)}"
                )
        for name in ("learning_rate", "alpha", "epochs"):
            if not 0 < getattr(self, name) < math.inf:
                option = name.replace("_", "-")
                raise CliError(f"--{option} must be positive and finite, got {getattr(self, name)}")
        if self.eval_data and self.eval_fraction:
            raise CliError("--eval-data and --eval-fraction exclude each other; give one of them")

    def check_model(self) -> None:
        """The part of `check` that concerns how the model is loaded and quantized."""
        _one_of("quant-type", self.quant_type, QUANT_TYPES)
        _one_of("device", self.device, DEVICES)
        _one_of("dtype", self.dtype, DTYPES)
        if self.blocksize not in {2**i for i in range(5, 13)}:
            raise CliError(
                f"--blocksize must be a power of two from 32 to 4096, got {self.blocksize}"
            )

    @property
    def target_names(self) -> str | list[str]:
        """ "all-linear", or the list of module names."""
        names = [name.strip() for name in self.targets.split(",") if name.strip()]
        if not names:
            raise CliError(
                "--targets is empty; give all-linear or module names separated by commas"
            )
        return "all-linear" if names == ["all-linear"] else names

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """Read settings that an earlier run wrote; fields this version does not know are
        ignored.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def check_resumable(self, earlier: "Settings", checkpoint: Path) -> None:
        """Raise CliError if this run cannot continue a checkpoint made with `earlier`."""
        for name in FIXED_ON_RESUME:
            now, then = getattr(self, name), getattr(earlier, name)
            if now != then:
                option = "--" + name.replace("_", "-")
                raise CliError(
                    f"checkpoint {checkpoint} was made with {option} {then}, this run has {now}"
                )


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a data file: a checkpoint's position means something only in the same file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise CliError(f"--{option} must be one of {', '.join(known)}, got {value}")
