"""Run tests and record their outcome for bench/results.

    python bench/record_tests.py bench/results/tests_h100.json -m "gpu or not gpu" tests -n 4

The first argument is the record, the rest goes to pytest. The record holds the environment, the
counts per file, every failure, and the reasons for skipped tests.
"""

from __future__ import annotations

import collections
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from common import environment


def outcomes(junit: Path) -> dict:
    """Counts per test file, failures and reasons for skipping, from pytest's XML report."""
    files: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    failures, reasons = [], collections.Counter()
    for case in ElementTree.parse(junit).iter("testcase"):
        name = case.get("classname", "").rsplit(".", 1)[-1]
        problem = next(
            (case.find(tag) for tag in ("failure", "error") if case.find(tag) is not None), None
        )
        skipped = case.find("skipped")
        if problem is not None:
            files[name]["failed"] += 1
            failures.append(f"{name}::{case.get('name')}: {problem.get('message', '')[:300]}")
        elif skipped is not None:
            files[name]["skipped"] += 1
            reasons[skipped.get("message", "")[:120]] += 1
        else:
            files[name]["passed"] += 1
    total = sum(files.values(), collections.Counter())
    return {
        "total": dict(total),
        "files": {name: dict(counts) for name, counts in sorted(files.items())},
        "failures": failures,
        "skip_reasons": dict(reasons),
    }


def main() -> int:
    target, *arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={junit}", *arguments]
        code = subprocess.run(command).returncode
        record = {"benchmark": "tests", "environment": environment(), **outcomes(junit)}
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_text(json.dumps(record, indent=1) + "\n")
    print(record["total"])
    return code


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    sys.exit(main())
