"""The figures of README and docs/measured.md are those of the records."""

import subprocess
import sys
from pathlib import Path

import pytest

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
