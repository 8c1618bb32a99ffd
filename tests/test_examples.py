"""The scripts under examples/ run and do what they say."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_model import save_tiny_model
from typer.testing import CliRunner

from lowbit.cli.app import app

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs a checkout")


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script as `python examples/NAME ARGUMENTS`; returns what it printed."""

    def call(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("examples") / "tiny")


def test_every_script_and_data_file_is_listed():
    listed = (EXAMPLES / "README.md").read_text()
    for path in (*EXAMPLES.glob("*.py"), *(EXAMPLES / "data").glob("*.jsonl")):
        assert f"`{path.relative_to(EXAMPLES)}`" in listed


def test_the_data_is_the_demo_data():
    from lowbit.cli.finetune import DEMO_SETTINGS

    for setting, name in (("data", "lowbit_qa.jsonl"), ("eval_data", "lowbit_qa_heldout.jsonl")):
        assert Path(DEMO_SETTINGS[setting]).read_text() == (EXAMPLES / "data" / name).read_text()


def test_one_layer(run):
    lines = run("one_layer.py").splitlines()
    distance = float(lines[-1].split(": ")[1].split("%")[0])
    assert distance < 15


def test_finetune_in_python(run, model, tmp_path):
    output = tmp_path / "adapter"
    run("finetune_in_python.py", "--model", model, "--steps", 2, "--output", output)
    assert any(t.any() for t in load_file(output / "adapter_model.safetensors").values())


def test_adapter_in_peft(run, model, tmp_path):
    pytest.importorskip("peft")
    data, output = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text(json.dumps({"prompt": "what is red", "completion": "blue stone"}))
    options = ["--system", "", "--rank", "4", "--lr", "0.02", "--steps", "40"]
    places = ["--model", str(model), "--data", str(data), "--output", str(output)]
    trained = CliRunner().invoke(app, ["finetune", *places, *options])
    assert trained.exit_code == 0, trained.stderr
    assert run("adapter_in_peft.py", "--adapter", output, "what is red").strip() == "blue stone"
