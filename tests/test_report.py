"""The figures of README and docs/measured.md are those of the records."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_readme_shows_the_latest_records():
    check = [sys.executable, str(ROOT / "bench" / "report.py"), "--check"]
    result = subprocess.run(check, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
