"""The typer application: one function per command, each importing what it needs when it runs."""

import signal
import sys

import typer

from . import bench as _bench
from . import finetune as _finetune
from . import generate as _generate
from . import info as _info
from . import merge as _merge
from .options import paragraphs

HELP = "4-bit QLoRA fine-tuning on any machine. Start with: lowbit finetune --demo"

EXAMPLES = """Examples:

\b
  lowbit finetune --demo
\b
  lowbit generate --adapter out/demo --prompt "What is NF4?"
\b
  lowbit finetune --help
"""

app = typer.Typer(
    name="lowbit",
    help=HELP,
    epilog=EXAMPLES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _module, _function in (
    (_info, _info.info),
    (_finetune, _finetune.finetune),
    (_generate, _generate.generate),
    (_merge, _merge.merge),
):
    app.command(help=paragraphs(_module.HELP), epilog=_module.EXAMPLES)(_function)
app.add_typer(_bench.app)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .._version import __version__

        print(f"lowbit {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Options of `lowbit` itself."""


def run() -> None:
    """Run the application; a Ctrl-C that no command handled still ends without a traceback, and
    SIGTERM does what Ctrl-C does.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except KeyboardInterrupt:
        print("lowbit: interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
