"""`lowbit bench model`: the options, and how they become a measurement."""

import os
from pathlib import Path
from typing import Annotated

from ..benchmarks.model_configs import CONFIGS, ModelConfig
from .errors import EXIT_INTERNAL, CliError, guard, is_out_of_memory
from .options import option

HELP = """Time training steps of a whole model with random weights on a GPU.

The model is transformers' own, in double-quantized NF4 with 16-bit adapters on every linear layer
of its blocks, built and packed layer by layer on the GPU: nothing is downloaded, and the whole
model never exists in 16 bits. It first has to show that it trains; then steps are timed and the
memory of the card is taken apart. `llama-65b` with rank 64 is the QLoRA paper's headline.
"""

EXAMPLES = """Examples:

\b
  lowbit bench model --config llama-8b --batch 4 --seq 1024
\b
  lowbit bench model --config llama-8b --seq 512 --graph --profile
\b
  lowbit bench model --config llama-65b --rank 64 --memory-limit 43
\b
  lowbit bench model --config qwen2.5-vl-7b --seq 2048 --image 1008
"""

IMAGE = 448
OPTIMIZERS = ("adamw", "paged-adamw", "paged-adamw-8bit")
PEERS = ("peft-bnb",)

Config = Annotated[str, option("--config", help=f"{', '.join(CONFIGS)}.")]
Rank = Annotated[int, option("--rank", "-r", help="Rank of the adapters.", min=1)]
BatchSize = Annotated[int, option("--batch", "-b", help="Sequences per step.", min=1)]
Length = Annotated[int, option("--seq", "-s", help="Tokens per sequence.", min=2)]
Image = Annotated[
    int | None,
    option("--image", help="Of qwen2.5-vl: edge of each sequence's image in pixels, default 448."),
]
Optimizer = Annotated[str, option("--optimizer", help=f"{', '.join(OPTIMIZERS)}.")]
Graph = Annotated[
    bool, option("--graph", help="Also the step with forward and backward as a CUDA graph.")
]
Fuse = Annotated[
    bool, option("--fuse/--no-fuse", help="lowbit.fuse: groups, gated MLPs, norms, rotary.")
]
Checkpointing = Annotated[
    bool,
    option("--checkpointing/--no-checkpointing", help="Gradient checkpointing of every block."),
]
Compare = Annotated[
    str | None, option("--compare", help=f"Measure beside lowbit: {', '.join(PEERS)}.")
]
Profile = Annotated[bool, option("--profile", help="Where the GPU's time goes, by kernel class.")]
MemoryLimit = Annotated[
    float | None,
    option("--memory-limit", help="GiB of the card to use, as if it had no more.", min=1.0),
]
Seconds = Annotated[float, option("--seconds", help="Time to spend on timed steps.", min=0.0)]
Json = Annotated[
    Path | None,
    option("--json", panel="Results", help="Write rows and environment to this file."),
]


def model(
    config: Config = "llama-8b",
    rank: Rank = 16,
    batch: BatchSize = 1,
    seq: Length = 512,
    image: Image = None,
    optimizer: Optimizer = "paged-adamw",
    graph: Graph = False,
    fuse: Fuse = True,
    checkpointing: Checkpointing = True,
    compare: Compare = None,
    profile: Profile = False,
    memory_limit: MemoryLimit = None,
    seconds: Seconds = 4.0,
    json: Json = None,
) -> None:
    # Segments that grow leave less memory unused; torch reads this when it is imported.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    with guard():
        from .bench import _check_outputs, _require_cuda

        chosen = CONFIGS[_one_of("--config", config, tuple(CONFIGS))]
        _one_of("--optimizer", optimizer, OPTIMIZERS)
        peers = [_one_of("--compare", compare, PEERS)] if compare is not None else []
        image = IMAGE if image is None and chosen.vision is not None else image
        if image is not None:
            _check_image(chosen, seq, image)
        _check_outputs(json, None)
        _require_cuda("lowbit bench model")
        from . import source

        source.quiet(offline=True)
        from ..benchmarks import model as bench
        from ..benchmarks.model_build import why_no_peft

        missing = why_no_peft() if peers else None
        if missing is not None:
            raise CliError(f"--compare {compare}: {missing}")
        options = bench.Options(
            chosen, rank, batch, seq, image, optimizer, graph, fuse, checkpointing, peers, profile,
            memory_limit, seconds, json,
        )  # fmt: skip
        try:
            bench.run(options)
        except bench.CheckError as error:
            raise CliError(str(error), EXIT_INTERNAL) from error
        except Exception as error:
            if is_out_of_memory(error):
                raise CliError(
                    "the GPU ran out of memory; give a smaller --batch, --seq or --config"
                ) from error
            raise


def _check_image(config: ModelConfig, seq: int, image: int) -> None:
    try:
        config.check_image(seq, image)
    except ValueError as error:
        raise CliError(str(error)) from error


def _one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise CliError(f"{name} must be one of {', '.join(known)}, got {value}")
    return value
