"""Write docs/measured.md and what README.md shows of the records in bench/results.

    python bench/report.py            rewrite the file, the README between its markers, the figures
    python bench/report.py --check    exit 1 if that would change anything

A record is what write_json in common.py wrote. docs/measured.md has a table for each record found,
the README the few rows that HEADLINES picks; captions name the machine, the versions and the date
that the record holds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import figures

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
README, MEASURED = ROOT / "README.md", ROOT / "docs" / "measured.md"
INTRODUCTION = """# Measured

Made by `python bench/report.py` from the records in [bench/results](../bench/results); each was
checked against the reference before it was timed. What was predicted and what limits it:
[bench/NOTES.md](../bench/NOTES.md).

Time of a linear layer with LoRA over that of a 16-bit layer without, by tokens, geometric mean and
range of four layers of llama-8b and llama-70b:

""" + "".join(f"![{card}]({figures.figure(card).name})\n\n" for card in figures.CARDS)


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


def _note(record: dict) -> str:
    """What else is to be said of a record, as part of its caption."""
    return f"; {record['note']}" if "note" in record else ""


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
    "torchao": "torchao",
    "lowbit": "lowbit",
}
LINEAR_TOKENS = (1, 16, 256, 4096)  # the record may have more


def linear(
    name: str, record: dict, op: str = "lora_linear", tokens=LINEAR_TOKENS, title: str = "forward"
) -> str:
    """Microseconds of a linear layer with its adapter on a GPU, and what the card allows."""
    rows = [row for row in record["rows"] if row["op"] == op]
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cases.setdefault((row["N"], row["K"], row["M"]), {})[row["impl"]] = row
    measured = {M for _, _, M in cases}
    shown = measured & set(tokens) or measured
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
    if any(row["timing"] == "graph, sustained" for row in rows):
        rates += "; where arithmetic is the limit, times that each keeps up at the power limit"
    if "headline" not in record:
        rates += _note(record)
    caption = machine(record["environment"], card=True)
    what = f"Linear layers on a GPU, {title}, {rows[0]['dtype']}, rank {rows[0]['r']}"
    text = f"{what} ({caption}; {rates}; `{name}`):\n\n{table(head, body)}"
    return text if "headline" in record else text + _in_turn(cases, columns)


def _in_turn(cases: dict[tuple, dict[str, dict]], columns: dict[str, str]) -> str:
    """Microseconds of those cases at the power limit that were also timed in turn, if any."""
    body = []
    for (N, K, M), impls in cases.items():
        times = {impl: row.get("in_turn_us") for impl, row in impls.items()}
        if not times["lowbit"]:
            continue
        cells = [f"{times[impl]:.1f}" if times.get(impl) else "-" for impl in columns]
        ratio = f"{times['lowbit'] / times['dense']:.2f}" if times.get("dense") else "-"
        body.append([f"{N} x {K}", str(M), *cells, ratio, f"{impls['lowbit']['us']:.1f}"])
    if not body:
        return ""
    head = ["us", "M", *columns.values(), "lowbit / dense", "kept up"]
    what = (
        "In turn, each for some milliseconds, before the card is at its power limit; in the last "
        "column what lowbit keeps up there"
    )
    return f"\n\n{what}:\n\n{table(head, body)}"


def linear_options(name: str, record: dict) -> str:
    """What options cost: the layer's time, that with each over it, and what rank 64 may take."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in record["rows"]:
        cases.setdefault((row["N"], row["K"], row["M"]), {})[row["impl"]] = row
    ceilings = record["ceilings"]
    body = []
    for (N, K, M), impls in cases.items():
        plain, bias, fp32, large = impls.values()
        more_flops = 2 * M * (large["r"] - plain["r"]) * (N + K)
        allowed = (
            plain["us"]
            + more_flops / ceilings["matmul_tflops"] / 1e6
            + 2 * M * K / ceilings["copy_gbps"] / 1e3
        )
        ratios = [f"{row['us'] / plain['us']:.3f}" for row in (bias, fp32)]
        times = [f"{us:.1f}" for us in (large["us"], allowed)]
        body.append([f"{N} x {K}", str(M), f"{plain['us']:.1f}", *ratios, *times])
    head = ["us", "M", "lowbit", "with bias", "with fp32 scales", "rank 64", "its allowance"]
    caption = machine(record["environment"], card=True)
    what = "Options of a layer, forward; rank 64 may take its multiply-adds and a read of x"
    return f"{what} ({caption}; `{name}`):\n\n{table(head, body)}"


HOST_CASES = {
    "forward+backward wall": "one layer, wall",
    "f+b wall, calling thread": "one layer, wall, calling thread",
    "forward+backward host": "a layer of a chain, host",
    "f+b host, calling thread": "a layer of a chain, host, calling thread",
}
IN_A_ROW = (
    "calls of a contender in a row without the first two, as the first after other work takes up "
    "to 1.9 times as long"
)
AFTER_OTHERS = (
    "each is a contender's first call or chain after those of others, and would take less in a row"
)
HOST_COLUMNS = {"empty function": "empty function", **LINEAR_COLUMNS}


def linear_backward(name: str, record: dict) -> str:
    """The same of forward and backward; then what an eager call costs."""
    tokens = {row["M"] for row in record["rows"]}
    graphs = linear(name, record, "forward+backward", tokens, "forward and backward")
    times: dict[tuple, dict[str, float]] = {}
    in_a_row = False
    for row in record["rows"]:
        if row["op"] in HOST_CASES and row["impl"] in HOST_COLUMNS:
            in_a_row = row["timing"].endswith("in a row")
            case = (f"{row['N']} x {row['K']}", str(row["M"]), HOST_CASES[row["op"]])
            times.setdefault(case, {})[row["impl"]] = row["p20"]
    if not times:
        return graphs
    columns = [impl for impl in HOST_COLUMNS if any(impl in mine for mine in times.values())]
    body = [
        [*case, *(f"{mine[impl]:.0f}" if impl in mine else "-" for impl in columns)]
        for case, mine in times.items()
    ]
    head = ["us, eager", "M", "", *(HOST_COLUMNS[impl] for impl in columns)]
    what = (
        "The same without a CUDA graph, backward in a thread of autograd's own or in the calling "
        "one; 20th percentiles, as what disturbs a host only adds to its times"
    )
    if "empty function" in columns:
        what += "; the empty function is one of autograd's in Python, with the same tensors"
    what += "; " + (IN_A_ROW if in_a_row else AFTER_OTHERS)
    return f"{graphs}\n\n{what}:\n\n{table(head, body)}"


def optimizer(name: str, record: dict) -> str:
    """Milliseconds of a step on the LoRA parameters of two models, and where the state then is."""
    models = {"8b bf16": "8B, r 16", "65b bf16": "65B, r 64"}
    by_name: dict[str, dict[str, dict]] = {}
    for row in record["rows"]:
        if row["parameters"] in models:
            by_name.setdefault(row["optimizer"], {})[row["parameters"]] = row
    body = []
    for optimizer_name, rows in by_name.items():
        times = [f"{rows[m]['ms']:.2f}" if m in rows else "-" for m in models]
        large = rows.get("65b bf16", {})
        link = f"{large['link_ms']:.0f}" if large.get("link_ms") else "-"
        held = [f"{large[key]:.0f}" if large else "-" for key in ("device_mib", "host_mib")]
        body.append([optimizer_name, *times, link, *held])
    head = ["ms", *models.values(), "link at least", "GPU MiB", "host MiB"]
    link = record["link"]
    rates = (
        f"copies over the link: {link['to_device']:.0f} GB/s in, {link['each_way']:.0f} each way"
    )
    caption = machine(record["environment"], card=True)
    what = "One optimizer step, bf16 parameters (torch keeps state in bf16); link and memory of 65B"
    return f"{what} ({caption}; {rates} at once; `{name}`):\n\n{table(head, body)}"


def optimizer_headline(name: str, record: dict) -> str:
    """The README's figures of paged AdamW, with fp32 and with 8-bit state."""
    ms = {(row["parameters"], row["optimizer"]): row["ms"] for row in record["rows"]}

    def cell(parameters: str, library: str, bits32: str, where: str) -> str:
        optimizers = (f"{library} {bits}{where}" for bits in (bits32, "PagedAdamW8bit"))
        times = [ms.get((parameters, optimizer)) for optimizer in optimizers]
        return " / ".join(f"{t:.1f}" for t in times) if all(times) else "-"

    body = []
    for parameters, model, where, title in (
        ("8b bf16", "8B, r 16", "", "on the card"),
        ("65b bf16", "65B, r 64", "", "on the card"),
        ("65b bf16", "65B, r 64", " evicted", "moved out before each step"),
        ("65b bf16", "65B, r 64", " under pressure", "no room on the card"),
    ):
        torchs = "-" if where else f"{ms[parameters, 'torch AdamW fused']:.1f}"
        ours = cell(parameters, "lowbit", "PagedAdamW", where)
        theirs = cell(parameters, "bitsandbytes", "PagedAdamW32bit", where)
        body.append([model, title, torchs, ours, theirs])
    head = [
        "ms",
        "state",
        "torch fused, bf16",
        "lowbit, fp32 / 8-bit",
        "bitsandbytes, fp32 / 8-bit",
    ]
    caption = machine(record["environment"], card=True)
    what = (
        "One step of paged AdamW over all LoRA parameters, by where the state is and its precision "
        "(bitsandbytes had most of its paged state on the host in every row)"
    )
    return f"{what} ({caption}; `{name}`):\n\n{table(head, body)}"


def optimizer_curves(name: str, record: dict) -> str:
    """What the optimizer does to the losses of the demo."""
    body = []
    for optimizer_name, run in record["runs"].items():
        gaps = record["differences"][optimizer_name]
        losses = [run["losses"][-1], run["held_out"][-1]]
        mean = [gaps["mean"], gaps["held_out_mean"]]
        cells = [f"{x:.4f}" for x in (losses[0], losses[1], *mean)]
        body.append([optimizer_name, *cells])
    command = f"`lowbit finetune --demo --epochs {record['epochs']} --batch {record['batch']}`"
    head = [command, "last loss", "held-out loss", "mean gap", "held-out gap"]
    caption = machine(record["environment"], card=False)
    what = "Losses by optimizer; gaps are absolute differences to torch's AdamW"
    return f"{what} ({caption}; `{name}`):\n\n{table(head, body)}"


MODEL_TITLES = {
    "lowbit": "lowbit",
    "lowbit, graph": "lowbit, CUDA graph",
    "lowbit, not fused": "lowbit, not fused",
    "peft-bnb": "PEFT + bitsandbytes",
}


def model(name: str, record: dict) -> str:
    """Training steps of whole models, and where the memory of the largest one goes."""
    body = []
    for row in record["rows"]:
        speed = row["batch"] * row["seq"] / row["ms"] * 1e3
        name_of_case = row["config"] + ("" if row["checkpointing"] else ", all activations kept")
        if row.get("image"):
            name_of_case += f", images of {row['image']} x {row['image']} pixels"
        case = [name_of_case, str(row["r"]), f"{row['batch']} x {row['seq']}"]
        sizes = [f"{row[key] / 2**30:.1f}" for key in ("peak_bytes", "in_use_bytes")]
        body.append([*case, MODEL_TITLES[row["impl"]], f"{speed:,.0f}", f"{row['ms']:.0f}", *sizes])
    head = ["model", "rank", "batch x tokens", "", "tokens/s", "ms", "peak GiB", "in use GiB"]
    caption = machine(record["environment"], card=True)
    what = (
        "A training step of a whole model, random weights, transformers' code, gradient "
        "checkpointing, bf16 adapters on all linear layers, paged 32-bit AdamW"
    )
    parts = [f"{what} ({caption}{_note(record)}; `{name}`):\n\n{table(head, body)}"]
    largest = [row for row in record["rows"] if row["config"] == "llama-65b"]
    if largest and "headline" not in record:
        parts.append(_memory(largest, record["paper"]))
    return "\n\n".join(parts)


def _memory(rows: list[dict], paper: dict) -> str:
    """GB of every purpose, beside what the QLoRA paper promises for the same model."""
    body = [
        [part, *(f"{row['memory'][part] / 1e9:.1f}" for row in rows)] for part in rows[0]["memory"]
    ]
    body.append(["in use", *(f"{row['in_use_bytes'] / 1e9:.1f}" for row in rows)])
    host = [f"{row['host_bytes'] / 1e9:.1f}" for row in rows]
    body.append(["optimizer, on the host", *host])
    head = ["GB", *(MODEL_TITLES[row["impl"]] for row in rows)]
    limits = sorted({row["memory_limit"] for row in rows if row["memory_limit"]})
    limit = f"; lowbit may use {limits[0]:g} GiB of the card" if limits else ""
    text = (
        f"Memory of the {rows[0]['config']} rows (QLoRA's figures for this model: from more than "
        f"{paper['full_gb']} GB for 16-bit fine-tuning to less than {paper['gb']} GB{limit}):"
    )
    return f"{text}\n\n{table(head, body)}"


def loss_curve(name: str, record: dict) -> str:
    """How far the losses of lowbit and of PEFT on bitsandbytes are apart."""
    o, gap = record["options"], record["differences"]["peft-bnb"]
    ours = record["runs"]["lowbit"]["losses"]
    again = record["differences"]["lowbit, rows reversed"]
    where = machine(record["environment"], card=False)
    return (
        f"Loss of the demo model over {o['steps']} steps from the same weights, adapters and data, "
        f"{o['dtype']} ({where}; `{name}`): from {ours[0]:.2f} to {ours[-1]:.2f}. PEFT on "
        f"bitsandbytes differs by {gap['mean']:.1g} in the mean and {gap['largest']:.1g} at most, "
        f"lowbit with the rows of its batches in reverse order by {again['mean']:.1g} and "
        f"{again['largest']:.1g}."
    )


def tests(name: str, record: dict) -> str:
    """Counts, failures, and why tests were skipped."""
    counts = ", ".join(f"{count} {outcome}" for outcome, count in record["total"].items())
    lines = [f"Tests on a GPU ({_at_commit(record)}{_note(record)}; `{name}`): {counts}."]
    lines += [f"- failed: {failure.splitlines()[0]}" for failure in record["failures"]]
    lines += [f"- skipped {n}: {reason}" for reason, n in record["skip_reasons"].items()]
    return lines[0] + "\n\n" + "\n".join(lines[1:])


def sanitizers(name: str, record: dict) -> str:
    """What compute-sanitizer said of the kernels, per tool."""
    body = []
    for tool in dict.fromkeys(row["tool"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["tool"] == tool]
        body.append([tool, str(len(rows)), str(sum(row["clean"] for row in rows))])
    missing = ", ".join(record["kernels_not_launched"]) or "none"
    what = (
        f"{len(record['kernels'])} kernels of csrc/cuda under compute-sanitizer, not run: {missing}"
    )
    return f"{what} ({_at_commit(record)}; `{name}`):\n\n{table(['tool', 'cases', 'clean'], body)}"


def counters(name: str, record: dict) -> str:
    """How busy the longest kernel of each call kept the card, lowbit's and cuBLAS's."""
    longest: dict[tuple, dict[str, dict]] = {}
    for row in record["rows"]:
        calls = longest.setdefault((row["layer"], row["M"], row["pass"]), {})
        if row["us"] > calls.get(row["impl"], {"us": 0})["us"]:
            calls[row["impl"]] = row
    parts = ("tensor", "dram", "l2", "l1", "issue")
    body = []
    for (layer, M, direction), calls in longest.items():
        own, dense = calls["lowbit"], calls["dense"]
        cells = [f"{own[f'{p}_percent']:.0f} ({dense[f'{p}_percent']:.0f})" for p in parts]
        read = [f"{row['dram_read_bytes'] / 1e9:.2f}" for row in (own, dense)]
        kernel = own["kernel"].removesuffix("_kernel")
        body.append([f"{layer}, {direction}", str(M), kernel, *cells, f"{read[0]} ({read[1]})"])
    head = ["layer", "M", "kernel", "tensor pipes", "DRAM", "L2", "L1", "issue slots", "GB read"]
    what = (
        "Counters by ncu, cold caches, of lowbit's longest kernel and in brackets of cuBLAS's with "
        "a 16-bit weight, % of the peak"
    )
    return f"{what} ({_at_commit(record)}; `{name}`):\n\n{table(head, body)}"


def _at_commit(record: dict) -> str:
    return f"{machine(record['environment'], card=True)}, commit {record['environment']['commit']}"


WRITERS = {  # in the order of docs/measured.md
    "model": model,
    "linear": linear,
    "linear_options": linear_options,
    "linear_backward": linear_backward,
    "optimizer": optimizer,
    "cuda_quantize": cuda_quantize,
    "cpu_linear": cpu_linear,
    "quantize": quantize,
    "loss_curve": loss_curve,
    "optimizer_curves": optimizer_curves,
    "tests": tests,
    "sanitizers": sanitizers,
    "counters": counters,
}


# The records that the README shows, and what of them. A llama-8b's gate and up projections stand
# for the layers.
HEADLINES = {
    "model_h200.json": lambda row: True,
    "linear_h200.json": lambda row: (row["N"], row["K"]) == (14336, 4096),
}
OPTIMIZER_HEADLINE = "optimizer_h200.json"


def report(*, headlines: bool) -> str:
    """All records, or what the README shows of those that it shows."""
    parts = []
    for benchmark, write in WRITERS.items():
        for name, record in records():
            if record.get("benchmark") != benchmark:
                continue
            if not headlines:
                parts.append(write(name, record))
            elif name in HEADLINES:
                rows = [row for row in record["rows"] if HEADLINES[name](row)]
                parts.append(write(name, {**record, "rows": rows, "headline": True}))
    return "\n\n".join(parts) + "\n"


def readme(text: str) -> str:
    """The README with what stands between its markers replaced."""
    steps = json.loads((RESULTS / OPTIMIZER_HEADLINE).read_text())
    for name, content in {
        "optimizer": optimizer_headline(OPTIMIZER_HEADLINE, steps) + "\n",
        "results": report(headlines=True),
    }.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = before + begin + "\n" + content + "\n" + end + after
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether all are up to date")
    options = parser.parse_args()
    shown = readme(README.read_text())
    stale = False
    for path, text in {README: shown, MEASURED: INTRODUCTION + report(headlines=False)}.items():
        if not options.check:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            print(f"{path.name} does not show bench/results; run python bench/report.py")
            stale = True
    for card in figures.CARDS:
        if not options.check:
            figures.draw(card)
        elif not figures.up_to_date(card):
            name = figures.figure(card).name
            print(f"{name} does not show bench/results; run python bench/report.py")
            stale = True
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
