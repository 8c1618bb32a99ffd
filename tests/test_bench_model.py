"""`lowbit bench model`: what it is asked for, its arithmetic, and on the CPU the whole run with a
tiny model; on a GPU the command.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lowbit.cli.app import app

pytest.importorskip("transformers", reason="needs transformers")

from lowbit.benchmarks import model as bench
from lowbit.benchmarks import model_build, model_contenders, model_inputs, model_profile
from lowbit.benchmarks.model_configs import CONFIGS
from lowbit.fusing import unfuse
from lowbit.nn import QLoRALinear

ROOT = Path(__file__).resolve().parent.parent
TINY, TINY_VL = CONFIGS["tiny"], CONFIGS["tiny-vl"]
NEEDS_PEFT = pytest.mark.skipif(
    model_build.why_no_peft() is not None, reason="needs bitsandbytes and peft"
)


def run(*arguments):
    return CliRunner().invoke(app, ["bench", "model", *map(str, arguments)])


# ---- what was asked for --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config", "llama-9b"], "--config must be one of tiny, llama-8b, llama-65b"),
        (["--optimizer", "sgd"], "--optimizer must be one of adamw, paged-adamw"),
        (["--compare", "unsloth"], "--compare must be one of peft-bnb, got unsloth"),
        (["--json", "."], "--json . is a folder; name a file"),
        (["--image", "448"], "--image is for models that see, not for llama-8b"),
        (["--config", "qwen2.5-vl-7b", "--image", "450"], "must be a multiple of 28 pixels, got"),
        (["--config", "qwen2.5-vl-7b", "--seq", "200"], "448 x 448 pixels is 256 tokens; --seq mu"),
    ],
)
def test_wrong_input_is_one_sentence(arguments, sentence):
    result = run(*arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_so():
    assert "lowbit bench model needs a CUDA device: " in run().stderr


def test_help_names_every_choice(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    text = run("--help").stdout
    for name in (
        *CONFIGS,
        *model_contenders.OPTIMIZERS,
        *bench.PEERS,
        "Examples:",
        "--graph",
        "--no-fuse",
    ):
        assert name in text


# ---- arithmetic ----------------------------------------------------------------------------------


def test_sizes_of_the_models():
    """Parameters as published, to the percent that norms and rounding take."""
    published = {
        "llama-8b": 8.03e9,
        "llama-65b": 65.2e9,
        "qwen2.5-7b": 7.62e9,
        "qwen2.5-vl-7b": 8.29e9,
        "qwen2.5-vl-72b": 73.4e9,
    }
    for name, count in published.items():
        assert CONFIGS[name].parameters == pytest.approx(count, rel=0.01)
    assert CONFIGS["llama-65b"].full_bytes == pytest.approx(780e9, rel=0.01)  # the paper's figure
    assert CONFIGS["llama-65b"].linear_parameters == 80 * (4 * 8192**2 + 3 * 8192 * 22016)


def test_flops_by_hand():
    """q, k, v, o, gate, up, down of `tiny`: 64 x 64, 2 of 32 x 64, 64 x 64, 2 of 128 x 64, 64 x
    128."""
    linear = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    assert TINY.linear_parameters == linear
    adapters = 2 * 4 * (2 * 128 + 2 * 96 + 3 * 192)
    head = 2 * 512 * 64
    assert TINY.step_flops(5, 2, 4, True) == 20.0 * (3 * linear + 4 * adapters + head)
    assert TINY.step_flops(5, 2, 4, False) == 20.0 * (2 * linear + 3 * adapters + head)


def test_flops_of_an_image_by_hand():
    """Two images of 84 x 84 pixels are 72 patches and 18 tokens. A block has qkv, proj, gate, up
    and down of 96 x 32, 32 x 32, 2 of 44 x 32, 32 x 44; the merger 128 x 128 and 64 x 128.
    """
    block, adapters = 96 * 32 + 32 * 32 + 3 * 44 * 32, 4 * (128 + 64 + 3 * 76)
    merger, merger_adapters = 128 * 128 + 64 * 128, 4 * (256 + 192)
    seen = 72 * (2 * (3 * block + 4 * adapters) + 32 * 1176)
    seen += 18 * (2 * merger + 3 * merger_adapters)
    text = TINY_VL.step_flops(2, 30, 4, True)
    assert text == TINY.step_flops(2, 30, 4, True)
    assert TINY_VL.step_flops(2, 30, 4, True, image=84) == text + 2.0 * seen


def test_kernel_classes():
    for name, kind in (
        ("void lowbit::cuda::(anonymous namespace)::nf4_lora_gemv_kernel<...>", "lowbit"),
        ("nvjet_sm90_tst_128x128_64x6_2x1_v_bz_NNT", "GEMM"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_s16816gemm>", "GEMM"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "bitsandbytes"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel", "copies"),
        ("Memset (Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<8, silu>", "elementwise"),
    ):
        assert model_profile.kernel_class(name) == kind, name


def test_profile_sums_up():
    launches = [("nvjet_a", 2000.0), ("nvjet_a", 1000.0), ("other", 500.0), ("Memcpy DtoH", 250.0)]
    profile = model_profile.collect(launches, wall_ms=5.0)
    assert profile.busy_ms == 3.75
    assert list(profile.classes.items()) == [("GEMM", 3.0), ("elementwise", 0.5), ("copies", 0.25)]
    assert profile.launches == {"GEMM": 2, "elementwise": 1, "copies": 1}
    assert profile.kernels[0] == ("nvjet_a", 2, 3.0)
    assert "GPU busy 3.8 of 5.0 ms" in profile.lines()[0]
    assert "4 launches" in profile.lines()[0]


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", [True, False])
def test_model_is_packed_and_adapted_throughout(fuse):
    model = model_build.lowbit_model(TINY, 4, torch.bfloat16, "cpu", fuse)
    layers = [m for m in model.modules() if isinstance(m, QLoRALinear)]
    assert len(layers) == 2 * 7
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert all(layer.double_quant and layer.blocksize == 64 for layer in layers)
    assert not any(p.is_meta for p in model.parameters())
    dense = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear]
    assert dense == ["lm_head"]
    assert unfuse(model) == (9 if fuse else 0)
    weight = layers[0].quantized_weight.dequantize(torch.float32)
    assert weight.std().item() == pytest.approx(model_build.STD, rel=0.1)


@NEEDS_PEFT
def test_peer_has_the_same_weights():
    """The same draws, packed by bitsandbytes; scales may differ by a code (on a CPU, in ties)."""
    ours = model_build.lowbit_model(TINY, 4, torch.bfloat16, "cpu", False)
    theirs = model_build.peft_model(TINY, 4, torch.bfloat16, "cpu").get_base_model()
    a = ours.model.layers[1].mlp.up_proj
    b = theirs.model.layers[1].mlp.up_proj.base_layer
    assert torch.equal(a.weight.flatten(), b.weight.flatten())
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, theirs)]
    assert counts[0] == counts[1] > 0


# ---- the whole run -------------------------------------------------------------------------------


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(bench, "DEVICE", "cpu")


def options(**changes) -> bench.Options:
    return bench.Options(TINY, **{"rank": 4, "batch": 2, "seq": 16, "seconds": 0.0} | changes)


def test_a_model_that_sees_trains_all_its_adapters(on_the_cpu, capsys):
    """Behind the first token stands the image, and only what follows it is predicted."""
    o = options(seq=20, image=84)
    o.config = TINY_VL
    (row,) = bench.run(o)
    assert row.image == 84
    assert "2 x 20 tokens of which 9 are an image of 84 x 84 pixels" in capsys.readouterr().out
    batch = model_inputs.draw(TINY_VL, 2, 20, 84, "cpu")
    assert batch.prefix == 10
    assert batch.ids.eq(511).sum(1).tolist() == [9, 9]
    assert batch.more["pixel_values"].shape == (2 * 36, 1176)
    contender = model_contenders.build_lowbit(o, batch)
    contender.loss(batch.ids).backward()
    layers = {n: m for n, m in contender.model.named_modules() if isinstance(m, QLoRALinear)}
    assert sum("visual" in name for name in layers) == 2 * 5 + 2
    assert len(layers) == 2 * 5 + 2 + 2 * 7
    for name, layer in layers.items():
        assert layer.lora_B.grad.abs().max() > 0, name


def test_run_writes_rows_and_record(on_the_cpu, tmp_path, capsys):
    rows = bench.run(options(json=tmp_path / "deep/out.json"))
    (row,) = rows
    assert row.last_loss < row.first_loss
    assert row.tokens_per_s == pytest.approx(2 * 16 / row.ms * 1e3)
    assert row.memory["adapters"] == row.memory["gradients"] == 2 * 2 * 4 * (256 + 192 + 576)
    record = json.loads((tmp_path / "deep/out.json").read_text())
    assert record["benchmark"] == "model"
    assert record["paper"] == {"full_gb": 780, "gb": 48}
    assert record["rows"][0]["config"] == "tiny"
    shown = capsys.readouterr().out
    assert bench.COLUMNS in shown
    assert len(row.line()) == len(bench.COLUMNS)
    assert "16-bit fine-tuning of all 0.0 G parameters" in shown


@pytest.mark.parametrize(("tokens", "graph"), [(16, False), (16, True), (4096, False)])
def test_few_tokens_are_checkpointed_by_the_reentrant_kind(on_the_cpu, tokens, graph):
    """But not where a graph takes the host's time; without, no block is."""
    batch = model_inputs.Batch(torch.zeros(1, tokens, dtype=torch.int64))
    contender = model_contenders.build_lowbit(options(), batch)
    contender.checkpoint(graph=graph)
    for block in contender.model.model.layers:
        assert block.gradient_checkpointing
        kind = block._gradient_checkpointing_func.keywords
        assert kind == {"use_reentrant": tokens == 16 and not graph, "preserve_rng_state": False}
    contender = model_contenders.build_lowbit(options(checkpointing=False), batch)
    assert not any(block.gradient_checkpointing for block in contender.model.model.layers)


@NEEDS_PEFT
@pytest.mark.parametrize("optimizer", list(model_contenders.OPTIMIZERS))
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_every_optimizer_and_the_peer(on_the_cpu, optimizer):
    o = options(optimizer=optimizer, compare=["peft-bnb"], checkpointing=False, fuse=False)
    if optimizer == "paged-adamw-8bit":
        o.compare = []  # bitsandbytes' 8-bit optimizers need a GPU
    rows = bench.run(o)
    assert [row.impl for row in rows] == ["lowbit, not fused", *o.compare]
    losses = [row.first_loss for row in rows]
    assert losses[-1] == pytest.approx(losses[0], rel=1e-3)


def test_a_model_that_does_not_train_is_not_timed(on_the_cpu, monkeypatch):
    frozen = lambda parameters: torch.optim.SGD(parameters, lr=0.0)  # noqa: E731
    monkeypatch.setitem(model_contenders.OPTIMIZERS, "adamw", frozen)
    with pytest.raises(bench.CheckError, match="lowbit does not train; losses on one batch: 6"):
        bench.run(options(optimizer="adamw"))


def test_memory_adds_up(on_the_cpu):
    batch = model_inputs.Batch(torch.zeros(2, 16, dtype=torch.int64))
    contender = model_contenders.build_lowbit(options(), batch)
    parts = bench.memory(contender, peak=10_000_000, in_use=20_000_000)
    assert sum(parts.values()) == 20_000_000
    assert parts["base, 16-bit"] == 2 * (2 * 512 * 64 + 5 * 64)  # embeddings, head, norms
    packed = [m.quantized_weight.nbytes for m in contender.model.modules()
              if isinstance(m, QLoRALinear)]  # fmt: skip
    assert parts["base, 4-bit"] >= sum(packed)
    assert parts["activations, workspace"] == 10_000_000 - sum(list(parts.values())[:4])


def test_report_makes_tables_of_a_record(on_the_cpu, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import report

    path = tmp_path / "model.json"
    bench.run(options(json=path))
    record = json.loads(path.read_text())
    record["environment"] |= {"card": "a card", "torch": "2.11.0", "date": "2026-11-24"}
    (row,) = record["rows"]
    row |= {"ms": 16.0, "peak_bytes": 3 << 29, "in_use_bytes": 2 << 30}
    text = report.WRITERS["model"]("model_h100.json", record)
    assert "(a card, torch 2.11.0, 2026-11-24; `model_h100.json`)" in text
    assert text.endswith("| tiny | 4 | 2 x 16 | lowbit | 2,000 | 16 | 1.5 | 2.0 |")
    memory = dict.fromkeys(row["memory"], 1_000_000_000)
    row |= {"config": "llama-65b", "memory_limit": 44.0, "memory": memory, "host_bytes": 2 * 10**9}
    text = report.WRITERS["model"]("model_h100.json", record)
    assert "from more than 780 GB for 16-bit fine-tuning to less than 48 GB" in text
    assert "lowbit may use 44 GiB of the card" in text
    assert "| base, 4-bit | 1.0 |" in text
    assert text.endswith("| optimizer, on the host | 2.0 |")


@pytest.mark.gpu
def test_command_on_a_gpu(tmp_path):
    path = tmp_path / "model.json"
    result = run("--config", "tiny", "--rank", 4, "--batch", 2, "--seq", 64, "--graph", "--profile",
                 "--seconds", 0.2, "--json", path)  # fmt: skip
    assert result.exit_code == 0, (result.stdout, result.stderr)
    rows = json.loads(path.read_text())["rows"]
    assert [row["impl"] for row in rows] == ["lowbit", "lowbit, graph"]
    for row in rows:
        assert 0 < row["p20"] <= row["ms"] <= row["p80"]
        assert sum(row["memory"].values()) == row["in_use_bytes"] > row["peak_bytes"] > 0
        assert row["profile"]["classes"]["lowbit"] > 0
    assert rows[1]["last_loss"] < rows[0]["first_loss"]


@pytest.mark.gpu
@NEEDS_PEFT
def test_a_model_that_sees_on_a_gpu():
    o = options(seq=64, image=84, compare=["peft-bnb"], seconds=0.1)
    o.config = TINY_VL
    ours, theirs = bench.run(o)
    assert theirs.first_loss == pytest.approx(ours.first_loss, rel=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@NEEDS_PEFT
def test_peer_on_a_gpu():
    rows = bench.run(options(compare=["peft-bnb"], seconds=0.1))
    assert [row.impl for row in rows] == ["lowbit", "peft-bnb"]
    assert rows[1].first_loss == pytest.approx(rows[0].first_loss, rel=1e-2)
