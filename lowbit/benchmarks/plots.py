"""PNGs of `lowbit bench linear`: for every layer, time over M and time over the floor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .records import Row

LINEAR_OP = "lora_linear"
# One look for each implementation in every figure: (color, line style). lowbit comes last, on top.
STYLES = {
    "dense": ("tab:gray", "-"),
    "dense+lora": ("tab:brown", "-"),
    "dense+addmm": ("tab:olive", "-"),
    "bitsandbytes": ("tab:orange", "-"),
    "unsloth-style": ("tab:green", "-"),
    "torchao": ("tab:purple", "-"),
    "lowbit-panels": ("tab:cyan", "-"),
    "lowbit": ("tab:blue", "-"),
}


def plot_linear(
    rows: Sequence[Row],
    folder: Path,
    machine: str = "",
    *,
    op: str = LINEAR_OP,
    name: str = "linear",
) -> list[Path]:
    """Draw one figure for each layer and dtype.

    Args:
        rows: of `lowbit bench linear`; those of operations other than `op` are ignored.
        folder: made if it does not exist.
        machine: named in the title; default the card of this machine, if there is one.
        name: begins the names of the files.

    Returns:
        The files written, `<name>_<layer>_<dtype>.png`.
    """
    import matplotlib

    matplotlib.use("Agg")  # no window, also where a display exists
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    machine = machine or _card()
    paths = []
    cases: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.op == op:
            cases.setdefault((row.layer or f"{row.N}x{row.K}", row.dtype), []).append(row)
    for (layer, dtype), mine in cases.items():
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), dpi=140, layout="tight")
        try:
            _draw_times(left, mine)
            _draw_ratios(right, mine)
            first = mine[0]
            title = f"{layer}: {first.N} x {first.K}, {dtype}, rank {first.r}"
            figure.suptitle(", ".join(part for part in (title, machine) if part), fontsize=10)
            paths.append(folder / f"{name}_{layer}_{dtype}.png")
            figure.savefig(paths[-1])
        finally:
            pyplot.close(figure)
    return paths


def _card() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def _draw_times(axes, rows: Sequence[Row]) -> None:
    for impl, mine in _by_implementation(rows).items():
        low = [row.us - row.p20 for row in mine]
        high = [row.p80 - row.us for row in mine]
        options = {"label": impl, "marker": "o", "markersize": 3, "capsize": 2, **_style(impl)}
        axes.errorbar([row.M for row in mine], [row.us for row in mine], [low, high], **options)
    floor = {row.M: row.floor_us for row in rows if row.floor_us}
    tokens = sorted(floor)
    axes.plot(tokens, [floor[M] for M in tokens], "k--", linewidth=1, label="floor")
    axes.set_ylabel("us per layer")
    _finish(axes, rows)


def _draw_ratios(axes, rows: Sequence[Row]) -> None:
    for impl, mine in _by_implementation(rows).items():
        points = [(row.M, row.vs_floor) for row in mine if row.vs_floor]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, **_style(impl))
    axes.axhline(1.0, color="black", linestyle="--", linewidth=1)
    axes.set_ylabel("time / floor")
    _finish(axes, rows, legend=False)


def _finish(axes, rows: Sequence[Row], *, legend: bool = True) -> None:
    from matplotlib import ticker

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    tokens = sorted({row.M for row in rows})
    axes.set_xticks(tokens, [str(M) for M in tokens])
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xlabel("M (tokens)")
    axes.grid(alpha=0.25, which="both")
    if legend:
        axes.legend(frameon=False, fontsize=8)


def _by_implementation(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.M):
        groups.setdefault(row.impl, []).append(row)
    order = list(STYLES)
    return dict(
        sorted(groups.items(), key=lambda item: order.index(item[0]) if item[0] in order else 0)
    )


def _style(impl: str) -> dict:
    color, line = STYLES.get(impl, ("black", ":"))
    width = 2.2 if impl == "lowbit" else 1.2
    return {"color": color, "linestyle": line, "linewidth": width}
