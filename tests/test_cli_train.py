"""The training loop of `lowbit finetune`: loss, accumulation, schedule, exact resume."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_bitwise_equal
from safetensors.torch import load_file
from tiny_model import make_llama, save_tiny_model
from typer.testing import CliRunner

from lowbit import fuse, prepare
from lowbit.cli import loss as loss_module
from lowbit.cli.adapt import checkpoint_activations, draws_random_numbers
from lowbit.cli.app import app
from lowbit.cli.encode import Encoded, collate, widened
from lowbit.cli.loss import IGNORED, AnswerLoss, answer_places
from lowbit.cli.report import TrainingProgress
from lowbit.cli.settings import OPTIMIZERS, Settings
from lowbit.cli.train import Trainer, graph_shape, learning_rate

CPU = torch.device("cpu")
VOCABULARY = 120


def random_examples(count: int, *, seed: int = 0) -> list[Encoded]:
    """Token sequences of 4 to 20 tokens, the second half of each to be learned."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(count):
        length = int(torch.randint(4, 21, (1,), generator=generator))
        ids = torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()
        examples.append(Encoded(ids, [i >= length // 2 for i in range(length)]))
    return examples


def plain_loss(model, batch) -> torch.Tensor:
    """The definition: summed cross-entropy of the model's own logits at the learned tokens."""
    logits = model(input_ids=batch.ids).logits[:, :-1].float()
    targets = torch.where(batch.learn, batch.ids, -100)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


# ---- loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [1, 4 * VOCABULARY * 7, 1 << 26])
def test_answer_loss_equals_cross_entropy(monkeypatch, chunk_bytes):
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", {"cpu": chunk_bytes})
    model = prepare(make_llama(VOCABULARY), r=4)
    torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.lora_B)
    batch = collate(random_examples(6), 0)
    answer_loss = AnswerLoss(model)
    assert answer_loss.short
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss, expected = answer_loss(batch, CPU), plain_loss(model, batch)
    got = torch.autograd.grad(loss / batch.answers, parameters)
    wanted = torch.autograd.grad(expected / batch.answers, parameters)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)


def test_model_that_scales_its_logits_takes_the_long_way():
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        logits_scaling=4.0,
        pad_token_id=0,
    )
    model = prepare(GraniteForCausalLM(config), r=2)
    batch = collate(random_examples(3), 0)
    answer_loss = AnswerLoss(model)
    assert not answer_loss.short
    expected = plain_loss(model, batch).item()
    assert answer_loss(batch, CPU).item() == pytest.approx(expected, rel=1e-6)


def test_padding_and_neighbours_do_not_change_the_loss():
    model = prepare(make_llama(VOCABULARY), r=4)
    examples = random_examples(5)
    answer_loss = AnswerLoss(model)
    together = answer_loss(collate(examples, 0), CPU).item()
    alone = sum(answer_loss(collate([example], 0), CPU).item() for example in examples)
    assert together == pytest.approx(alone, rel=1e-5)


def test_places_of_a_batch_and_of_a_wider_one():
    """More padding and more places than answers change no sum and no gradient."""
    batch = collate(random_examples(5), 0)
    places, targets = answer_places(batch)
    learned = [(row, t) for row in range(5) for t in range(1, batch.ids.shape[1])
               if batch.learn[row, t]]  # fmt: skip
    assert places.tolist() == [row * batch.ids.shape[1] + t - 1 for row, t in learned]
    assert targets.tolist() == [batch.ids[row, t].item() for row, t in learned]
    wide = widened(batch, 32, 0)
    more = answer_places(wide, 64)
    assert [len(t) for t in more] == [64, 64]
    assert more[1].tolist() == targets.tolist() + [IGNORED] * (64 - len(targets))
    model = prepare(make_llama(VOCABULARY), r=4)
    loss = AnswerLoss(model)
    results = []
    for inputs in ((batch.ids, places, targets), (wide.ids, *more)):
        model.zero_grad()
        value = loss.of(*inputs)
        value.backward()
        results.append([value.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    loss.short = False
    assert loss.of(wide.ids, *more).item() == pytest.approx(results[0][0].item(), rel=1e-5)


# ---- steps -------------------------------------------------------------------------------------


def make_trainer(examples, device=CPU, **options) -> Trainer:
    settings = Settings(learning_rate=1e-2, schedule="constant", warmup=0.0, **options)
    torch.manual_seed(0)
    model = prepare(make_llama(VOCABULARY), r=4, lora_dtype=torch.float32, device=device)
    return Trainer(model, examples, examples[:3], settings, pad_id=0, device=device)


def run_steps(trainer: Trainer) -> list[float]:
    trainer.run(on_step=lambda step: None, save=lambda: None, should_stop=lambda: False)
    return [step["loss"] for step in trainer.history.steps]


def test_accumulation_equals_one_large_batch():
    examples = random_examples(8)
    large = run_steps(make_trainer(examples, batch=8, steps=3))
    small = run_steps(make_trainer(examples, batch=2, accumulate=4, steps=3))
    assert small == pytest.approx(large, rel=1e-4)


def test_gradient_checkpointing_gives_the_same_losses():
    examples = random_examples(8)
    usual = run_steps(make_trainer(examples, batch=4, steps=4))
    trainer = make_trainer(examples, batch=4, steps=4)
    checkpoint_activations(trainer.model)
    assert run_steps(trainer) == pytest.approx(usual, rel=1e-6)


def test_a_fused_model_trains_with_the_same_bits():
    examples = random_examples(8)
    usual = run_steps(make_trainer(examples, batch=4, steps=4))
    trainer = make_trainer(examples, batch=4, steps=4)
    assert len(fuse(trainer.model).mlp) == 2
    assert run_steps(trainer) == usual


def test_what_draws_random_numbers():
    model = make_llama(VOCABULARY)
    assert not draws_random_numbers(model)
    model.config.attention_dropout = 0.1
    assert draws_random_numbers(model)
    model = prepare(make_llama(VOCABULARY), r=4, dropout=0.05)
    assert draws_random_numbers(model)
    assert draws_random_numbers(torch.nn.Sequential(torch.nn.Dropout(0.1)))
    assert not draws_random_numbers(torch.nn.Sequential(torch.nn.Dropout(0.0)))


def test_shapes_of_graphs():
    assert graph_shape(4, 64, 1) == (64, 64)
    assert graph_shape(4, 65, 300) == (128, 384)
    assert graph_shape(1, 513, 640) == (640, 640)
    assert {graph_shape(2, width, 2 * width)[1] for width in range(1, 65)} == {32, 64, 96, 128}


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_graphs_train_as_eager_steps_do(checkpointing):
    examples = random_examples(26)
    options = {"batch": 4, "accumulate": 2, "steps": 12, "gradient_checkpointing": checkpointing}
    curves = {}
    for graphs in (True, False):
        trainer = make_trainer(examples, torch.device("cuda"), graphs=graphs, **options)
        fuse(trainer.model)
        if checkpointing:
            checkpoint_activations(trainer.model)
        curves[graphs] = run_steps(trainer)
    assert trainer.captured is None
    assert curves[True] == pytest.approx(curves[False], rel=1e-3)
    recorded = make_trainer(examples, torch.device("cuda"), **options).captured
    assert recorded is not None
    dropped = make_trainer(examples, torch.device("cuda"), dropout=0.1, **options).captured
    assert (dropped is None) == checkpointing


def test_training_lowers_the_loss_and_counts_steps():
    trainer = make_trainer(random_examples(10), batch=4, epochs=10.0)
    before = trainer.evaluate()
    losses = run_steps(trainer)
    assert len(losses) == trainer.total == 30
    assert trainer.evaluate() < 0.7 * before
    assert trainer.history.held_out[0][0] == 0
    assert trainer.history.held_out[-1][0] == 30


def test_epochs_may_be_a_fraction_and_steps_override():
    examples = random_examples(10)
    assert make_trainer(examples, batch=4, epochs=0.5).total == 2
    assert make_trainer(examples, batch=4, epochs=0.01).total == 1
    assert make_trainer(examples, batch=4, steps=7).total == 7


def test_schedules():
    rates = {
        name: [learning_rate(Settings(schedule=name, warmup=0.2), step, 10) for step in range(10)]
        for name in ("constant", "linear", "cosine")
    }
    for values in rates.values():
        assert 0 < values[0] < values[1] < values[2] == 2e-4  # two steps of warm-up, then the peak
    assert rates["constant"][9] == 2e-4
    assert rates["linear"][9] == pytest.approx(2e-4 / 8)
    middle = 2e-4 * 0.5 * (1 + math.cos(math.pi * 0.5))
    assert rates["cosine"][6] == pytest.approx(middle)


def test_weight_decay_and_clipping_act():
    examples = random_examples(4)
    free = make_trainer(examples, batch=4, steps=2, clip=0.0)
    clipped = make_trainer(examples, batch=4, steps=2, clip=1e-4)
    assert run_steps(free)[0] == run_steps(clipped)[0]
    norms = [step["gradient_norm"] for step in clipped.history.steps]
    assert norms[0] > 1e-4  # the norm before clipping is reported
    decayed = make_trainer(examples, batch=4, steps=2, weight_decay=50.0)
    run_steps(decayed)
    size = sum(p.norm() for p in decayed.parameters)
    assert size < sum(p.norm() for p in free.parameters)


def test_every_optimizer_trains_alike():
    examples = random_examples(8)
    curves = {
        name: run_steps(make_trainer(examples, batch=4, steps=8, optimizer=name))
        for name in OPTIMIZERS
    }
    for name, curve in curves.items():
        assert curve == pytest.approx(curves["adamw"], rel=0.02), name
        assert curve[-1] < curve[0]
    assert curves["paged-adamw-8bit"] == curves["adamw-8bit"] != curves["paged-adamw"]


# ---- resume ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("resume") / "tiny")


@pytest.fixture
def train(model_folder, tmp_path):
    """Run `lowbit finetune` on ten pairs, with dropout, so that the generators' state matters."""
    data = tmp_path / "data.jsonl"
    pairs = [{"prompt": f"what is {i} red", "completion": f"stone {i * i}"} for i in range(10)]
    data.write_text("\n".join(map(json.dumps, pairs)))

    def call(*arguments: str):
        options = "--rank 4 --dropout 0.2 --batch 2 --accumulate 2 --epochs 3 --lr 0.01 --show 1"
        run = ["--model", model_folder, "--data", data, "--eval-fraction", "0.1"]
        return CliRunner().invoke(
            app, ["finetune", *map(str, run), *options.split(), *map(str, arguments)]
        )

    return call


def resume(*arguments) -> object:
    return CliRunner().invoke(app, ["finetune", "--resume", *map(str, arguments)])


@pytest.mark.parametrize("optimizer", ["adamw", "paged-adamw-8bit"])
def test_resumed_run_repeats_the_uninterrupted_one(optimizer, train, tmp_path):
    whole = train("--output", tmp_path / "whole", "--save-every", 4, "--optimizer", optimizer)
    assert whole.exit_code == 0, whole.stderr
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-000004"
    again = resume(checkpoint, "--output", tmp_path / "again")
    assert again.exit_code == 0, again.stderr
    logs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "again")]
    for key in ("loss", "learning_rate", "gradient_norm", "epoch", "tokens"):
        first, second = ([step[key] for step in log["steps"]] for log in logs)
        assert first == second, key
    assert logs[0]["held_out"] == logs[1]["held_out"]
    assert logs[0]["answers"] == logs[1]["answers"]
    adapters = [
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "again")
    ]
    for key, tensor in adapters[0].items():
        assert_bitwise_equal(adapters[1][key], tensor, key)


def test_interrupt_saves_a_checkpoint_that_resumes(train, tmp_path, monkeypatch):
    whole = train("--output", tmp_path / "whole")
    update = TrainingProgress.update

    def interrupt_after_three(self, step, memory):
        update(self, step, memory)
        if step.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TrainingProgress, "update", interrupt_after_three)
    stopped = train("--output", tmp_path / "part")
    monkeypatch.undo()
    assert stopped.exit_code == 130
    assert (
        "interrupted after step 3 of 9; continue with: lowbit finetune --resume" in stopped.stderr
    )
    assert not (tmp_path / "part").exists()
    assert [path.name for path in (tmp_path / "part.unfinished").iterdir()] == ["checkpoints"]

    again = train("--output", tmp_path / "part")
    assert again.exit_code == 2
    assert "holds an unfinished run" in again.stderr

    finished = resume(tmp_path / "part.unfinished")
    assert finished.exit_code == 0, finished.stderr
    assert not (tmp_path / "part.unfinished").exists()
    assert whole.exit_code == 0
    first, second = (
        json.loads((tmp_path / name / "run.json").read_text())["steps"]
        for name in ("whole", "part")
    )
    assert [s["loss"] for s in first] == [s["loss"] for s in second]


def test_a_killed_run_resumes_bit_for_bit_and_leaves_no_trace(model_folder, tmp_path):
    data, part, whole = tmp_path / "data.jsonl", tmp_path / "part", tmp_path / "whole"
    data.write_text("\n".join(json.dumps({"prompt": f"red {i}", "completion": "stone"})
                              for i in range(10)))  # fmt: skip
    options = "--rank 4 --dropout 0.2 --batch 2 --lr 0.01 --schedule constant --warmup 0"
    options += " --save-every 2 --epochs"
    start = ["finetune", "--model", model_folder, "--data", data, *options.split()]
    command = [sys.executable, "-m", "lowbit.cli", *start, "1000", "--output", part]
    checkpoints = part.with_name("part.unfinished") / "checkpoints"
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL) as killed:
        while not (checkpoints / "step-000006").exists():
            assert killed.poll() is None
            time.sleep(0.01)
        killed.kill()  # in the middle of a later step
    (checkpoints / ".step-999999.new-1").mkdir()  # as if while it wrote a checkpoint
    for late in sorted(checkpoints.glob("step-*"))[3:]:
        shutil.rmtree(late)
    assert resume(part.with_name("part.unfinished"), "--epochs", 4).exit_code == 0
    made = CliRunner().invoke(app, list(map(str, [*start, "4", "--output", whole])))
    assert made.exit_code == 0, made.stderr
    for a, b in zip(*(sorted(f.rglob("*")) for f in (part, whole)), strict=True):
        assert a.relative_to(part) == b.relative_to(whole)
    losses = [
        [step["loss"] for step in json.loads((folder / "run.json").read_text())["steps"]]
        for folder in (part, whole)
    ]
    assert losses[0] == losses[1]


def test_failure_after_a_checkpoint_says_how_to_go_on(train, tmp_path, monkeypatch):
    step = Trainer._one_step

    def exhausted_at_six(self, group):
        if self.step == 6:
            raise MemoryError
        return step(self, group)

    monkeypatch.setattr(Trainer, "_one_step", exhausted_at_six)
    failed = train("--output", tmp_path / "run", "--save-every", 4)
    assert failed.exit_code == 2
    assert "out of memory" in failed.stderr
    assert f"continue with: lowbit finetune --resume {tmp_path / 'run.unfinished'}" in failed.stderr
    assert [path.name for path in (tmp_path / "run.unfinished").rglob("step-*")] == ["step-000004"]


def test_resume_refuses_what_does_not_fit(train, tmp_path):
    made = train("--output", tmp_path / "run", "--save-every", 4)
    assert made.exit_code == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000008"
    output = ("--output", tmp_path / "new")
    cases = [
        (resume(tmp_path / "nothing", *output), "is no folder"),
        (resume(tmp_path, *output), "neither a checkpoint nor a run with checkpoints"),
        (resume(checkpoint, *output, "--rank", 8), "was made with --rank 4, this run has 8"),
        (resume(checkpoint, *output, "--steps", 8), "nothing is left to train"),
        (resume(checkpoint), "exists and is not empty"),
    ]
    (tmp_path / "data.jsonl").write_text('{"text": "other"}\n{"text": "data"}\n')
    cases.append((resume(checkpoint, *output), "was made with other data"))
    (checkpoint / "trainer.pt").write_bytes(b"damaged")
    cases.append((resume(checkpoint, *output), "cannot be read"))
    (checkpoint / "adapter_config.json").unlink()
    cases.append((resume(checkpoint, *output), "lacks adapter_config.json"))
    for result, message in cases:
        assert result.exit_code == 2, result.stderr
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "new.unfinished").exists()


def test_longer_training_from_the_last_checkpoint(train, tmp_path):
    assert train("--output", tmp_path / "run", "--save-every", 4).exit_code == 0
    longer = resume(tmp_path / "run", "--output", tmp_path / "longer", "--epochs", 4)
    assert longer.exit_code == 0, longer.stderr
    assert len(json.loads((tmp_path / "longer" / "run.json").read_text())["steps"]) == 12
