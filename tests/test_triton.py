"""The Triton kernels against lowbit/reference.py: bits where bits are promised, float64 elsewhere.

On a GPU the kernels are compiled and bf16 is tested too; without one they are interpreted, where
bf16 cannot be (kernels/triton/common.py says why).
"""

from typing import NamedTuple

import pytest
import torch
from helpers import assert_bitwise_equal, assert_close_to_float64

triton = pytest.importorskip("triton", reason="triton is not installed")
if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
    pytest.skip("no CUDA device, and TRITON_INTERPRET is not 1", allow_module_level=True)

import triton.language as tl  # noqa: E402

from lowbit import codebooks, dispatch, kernels, reference  # noqa: E402
from lowbit.backends import reference as plain  # noqa: E402
from lowbit.backends import triton as backend  # noqa: E402

common, lora_grads = kernels.common, kernels.lora_grads
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]
if not kernels.INTERPRETED:
    DTYPES.append(torch.bfloat16)
# fp16 and bf16 compile to the same code but for the type; one of them spares minutes of compiling.
PRODUCT_DTYPES = [torch.float32, DTYPES[-1]]
GRADIENTS = ("dx", "d_lora_A", "d_lora_B", "d_bias", "d_lora_scaling")


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def seed(value: int = 1234) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int64, device=DEVICE)


def quantizer(quant_type: str):
    table = codebooks.codebook(quant_type)
    bounds, order = codebooks.thresholds(table, quant_type)
    return table.to(DEVICE), bounds.to(DEVICE), order.to(DEVICE)


def make_weight(N, K, blocksize=64, rows=True, nested=True, quant_type="nf4"):
    """The eleven weight arguments of a random [N, K], quantized by the reference."""
    table, bounds, order = quantizer(quant_type)
    nested_table = codebooks.nested_codebook().to(DEVICE) if nested else None
    q, absmax, nested_absmax, offset = plain.quantize_4bit(
        randn(N, K), bounds, order, nested_table, blocksize, 256, rows
    )
    scales = (nested_absmax, nested_table, offset) if nested else (None, None, None)
    return q, absmax, table, *scales, N, K, blocksize, 256, rows


def make_dense(N, K, dtype):
    return randn(N, K, dtype=dtype), *(None,) * 5, N, K, 64, 256, True


# ---- (a) exact ---------------------------------------------------------------------------------

# N, K, blocksize, row-aligned: the reason.
LAYOUTS = [
    (3, 64, 64, True),  # one block per row
    (70, 128, 32, True),  # more blocks than one program holds, the last program is part empty
    (5, 100, 64, True),  # short last block
    (5, 101, 64, True),  # odd row: the last nibble is padding
    (5, 101, 64, False),  # flat: rows start in the middle of bytes and blocks
    (2, 64, 32, False),  # flat and aligned: the bytes of the row layout
    (3, 4096, 4096, True),  # the largest block
    (2, 5000, 2048, True),  # large blocks, short last one
    (1, 1, 32, True),  # a single element
]


def layout_id(case) -> str:
    N, K, blocksize, rows = case
    return f"N{N}-K{K}-bs{blocksize}-{'rows' if rows else 'flat'}"


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_quantize_bits(layout, dtype):
    N, K, blocksize, rows = layout
    _, bounds, order = quantizer("nf4")
    weight = randn(N, K, dtype=dtype)
    weight[-1, : K // 2] = 0  # an all-zero block, if blocks are short enough
    # Every threshold itself, beside a 1 that makes the scale 1: a tie takes the lower code.
    ties = torch.cat([bounds, bounds.new_ones(1)])[:K]
    weight[0, :16] = ties.to(dtype)
    nested_table = codebooks.nested_codebook().to(DEVICE)
    for nested in (None, nested_table):
        arguments = (weight, bounds, order, nested, blocksize, 256, rows)
        outputs = zip(
            backend.quantize_4bit(*arguments), plain.quantize_4bit(*arguments), strict=True
        )
        for name, (actual, expected) in zip(
            ("qweight", "absmax", "nested_absmax", "nested_offset"), outputs, strict=True
        ):
            assert_bitwise_equal(actual, expected, name)


@pytest.mark.parametrize("quant_type", codebooks.NAMES)
def test_quantize_bits_of_every_format(quant_type):
    """FP4's codes are not in the order of their values; NF2 and NF3 pad the table."""
    _, bounds, order = quantizer(quant_type)
    arguments = (randn(4, 192), bounds, order, None, 64, 256, True)
    actual, expected = backend.quantize_4bit(*arguments), plain.quantize_4bit(*arguments)
    assert_bitwise_equal(actual[0], expected[0], "qweight")


def test_quantize_bits_of_tiny_values():
    """Blocks below the absmax floor, down to the smallest subnormal: no flush to zero, no 1/0."""
    _, bounds, order = quantizer("nf4")
    exponents = torch.tensor([-149, -140, -130, -127, -126, -120], device=DEVICE)
    weight = (randn(6, 64) * 0.3).clamp(-1, 1) * torch.exp2(exponents.double())[:, None]
    arguments = (weight.float(), bounds, order, None, 64, 256, True)
    for name, actual, expected in zip(
        ("qweight", "absmax"),
        backend.quantize_4bit(*arguments),
        plain.quantize_4bit(*arguments),
        strict=False,
    ):
        assert_bitwise_equal(actual, expected, name)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # Inf * 0 in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_values_reach_absmax(bad):
    _, bounds, order = quantizer("nf4")
    weight = randn(2, 128)
    weight[1, 70] = bad
    absmax = backend.quantize_4bit(weight, bounds, order, None, 64, 256, True)[1]
    assert torch.isfinite(absmax).tolist() == [True, True, True, False]
    if bad != bad:
        weight[1, 71] = float("inf")  # NaN wins over Inf
        absmax = backend.quantize_4bit(weight, bounds, order, None, 64, 256, True)[1]
        assert torch.isnan(absmax[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_dequantize_bits(layout, nested, dtype):
    N, K, blocksize, rows = layout
    weight = make_weight(N, K, blocksize, rows, nested)
    expected = plain.dequantize_4bit(*weight, dtype)
    assert_bitwise_equal(backend.dequantize_4bit(*weight, dtype), expected, "weight")


def test_nested_scale_is_rounded_twice():
    """One FMA instead of a product and a sum changes a third of these scales."""
    blocks = 512
    codes = torch.arange(blocks, device=DEVICE) % 256
    table = codebooks.nested_codebook().to(DEVICE)
    scale, offset = torch.rand(2, device=DEVICE) + 0.5, torch.rand((), device=DEVICE)
    product = table[codes].double() * scale.repeat_interleave(256).double()
    fused = (product + offset.double()).float()
    twice = product.float() + offset
    assert (fused != twice).sum() > blocks // 10
    ones = torch.tensor([0.0] * 15 + [1.0], device=DEVICE)
    packed = torch.full((blocks, 16), 255, dtype=torch.uint8, device=DEVICE)
    weight = (packed, codes.to(torch.uint8), ones, scale, table, offset, blocks, 32, 32, 256, True)
    decoded = backend.dequantize_4bit(*weight, torch.float32)
    assert_bitwise_equal(decoded, twice[:, None].expand(-1, 32), "absmax")
    # The matmul decodes by itself: one-hot rows read the weight out.
    eye = torch.eye(32, device=DEVICE)
    assert_bitwise_equal(backend.linear(eye, *weight, None).t(), decoded, "absmax in linear")


# N, K, blocksize, row-aligned, quant_type: the reason.
ONE_HOT = [
    (40, 70, 64, True, "nf4"),  # nothing a multiple of a tile; short last block
    (33, 101, 32, True, "fp4"),  # odd K; several blocks per tile; unsorted codebook
    (33, 101, 64, False, "nf4"),  # flat, every alignment of a row against bytes and blocks
    (20, 256, 256, True, "nf4"),  # a block wider than a tile
]


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("case", ONE_HOT, ids=lambda c: f"{layout_id(c[:4])}-{c[4]}")
def test_matmul_of_one_hot_rows(case, dtype):
    N, K, blocksize, rows, quant_type = case
    weight = make_weight(N, K, blocksize, rows, True, quant_type)
    dense = plain.dequantize_4bit(*weight, dtype) + 0.0  # a sum with zeros turns -0 into +0
    for tokens in (8, N if N > K else K):  # both ends of the configuration table
        eye = torch.eye(max(N, K), device=DEVICE, dtype=dtype)[:tokens]
        y = backend.linear(eye[:, :K].contiguous(), *weight, None)
        assert_bitwise_equal(y[:K], dense.t()[:tokens].contiguous(), "y")
        dx = backend.linear_dx(eye[:, :N].contiguous(), *weight)
        assert_bitwise_equal(dx[:N], dense[:tokens], "dx")


# Shapes whose number of elements is no multiple of 4, and more than one program.
@pytest.mark.parametrize("shape", [(7, 101), (3, 1000)])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_dropout_bits(shape, dtype):
    x = randn(*shape, dtype=dtype)
    for p, value in ((0.1, 7), (0.5, -(2**62) - 12345), (0.0, 1)):
        actual, expected = backend.dropout(x, p, seed(value)), plain.dropout(x, p, seed(value))
        assert_bitwise_equal(actual, expected, "dropout")


@triton.jit
def philox_kernel(seed_ptr, counter_ptr, out_ptr, N: tl.constexpr):
    counter = tl.load(counter_ptr + tl.arange(0, N))
    words = common.philox_words(tl.load(seed_ptr), counter)
    tl.store(out_ptr + tl.arange(0, 4 * N), words.to(tl.int64))


def test_philox_words_of_large_counters():
    """Beyond 2^32 Philox blocks the high half of the counter counts."""
    counter = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**40 + 3, 2**60 - 1, 5, 6], device=DEVICE)
    out = torch.empty(32, dtype=torch.int64, device=DEVICE)
    philox_kernel[(1,)](seed(-99), counter, out, N=8)
    expected = reference.philox_4x32(seed(-99), counter).view(-1)
    assert_bitwise_equal(out, expected, "words")


# K odd, and even: four neighbours do not share a Philox block. K = 136: they do; several tiles, the
# last part empty.
@pytest.mark.parametrize("K", [101, 102, 136])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_every_kernel_draws_the_same_mask(K, dtype):
    """With identities around it each kernel hands out drop(x) itself, bit for bit."""
    M, p = 70, 0.3
    x = randn(M, K, dtype=dtype)
    expected = plain.dropout(x, p, seed()) + 0.0
    eye_k, eye_m = (torch.eye(n, device=DEVICE, dtype=dtype) for n in (K, M))
    z = kernels.project(x, eye_k, 1, dtype, p, seed())
    assert_bitwise_equal(z, expected, "z")
    # dy = lora_B = 1 makes u = 1, then d_lora_A = drop(x); with lora_A = x and W = 0, dx = drop(x).
    weight = torch.zeros(M, K, device=DEVICE, dtype=dtype), *(None,) * 5, M, K, 64, 256, True
    dx, d_lora_A, *_ = backend.lora_linear_backward(
        eye_m, x, eye_m, *weight, x, eye_m, None, 1.0, p, seed(), True, True, False, False, False
    )
    assert_bitwise_equal(d_lora_A, expected, "d_lora_A")
    assert_bitwise_equal(dx, expected, "dx")


# ---- (b) against float64 -----------------------------------------------------------------------


class Case(NamedTuple):
    """One product; `why` is the reason for its numbers."""

    why: str
    M: int
    N: int
    K: int
    r: int
    blocksize: int = 64  # 0: dense weight
    rows: bool = True
    nested: bool = True
    p: float = 0.0
    vector: bool = False  # scaling per rank (AdaLoRA)
    bias: bool = True

    def __str__(self):
        layout = (
            "dense"
            if not self.blocksize
            else f"bs{self.blocksize}-{'rows' if self.rows else 'flat'}"
        )
        return f"{self.why}-M{self.M}-N{self.N}-K{self.K}-r{self.r}-{layout}"


CASES = [
    Case("decode", 1, 64, 256, 16, bias=False),
    Case("odd-everything", 5, 37, 101, 3, 32, p=0.25, vector=True),
    Case("rank-one", 16, 48, 96, 1, nested=False, p=0.5),
    Case("flat-across-rows", 17, 33, 101, 16, rows=False, p=0.1),
    Case("slices-of-K", 20, 40, 1024, 8, 256, vector=True),
    Case("slices-of-M", 600, 24, 72, 8, p=0.1, vector=True),
    Case("rank-above-a-tile", 66, 70, 192, 72, 32, p=0.5),
    Case("dense", 19, 40, 100, 4, 0, p=0.2),
]
# The configurations of a real layer, too slow to interpret.
if not kernels.INTERPRETED:
    CASES += [
        Case("real-decode", 1, 4096, 4096, 16),
        Case("real-small", 48, 4096, 1024, 16, p=0.1),
        Case("real-large", 1030, 2048, 2816, 64, p=0.1, vector=True),
        Case("vision-tower", 300, 1280, 3420, 16, rows=False),
    ]


def make_operands(case: Case, dtype: torch.dtype):
    M, N, K, r = case.M, case.N, case.K, case.r
    weight = (
        make_weight(N, K, case.blocksize, case.rows, case.nested)
        if case.blocksize
        else make_dense(N, K, dtype)
    )
    x, dy = randn(M, K, dtype=dtype), randn(M, N, dtype=dtype)
    lora_A, lora_B = randn(r, K, dtype=dtype) / K**0.5, randn(N, r, dtype=dtype) / r**0.5
    vector = torch.rand(r, device=DEVICE) + 0.5 if case.vector else None
    bias = randn(N, dtype=dtype) if case.bias else None
    return weight, x, dy, lora_A, lora_B, vector, bias


def widened(*tensors):
    return tuple(None if t is None else t.double() for t in tensors)


@pytest.mark.parametrize("dtype", PRODUCT_DTYPES, ids=short)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lora_linear(case, dtype):
    weight, x, dy, lora_A, lora_B, vector, bias = make_operands(case, dtype)
    tail = (vector, 2.0, bias, case.p, seed())
    y, z = backend.lora_linear(x, *weight, lora_A, lora_B, *tail)
    y_low, z_low = plain.lora_linear(x, *weight, lora_A, lora_B, *tail)
    x64, A64, B64, bias64 = widened(x, lora_A, lora_B, bias)
    y64, z64 = plain.lora_linear(x64, *weight, A64, B64, vector, 2.0, bias64, case.p, seed())
    assert (y.dtype, z.dtype) == (dtype, dtype)
    assert_close_to_float64("z", z, z64, z_low)
    assert_close_to_float64("y", y, y64, y_low)

    low = plain.linear(x, *weight, bias)
    wide = plain.linear(x64, *weight, bias64)
    assert_close_to_float64("linear", backend.linear(x, *weight, bias), wide, low)
    low, wide = plain.linear_dx(dy, *weight), plain.linear_dx(dy.double(), *weight)
    assert_close_to_float64("linear_dx", backend.linear_dx(dy, *weight), wide, low, 3)


@pytest.mark.parametrize("dtype", PRODUCT_DTYPES, ids=short)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lora_linear_backward(case, dtype):
    weight, x, dy, lora_A, lora_B, vector, _ = make_operands(case, dtype)
    z64 = plain.lora_linear(
        x.double(), *weight, *widened(lora_A, lora_B), vector, 2.0, None, case.p, seed()
    )[1]
    tail = (vector, 2.0, case.p, seed(), *(True,) * 5)
    z = z64.to(dtype)
    actual = backend.lora_linear_backward(dy, x, z, *weight, lora_A, lora_B, *tail)
    low = plain.lora_linear_backward(dy, x, z, *weight, lora_A, lora_B, *tail)
    wide = plain.lora_linear_backward(
        dy.double(), x.double(), z64, *weight, *widened(lora_A, lora_B), *tail
    )
    dtypes = (dtype, dtype, dtype, dtype, torch.float32)
    for name, a, expected, lowp, kind in zip(GRADIENTS, actual, wide, low, dtypes, strict=True):
        assert a.dtype == kind, f"{name}: {a.dtype}"
        assert_close_to_float64(name, a, expected, lowp, 3)


def test_fp32_masters():
    """fp32 adapters beside fp16 activations: rounded for the products, gradients back in fp32."""
    case, dtype = Case("masters", 33, 40, 96, 8, p=0.2), torch.float16
    weight, x, dy, lora_A, lora_B, _, bias = make_operands(case, torch.float32)
    x, dy = x.to(dtype), dy.to(dtype)
    tail = (None, 2.0, bias, case.p, seed())
    y, z = backend.lora_linear(x, *weight, lora_A, lora_B, *tail)
    half = (lora_A.to(dtype), lora_B.to(dtype))
    y_half, z_half = backend.lora_linear(x, *weight, *half, *tail)
    assert_bitwise_equal(z, z_half, "z")
    assert_bitwise_equal(y, y_half, "y")
    tail = (None, 2.0, case.p, seed(), *(True,) * 5)
    gradients = backend.lora_linear_backward(dy, x, z, *weight, lora_A, lora_B, *tail)
    rounded = backend.lora_linear_backward(dy, x, z, *weight, *half, *tail)
    for name, a, b in zip(GRADIENTS, gradients, rounded, strict=True):
        assert a.dtype == (dtype if name in ("dx", "d_bias") else torch.float32), name
        assert_bitwise_equal(a.to(b.dtype), b, name)


# ---- (c) contract ------------------------------------------------------------------------------


def test_gradients_not_needed_are_empty():
    case = Case("needs", 6, 24, 40, 4, p=0.5)
    weight, x, dy, lora_A, lora_B, vector, _ = make_operands(case, torch.float16)
    z = randn(6, 4, dtype=torch.float16)

    def backward(needs):
        return backend.lora_linear_backward(
            dy, x, z, *weight, lora_A, lora_B, vector, 2.0, case.p, seed(), *needs
        )

    every = backward((True,) * 5)
    for i, name in enumerate(GRADIENTS):
        needs = tuple(j == i for j in range(5))
        for j, gradient in enumerate(backward(needs)):
            assert gradient.dtype == every[j].dtype
            if j == i:
                assert_close_to_float64(name, gradient, every[j].double(), every[j])
            else:
                assert gradient.shape == (0,), f"{GRADIENTS[j]} with only {name} needed"


def test_no_tokens():
    case = Case("empty", 0, 24, 40, 4, p=0.5)
    weight, x, dy, lora_A, lora_B, vector, bias = make_operands(case, torch.float16)
    y, z = backend.lora_linear(x, *weight, lora_A, lora_B, vector, 2.0, bias, case.p, seed())
    assert (y.shape, z.shape) == ((0, 24), (0, 4))
    tail = (vector, 2.0, case.p, seed(), *(True,) * 5)
    dx, *others = backend.lora_linear_backward(dy, x, z, *weight, lora_A, lora_B, *tail)
    assert dx.shape == (0, 40)
    assert all(not gradient.any() for gradient in others)
    assert backend.linear(x, *weight, bias).shape == (0, 24)
    assert backend.dropout(x, 0.5, seed()).shape == (0, 40)


def test_rows_do_not_depend_on_their_neighbours():
    weight = make_weight(40, 128)
    x = randn(9, 128, dtype=torch.float16)
    y = backend.linear(x, *weight, None)
    others = randn(9, 128, dtype=torch.float16) * 100
    others[3] = x[3]
    assert_bitwise_equal(backend.linear(others, *weight, None)[3], y[3], "y[3]")


def test_slices_are_planned_without_gaps():
    for tiles, length, step in (
        (1, 1, 64),
        (1, 64 * 37, 64),
        (3, 4097, 64),
        (1000, 10**6, 64),
        (1, 0, 64),
    ):
        slices, size = lora_grads.plan_slices(tiles, length, step)
        assert size % step == 0
        assert (slices - 1) * size < max(length, 1) <= slices * size


def test_autograd_through_the_operations():
    """torch.ops.lowbit forced to Triton differentiates as it does forced to the reference."""
    case = Case("autograd", 12, 40, 64, 4, p=0.25, vector=True)
    weight, x, dy, lora_A, lora_B, vector, bias = make_operands(case, torch.float32)
    results = {}
    for name in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, lora_A, lora_B, vector, bias)]
        with dispatch.force(name):
            y, _ = torch.ops.lowbit.lora_linear(
                leaves[0], *weight, *leaves[1:4], 2.0, leaves[4], case.p, seed()
            )
            y.backward(dy)
        results[name] = [y.detach()] + [leaf.grad for leaf in leaves]
    for actual, expected in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs CUDA tensors, got one on cpu"):
        backend.dropout(torch.zeros(1, 1), 0.5, torch.zeros(1, dtype=torch.int64))


@pytest.mark.gpu
def test_repeats_and_streams_give_the_same_bits():
    case = Case("repeat", 700, 512, 1024, 16, p=0.1, vector=True)
    weight, x, dy, lora_A, lora_B, vector, bias = make_operands(case, torch.bfloat16)

    def everything():
        y, z = backend.lora_linear(x, *weight, lora_A, lora_B, vector, 2.0, bias, case.p, seed())
        tail = (vector, 2.0, case.p, seed(), *(True,) * 5)
        return y, z, *backend.lora_linear_backward(dy, x, z, *weight, lora_A, lora_B, *tail)

    first = everything()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = everything()
    torch.cuda.synchronize()
    for name, a, b in zip(("y", "z", *GRADIENTS), first, second, strict=True):
        assert_bitwise_equal(b, a, name)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_another_device_than_the_current():
    weight = tuple(
        t.to("cuda:1") if isinstance(t, torch.Tensor) else t for t in make_weight(64, 128)
    )
    x = torch.randn(5, 128, device="cuda:1")
    y = backend.linear(x, *weight, None)
    assert y.device == x.device
    torch.testing.assert_close(y, plain.linear(x, *weight, None), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_billion_elements():
    """Offsets past 2^31 in the weight, its dense copy and x: compares the last rows."""
    N, K, blocksize = 2**19 + 8, 4096, 64
    table = codebooks.codebook("nf4").to(DEVICE)
    qweight = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device=DEVICE)
    absmax = torch.rand(N * K // blocksize, device=DEVICE)
    weight = (qweight, absmax, table, None, None, None, N, K, blocksize, 256, True)
    tail = (qweight[-8:], absmax[-8 * K // blocksize :], *weight[2:6], 8, *weight[7:])
    dense = backend.dequantize_4bit(*weight, torch.bfloat16)
    last = plain.dequantize_4bit(*tail, torch.bfloat16)
    assert_bitwise_equal(dense[-8:], last, "last rows")
    del dense
    x = randn(3, K, dtype=torch.bfloat16)
    y = backend.linear(x, *weight, None)[:, -8:].contiguous()
    # 8 columns alone are another tile position but the same sums in the same order.
    assert_bitwise_equal(y, backend.linear(x, *tail, None), "last columns")
    M = 2**31 // K + 40
    x = torch.zeros(M, K, dtype=torch.bfloat16, device=DEVICE)
    x[-40:] = randn(40, K, dtype=torch.bfloat16)
    small = make_weight(64, K)
    expected = plain.linear(x[-40:].double(), *small, None)
    low = plain.linear(x[-40:], *small, None)
    assert_close_to_float64("y", backend.linear(x, *small, None)[-40:], expected, low)
