"""Draw the figures that README.md shows, from the records in bench/results.

`report.py` calls this. A figure carries the digest of the records it was drawn from, so that
whether it is up to date can be told without drawing it again (pixels depend on matplotlib's
version).
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

from lowbit.benchmarks.plots import STYLES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DOCS = ROOT / "docs"
CARDS = ("h200", "h100")  # the README shows the first
PANELS = {  # record of a card: the operation to show, the panel's title
    "linear": ("lora_linear", "forward"),
    "linear_backward": ("forward+backward", "forward and backward"),
}
SHOWN = ("dense", "dense+lora", "bitsandbytes", "unsloth-style", "lowbit")
TITLES = {
    "dense": "16-bit layer, no LoRA",
    "dense+lora": "16-bit layer + LoRA (PEFT's formula)",
    "bitsandbytes": "bitsandbytes + LoRA",
    "unsloth-style": "dequantize, cuBLAS, addmm (Unsloth's way)",
    "lowbit": "lowbit",
}


def figure(card: str) -> Path:
    """Where the figure of a card's layers is."""
    return DOCS / f"layers_{card}.svg"


def _record(name: str, card: str) -> Path:
    return RESULTS / f"{name}_{card}.json"


def digest(card: str) -> str:
    """Of the records that the figure shows."""
    content = b"".join(_record(name, card).read_bytes() for name in PANELS)
    return hashlib.sha256(content).hexdigest()[:16]


def up_to_date(card: str) -> bool:
    return figure(card).exists() and digest(card) in figure(card).read_text()


def ratios(record: dict, op: str) -> dict[str, dict[int, list[float]]]:
    """Time over that of the 16-bit layer without LoRA: by implementation and M, all layers."""
    rows = [row for row in record["rows"] if row["op"] == op and row["impl"] in SHOWN]
    dense = {(row["layer"], row["M"]): row["us"] for row in rows if row["impl"] == "dense"}
    found: dict[str, dict[int, list[float]]] = {impl: {} for impl in SHOWN}
    for row in sorted(rows, key=lambda row: row["M"]):
        ratio = row["us"] / dense[row["layer"], row["M"]]
        found[row["impl"]].setdefault(row["M"], []).append(ratio)
    return found


def draw(card: str) -> None:
    """One panel per record: the geometric mean over the layers, and the range as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    options = {"svg.hashsalt": "lowbit", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(options):
        drawn, panels = pyplot.subplots(1, len(PANELS), figsize=(10, 4), layout="constrained")
        for axes, (name, (op, title)) in zip(panels, PANELS.items(), strict=True):
            record = json.loads(_record(name, card).read_text())
            _draw_panel(axes, ratios(record, op), f"{title} ({record['environment']['card']})")
        panels[0].set_ylabel("time / 16-bit layer without LoRA")
        handles, labels = panels[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        about = {"Date": None, "Description": f"records {digest(card)}"}
        drawn.savefig(figure(card), metadata=about)
        pyplot.close(drawn)


def _draw_panel(axes, by_impl: dict[str, dict[int, list[float]]], title: str) -> None:
    from matplotlib import ticker

    for impl, by_tokens in by_impl.items():
        tokens, groups = list(by_tokens), list(by_tokens.values())
        mean = [math.exp(sum(map(math.log, group)) / len(group)) for group in groups]
        color, width = STYLES[impl][0], 2.2 if impl == "lowbit" else 1.3
        axes.plot(tokens, mean, "o-", color=color, lw=width, markersize=3, label=TITLES[impl])
        axes.fill_between(
            tokens, list(map(min, groups)), list(map(max, groups)), color=color, alpha=0.12, lw=0
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(tokens, [str(M) for M in tokens])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_locator(
        ticker.FixedLocator([0.25, 0.35, 0.5, 0.7, 1, 1.25, 1.5, 2, 2.5, 3])
    )
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xlabel("M (tokens)")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.25)
