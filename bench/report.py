"""Write the measured tables of README.md from the records in bench/results.

    python bench/report.py            rewrite the part between the two markers
    python bench/report.py --check    exit 1 if that would change anything

A record is what write_json in common.py wrote. A table is made for each record found; its caption
names the machine, the versions and the date the record holds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->"


def records() -> Iterable[tuple[str, dict]]:
    for path in sorted(RESULTS.glob("*.json")):
        yield path.name, json.loads(path.read_text())


def machine(environment: dict, *, card: bool) -> str:
    """The caption's machine and versions; a CPU record says how many threads and which level."""
    date, torch = environment["date"], environment["torch"]
    if card:
        return f"{environment['card']}, torch {torch}, {date}"
    level = environment.get("cpu_isa")
    return (
        f"{environment['cpu']} ({level}), {environment['threads']} threads, torch {torch}, {date}"
    )


def table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def time_cell(row: dict | None) -> str:
    if row is None:
        return "-"
    return f"{row['us'] / 1000:.2f}"


def cpu_linear(name: str, record: dict) -> str:
    """Milliseconds per operation; the fastest lowbit row is the level the machine would use."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in record["rows"]:
        case = (row["op"], row["dtype"], row["N"], row["K"], row["M"])
        cases.setdefault(case, {})[row["impl"]] = row
    level = record["environment"]["cpu_isa"]
    dtypes = {row["dtype"] for row in record["rows"]}
    shown = "bf16" if "bf16" in dtypes else "fp32"  # the record has all of them
    body = []
    for (op, dtype, N, K, M), impls in cases.items():
        if dtype != shown or (op == "linear" and M > 1):
            continue  # the layer with its adapter says more
        ours = impls.get(f"lowbit-{level}") or impls.get("lowbit")
        dense = impls["dense"]
        ratio = f"{ours['us'] / dense['us']:.2f}"
        cells = [time_cell(impls.get(key)) for key in ("dense", "bitsandbytes")]
        body.append([op, dtype, f"{N} x {K}", str(M), *cells, time_cell(ours), ratio])
    head = ["ms", "dtype", "N x K", "M", "dense", "bitsandbytes", "lowbit", "lowbit / dense"]
    caption = machine(record["environment"], card=False)
    return f"Linear layers on a CPU, rank 16 ({caption}; `{name}`):\n\n{table(head, body)}"


def quantize(name: str, record: dict) -> str:
    """Milliseconds of quantize and dequantize as a user calls them."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in record["rows"]:
        if "dropout" not in row["op"]:
            cases.setdefault((row["op"], row["N"], row["K"]), {})[row["impl"]] = row
    body = []
    for (op, N, K), impls in cases.items():
        ours = min((r for i, r in impls.items() if i.startswith("lowbit")), key=lambda r: r["us"])
        others = [time_cell(impls.get(key)) for key in ("copy", "bitsandbytes")]
        body.append([op, f"{N} x {K}", *others, time_cell(ours)])
    caption = machine(record["environment"], card=False)
    head = ["ms, bf16", "N x K", "copy", "bitsandbytes", "lowbit"]
    return f"Quantization on a CPU ({caption}; `{name}`):\n\n{table(head, body)}"


def cuda_quantize(name: str, record: dict) -> str:
    """Microseconds and the share of the card's copy bandwidth of the compiled CUDA kernels."""
    body = []
    for row in record["rows"]:
        if row["impl"] != "nested":  # double quantization is the default; the record has both
            continue
        rate = row["bytes"] / row["us"] / 1e6
        peak = f"{row['percent_peak']:.0f} %"
        case = [row["op"], f"{row['N']} x {row['K']}", row["dtype"]]
        body.append([*case, f"{row['us']:.1f}", f"{rate:.2f}", peak])
    head = ["double-quantized", "N x K", "dtype", "us", "TB/s", "of copy bandwidth"]
    caption = machine(record["environment"], card=True)
    return f"Quantization on a GPU ({caption}; `{name}`):\n\n{table(head, body)}"


LINEAR_COLUMNS = {  # of the README, in this order, where the record has them
    "dense": "dense, no LoRA",
    "dense+lora": "dense + LoRA",
    "bitsandbytes": "bitsandbytes",
    "unsloth-style": "Unsloth-style",
    "lowbit": "lowbit",
}
LINEAR_TOKENS = (1, 16, 256, 4096)  # the record may have more


def linear(name: str, record: dict) -> str:
    """Microseconds of a linear layer with its adapter on a GPU, and what the card allows."""
    rows = [row for row in record["rows"] if row["op"] == "lora_linear"]
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cases.setdefault((row["N"], row["K"], row["M"]), {})[row["impl"]] = row
    measured = {M for _, _, M in cases}
    shown = measured & set(LINEAR_TOKENS) or measured
    columns = {
        impl: title
        for impl, title in LINEAR_COLUMNS.items()
        if any(impl in impls for impls in cases.values())
    }
    body = []
    for (N, K, M), impls in cases.items():
        if M not in shown:
            continue
        ours, dense = impls["lowbit"], impls.get("dense")
        times = [f"{impls[impl]['us']:.1f}" if impl in impls else "-" for impl in columns]
        ratio = f"{ours['us'] / dense['us']:.2f}" if dense else "-"
        floor = f"{ours['us'] / ours['floor_us']:.2f}"
        body.append([f"{N} x {K}", str(M), f"{ours['floor_us']:.1f}", *times, ratio, floor])
    head = ["us", "M", "floor", *columns.values(), "lowbit / dense", "lowbit / floor"]
    ceilings = record["ceilings"]
    rates = (
        f"floor: the larger of bytes at {ceilings['copy_gbps'] / 1e3:.2f} TB/s and flops at "
        f"{ceilings['matmul_tflops']:.0f} TFLOP/s, both measured"
    )
    caption = machine(record["environment"], card=True)
    what = f"Linear layers on a GPU, forward, {rows[0]['dtype']}, rank {rows[0]['r']}"
    return f"{what} ({caption}; {rates}; `{name}`):\n\n{table(head, body)}"


WRITERS = {
    "cpu_linear": cpu_linear,
    "quantize": quantize,
    "cuda_quantize": cuda_quantize,
    "linear": linear,
}


def report() -> str:
    parts = [
        WRITERS[record["benchmark"]](name, record)
        for name, record in records()
        if record.get("benchmark") in WRITERS
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="only say whether README is up to date"
    )
    options = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    updated = before + BEGIN + "\n" + report() + "\n" + END + after
    if options.check:
        if updated != text:
            print("README.md does not show bench/results; run python bench/report.py")
        return int(updated != text)
    readme.write_text(updated)
    return 0


if __name__ == "__main__":
    sys.exit(main())
