"""The figures of README and docs/measured.md are those of the records, and their tables say what
the records hold.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench_row import make_row

from lowbit.benchmarks import linear_backward

BENCH = Path(__file__).resolve().parent.parent / "bench"


def test_readme_shows_the_latest_records():
    check = [sys.executable, str(BENCH / "report.py"), "--check"]
    result = subprocess.run(check, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_figure_of_other_records_is_noticed(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCH))
    import figures

    monkeypatch.setattr(figures, "DOCS", tmp_path)
    assert not figures.up_to_date("h100")
    figures.figure("h100").write_text("<desc>records 0123456789abcdef</desc>")
    assert not figures.up_to_date("h100")
    figures.figure("h100").write_text(f"<desc>records {figures.digest('h100')}</desc>")
    assert figures.up_to_date("h100")


def test_ratios_are_to_the_dense_layer_of_the_same_size(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import figures

    times = {("a", "dense"): 10.0, ("a", "lowbit"): 5.0, ("b", "dense"): 20.0, ("b", "lowbit"): 30}
    rows = [
        {"op": "lora_linear", "layer": layer, "impl": impl, "M": 8, "us": us}
        for (layer, impl), us in times.items()
    ]
    rows.append({"op": "lora_linear host", "layer": "a", "impl": "lowbit", "M": 8, "us": 99.0})
    found = figures.ratios({"rows": rows}, "lora_linear")
    assert found["lowbit"] == {8: [pytest.approx(0.5), pytest.approx(1.5)]}


def test_counters_are_read_from_what_ncu_prints(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import record_counters

    metrics = [metric for metric, _ in record_counters.METRICS.values()]
    units = ["usecond", "cycle", "%", "%", "%", "%", "%", "Mbyte", "Kbyte"]
    values = ["41.5", "81,622", "1", "2", "3", "4", "5", "122.4", "2.5"]

    def line(*cells):
        return ",".join(f'"{cell}"' for cell in cells)

    case = "<default domain>:case gate70b 16 lowbit forward end:none"
    kernel = "void lowbit::cuda::<unnamed>::nf4_lora_gemv_kernel<__half, 1>(Args, Plan)"
    table = [
        "==PROF== Connected to process 1",
        line("ID", "Kernel Name", "Push/Pop_Range", *metrics),
        line("", "", "", *units),
        line(0, kernel, case, *values),
    ]
    (row,) = record_counters.read("\n".join(table))
    assert (row["layer"], row["M"], row["impl"], row["pass"]) == (
        "gate70b",
        16,
        "lowbit",
        "forward",
    )
    assert (row["kernel"], row["us"], row["cycles"]) == ("nf4_lora_gemv_kernel", 41.5, 81622)
    assert (row["dram_read_bytes"], row["dram_written_bytes"]) == (122.4e6, 2500)
    table[-1] = line(0, kernel, "", *values)
    with pytest.raises(SystemExit, match="named no case"):
        record_counters.read("\n".join(table))


def test_report_makes_a_table_of_a_record(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import report

    rows = [make_row("dense", 20.0), make_row("bitsandbytes", 50.0), make_row("lowbit", 8.0)]
    rows += [make_row("dense", 21.0, M=64), make_row("lowbit", 9.0, M=64)]
    rows += [make_row("dense", 22.0, M=256), make_row("lowbit", 11.0, M=256)]
    record = {
        "benchmark": "linear",
        "environment": {"card": "a card", "torch": "2.11.0", "date": "2026-11-24"},
        "ceilings": {"copy_gbps": 3020.0, "matmul_tflops": 739.4},
        "rows": [vars(row) for row in rows] + [vars(make_row("lowbit", 99.0)) | {"op": "host"}],
    }
    text = report.WRITERS["linear"]("linear_h100.json", json.loads(json.dumps(record)))
    caption, _, *table = text.split("\n")
    assert caption == (
        "Linear layers on a GPU, forward, bf16, rank 16 (a card, torch 2.11.0, 2026-11-24; floor: "
        "the larger of bytes at 3.02 TB/s and flops at 739 TFLOP/s, both measured; "
        "`linear_h100.json`):"
    )
    assert table == [
        "| us | M | floor | dense, no LoRA | bitsandbytes | lowbit | lowbit / dense "
        "| lowbit / floor |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| 4096 x 4096 | 16 | 4.0 | 20.0 | 50.0 | 8.0 | 0.40 | 2.00 |",
        "| 4096 x 4096 | 256 | 4.0 | 22.0 | - | 11.0 | 0.50 | 2.75 |",
    ]


def test_report_of_times_in_turn(monkeypatch):
    """A table of its own, of the cases that have them."""
    monkeypatch.syspath_prepend(str(BENCH))
    import report

    rows = [make_row("lowbit", 8.0, M=1, timing="graph")]
    for impl, us, in_turn in (("dense", 20.0, 16.0), ("torchao", 90.0, None), ("lowbit", 9.0, 8.0)):
        rows.append(make_row(impl, us, timing="graph, sustained", in_turn_us=in_turn))
    record = {
        "environment": {"card": "a card", "torch": "2.11.0", "date": "2026-11-24"},
        "ceilings": {"copy_gbps": 3020.0, "matmul_tflops": 739.4},
        "rows": [vars(row) for row in rows],
    }
    what, _, head, _, *body = report.linear("linear_a.json", record).split("\n\n", 2)[2].split("\n")
    assert what.startswith("In turn, each for some milliseconds")
    assert head == "| us | M | dense, no LoRA | torchao | lowbit | lowbit / dense | kept up |"
    assert body == ["| 4096 x 4096 | 16 | 16.0 | - | 8.0 | 0.50 | 9.0 |"]
    assert "In turn" not in report.linear("linear_a.json", record | {"headline": True})
    del record["rows"][1:]
    assert "In turn" not in report.linear("linear_a.json", record)


def test_report_of_eager_times(monkeypatch):
    """Every kind of time has a line; records from before the empty function do without it."""
    monkeypatch.syspath_prepend(str(BENCH))
    import report

    times = {"empty function": 40.0, "dense": 60.0, "lowbit": 90.0}
    ops = linear_backward.WALL_OP, linear_backward.CALLER_WALL_OP, linear_backward.HOST_OP
    rows = [vars(make_row("lowbit", 8.0)) | {"op": linear_backward.OP}]
    rows += [
        vars(make_row(impl, us + i, timing="wall, in a row")) | {"op": op, "p20": us - i}
        for i, op in enumerate(ops)
        for impl, us in times.items()
    ]
    record = {
        "environment": {"card": "a card", "torch": "2.11.0", "date": "2026-11-24"},
        "ceilings": {"copy_gbps": 3020.0, "matmul_tflops": 739.4},
        "rows": rows,
    }
    what, _, head, _, *body = report.linear_backward("a.json", record).split("\n")[-7:]
    assert "in a row without the first two" in what
    assert head == "| us, eager | M |  | empty function | dense, no LoRA | lowbit |"
    assert body == [
        "| 4096 x 4096 | 16 | one layer, wall | 40 | 60 | 90 |",
        "| 4096 x 4096 | 16 | one layer, wall, calling thread | 39 | 59 | 89 |",
        "| 4096 x 4096 | 16 | a layer of a chain, host | 38 | 58 | 88 |",
    ]
    record["rows"] = [row | {"timing": "wall"} for row in rows if row["impl"] != "empty function"]
    text = report.linear_backward("a.json", record)
    assert "empty function" not in text
    assert "after those of others" in text
    assert "| 4096 x 4096 | 16 | one layer, wall | 60 | 90 |" in text
