"""Gated MLPs with a hidden layer that no kernel serves, computed with a wider one."""

import copy

import pytest
import torch
from helpers import relative_rms
from torch import nn

import lowbit
from lowbit import codebooks, dispatch, reference, widening
from lowbit.backends import cuda
from lowbit.nn import QLoRALinear


def make_mlp(H, K=128, N=96, r=4, **options):
    """Weights, biases, lora_As, lora_Bs, scalings, dropout_p of gate, up and down."""
    shapes = ((H, K), (H, K), (N, H))
    return widening.MLP(
        [lowbit.quantize(torch.randn(n, k) * 0.05, **options).args() for n, k in shapes],
        [torch.randn(n, requires_grad=True) for n, _ in shapes],
        [torch.randn(r, k).div_(8).requires_grad_() for _, k in shapes],
        [torch.randn(n, r).mul_(0.1).requires_grad_() for n, _ in shapes],
        [2.0] * 3,
        [0.0] * 3,
    )


def compute(mlp, x, trained):
    weights, biases, *adapters, dropout_p = mlp
    y = lowbit.lora_gated_mlp(x, weights, *adapters, biases=biases, dropout_p=dropout_p)
    dy = torch.linspace(-1, 1, y.numel()).view_as(y)
    return [y, *torch.autograd.grad(y, [x, *trained], dy)]


# 172 rows of 2 blocks are 344 scales in 2 nested blocks; 192 rows need no more. 246 rows of 2
# blocks are 492 in 2, 256 rows 512 in 2; 254 and 2 more fill the last nested block.
@pytest.mark.parametrize("H", [172, 246, 254])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"double_quant": False},
        {"quant_type": "fp4"},
        {"blocksize": 128},
        {"nested_blocksize": 32},
    ],
    ids=lambda o: ", ".join(f"{k} {v}" for k, v in o.items()) or "nf4",
)
def test_hidden_units_of_zeros_change_nothing(H, options):
    mlp, x = make_mlp(H, **options), torch.randn(5, 128, requires_grad=True)
    unit = max(64, options.get("blocksize", 64))
    more = unit - H % unit
    code = codebooks.codebook(options.get("quant_type", "nf4")).tolist().index(0.0)
    wide = widening.widened(mlp, more, [code] * 3)
    for weight, before, (n, k) in zip(
        wide.weights, mlp.weights, ((H + more, 128), (H + more, 128), (96, H + more)), strict=True
    ):
        assert weight.shape == (n, k)
        dense = reference.dequantize_4bit(*weight, torch.float32)
        assert torch.equal(
            dense[: before.N, : before.K], reference.dequantize_4bit(*before, torch.float32)
        )
        assert not dense[before.N :].any()
        assert not dense[:, before.K :].any()
    trained = [t for ts in (mlp.biases, mlp.lora_As, mlp.lora_Bs) for t in ts]
    for got, true in zip(compute(wide, x, trained), compute(mlp, x, trained), strict=True):
        assert got.shape == true.shape
        assert relative_rms(got, true) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_casts_none_of_what_is_wider(dtype):
    """Trainers run models in one 16-bit type under autocast to the other."""
    mlp = make_mlp(172)
    mlp = mlp._replace(
        biases=[b.detach().to(dtype) for b in mlp.biases],
        lora_Bs=[B.detach().to(dtype) for B in mlp.lora_Bs],
    )
    other = torch.bfloat16 if dtype == torch.float16 else torch.float16
    with torch.autocast("cpu", dtype=other):
        wide = widening.widened(mlp, 20, [7] * 3)
    assert [t.dtype for t in (*wide.biases, *wide.lora_Bs)] == [dtype] * 6


def test_codes_of_zero():
    for kind in ("nf4", "fp4", "nf3"):
        code = widening._code_of_zero(kind)
        assert lowbit.codebook(kind)[code] == 0.0
    assert widening._code_of_zero("custom") is None


def test_a_cpu_has_no_such_kernels():
    mlp = make_mlp(172)
    assert widening.for_kernels(torch.randn(3, 128), mlp, ["nf4"] * 3) is mlp


class GatedMLP(nn.Module):
    def __init__(self, H, K=128, N=96):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(K, H), nn.Linear(K, H)
        self.down_proj = nn.Linear(H, N)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def make_model(dtype, H=172, r=4, **options):
    model = nn.Sequential(GatedMLP(H, **options)).to("cuda", dtype)
    model = lowbit.prepare(model, r=r)
    for module in model.modules():
        if isinstance(module, QLoRALinear):
            nn.init.normal_(module.lora_B, std=0.1)
    return model


def run(model, x):
    x = x.detach().requires_grad_()
    y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    dy = torch.linspace(-1, 1, y.numel(), device="cuda").view_as(y).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], dy)]


def own_kernels():
    return torch.cuda.get_device_capability() == (9, 0) and dispatch.unavailable("cuda") is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("M", [3, 70, 300, 2100])
def test_kernels_serve_what_is_wider(M, dtype, monkeypatch):
    """No panel is made where there are kernels, and results are as near to float64 as before."""
    model, x = make_model(dtype), torch.randn(M, 128, device="cuda", dtype=dtype)
    separate = run(model, x)
    exact = run(copy.deepcopy(model).double(), x.double())
    lowbit.fuse(model)
    if own_kernels():
        monkeypatch.setattr(cuda, "_row_panels", lambda *_: pytest.fail("a panel"))
        monkeypatch.setattr(cuda, "_column_panels", lambda *_: pytest.fail("a panel"))
    for got, rough, true in zip(run(model, x), separate, exact, strict=True):
        assert got.shape == true.shape
        allowed = 2 * relative_rms(rough, true) + torch.finfo(dtype).eps
        assert relative_rms(got, true) <= allowed


@pytest.mark.gpu
def test_dropout_of_down_draws_the_mask_of_the_layer():
    model, x = make_model(torch.bfloat16), torch.randn(300, 128, device="cuda").bfloat16()
    model[0].down_proj.dropout = 0.5
    model.train()
    torch.manual_seed(1)
    separate = run(model, x)
    lowbit.fuse(model)
    torch.manual_seed(1)
    for got, true in zip(run(model, x), separate, strict=True):
        assert relative_rms(got, true) <= 2e-2


@pytest.mark.gpu
def test_a_graph_may_be_recorded_before_any_other_call():
    model, x = make_model(torch.bfloat16, H=236), torch.randn(70, 128, device="cuda").bfloat16()
    lowbit.fuse(model)
    widening._kept.cache_clear()
    with torch.no_grad():
        expected = model.float()(x.float())
    model.bfloat16()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = model(x)
    graph.replay()
    assert relative_rms(y, expected) <= 2e-2
