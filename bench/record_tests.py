"""Run tests and record their outcome for bench/results.

    python bench/record_tests.py bench/results/tests_h200.json -m "gpu or not gpu" tests -n 4

The first argument is the record, the rest goes to pytest. With workers (-n), tests marked
`exclusive`, which measure the whole card, run first, in a pass of their own without workers. The
record holds the environment, the counts per file, every failure, and the reasons for skipped tests.
"""

from __future__ import annotations

import argparse
import collections
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from common import environment


def passes(arguments: list[str]) -> list[list[str]]:
    """The arguments of each run of pytest."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-m", default="")
    parser.add_argument("-n", "--numprocesses")
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.numprocesses in (None, "0"):
        return [arguments]
    given = f"({chosen.m}) and " if chosen.m else ""
    return [
        [*rest, "-m", f"{given}exclusive"],
        [*rest, "-n", chosen.numprocesses, "-m", f"{given}not exclusive"],
    ]


def run(arguments: list[str]) -> tuple[int, list[ElementTree.Element]]:
    """Exit code and test cases of one run of pytest; no tests at all is no error."""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={junit}", *arguments]
        code = subprocess.run(command).returncode
        cases = list(ElementTree.parse(junit).iter("testcase")) if junit.exists() else []
        return (0 if code == 5 else code), cases


def outcomes(cases: list[ElementTree.Element]) -> dict:
    """Counts per test file, failures and reasons for skipping."""
    files: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    failures, reasons = [], collections.Counter()
    for case in cases:
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
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    failed, cases = False, []
    for part in passes(arguments):
        code, more = run(part)
        failed, cases = failed or code != 0, cases + more
        # After each, so that a run that is cut off leaves what there is.
        record = {"benchmark": "tests", "environment": environment(), **outcomes(cases)}
        Path(target).write_text(json.dumps(record, indent=1) + "\n")
    print(record["total"])
    return int(failed)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    sys.exit(main())
