"""`lowbit bench`: measurements of this machine, one subcommand for each."""

import importlib.util
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from . import bench_model
from .errors import EXIT_INTERNAL, CliError, guard, is_out_of_memory
from .options import option, paragraphs

HELP = """Measure this machine: lowbit against dense layers and the libraries beside it."""

LINEAR_HELP = """Time a linear layer with a LoRA adapter on a GPU: forward, or forward and backward.

Compares lowbit with a dense 16-bit layer, with and without LoRA, and with bitsandbytes, Unsloth's
method and torchao where they are installed. Every result is checked against float64 first. Times
are medians over CUDA graph replays that rotate through copies of the weight, next to the floor: the
least time that the card's measured copy bandwidth and product rate allow.
"""

LINEAR_EXAMPLES = """Examples:

\b
  lowbit bench linear --shapes llama-8b --m 1,16,256,4096
\b
  lowbit bench linear --shapes q8b,gate70b,4096x11008 --m 1,8,64 \\
      --impl dense,lowbit,bitsandbytes --eager
\b
  lowbit bench linear --shapes qwen2.5-7b --dtype fp16 --json linear.json \\
      --plot plots
\b
  lowbit bench linear --backward --shapes llama-8b --m 256,1024,4096 --eager
"""

DTYPES = {"bf16": "bfloat16", "fp16": "float16"}

EXAMPLES = """Examples:

\b
  lowbit bench linear --shapes llama-8b --m 1,16,256,4096
\b
  lowbit bench model --config llama-8b --batch 4 --seq 1024
"""

app = typer.Typer(
    name="bench",
    help=HELP,
    epilog=EXAMPLES,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _result(*names: str, help: str, **limits: Any) -> Any:
    return option(*names, panel="Results", help=help, **limits)


Shapes = Annotated[
    str,
    option(
        "--shapes",
        help="llama-8b, llama-70b, qwen2.5-7b, qwen2.5-vl-vision, smollm2-135m, a single layer of "
        "one (q8b, gate70b), or OUTxIN like 4096x11008; several separated by commas.",
    ),
]
Tokens = Annotated[str, option("--m", "--M", help="Numbers of tokens, separated by commas.")]
Rank = Annotated[int, option("--r", help="Rank of the adapter.", min=1)]
Dtype = Annotated[str, option("--dtype", help="bf16 or fp16.")]
Implementations = Annotated[
    str | None,
    option(
        "--impl",
        help="dense, dense+lora, dense+addmm, lowbit, lowbit-panels, bitsandbytes, unsloth-style, "
        "torchao; several separated by commas. Default: all that are installed.",
    ),
]
Rounds = Annotated[
    int,
    option("--rounds", help="Most rounds of 3 samples; long cases take fewer, at least 6.", min=1),
]
Eager = Annotated[
    bool,
    option(
        "--eager",
        help="Also the time that the host needs per call, for M up to 64; with --backward the wall "
        "time of one layer and the host's in a chain of layers, for M up to 256.",
    ),
]
Backward = Annotated[
    bool,
    option("--backward", help="Forward and backward, with the gradients of x and the adapter."),
]
Json = Annotated[Path | None, _result("--json", help="Write rows and environment to this file.")]
Plot = Annotated[Path | None, _result("--plot", help="Draw PNGs into this folder.")]


@app.command("linear", help=paragraphs(LINEAR_HELP), epilog=LINEAR_EXAMPLES)
def linear(
    shapes: Shapes = "llama-8b",
    m: Tokens = "1,16,256,4096",
    r: Rank = 16,
    dtype: Dtype = "bf16",
    impl: Implementations = None,
    rounds: Rounds = 8,
    backward: Backward = False,
    eager: Eager = False,
    json: Json = None,
    plot: Plot = None,
) -> None:
    with guard():
        from ..benchmarks.shapes import parse_counts, parse_shapes

        # Mistakes are found before torch is imported, which takes seconds.
        layers, tokens = parse_shapes(shapes), parse_counts("--m", m)
        if dtype not in DTYPES:
            raise CliError(f"--dtype must be {' or '.join(DTYPES)}, got {dtype}")
        _check_outputs(json, plot)
        wanted = _implementations(impl)
        _require_cuda("lowbit bench linear")
        import torch

        from ..benchmarks.linear import Options

        _run(
            Options(
                layers=layers,
                tokens=tokens,
                r=r,
                dtype=getattr(torch, DTYPES[dtype]),
                implementations=wanted,
                rounds=rounds,
                eager=eager,
                backward=backward,
                json=json,
                plot=plot,
            )
        )


app.command("model", help=paragraphs(bench_model.HELP), epilog=bench_model.EXAMPLES)(
    bench_model.model
)


def _run(options: Any) -> None:
    from ..benchmarks import linear, linear_backward
    from ..benchmarks.checks import CheckError

    try:
        (linear_backward if options.backward else linear).run(options)
    except CheckError as error:
        raise CliError(str(error), EXIT_INTERNAL) from error
    except Exception as error:
        if is_out_of_memory(error):
            raise CliError("the GPU ran out of memory; give a smaller --m or --shapes") from error
        raise


def _implementations(text: str | None) -> list[str]:
    """Names of implementations, in the order in which they are listed; all by default."""
    from ..benchmarks.implementations import IMPLEMENTATIONS
    from ..benchmarks.shapes import names

    if text is None:
        return list(IMPLEMENTATIONS)
    wanted = names(text)
    unknown = [name for name in wanted if name not in IMPLEMENTATIONS]
    if unknown or not wanted:
        raise CliError(
            f"--impl must name some of {', '.join(IMPLEMENTATIONS)}; "
            f"got {', '.join(unknown) or text!r}"
        )
    return [name for name in IMPLEMENTATIONS if name in wanted]


def _check_outputs(json: Path | None, plot: Path | None) -> None:
    """Refuse what could not be written at the end of the run."""
    if json is not None and json.is_dir():
        raise CliError(f"--json {json} is a folder; name a file")
    if plot is not None:
        if plot.exists() and not plot.is_dir():
            raise CliError(f"--plot {plot} is a file; name a folder")
        if importlib.util.find_spec("matplotlib") is None:
            raise CliError("--plot needs matplotlib: pip install matplotlib")
    for name, path in (("--json", json), ("--plot", plot)):
        if path is None:
            continue
        parent = path.absolute() if path.is_dir() else path.absolute().parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise CliError(f"{name} {path} cannot be written: {parent} is no folder to write in")


def _require_cuda(command: str) -> None:
    import torch

    if torch.cuda.is_available():
        return
    if torch.version.cuda is None:
        why = f"this torch ({torch.__version__}) is built without CUDA"
    else:
        why = "torch sees no NVIDIA GPU with a working driver"
    raise CliError(f"{command} needs a CUDA device: {why}")
