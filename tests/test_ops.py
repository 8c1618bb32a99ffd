"""Every registered operation against torch's own checker, and the dispatch table."""

import pytest
import torch

import lowbit
from lowbit import _library, codebooks, dispatch, functional, ops

X, R = (5, 128), 4


@pytest.fixture(autouse=True)
def _free_choice(monkeypatch):
    """These tests are about the choice itself, whatever the run forces."""
    monkeypatch.setattr(dispatch, "_environment", None)


def _samples(device):
    """Arguments for every operation: plain, double-quantized and dense weights, with what needs a
    gradient.
    """
    weight = torch.randn(48, 128, device=device)
    packed, plain = lowbit.quantize(weight), lowbit.quantize(weight, double_quant=False)
    dense = functional._dense_args(weight, weight)
    bounds, order = (t.to(device) for t in codebooks.thresholds(lowbit.codebook("nf4")))
    nested = lowbit.nested_codebook().to(device)

    def leaf(*shape):
        return torch.randn(*shape, device=device, requires_grad=True)

    seed = torch.tensor([5], device=device)
    for w in (packed.args(), plain.args(), dense):
        yield "linear", (leaf(*X), *w, leaf(48))
        yield "linear_dx", (leaf(5, 48), *w)
        low_rank = (torch.randn(5, R, device=device), torch.randn(48, R, device=device))
        yield "linear_low_rank", (torch.randn(X, device=device), *w, *low_rank, None, 2.0, None)
        adapter = (leaf(R, 128), leaf(48, R))
        yield "lora_linear", (leaf(*X), *w, *adapter, None, 2.0, None, 0.0, None)
        yield "lora_linear", (leaf(*X), *w, *adapter, leaf(R), 1.0, leaf(48), 0.25, seed)
        plain_adapter = tuple(t.detach() for t in adapter)
        x, z, dy = (torch.randn(s, device=device) for s in (X, (5, R), (5, 48)))
        yield (
            "lora_linear_backward",
            (
                dy,
                x,
                z,
                *w,
                *plain_adapter,
                torch.rand(R, device=device),
                2.0,
                0.25,
                seed,
                *[True] * 5,
            ),
        )
        yield (
            "lora_linear_backward",
            (dy, x, z, *w, *plain_adapter, None, 2.0, 0.0, None, *[False] * 5),
        )
    yield "dequantize_4bit", (*packed.args(), torch.bfloat16)
    yield "dequantize_4bit", (*plain.args(), torch.float32)
    yield "quantize_4bit", (weight, bounds, order, nested, 64, 256, True)
    yield "quantize_4bit", (weight[:, :65].contiguous(), bounds, order, None, 64, 256, False)
    yield "dropout", (leaf(*X), 0.5, seed)


def test_opcheck_of_every_operation(device):
    seen = set()
    for name, args in _samples(device):
        seen.add(name)
        results = torch.library.opcheck(
            getattr(torch.ops.lowbit, name).default, args, raise_exception=False
        )
        failed = {test: result for test, result in results.items() if result != "SUCCESS"}
        assert not failed, f"lowbit::{name}: {failed}"
    assert seen == set(ops.SCHEMAS) == set(dispatch.OPERATIONS)


def test_a_weight_that_is_partly_on_meta_is_refused(device):
    """torch would take the shape of the result for the result."""
    q = lowbit.quantize(torch.randn(48, 128, device=device))
    q.absmax = q.absmax.to("meta")
    x = torch.randn(*X, device=device, requires_grad=True)
    for function in (q.dequantize, lambda: lowbit.matmul(x, q)):
        with pytest.raises(ValueError, match=r"absmax must be on .* got meta"):
            function()


def test_force_is_scoped_and_checked():
    assert dispatch.forced() is None
    with dispatch.force("reference"):
        assert dispatch.choose("linear", torch.device("cpu"), torch.float32).backend == "reference"
    assert dispatch.forced() is None
    with (
        pytest.raises(
            ValueError,
            match=r"backend must be one of cuda, triton, cpu, reference, cuda:.* got 'gpu'",
        ),
        dispatch.force("gpu"),
    ):
        pass


def test_contexts_of_two_threads_may_end_in_any_order():
    first, second = dispatch.force("cpu"), dispatch.force("reference")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert dispatch.forced() == "reference"
    second.__exit__(None, None, None)
    assert dispatch.forced() is None


def test_environment_forces_a_backend(monkeypatch):
    monkeypatch.setattr(dispatch, "_environment", "reference")
    assert dispatch.choose("linear", torch.device("cpu"), torch.float32).reason == "forced"
    monkeypatch.setattr(dispatch, "_environment", "fast")
    with pytest.raises(ValueError, match=r"LOWBIT_BACKEND must be one of .* got 'fast'"):
        dispatch.choose("linear", torch.device("cpu"), torch.float32)


def test_a_forced_backend_that_is_missing_says_why(monkeypatch):
    monkeypatch.setattr(dispatch, "unavailable", lambda backend: "not compiled here")
    with (
        dispatch.force("cuda"),
        pytest.raises(
            RuntimeError, match="backend 'cuda' was forced but cannot run here: not compiled here"
        ),
    ):
        lowbit.matmul(torch.randn(2, 64), lowbit.quantize(torch.randn(8, 64)))


def test_the_reference_serves_every_operation_and_float64():
    for operation in dispatch.OPERATIONS:
        row = dispatch.choose(operation, torch.device("cpu"), torch.float64)
        assert row.backend == "reference"
    with pytest.raises(TypeError, match=r"lowbit::linear does not support torch.int8 on cpu"):
        dispatch.choose("linear", torch.device("cpu"), torch.int8)


@pytest.mark.parametrize(
    ("N", "r", "kernel"),
    [
        (128256, 50, "mid"), (128256, 12, "large"), (128256, 48, "large"), (4096, 50, "large"),
        (1 << 18, 12, "mid"),
    ],
)  # fmt: skip
def test_many_tokens_leave_the_large_kernel_where_a_padded_factor_does_not_fit(N, r, kernel):
    layer = dispatch.Layer(N, 4096, 64, True, r)
    rows = [
        row.kernel
        for row in dispatch.TABLE
        if "lora_linear" in row.operations and row.serves is not None and row.serves(layer)
        and row.tokens[0] <= 60000 <= row.tokens[1]
    ]  # fmt: skip
    assert rows[0] == f"nf4_lora_matmul_{kernel}"


@pytest.fixture
def another_card(monkeypatch):
    """monkeypatch; no row that is chosen for a card that is not there outlives the test."""
    caches = dispatch._choose, _library.missing_code
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(
    ("N", "K", "kernel"),
    [
        (16384, 53248, "matmul_small"), (28672, 8192, "gemv"), (8192, 32768, "gemv"),
        ((1 << 19) + 16, 1024, "matmul_small"), (95584, 32768, "matmul_small"),
        (1 << 19, 1024, "gemv"), (128256, 4096, "gemv"),
    ],
)  # fmt: skip
def test_one_token_of_a_layer_beyond_its_kernel_takes_the_next(another_card, N, K, kernel):
    another_card.setattr(dispatch, "_card", lambda index: ((9, 0), 132))
    another_card.setattr(dispatch, "obstacle", lambda backend, device: None)
    layer = dispatch.Layer(N, K, 64, True, 64)
    row = dispatch.choose("lora_linear", torch.device("cuda", 0), torch.bfloat16, 1, layer)
    assert row.kernel == f"nf4_lora_{kernel}"


def test_a_device_without_index_is_the_current_one_of_each_call(another_card):
    cards = {0: ((9, 0), 132), 1: ((8, 0), 108)}
    another_card.setattr(dispatch, "_card", cards.__getitem__)
    another_card.setattr(dispatch, "obstacle", lambda backend, device: None)
    another_card.setattr(torch.cuda, "is_available", lambda: True)
    layer = dispatch.Layer(4096, 4096, 64, True, 16)
    for current, kernel in ((0, "nf4_lora_gemv"), (1, "nf4_lora_matmul_portable")):
        another_card.setattr(torch.cuda, "current_device", lambda current=current: current)
        row = dispatch.choose("lora_linear", torch.device("cuda"), torch.bfloat16, 1, layer)
        assert row.kernel == kernel


def test_a_forced_backend_that_is_not_there_is_an_error_without_a_gpu(another_card):
    another_card.setattr(torch.cuda, "is_available", lambda: False)
    another_card.setattr(torch.cuda, "current_device", lambda: pytest.fail("there is none"))
    another_card.setattr(dispatch, "unavailable", lambda backend: "no GPU")
    with dispatch.force("cuda"), pytest.raises(RuntimeError, match="cannot run here: no GPU"):
        dispatch.choose("lora_linear", torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (10, 0), (12, 0)])
def test_cards_without_kernels_of_their_own_have_a_fused_forward(another_card, capability):
    another_card.setattr(dispatch, "_card", lambda index: (capability, 132))
    another_card.setattr(dispatch, "obstacle", lambda backend, device: None)
    device, layer = torch.device("cuda", 0), dispatch.Layer(4096, 4096, 64, True, 16)
    kernels = [
        dispatch.choose("lora_linear", device, torch.bfloat16, M, layer).kernel for M in (1, 64, 65)
    ]
    assert kernels == ["nf4_lora_matmul_portable", "nf4_lora_matmul_portable", "panels"]


@pytest.mark.parametrize(("sms", "many"), [(16, False), (32, True), (132, True)])
def test_slices_of_a_card_take_no_kernel_that_needs_more_of_it(another_card, sms, many):
    another_card.setattr(dispatch, "_card", lambda index: ((9, 0), sms))
    another_card.setattr(dispatch, "obstacle", lambda backend, device: None)
    device, layer = torch.device("cuda", 0), dispatch.Layer(4096, 4096, 64, True, 16)
    kernels = [
        dispatch.choose(operation, device, torch.bfloat16, 4096, layer).kernel
        for operation in ("lora_linear", "lora_linear_backward")
    ]
    one = dispatch.choose("lora_linear", device, torch.bfloat16, 1, layer)
    if many:
        assert kernels == ["nf4_lora_matmul_large", "nf4_lora_backward_large"]
    else:
        assert kernels == ["nf4_lora_matmul_mid", "nf4_lora_backward"]
    assert one.kernel == ("nf4_lora_gemv" if sms == 132 else "nf4_lora_matmul_small")


@pytest.mark.parametrize(
    ("N", "tokens", "kernel"),
    [
        (4096, 2048, "mid"), (4096, 2560, "mid"), (4096, 3072, "large"), (4096, 3584, "mid"),
        (14336, 3072, "mid"), (14336, 3584, "large"), (28672, 3072, "large"),
        (4096, 4096, "large"), (14336, 4096, "large"), (28672, 4096, "large"),
        (4096, 4352, "mid"), (14336, 4352, "large"), (4096, 5120, "large"), (14336, 5120, "mid"),
        (14336, 6144, "large"), (4096, 7000, "large"), (1024, 3072, "mid"), (1024, 4096, "large"),
    ],
)  # fmt: skip
def test_many_tokens_take_the_kernel_whose_waves_are_full(another_card, N, tokens, kernel):
    """As measured with 132 SMs (bench/NOTES.md)."""
    another_card.setattr(dispatch, "_card", lambda index: ((9, 0), 132))
    another_card.setattr(dispatch, "obstacle", lambda backend, device: None)
    device, layer = torch.device("cuda", 0), dispatch.Layer(N, 4096, 64, True, 16)
    row = dispatch.choose("lora_linear", device, torch.bfloat16, tokens, layer)
    assert row.kernel == f"nf4_lora_matmul_{kernel}"


def test_a_card_that_the_library_has_no_code_for_takes_the_next_backend(another_card):
    device, layer = torch.device("cuda", 0), dispatch.Layer(4096, 4096, 64, True, 16)
    another_card.setattr(dispatch, "_card", lambda index: ((12, 0), 132))
    another_card.setattr(dispatch, "unavailable", lambda backend: None)
    another_card.setattr(_library, "build_info", lambda: {"cuda_archs": ["90a-real"]})
    row = dispatch.choose("lora_linear", device, torch.bfloat16, 1, layer)
    with dispatch.force("cuda"), pytest.raises(RuntimeError, match="not for compute capability 12"):
        dispatch.choose("lora_linear", device, torch.bfloat16, 1, layer)
    assert row.backend == "triton"


def test_every_row_of_the_table_names_known_things():
    for row in dispatch.TABLE:
        assert set(row.operations) <= set(dispatch.OPERATIONS)
        assert row.backend in dispatch.BACKENDS
        assert row.reason
