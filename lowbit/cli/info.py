"""`lowbit info`: what this machine can run, and why not the rest."""

import json
from typing import Annotated, Any

import typer

from .errors import guard

HELP = """Report versions, processor, GPUs, backends, and which backend each operation uses here."""

EXAMPLES = """Examples:

\b
  lowbit info
\b
  lowbit info --json > machine.json
"""


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    with guard():
        from .._info import report

        facts = report()
        if as_json:
            print(json.dumps(facts, indent=1))
        else:
            _show(facts)


def _show(facts: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from .report import make_console

    console = make_console()
    versions = facts["versions"]
    console.print(Text.assemble(("lowbit ", "bold cyan"), str(versions["lowbit"])))
    head = Table.grid(padding=(0, 2))
    for name, text in _head(facts):
        head.add_row(Text(name, style="cyan"), Text(text))
    console.print(head)
    console.print()
    backends = Table(title="Backends", title_justify="left")
    backends.add_column("backend")
    backends.add_column("here?")
    backends.add_column("why not", overflow="fold")
    for name, reason in facts["backends"].items():
        mark = Text("no", style="yellow") if reason else Text("yes", style="green")
        backends.add_row(name, mark, Text(reason or ""))
    console.print(backends)
    console.print(_operations(facts["operations"]))


def _head(facts: dict[str, Any]) -> list[tuple[str, str]]:
    versions, cpu, cuda = facts["versions"], facts["cpu"], facts["cuda"]
    packages = ", ".join(
        f"{name} {version or 'not installed'}"
        for name, version in versions.items()
        if name not in ("lowbit", "system")
    )
    level = cpu["level_in_use"] or "none, the library is missing"
    rows = [
        ("system", str(versions["system"])),
        ("packages", packages),
        ("processor", f"{cpu['model']}, {cpu['threads']} threads"),
        ("CPU kernels", f"{level} (the processor has {', '.join(cpu['levels']) or 'none'})"),
        ("CUDA", f"torch: {cuda['torch'] or 'without'}, driver: {cuda['driver'] or 'none'}"),
    ]
    for gpu in cuda["gpus"]:
        memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
        rows.append(("GPU", f"{gpu['name']}, compute capability {gpu['capability']}, {memory}"))
    if facts["forced"]:
        rows.append(("forced", str(facts["forced"])))
    return rows


def _operations(choices: list[dict[str, Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Backend of each operation", title_justify="left")
    for name in ("device", "operation", "from M", "backend"):
        table.add_column(name, no_wrap=True)
    table.add_column("reason", overflow="fold")
    for choice in choices:
        table.add_row(
            choice["device"],
            choice["operation"],
            str(choice["min_tokens"]),
            choice["backend"] or "none",
            Text(choice["reason"] or ""),
        )
    return table
