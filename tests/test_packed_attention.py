"""Attention within the pieces of a packed sequence, as vision towers have it."""

import copy
import importlib.util

import pytest
import torch
from helpers import relative_rms

import lowbit
from lowbit import fusing, packed_attention, patterns, pointwise
from lowbit.nn import QLoRALinear

modeling = pytest.importorskip(
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", reason="needs transformers"
)
ATTENTION = modeling.Qwen2_5_VLVisionAttention
WINDOWS = {  # of a tower's four patches a token: even, with short ones at the edges, none
    "even": (16, 16, 16, 16),
    "ragged": (64, 32, 64, 16, 8),
    "single": (64,),
}


def make_attention(implementation="sdpa"):
    config = modeling.Qwen2_5_VLVisionConfig(
        depth=1, hidden_size=64, intermediate_size=96, num_heads=4, out_hidden_size=64
    )
    config._attn_implementation = implementation
    return ATTENTION(config)


def make_call(windows, device="cpu", dtype=torch.float32):
    offsets = torch.tensor([0, *windows]).cumsum(0).to(device, torch.int32)
    tokens = sum(windows)
    angles = torch.rand(tokens, 16, device=device) * 6
    x = torch.randn(tokens, 64, device=device, dtype=dtype)
    return x, offsets, (angles.cos(), angles.sin())


def with_gradients(forward, module, x, offsets, positions):
    x = x.detach().requires_grad_()
    y = forward(module, x, cu_seqlens=offsets, position_embeddings=positions)
    trained = [p for p in module.parameters() if p.requires_grad]
    dy = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], dy)]


@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
def test_computes_what_the_module_computes(windows):
    module, call = make_attention(), make_call(windows)
    expected = with_gradients(ATTENTION.forward, module, *call)
    for got, true in zip(
        with_gradients(fusing._by_pieces(ATTENTION.forward), module, *call), expected, strict=True
    ):
        assert relative_rms(got, true) <= 1e-5  # in another order


def test_grouped_keys():
    q, k, v = torch.randn(1, 4, 24, 8), torch.randn(1, 2, 24, 8), torch.randn(1, 2, 24, 8)
    offsets = torch.tensor([0, 8, 24], dtype=torch.int32)
    y, weights = packed_attention.attend(
        None, q, k, v, scaling=0.3, dropout=0.0, cu_seq_lens_q=offsets
    )
    assert y.shape == (1, 24, 4, 8)
    assert weights is None
    for begin, end in ((0, 8), (8, 24)):
        scores = 0.3 * q[0, 3, begin:end] @ k[0, 1, begin:end].T  # head 3 is of the second group
        expected = scores.softmax(-1) @ v[0, 1, begin:end]
        torch.testing.assert_close(y[0, begin:end, 3], expected)


def test_pieces_are_looked_up_once_and_again_after_a_change(monkeypatch):
    offsets = torch.tensor([0, 8, 24], dtype=torch.int32)
    assert packed_attention.extent(offsets) == (0, 8, 16, 24)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "diff", lambda *_: pytest.fail("looked up again"))
        assert packed_attention.extent(offsets) == (0, 8, 16, 24)
    offsets[1] = 4
    assert packed_attention.extent(offsets) == (0, 4, 20, 24)


@torch.inference_mode()
def test_pieces_in_inference_mode():
    offsets = torch.tensor([0, 8, 24], dtype=torch.int32)
    assert packed_attention.extent(offsets) == (0, 8, 16, 24)
    offsets[1] = 4
    assert packed_attention.extent(offsets) == (0, 4, 20, 24)


@pytest.mark.parametrize(
    "ends", [(0, 8, 12), (4, 8, 16), (0, 8, 24), (0, 12), (0, 12, 4, 16)], ids=str
)
def test_pieces_that_are_not_all_of_the_tokens(ends):
    """Those of the first would count as two equal ones by the longest."""
    q = torch.randn(1, 2, 16, 8)
    with pytest.raises(
        ValueError, match=f"pieces from {ends[0]} to {ends[-1]}, .* were given for 16"
    ):
        packed_attention.attend(
            None, q, q, q, scaling=1.0, dropout=0.0,
            cu_seq_lens_q=torch.tensor(ends, dtype=torch.int32),
        )  # fmt: skip


def test_names_that_somebody_replaces_later(monkeypatch):
    """The way for flash attention and the function found there go together, or not at all."""
    module, call = make_attention(), make_call(WINDOWS["ragged"])
    expected = with_gradients(ATTENTION.forward, module, *call)
    forward = fusing._by_pieces(ATTENTION.forward)
    assert forward is not ATTENTION.forward
    requested = modeling.is_flash_attention_requested
    for name, value in (
        ("ALL_ATTENTION_FUNCTIONS", type(modeling.ALL_ATTENTION_FUNCTIONS)()),
        ("is_flash_attention_requested", lambda config: requested(config)),
        ("get_max_seqlen", lambda *_, **__: None),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(modeling, name, value)
            assert fusing._by_pieces(ATTENTION.forward) is ATTENTION.forward
            for got, true in zip(
                with_gradients(fusing._by_pieces(ATTENTION.forward), module, *call), expected,
                strict=True,
            ):  # fmt: skip
                assert torch.equal(got, true)
    own = modeling.ALL_ATTENTION_FUNCTIONS["sdpa"]
    with monkeypatch.context() as patch:
        patch.setitem(modeling.ALL_ATTENTION_FUNCTIONS, "sdpa", lambda *a, **k: own(*a, **k))
        assert fusing._by_pieces(ATTENTION.forward) is ATTENTION.forward
    assert fusing._by_pieces(ATTENTION.forward) is forward


# ---- which modules -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen2_vl", "VisionAttention"),
        ("qwen2_5_vl", "Qwen2_5_VLVisionAttention"),
        ("qwen3_vl", "Qwen3VLVisionAttention"),
        ("glm4v", "Glm4vVisionAttention"),
    ],
)
def test_vision_towers_of_transformers_follow_the_pattern(family, name):
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    forward = getattr(module, name).forward
    assert patterns.attends_by_pieces(forward)
    assert patterns.uses_vision_rotary(forward)
    assert not patterns.attends_by_pieces(modeling.Qwen2_5_VLAttention.forward)


FORWARD = """
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    ALL_ATTENTION_FUNCTIONS, get_max_seqlen, is_flash_attention_requested
)

def forward(self, q, cu_seqlens, attention_interface):
    if is_flash_attention_requested(self.config):
        y = attention_interface(
            self, q, attention_mask=None, scaling=self.scaling, cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens, {more}
        )
    else:
        lengths = cu_seqlens[1:] - cu_seqlens[:-1]
        y = [attention_interface(self, part) for part in q.split(lengths.tolist())]
    return y
"""


@pytest.mark.parametrize(
    ("more", "follows"),
    [
        ("is_causal=False", True),
        ("is_causal=True", False),
        ("is_causal=False, sliding_window=8", False),
    ],
)
def test_what_the_call_asks_for_besides_is_another_pattern(more, follows, tmp_path):
    path = tmp_path / "towers.py"
    path.write_text(FORWARD.replace("{more}", more))
    spec = importlib.util.spec_from_file_location("towers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert patterns.attends_by_pieces(module.forward) == follows
    patterns.attends_by_pieces.cache_clear()
    module.get_max_seqlen = lambda *_: 1  # no longer transformers' own
    assert not patterns.attends_by_pieces(module.forward)


def prepared(device="cpu", dtype=torch.float32):
    model = torch.nn.Sequential(make_attention()).to(device, dtype)
    model = lowbit.prepare(model, r=4)
    for module in model.modules():
        if isinstance(module, QLoRALinear):
            torch.nn.init.normal_(module.lora_B, std=0.1)
    return model


def test_a_model_reports_them_and_goes_back():
    model = prepared()
    report = lowbit.fuse(model)
    assert report.pieces == ["0"]
    assert "and 1 attention modules of a vision tower" in str(report)
    x, offsets, positions = make_call(WINDOWS["ragged"])
    model[0](x, cu_seqlens=offsets, position_embeddings=positions)  # a CPU has nothing to gain
    assert lowbit.unfuse(model) == 1
    assert type(model[0]) is ATTENTION


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
def test_as_near_to_float64_as_the_module(windows, dtype):
    model = prepared("cuda", dtype)
    call = make_call(windows, "cuda", dtype)
    plain = with_gradients(type(model[0]).forward, model[0], *call)
    exact = with_gradients(
        ATTENTION.forward, copy.deepcopy(model[0]).double(), call[0].double(), *call[1:]
    )
    lowbit.fuse(model)
    fused = with_gradients(type(model[0]).forward, model[0], *call)
    for got, rough, true in zip(fused, plain, exact, strict=True):
        allowed = 2 * relative_rms(rough, true) + torch.finfo(dtype).eps
        assert relative_rms(got, true) <= allowed


@pytest.mark.gpu
def test_nobody_waits_for_the_gpu():
    model = prepared("cuda", torch.bfloat16)
    lowbit.fuse(model)
    call = make_call((*(16,) * 63, 8), "cuda", torch.bfloat16)
    with_gradients(type(model[0]).forward, model[0], *call)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradients(type(model[0]).forward, model[0], *call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_as_many_launches_for_64_pieces_as_for_two():
    model = prepared("cuda", torch.bfloat16)
    lowbit.fuse(model)
    launches = []
    for windows in ((512, 504), (*(16,) * 63, 8)):
        call = make_call(windows, "cuda", torch.bfloat16)
        with_gradients(type(model[0]).forward, model[0], *call)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            with_gradients(type(model[0]).forward, model[0], *call)
            torch.cuda.synchronize()
        launches.append(sum(event.count for event in profile.key_averages()))
    assert abs(launches[0] - launches[1]) <= 4, launches


@pytest.mark.gpu
def test_another_attention_function_is_left_alone(monkeypatch):
    model = prepared("cuda", torch.bfloat16)
    lowbit.fuse(model)
    monkeypatch.setattr(packed_attention, "attend", lambda *_, **__: pytest.fail("called"))
    x, offsets, positions = make_call((16,) * 4, "cuda", torch.bfloat16)
    model[0].config._attn_implementation = "eager"
    model[0](x, cu_seqlens=offsets, position_embeddings=positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vision_rotary(device, dtype):
    q, k = (torch.randn(24, 3, 16, device=device, dtype=dtype, requires_grad=True) for _ in "qk")
    angles = torch.rand(24, 16, device=device) * 6
    results = [
        function(q, k, angles.cos(), angles.sin())
        for function in (pointwise.vision_rotary, modeling.apply_rotary_pos_emb_vision)
    ]
    dys = [torch.randn_like(t) for t in (q, k)]
    gradients = [torch.autograd.grad(r, (q, k), dys) for r in results]
    for got, true in zip((*results[0], *gradients[0]), (*results[1], *gradients[1]), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, true)
