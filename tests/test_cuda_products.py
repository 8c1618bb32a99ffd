"""The products of the CUDA backend, composed of panels of the weight and cuBLAS, against float64.

The composition is plain torch around two compiled operators, so its logic is tested on the CPU as
well, with lowbit/reference.py in the operators' place.
"""

from types import SimpleNamespace

import pytest
import torch
from helpers import assert_bitwise_equal, assert_close_to_float64
from layer_case import GRADIENTS, LayerCase

import lowbit
from lowbit import dispatch, reference
from lowbit.backends import composed, cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# M, N, K, r: one token; odd everything; several panels both ways; a layer of the demo model and
# more tokens than a tile, too slow without a GPU.
PRODUCTS = [
    (1, 256, 128, 8),
    (17, 333, 200, 3),
    (33, 576, 192, 16),
    pytest.param((300, 1536, 576, 64), marks=pytest.mark.gpu),
]


def _dequantize_out(*args):
    *weight, row0, out, column0 = args if len(args) == 14 else (*args, 0)
    dense = reference.dequantize_4bit(*weight, out.dtype)
    out.copy_(dense[row0 : row0 + out.shape[0], column0 : column0 + out.shape[1]])


@pytest.fixture
def device(device, monkeypatch):
    """conftest's device; on the CPU the compiled operators are replaced."""
    if device.type == "cpu":
        ops = {"dequantize_4bit": reference.dequantize_4bit, "dequantize_4bit_out": _dequantize_out}
        monkeypatch.setattr(cuda, "_ops", SimpleNamespace(**ops))
        monkeypatch.setattr(cuda, "dropout", reference.dropout)
    elif (why := dispatch.unavailable("cuda")) is not None:
        pytest.skip(f"the compiled CUDA backend is not there: {why}")
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield device
    torch.backends.cuda.matmul.allow_tf32 = tf32


@pytest.fixture(params=[None, 1 << 16], ids=["one-panel", "panels"])
def panels(request, monkeypatch):
    """Everything in one panel, or panels of 64 KiB."""
    if request.param:
        monkeypatch.setattr(cuda, "PANEL_BYTES", request.param)


def _product_id(size):
    return "M{}-N{}-K{}-r{}".format(*size) if isinstance(size, tuple) else None


def _dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


def _check_product(case):
    names = ("y", "z", *GRADIENTS)
    y, z = case.forward()
    actual = (y, z, *case.backward(z))
    exact, lowp = case.formulas(torch.float64), case.formulas(case.dtype)
    for i, (name, a, e, low) in enumerate(zip(names, actual, exact, lowp, strict=True)):
        assert_close_to_float64(name, a, e, low, 2.0 if i < 2 else 3.0)
    assert actual[3].dtype == case.lora_A.dtype
    assert actual[4].dtype == case.lora_B.dtype
    assert actual[6].dtype == torch.float32


@pytest.mark.usefixtures("panels")
@pytest.mark.parametrize("size", PRODUCTS, ids=_product_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=_dtype_id)
@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
def test_products_against_float64(device, size, dtype, vector):
    """With a vector the adapters are fp32 masters too."""
    _check_product(LayerCase(size, dtype, device, masters=vector, vector=vector))


@pytest.mark.usefixtures("panels")
@pytest.mark.parametrize("dtype", DTYPES, ids=_dtype_id)
def test_products_with_dropout(device, dtype):
    _check_product(LayerCase((33, 320, 256, 8), dtype, device, masters=True, dropout_p=0.25))


@pytest.mark.usefixtures("panels")
@pytest.mark.parametrize("layout", ["flat", "dense"])
def test_products_with_other_weights(device, layout):
    """Flat blocks that cross rows (K = 200), and a 16-bit weight."""
    _check_product(LayerCase((33, 333, 200, 8), torch.bfloat16, device, layout=layout))


@pytest.mark.parametrize(
    ("total", "other", "least", "expected"),
    [
        (2048, 4096, 1, 2048),  # all of it fits 16 MiB
        (14336, 4096, 1, 2048),  # 16 MiB exactly
        (4096, 14336, 1, 512),  # the largest power of two below 585
        (4096, 200_000, 64, 64),  # the least, beyond 16 MiB
        (40, 200_000, 64, 40),
        (4096, 1 << 24, 1, 1),  # not even one row fits
    ],
)
def test_panel_length(total, other, least, expected):
    assert cuda._panel_length(total, other, 2, least) == expected


def test_gradients_that_are_not_needed_are_none(device):
    case = LayerCase((5, 128, 64, 4), torch.bfloat16, device, vector=True)
    _, z = case.forward()
    every = case.backward(z)
    for i in range(5):
        for j, gradient in enumerate(case.backward(z, tuple(j == i for j in range(5)))):
            if i == j:
                assert_bitwise_equal(gradient, every[j])
            else:
                assert gradient is None


# ---- what only a GPU shows -----------------------------------------------------------------------


@pytest.fixture
def gpu():
    if (why := dispatch.unavailable("cuda")) is not None:
        pytest.skip(f"the compiled CUDA backend is not there: {why}")
    return torch.device("cuda")


@pytest.mark.gpu
def test_autograd_through_the_public_function(gpu):
    """lowbit.lora_matmul picks this backend and returns the gradients of its operations."""
    case = LayerCase((6, 256, 128, 8), torch.bfloat16, gpu, masters=True, vector=True)
    assert dispatch.choose("lora_linear", case.x.device, case.dtype, 6).backend == "cuda"
    leaves = [case.x, case.lora_A, case.lora_B, case.vector, case.bias]
    for leaf in leaves:
        leaf.requires_grad_()
    scaling = case.vector * case.scaling
    y = lowbit.lora_matmul(case.x, case.q, case.lora_A, case.lora_B, scaling, bias=case.bias)
    y.backward(case.dy)
    with torch.no_grad():
        vector, case.vector, case.scaling, case.seed = case.vector, scaling, 1.0, None
        args = (
            case.x, *case.weight(), case.lora_A, case.lora_B, scaling, 1.0, case.bias, 0.0, None,
        )  # fmt: skip
        expected_y, z = dispatch.select("lora_linear", args)(*args)
        args = case.backward_args(z)
        dx, d_lora_A, d_lora_B, d_bias, d_vector = dispatch.select("lora_linear_backward", args)(
            *args
        )
    assert_bitwise_equal(y, expected_y, "y")
    expected = {"dx": dx, "d_lora_A": d_lora_A, "d_lora_B": d_lora_B, "d_bias": d_bias}
    actual = (case.x, case.lora_A, case.lora_B, case.bias)
    for (name, gradient), leaf in zip(expected.items(), actual, strict=True):
        assert_bitwise_equal(leaf.grad, gradient, name)
    torch.testing.assert_close(vector.grad, 1.7 * d_vector, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["linear", "linear_dx"])
def test_no_product_needs_memory_of_the_weight_s_size(gpu, direction):
    """14336 x 4096 is 112 MiB in bf16; a panel is 16 MiB at most, x and y are small."""
    N, K, M = 14336, 4096, 32
    q = lowbit.quantize(torch.randn(N, K, device=gpu, dtype=torch.bfloat16))
    x = torch.randn(M, K if direction == "linear" else N, device=gpu, dtype=torch.bfloat16)
    rest = (None,) if direction == "linear" else ()
    product = getattr(cuda, direction)
    product(x, *q.args(), *rest)  # cuBLAS allocates its own workspace once
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    product(x, *q.args(), *rest)
    assert torch.cuda.max_memory_allocated() - before <= 20 << 20


# Whole 64 tokens and not, rows that are aligned and rows that are not.
@pytest.mark.parametrize("M", [63, 64, 4994, 5569])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=_dtype_id)
def test_wide_products_sum_all_tokens(M, aligned, dtype, device):
    """cuBLAS left out the last of 5569 or 4994 tokens."""
    N, r = 768, 8
    dy = torch.randn(M, N if aligned else N + 1, device=device).to(dtype)[:, :N]
    z = torch.randn(M, r, device=device).to(dtype)
    z[-2:] = 1.0
    dy[-2:] = 64.0  # half of the sum
    exact = dy.double().t() @ z.double()
    for rows in (dy.t(), dy.t().contiguous()):  # the second: unaligned by M
        wide = composed.mm_wide(rows, z)
        assert wide.dtype == torch.float32
        assert ((wide - exact).norm() / exact.norm()).item() < 1e-5
