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
