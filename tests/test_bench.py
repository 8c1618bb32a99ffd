"""`lowbit bench`: what it is asked for, its formulas, its arithmetic, its pictures; on a GPU, its
clocks.

The run itself is driven on the CPU with the four functions that need a GPU replaced.
"""

import gc
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bench_row import make_row
from helpers import relative_rms
from typer.testing import CliRunner

import lowbit
from lowbit import dispatch
from lowbit.benchmarks import (
    checks,
    implementations,
    linear,
    linear_backward,
    plots,
    records,
    shapes,
    timing,
)
from lowbit.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
NEEDS_BNB = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


def run(*arguments):
    return CliRunner().invoke(app, ["bench", "linear", *map(str, arguments)])


def fails(*arguments) -> str:
    """Run a command that must end in one sentence and exit code 2; returns the sentence."""
    result = run(*arguments)
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    assert result.stderr.startswith("lowbit: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stdout == ""
    return result.stderr


# ---- what was asked for --------------------------------------------------------------------------


def sizes(text: str) -> list[tuple[int, int]]:
    return [(layer.N, layer.K) for layer in shapes.parse_shapes(text)]


def test_shapes_by_model_layer_and_size():
    assert sizes("llama-8b") == [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
    assert sizes("gate70b, 4096x11008") == [(28672, 8192), (4096, 11008)]
    assert shapes.parse_shapes("3420X1280")[0].name == "3420x1280"
    assert (1280, 3420) in sizes("Qwen2.5-VL-vision")
    assert (3584, 18944) in sizes("qwen2.5-7b")
    assert sizes("q8b,4096x4096,llama-8b,") == sizes("llama-8b")  # each shape once


@pytest.mark.parametrize(
    "text", ["llama-9b", "4096", "4096x", "0x64", "-1x64", "4096*64", "1e3x64"]
)
def test_shapes_that_are_none(text):
    with pytest.raises(ValueError, match=r"is no model .*no layer.* no OUTxIN size") as caught:
        shapes.parse_shapes(f"q8b,{text}")
    assert repr(text) in str(caught.value)


def test_counts():
    assert shapes.parse_counts("--m", "1, 16,256,16") == [1, 16, 256]
    for text in ("", ",", "0", "1,x", "-4", "1.5", "1,,2 3"):
        with pytest.raises(ValueError, match="--m must be positive integers") as caught:
            shapes.parse_counts("--m", text)
        assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shapes", "llama-9b"], "'llama-9b' is no model"),
        (["--shapes", ""], "--shapes is empty"),
        (["--m", "1,two"], "--m must be positive integers separated by commas"),
        (["--dtype", "fp32"], "--dtype must be bf16 or fp16, got fp32"),
        (["--impl", "dense,cublas"], "--impl must name some of dense, dense+lora"),
        (["--impl", ""], "--impl must name some of"),
        (["--json", "."], "--json . is a folder; name a file"),
        (["--plot", __file__], "is a file; name a folder"),
        (["--plot", f"{__file__}/plots"], "is no folder to write in"),
    ],
)
def test_wrong_input_is_one_sentence(arguments, sentence):
    assert sentence in fails(*arguments)


def test_plot_without_matplotlib(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    assert "pip install matplotlib" in fails("--plot", "plots")


@NO_CUDA
def test_without_a_gpu_it_says_so():
    assert "lowbit bench linear needs a CUDA device: " in fails()


@NO_CUDA
def test_script_is_the_same_command(tmp_path):
    script = [sys.executable, ROOT / "bench" / "bench_nf4_lora_matmul.py", "--m", "1"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("lowbit: lowbit bench linear needs a CUDA device")


def test_help_has_examples_and_names_every_choice(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    help_text = run("--help").stdout
    assert "Examples:" in help_text
    assert "lowbit bench linear --shapes llama-8b --m 1,16,256,4096" in help_text
    for name in (*shapes.MODELS, *implementations.IMPLEMENTATIONS):
        assert name in help_text
    group = CliRunner().invoke(app, ["bench", "--help"]).stdout
    assert "linear" in group
    assert "bench" in CliRunner().invoke(app, ["--help"]).stdout


# ---- formulas ------------------------------------------------------------------------------------

# K a multiple of the block; rows with a short last block, where bitsandbytes quantizes by itself.
FORMULA_SIZES = [(96, 128), (40, 100)]


def prepared(name: str, N: int, K: int, dtype=torch.bfloat16, device="cpu", copies=3):
    weights = implementations.Weights(N, K, 8, dtype, device, copies)
    return weights, implementations.IMPLEMENTATIONS[name].build(weights)


@pytest.mark.parametrize("size", FORMULA_SIZES, ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "dense",
        "dense+lora",
        "dense+addmm",
        "lowbit",
        pytest.param("bitsandbytes", marks=NEEDS_BNB),
        pytest.param("unsloth-style", marks=NEEDS_BNB),
    ],
)
def test_every_formula_against_float64(name, size):
    weights, ready = prepared(name, *size)
    x = torch.randn(5, size[1], dtype=torch.bfloat16)
    implementation = implementations.IMPLEMENTATIONS[name]
    W = ready.exact_rows(torch.arange(size[0]))
    exact = F.linear(x.double(), W)
    plain = F.linear(x, W.to(x.dtype))
    if implementation.lora:
        A, B = weights.A[0], weights.B[0]
        exact += (x.double() @ A.double().t()) @ B.double().t() * 2.0
        plain = plain + (x @ A.t()) @ B.t() * 2.0
    with torch.no_grad():
        for i in range(weights.copies):
            assert relative_rms(ready.call(x, i), exact) <= 2 * relative_rms(plain, exact)
    error, plain_error = checks.errors(implementation, ready, weights, x)
    assert error <= 2 * plain_error
    assert plain_error == pytest.approx(relative_rms(plain, exact), rel=1e-6)


def test_copies_share_values_and_no_memory():
    weights, _ = prepared("lowbit", 64, 128)
    tensors = [[q.qweight, q.absmax, q.codebook, q.nested_absmax] for q in weights.quantized]
    for group in zip(*tensors, strict=True):
        assert len({t.data_ptr() for t in group}) == weights.copies
        assert all(torch.equal(t, group[0]) for t in group)
    for group in (weights.A, weights.B, weights.dense):
        assert len({t.data_ptr() for t in group}) == weights.copies
    x = torch.randn(2, 128, dtype=torch.bfloat16)
    q = weights.quantized[2]
    assert torch.equal(lowbit.matmul(x, q), lowbit.matmul(x, weights.quantized[0]))


@pytest.mark.parametrize("layout", ["rows", "flat"])
def test_exact_rows_are_the_dequantized_weight(layout):
    q = lowbit.quantize(torch.randn(40, 100), layout=layout)
    rows = torch.tensor([0, 7, 39])
    exact = implementations.exact_rows(q, rows)
    assert torch.equal(exact, q.dequantize(torch.float32)[rows].double())


@NEEDS_BNB
def test_bytes_that_are_counted():
    weights, dense = prepared("dense", 96, 128)
    assert dense.weight_bytes == 2 * 96 * 128
    unsloth = implementations.IMPLEMENTATIONS["unsloth-style"].build(weights)
    assert unsloth.weight_bytes == weights.quantized[0].nbytes
    assert unsloth.held_bytes == 2 * 96 * 128 + 4 * 192  # the weight in 16 bits, 192 scales


def test_missing_ones_have_a_reason(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    kept, skipped = linear.present(["dense", "bitsandbytes", "unsloth-style", "torchao"])
    assert kept == ["dense"]
    assert skipped["torchao"] == "torchao is not installed"
    assert skipped["unsloth-style"] == "bitsandbytes is not installed"


# ---- arithmetic ----------------------------------------------------------------------------------

CARD = timing.Ceilings(copy_gbps=2000.0, matmul_tflops=500.0)


def test_floor_by_hand():
    # 2 * 1 * (4096 * 4096 + 16 * 8192); 8.7 MB of weight, x and y of 8192 B each, A and B 262144 B.
    assert linear.needed_flops(1, 4096, 4096, 16) == 33_816_576
    moved = linear.needed_bytes(1, 4096, 4096, 16, 8_700_000)
    assert moved == 8_700_000 + 16_384 + 262_144
    assert linear.floor_us(moved, 33_816_576, CARD) == pytest.approx(4.489264)  # by bytes
    assert linear.floor_us(0.0, 33_816_576, CARD) == pytest.approx(0.067633152)
    assert linear.floor_us(2e6, 5e9, CARD) == pytest.approx(10.0)  # by flops: 1 us of bytes
    assert linear.needed_flops(2, 3, 5, 0) == 60


def test_copies_exceed_the_cache():
    assert linear.copies_for(8_700_000) == 14  # 121.8 MB
    assert linear.copies_for(121_000_000) == 4
    assert linear.copies_for(10_000_000, l2_bytes=100 << 20) == 21


def test_passes_fill_a_replay():
    assert linear.passes_for(floor=3.0, copies=14) == 8  # 12 would, 8 is the most
    assert linear.passes_for(floor=40.0, copies=4) == 4  # 640 us
    assert linear.passes_for(floor=10_000.0, copies=4) == 1


def test_rounds_fit_the_time():
    assert timing.rounds_that_fit([0.01, 0.04], seconds=0.72, most=20) == 14
    assert timing.rounds_that_fit([0.001], seconds=0.7, most=20) == 20
    assert timing.rounds_that_fit([0.5, 0.5], seconds=0.7, most=20) == 3
    assert timing.rounds_that_fit([0.5, 0.5], seconds=0.7, most=1) == 1


def test_samples_take_a_third_of_the_own_time():
    assert timing.samples_of(0.005, own_seconds=0) == 3
    assert timing.samples_of(0.005, own_seconds=0.3) == 20
    assert timing.samples_of(0.5, own_seconds=0.3) == 3


def test_only_arithmetic_is_timed_at_the_power_limit():
    """At 100 GB/s and 1 TFLOP/s, 1 MB take 10 us."""
    card = timing.Ceilings(copy_gbps=100, matmul_tflops=1)
    assert linear.own_seconds(1e6, 9e6, card) == 0
    assert linear.own_seconds(1e6, 11e6, card) == timing.SUSTAINED_SECONDS


def test_percentiles():
    assert timing.percentiles([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == (3.5, 2.0, 5.0)
    assert timing.percentiles([7.0]) == (7.0, 7.0, 7.0)


def test_host_times_are_taken_without_collections(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = {name: lambda name=name: seen.append((name, gc.isenabled())) for name in "abc"}
    for clock, options in ((timing.wall_times, {}), (timing.host_times, {"calls": 1})):
        assert clock(calls, rounds=7, **options).keys() == calls.keys()
        assert gc.isenabled()
        assert not any(enabled for _, enabled in seen)
        names = [name for name, _ in seen]
        times = (7 + timing.WARM_ROUNDS) * timing.IN_A_ROW
        assert [names.count(name) for name in "abc"] == [times] * 3
        seen.clear()


def test_first_calls_after_another_contender_are_not_counted():
    before = []

    def sample(call):
        cold = before[-timing.COLD :] != [call()] * timing.COLD
        before.append(call())
        return 100.0 if cold else 1.0

    contenders = {name: lambda name=name: name for name in "abc"}
    times = timing._host_samples(contenders, sample, rounds=5)
    assert times == dict.fromkeys("abc", (1.0, 1.0, 1.0))


def test_spread_holds_both_ends():
    assert checks.spread(3, 32).tolist() == [0, 1, 2]
    some = checks.spread(4096, 512).tolist()
    assert (some[0], some[-1], len(set(some))) == (0, 4095, 512)
    assert {index % 8 for index in some} == set(range(8))  # not always the same place in a tile


def test_ratios_and_their_line():
    rows = linear.finish([make_row("dense", 20.0, extra_bytes=3 << 20), make_row("lowbit", 8.0)])
    assert [row.vs_dense for row in rows] == [1.0, 2.5]
    assert [row.vs_floor for row in rows] == [5.0, 2.0]
    assert [row.percent_peak for row in rows] == [20.0, 50.0]
    shown = "lora_linear 16 4096 4096 16 bf16 lowbit 8.0 7.2 9.6 100.00 1250.00 50% 2.50 2.00 -"
    assert " ".join(rows[1].line().split()) == shown
    assert rows[0].line().split()[-1] == "3.0"
    assert len({len(row.line()) for row in rows} | {len(records.COLUMNS)}) == 1


def test_summary_is_a_geometric_mean():
    rows = linear.finish([make_row("dense", 20.0), make_row("lowbit", 10.0)])
    rows += linear.finish([make_row("dense", 32.0, M=64), make_row("lowbit", 4.0, M=64)])
    dense, ours = linear.summary(rows)
    assert "1.00 x dense" in dense
    assert f"{math.sqrt(5.0 * 8.0):.2f} x floor" in dense
    assert "over 2 cases" in ours
    assert "4.00 x dense" in ours  # sqrt(2 * 8)
    assert f"{math.sqrt(2.5 * 1.0):.2f} x floor" in ours


def test_without_dense_there_is_no_ratio_to_it():
    (row,) = linear.finish([make_row("lowbit", 8.0)])
    assert row.vs_dense is None
    assert "x dense" not in linear.summary([row])[0]


def test_check_holds_lowbit_only():
    checks.check("lowbit", 0.002, 0.001, "q8b, M 1")
    checks.check("bitsandbytes", 0.5, 0.001, "q8b, M 1")
    for error in (0.0021, math.nan):
        with pytest.raises(checks.CheckError, match="lowbit is wrong at q8b, M 1"):
            checks.check("lowbit", error, 0.001, "q8b, M 1")


# ---- the whole run, without a GPU ----------------------------------------------------------------


@pytest.fixture
def no_gpu_needed(monkeypatch):
    """Replace what needs a GPU: 1 us for each character of a contender's name."""

    def time_replays(replays, *, seconds, rounds, own_seconds=0.0):
        for replay in replays.values():
            replay.run()
        return {name: (len(name) + own_seconds,) * 3 for name in replays}

    monkeypatch.setattr(linear, "DEVICE", "cpu")
    monkeypatch.setattr(linear, "MIN_COPIES", 2)
    monkeypatch.setattr(linear, "ROTATED_BYTES", 0)
    monkeypatch.setattr(linear, "_l2_bytes", lambda: 0)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "measure_ceilings", lambda dtype: CARD)
    monkeypatch.setattr(timing, "extra_bytes", lambda call: timing.result_bytes(call()))
    monkeypatch.setattr(timing, "time_replays", time_replays)
    monkeypatch.setattr(timing, "capture", lambda calls, pool: timing.Replay(calls[0], len(calls)))


CHOICE = ("lora_linear", torch.device("cpu"), torch.bfloat16)


def options(**changes) -> linear.Options:
    given = {"layers": shapes.parse_shapes("96x128,40x100"), "tokens": [1, 5], "r": 4}
    return linear.Options(**given | {"implementations": ["dense", "lowbit"]} | changes)


def test_run_writes_rows_record_and_plots(no_gpu_needed, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    rows = linear.run(options(json=tmp_path / "deep/out.json", plot=tmp_path / "plots", eager=True))
    record = json.loads((tmp_path / "deep/out.json").read_text())
    assert record["benchmark"] == "linear"
    assert record["ceilings"] == {"copy_gbps": 2000.0, "matmul_tflops": 500.0}
    timed = [row for row in record["rows"] if row["op"] == "lora_linear"]
    assert [(row["layer"], row["M"], row["impl"]) for row in timed] == [
        (layer, M, impl)
        for layer in ("96x128", "40x100")
        for M in (1, 5)
        for impl in ("dense", "lowbit")
    ]
    assert all(row["vs_dense"] == 5 / len(row["impl"]) for row in timed)
    assert {row["kernel"] for row in timed} == {None, dispatch.choose(*CHOICE).backend}
    assert all(0 < row["error"] < 0.01 and row["floor_us"] > 0 for row in timed)
    host = [row for row in rows if row.op == "lora_linear host"]
    assert len(host) == len(timed)
    assert all(row.us > 0 and row.timing == "host, in a row" for row in host)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out.json"]
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {"linear_96x128_bf16.png", "linear_40x100_bf16.png"}
    shown = capsys.readouterr().out
    assert records.COLUMNS in shown
    assert "# 96x128, M 5: relative RMS error dense 0.00" in shown
    assert "geometric mean over 4 cases, lowbit" in shown


def test_what_arithmetic_limits_is_timed_in_turn_too(no_gpu_needed, monkeypatch):
    """Up to IN_TURN_MAX_TOKENS, and only where a time is one that is kept up."""
    monkeypatch.setattr(linear, "IN_TURN_MAX_TOKENS", 5)
    card = timing.Ceilings(copy_gbps=2000.0, matmul_tflops=10.0)
    for ceilings, in_turn in ((card, {1: None, 5: 6.0, 6: None}), (CARD, dict.fromkeys((1, 5, 6)))):
        monkeypatch.setattr(timing, "measure_ceilings", lambda dtype, it=ceilings: it)
        rows = linear.run(options(tokens=[1, 5, 6], implementations=["lowbit"]))
        assert {row.M: row.in_turn_us for row in rows} == in_turn
        sustained = {row.M for row in rows if row.timing == "graph, sustained"}
        assert sustained == ({5, 6} if ceilings is card else set())
        own = timing.SUSTAINED_SECONDS
        assert all(row.us == len("lowbit") + own * (row.M in sustained) for row in rows)


def test_forward_and_backward(no_gpu_needed, monkeypatch, tmp_path, capsys):
    """Gradients are checked; a layer alone is timed, and where N = K a chain of them."""
    layers = shapes.parse_shapes("64x64,40x128")
    names = ["dense", "dense+lora", "dense+addmm", "lowbit"]
    given = options(
        layers=layers,
        tokens=[5, 300],
        json=tmp_path / "out.json",
        eager=True,
        implementations=names,
    )
    rows = linear_backward.run(given)
    assert json.loads((tmp_path / "out.json").read_text())["benchmark"] == "linear_backward"
    timed = [row for row in rows if row.op == linear_backward.OP]
    assert [(r.layer, r.M, r.impl) for r in timed] == [
        (layer.name, M, impl) for layer in layers for M in (5, 300) for impl in names
    ]
    assert all(0 < row.error < 0.02 for row in timed)
    lowbit_row = next(r for r in timed if (r.layer, r.M, r.impl) == ("40x128", 5, "lowbit"))
    assert lowbit_row.flops == 2 * 5 * (2 * 40 * 128 + 3 * 4 * (40 + 128))
    assert lowbit_row.vs_dense == len("dense") / len("lowbit")
    # y, dx and the gradients of A and B
    assert lowbit_row.extra_bytes == 2 * (5 * 40 + 5 * 128 + 4 * (40 + 128))
    for op in (linear_backward.WALL_OP, linear_backward.CALLER_WALL_OP):
        assert {(r.layer, r.M) for r in rows if r.op == op} == {("64x64", 5), ("40x128", 5)}
    for op in (linear_backward.HOST_OP, linear_backward.CALLER_HOST_OP):
        host = [r for r in rows if r.op == op]
        assert {(r.layer, r.M) for r in host} == {("64x64", 5)}
        assert {r.impl for r in host} == {linear_backward.EMPTY, *names}
    assert "forward and backward, r 4" in capsys.readouterr().out


def test_wrong_gradients_end_the_run(no_gpu_needed, monkeypatch):
    true = implementations.lora_matmul

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy * 1.05

    monkeypatch.setattr(
        implementations, "lora_matmul", lambda x, w, A, B, s: true(x, w, Scaled.apply(A), B, s)
    )
    with pytest.raises(checks.CheckError, match="lowbit is wrong at 96x128, M 1"):
        linear_backward.run(options())


@NEEDS_BNB
def test_gradients_of_the_unsloth_style():
    weights, ready = prepared("unsloth-style", 96, 128)
    x, dy = torch.randn(5, 128), torch.randn(5, 96)
    x = x.bfloat16().requires_grad_()
    A, B = weights.A[0].requires_grad_(), weights.B[0].requires_grad_()
    gradients = torch.autograd.grad(ready.call(x, 0), (x, A, B), dy.bfloat16())
    error, plain = checks.gradient_errors(gradients, ready, weights, x, dy.bfloat16())
    assert error <= 3 * plain


def test_a_run_cut_short_leaves_what_it_had(no_gpu_needed, monkeypatch, tmp_path):
    case = linear.Benchmark.case

    def cut_short(self, layer, contenders, x):
        if layer.name == "40x100":
            raise KeyboardInterrupt
        return case(self, layer, contenders, x)

    monkeypatch.setattr(linear.Benchmark, "case", cut_short)
    with pytest.raises(KeyboardInterrupt):
        linear.run(options(json=tmp_path / "out.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["out.json.unfinished"]
    record = json.loads((tmp_path / "out.json.unfinished").read_text())
    assert {row["layer"] for row in record["rows"]} == {"96x128"}


def test_wrong_results_end_the_run(no_gpu_needed, monkeypatch):
    true = implementations.lora_matmul
    monkeypatch.setattr(implementations, "lora_matmul", lambda *args: true(*args) * 1.02)
    with pytest.raises(checks.CheckError, match="lowbit is wrong at 96x128, M 1"):
        linear.run(options())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(records, "environment", dict)
    result = run("--shapes", "96x128", "--m", "1", "--impl", "dense,lowbit")
    assert result.exit_code == 1
    assert result.stderr.startswith("lowbit: lowbit is wrong at 96x128, M 1: relative RMS error")


def test_a_peer_that_fails_is_left_out(no_gpu_needed, monkeypatch, capsys):
    def build(weights):
        def call(x, i):
            if x.shape[0] > 1:
                raise RuntimeError("no kernel for this M")
            return x.new_zeros(x.shape[0], weights.N)

        return implementations.Prepared(call, implementations._rows_of(weights), 1)

    broken = implementations.Implementation("torchao", "a peer", build)
    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "torchao", broken)
    rows = linear.run(options(implementations=["lowbit", "torchao"]))
    assert {row.M for row in rows if row.impl == "torchao"} == {1}
    assert {row.M for row in rows if row.impl == "lowbit"} == {1, 5}
    assert "# torchao skipped at 96x128, M 5: no kernel for this M" in capsys.readouterr().out


def test_what_cannot_be_captured_is_timed_eagerly(no_gpu_needed, monkeypatch, capsys):
    def capture(calls, pool):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(timing, "capture", capture)
    rows = linear.run(options(implementations=["lowbit"]))
    assert {row.timing for row in rows} == {"eager"}
    assert "lowbit at 96x128, M 1 is timed eagerly, no graph: operation" in capsys.readouterr().out


def test_panels_are_left_out_where_lowbit_runs_them(no_gpu_needed, monkeypatch, capsys):
    chosen = {1: "cuda:nf4_lora_gemv", 5: implementations.PANELS}
    monkeypatch.setattr(linear, "lowbit_kernel", lambda operation, q, r, M: chosen[M])
    panels = implementations.IMPLEMENTATIONS["lowbit-panels"]
    there = implementations.Implementation(panels.name, "", implementations._lowbit)
    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "lowbit-panels", there)
    rows = linear.run(options(implementations=["lowbit", "lowbit-panels"]))
    assert {row.M for row in rows if row.impl == "lowbit-panels"} == {1}
    assert {row.kernel for row in rows if row.impl == "lowbit-panels"} == {implementations.PANELS}
    assert "# lowbit-panels left out at 96x128, M 5: lowbit itself" in capsys.readouterr().out


def test_panels_can_be_forced():
    with dispatch.force(implementations.PANELS):
        assert dispatch.forced() == implementations.PANELS


def test_nothing_that_can_run_is_an_error(no_gpu_needed, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"none of them can run here \(torchao: torchao is not"):
        linear.run(options(implementations=["torchao"]))


# ---- pictures ------------------------------------------------------------------------------------


def test_plots_are_pngs(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        make_row(impl, us * M, M=M, layer=layer, floor_us=4.0 * M)
        for layer in ("q8b", "kv8b")
        for impl, us in (("lowbit", 5.0), ("dense", 20.0), ("something else", 30.0))
        for M in (16, 1, 256)
    ]
    rows.append(make_row("lowbit", 9.0, floor_us=None))
    rows[-1].op = "lora_linear host"
    paths = plots.plot_linear(rows, tmp_path / "a" / "b", machine="a card")
    assert [path.name for path in paths] == ["linear_q8b_bf16.png", "linear_kv8b_bf16.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5000


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_command_on_a_gpu(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "linear.json"
    result = run(
        "--shapes", "q135m,1024x4096", "--m", "1,64", "--rounds", 5, "--eager",
        "--json", path, "--plot", tmp_path / "plots",
    )  # fmt: skip
    assert result.exit_code == 0, (result.stdout, result.stderr)
    record = json.loads(path.read_text())
    rows = [row for row in record["rows"] if row["op"] == "lora_linear"]
    assert {(row["layer"], row["M"]) for row in rows if row["impl"] == "lowbit"} == {
        ("q135m", 1), ("q135m", 64), ("1024x4096", 1), ("1024x4096", 64),
    }  # fmt: skip
    timings = {row["timing"] for row in rows if row["impl"] in ("dense", "lowbit")}
    assert timings <= {"graph", "graph, sustained"}
    for row in rows:
        assert 0 < row["p20"] <= row["us"] <= row["p80"]
        assert row["error"] < 0.02, row["impl"]
    assert record["ceilings"]["copy_gbps"] > 0
    assert len(list((tmp_path / "plots").glob("*.png"))) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(implementations.IMPLEMENTATIONS))
def test_every_implementation_on_a_gpu(name):
    implementation = implementations.IMPLEMENTATIONS[name]
    if (reason := implementation.missing()) is not None:
        pytest.skip(reason)
    with torch.no_grad():
        weights, ready = prepared(name, 512, 1024, device="cuda")
        for M in (1, 16, 300):
            x = torch.randn(M, 1024, device="cuda", dtype=torch.bfloat16)
            error, plain = checks.errors(implementation, ready, weights, x)
            assert error <= (2 * plain if name.startswith("lowbit") else 0.02), (name, M)
            # Equal weights. cuBLAS, which the others use, may round the result elsewhere.
            differ = 0.0 if name == "lowbit" else 2.0**-8
            for i in range(weights.copies):
                assert relative_rms(ready.call(x, i), ready.call(x, 0)) <= differ, (name, i)


@pytest.mark.gpu
def test_replay_covers_all_calls():
    x = torch.zeros(4, device="cuda")
    calls = [lambda i=i: x[i].add_(1) for i in range(4)]
    calls[0]()
    x.zero_()
    replay = timing.capture(calls * 2)
    assert replay.launches == 8
    assert x.tolist() == [0, 0, 0, 0]  # capturing runs nothing
    times = timing.time_replays(
        {"graph": replay, "eager": timing.eager(calls)}, seconds=0.05, rounds=4
    )
    torch.cuda.synchronize()
    # First run and estimate, one untimed replay before each of the 4 rounds of 3 samples: 18
    # replays of 2; the eager one has no untimed replay: 14.
    assert x.tolist() == [50, 50, 50, 50]
    assert all(0 < low <= middle <= high for middle, low, high in times.values())


@pytest.mark.gpu
def test_extra_bytes_of_a_call():
    x = torch.ones(1 << 20, device="cuda")
    x.add(1)
    assert timing.extra_bytes(lambda: x.add(1)) == 0
    assert timing.extra_bytes(lambda: x.add(1).add(1)) == 4 << 20
