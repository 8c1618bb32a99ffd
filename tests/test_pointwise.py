"""Norms, rotary embeddings and the gated activation in few launches, against the chains of torch
operations they stand for, in float64.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_rms

from lowbit import fusing, patterns, pointwise


def rotate_half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def plain_rotary(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def plain_norm(x, weight, eps):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def with_gradients(function, inputs, dys):
    """Outputs, and gradients of the inputs that want one."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [t for t in inputs if t.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, leaves, dys)]


def hold(function, plain, inputs, dys):
    """At most twice as far from float64 as the chain in the same dtype, for every result."""

    def converted(dtype):
        made = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in inputs]
        return made, tuple(dy.to(dtype) for dy in dys)

    exact = with_gradients(plain, *converted(torch.float64))
    chain = with_gradients(plain, inputs, dys)
    for i, (got, rough, true) in enumerate(
        zip(with_gradients(function, inputs, dys), chain, exact, strict=True)
    ):
        assert got.dtype == inputs[0].dtype
        allowed = 2 * relative_rms(rough, true) + torch.finfo(got.dtype).eps / 2
        assert relative_rms(got, true) <= allowed, i


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotary(device, dtype):
    """4 heads of q, 2 of k, as attention has them: [B, T, heads, d] seen with heads in front."""
    q = torch.randn(2, 5, 4, 16, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
    k = torch.randn(2, 5, 2, 16, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
    angles = torch.rand(2, 5, 16, device=device) * 6  # halves need not agree
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    dys = tuple(torch.randn_like(t) for t in (q, k))
    hold(pointwise.rotary, plain_rotary, [q, k, cos, sin], dys)


@pytest.mark.parametrize("shape", [(2, 5, 20, 3, 16), (1, 7, 4, 4, 80), (1, 3, 1, 1, 2)], ids=str)
@pytest.mark.parametrize("forward", [True, False])
def test_rotary_kernel(device, shape, forward):
    """Heads beyond a block, halves that are no power of two, one cos for all of a batch."""
    kernels = pytest.importorskip("lowbit.kernels", reason="needs triton")
    if device.type == "cpu" and not kernels.INTERPRETED:
        pytest.skip("triton compiles for the GPU here")
    B, T, q_heads, k_heads, d = shape
    q, k = (torch.randn(B, T, h + 1, d, device=device)[:, :, 1:] for h in (q_heads, k_heads))
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    cos, sin = (torch.randn(1, T, d, device=device) for _ in range(2))
    assert q_heads == 1 or not q.is_contiguous()
    leaves = [t.double().requires_grad_() for t in (q, k)]
    rotated = plain_rotary(*leaves, cos.double(), sin.double())
    expected = (
        rotated if forward else torch.autograd.grad(rotated, leaves, [q.double(), k.double()])
    )
    for got, true in zip(kernels.rotate(q, k, cos, sin, forward), expected, strict=True):
        assert got.shape == true.shape
        assert got.transpose(1, 2).is_contiguous()
        torch.testing.assert_close(got.double(), true, rtol=1e-6, atol=1e-6)


def test_what_the_rotary_kernel_reads():
    """It goes by the sizes of q, so others must be of them."""
    q, k, cos = torch.randn(2, 4, 5, 16), torch.randn(2, 3, 5, 16), torch.randn(2, 5, 16)
    assert pointwise._fit(q, k, cos, cos, 1)
    assert pointwise._fit(q, k, cos[:1], cos[:1], 1)
    assert pointwise._fit(q.transpose(1, 2), k.transpose(1, 2), cos, cos, 2)
    assert pointwise._fit(q[0].transpose(0, 1), k[0].transpose(0, 1), cos[0], cos[0], 1)
    assert not pointwise._fit(q, k, cos, cos, 2)  # tokens where the heads are
    assert not pointwise._fit(q, k[:, :, :4], cos, cos, 1)
    assert not pointwise._fit(q, k[:1], cos, cos, 1)
    assert not pointwise._fit(q, k, cos[:, :4], cos[:, :4], 1)
    assert not pointwise._fit(q, k, cos[..., :8], cos[..., :8], 1)  # of a part of each head
    assert not pointwise._fit(q, k, cos, cos[:1], 1)
    assert not pointwise._fit(q, k, cos.to("meta"), cos, 1)
    assert not pointwise._fit(q[..., :15], k[..., :15], cos[..., :15], cos[..., :15], 1)
    assert not pointwise._fit(q.mT.contiguous().mT, k, cos, cos, 1)
    assert not pointwise._fit(q[:, :, None], k[:, :, None], cos[:, None], cos[:, None], 1)


def test_a_rotation_for_other_tokens_is_an_error(device):
    q, cos = torch.randn(1, 2, 5, 16, device=device), torch.randn(1, 6, 16, device=device)
    with pytest.raises(RuntimeError):
        pointwise.rotary(q, q, cos, cos)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotary_with_heads_behind_tokens(device, dtype):
    q, k = (torch.randn(2, 5, h, 16, device=device, dtype=dtype) for h in (4, 2))
    angles = torch.rand(2, 5, 16, device=device) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    results = pointwise.rotary(q, k, cos, sin, unsqueeze_dim=2)
    others = pointwise.rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    for got, true in zip(results, others, strict=True):
        assert torch.equal(got, true.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm(device, dtype):
    x = torch.randn(3, 7, 64, device=device, dtype=dtype).requires_grad_()
    weight = torch.rand(64, device=device, dtype=dtype) + 0.5
    dy = torch.randn_like(x)
    hold(
        lambda x, w: pointwise.rms_norm(x, w, 1e-5),
        lambda x, w: plain_norm(x, w, 1e-5),
        [x, weight],
        (dy,),
    )


def test_patterns_of_transformers():
    """Norms and rotations are found where transformers has them, and only there."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")
    assert patterns.is_rms_norm(llama.LlamaRMSNorm.forward)
    assert not patterns.is_rms_norm(gemma.GemmaRMSNorm.forward)  # 1 + weight
    assert not patterns.is_rms_norm(torch.nn.LayerNorm.forward)
    assert patterns.uses_rotary(llama.LlamaAttention.forward)
    assert not patterns.uses_rotary(llama.LlamaMLP.forward.__get__(object()))
    assert not patterns.uses_rotary(plain_rotary)


@pytest.mark.parametrize("shape", [(3, 5), (129, 1000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gated_activation(device, dtype, shape):
    """One tile with an edge, and several."""
    kernels = pytest.importorskip("lowbit.kernels", reason="needs triton")
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("triton's interpreter rounds bf16 toward zero")
    if device.type == "cpu" and not kernels.INTERPRETED:
        pytest.skip("triton compiles for the GPU here")
    g, u, dh = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    h = kernels.silu_mul_fwd(g, u)
    dg, du = kernels.silu_mul_bwd(dh.clone(), g, u)

    def plain(g, u, dh):
        g, u = (t.detach().requires_grad_() for t in (g, u))
        h = F.silu(g) * u
        return [h.detach(), *torch.autograd.grad(h, (g, u), dh)]

    exact = plain(*(t.double() for t in (g, u, dh)))
    for name, got, rough, true in zip(
        ("h", "dg", "du"), (h, dg, du), plain(g, u, dh), exact, strict=True
    ):
        allowed = 2 * relative_rms(rough, true) + torch.finfo(dtype).eps / 2
        assert relative_rms(got, true) <= allowed, name


def test_what_a_forward_finds_in_its_module_may_change(monkeypatch):
    """Other libraries replace functions of transformers' modules, at any time."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    config._attn_implementation = "eager"
    attention = llama.LlamaAttention(config, 0)
    x, positions = torch.randn(2, 3, 64), (torch.ones(2, 3, 16), torch.zeros(2, 3, 16))
    found = []

    def note(name):
        function = getattr(llama, name)
        monkeypatch.setattr(llama, name, lambda *a, **k: found.append(name) or function(*a, **k))

    with monkeypatch.context() as patch:
        patch.setattr(pointwise, "rotary", lambda q, k, *_: found.append("ours") or (q, k))
        forward = fusing._with_rotary.__wrapped__(llama.LlamaAttention.forward)
    forward(attention, x, positions, None)
    note("eager_attention_forward")
    note("apply_rotary_pos_emb")
    y, _ = forward(attention, x, positions, None)
    assert found == ["ours", "apply_rotary_pos_emb", "eager_attention_forward"]
    torch.testing.assert_close(y, attention(x, positions, None)[0])
