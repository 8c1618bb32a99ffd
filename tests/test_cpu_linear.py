"""The compiled CPU products (csrc/cpu/linear.cpp, lora_linear.cpp) at every level there is."""

import pytest
import torch
from helpers import assert_bitwise_equal, assert_close_to_float64

import lowbit
from lowbit import _library, reference
from lowbit.backends import reference as plain

if not _library.available("cpu"):
    pytest.skip(f"no CPU library: {_library.load_errors['cpu']}", allow_module_level=True)

from lowbit.backends import cpu

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SEED = 0x1234_5678_9ABC_DEF
NEEDS = (True,) * 5
GRADIENTS = ("dx", "d_lora_A", "d_lora_B", "d_bias", "d_lora_scaling")


@pytest.fixture(params=cpu.ISA_LEVELS, autouse=True)
def isa(request):
    """Each instruction set in turn; levels the processor lacks are skipped."""
    before = cpu.isa()
    try:
        cpu.set_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    cpu.set_isa(before)


class Case:
    """One layer with its inputs, and the same in float64 from the same quantized weight."""

    def __init__(self, M, N, K, r, dtype, *, p=0.0, master=None, vector=False, dense=False, **how):
        torch.manual_seed(M + N + K)
        w = torch.randn(N, K) / K**0.5
        if dense:
            self.weight = (w.to(dtype), None, None, None, None, None, N, K, 0, 0, True)
        else:
            self.weight = tuple(lowbit.quantize(w.to(dtype), **how).args())
        self.x = torch.randn(M, K).to(dtype)
        self.dy = torch.randn(M, N).to(dtype)
        adapter = master or dtype
        self.adapter = (
            (torch.randn(r, K) / K**0.5).to(adapter),
            (torch.randn(N, r) / r**0.5).to(adapter),
            torch.rand(r) + 0.5 if vector else None,
            0.75,
        )
        self.bias = torch.randn(N).to(dtype)
        self.p, self.seed = p, torch.tensor([SEED]) if p else None
        self.w64 = reference.dequantize_4bit(*self.weight, torch.float32).double()
        # The operation is defined on adapters rounded to the activation's dtype.
        A, B, s, scaling = self.adapter
        self.adapter64 = (A.to(dtype).double(), B.to(dtype).double(), s, scaling)

    def forward(self, backend=cpu, x=None):
        x = self.x if x is None else x
        return backend.lora_linear(x, *self.weight, *self.adapter, self.bias, self.p, self.seed)

    def forward64(self):
        return reference.lora_linear(
            self.x.double(), self.w64, *self.adapter64, self.bias.double(), self.p, self.seed
        )

    def backward(self, z, backend=cpu, needs=NEEDS):
        return backend.lora_linear_backward(
            self.dy, self.x, z, *self.weight, *self.adapter, self.p, self.seed, *needs
        )

    def backward64(self, z):
        inputs = (self.dy.double(), self.x.double(), z.double())
        return reference.lora_linear_backward(*inputs, self.w64, *self.adapter64, self.p, self.seed)


# (M, N, K, r) and options; the comment says what each one is there for. Ranks are not tiny: a
# handful of outputs is too few for a comparison of errors.
CASES = {
    "M1": ((1, 96, 320, 16), {}),  # decoding in registers, one row
    "M2-odd": ((2, 33, 101, 19), {}),  # two rows; odd K pads a nibble; N, r fit no vector
    "one": ((3, 1, 1, 1), {}),  # everything smaller than any tile
    "M17-tails": ((17, 70, 200, 5), {}),  # tails in M, N, K; the last block of a row is short
    "real": ((64, 192, 576, 16), {}),  # a real layer, whole tiles, more than one chunk of K
    "long-r": ((50, 40, 96, 300), {}),  # r longer than one chunk and one tile of columns
    "r48": ((200, 32, 64, 48), {}),  # with two threads d_bias is a tile of its own
    "rows": ((150, 64, 128, 8), {}),  # enough rows for wide pieces of the weight
    "row-blocks": ((1100, 40, 64, 6), {"p": 0.1, "vector": True}),  # x packed in two blocks
    "wide": ((9, 600, 64, 12), {}),  # more columns than one tile
    "bs32": ((7, 48, 96, 12), {"blocksize": 32}),  # a new scale with every vector
    "bs1024": ((7, 48, 1100, 12), {"blocksize": 1024}),  # one block spans chunks
    "fp4-single": ((7, 48, 128, 12), {"quant_type": "fp4", "double_quant": False}),  # fp32 absmax
    "flat": ((6, 40, 100, 12), {"layout": "flat"}),  # blocks cross rows
    "flat-odd": ((6, 31, 33, 12), {"layout": "flat", "blocksize": 32}),  # rows start mid-byte
    "dropout": ((33, 70, 130, 6), {"p": 0.3}),  # mask both ways, not on a multiple of 4
    "dropout-rows": ((150, 40, 64, 6), {"p": 0.1, "vector": True}),  # mask in tasks by rows
    "master": ((20, 48, 96, 8), {"master": torch.float32, "p": 0.2}),  # fp32 adapters
    "dense": ((20, 70, 130, 8), {"dense": True, "vector": True}),  # plain LoRA
}


@pytest.fixture(params=CASES)
def name(request):
    return request.param


@pytest.fixture(params=FLOATS, ids=("fp32", "bf16", "fp16"))
def dtype(request):
    return request.param


def make(name, dtype) -> Case:
    (shape, options) = CASES[name]
    return Case(*shape, dtype, **options)


# ---- against float64 -----------------------------------------------------------------------------


def test_forward(name, dtype):
    case = make(name, dtype)
    for label, *three in zip(
        ("y", "z"), case.forward(), case.forward64(), case.forward(plain), strict=True
    ):
        assert three[0].dtype == dtype
        assert_close_to_float64(label, *three)


def test_backward(name, dtype):
    case = make(name, dtype)
    z = case.forward()[1]
    actual, low = case.backward(z), case.backward(z, plain)
    for label, *three in zip(GRADIENTS, actual, case.backward64(z), low, strict=True):
        assert three[0].dtype == three[2].dtype, label
        assert_close_to_float64(label, *three, factor=3.0)


def test_frozen_products(name, dtype):
    case = make(name, dtype)
    w = case.w64.to(dtype)
    y = cpu.linear(case.x, *case.weight, case.bias)
    y64 = reference.linear(case.x.double(), case.w64, case.bias.double())
    assert_close_to_float64("y", y, y64, reference.linear(case.x, w, case.bias))
    dx = cpu.linear_dx(case.dy, *case.weight)
    assert_close_to_float64("dx", dx, case.dy.double() @ case.w64, case.dy @ w)


def test_long_reduction(dtype):
    # Sums of 4096 products: chunk sums must keep the error where blocked library code has it.
    case = Case(5, 64, 4096, 16, dtype)
    y, z = case.forward()
    y64, z64 = case.forward64()
    y_low, z_low = case.forward(plain)
    assert_close_to_float64("y", y, y64, y_low)
    assert_close_to_float64("z", z, z64, z_low)


# ---- exact ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("M", [1, 40])  # both ways of reading the weight
def test_one_hot_rows_read_the_weight(name, dtype, M):
    case = make(name, dtype)
    N, K = case.w64.shape
    w = reference.dequantize_4bit(*case.weight, dtype) + 0.0  # a sum of products is never -0
    picked = torch.linspace(0, K - 1, M).round().long()
    x = torch.zeros(M, K, dtype=dtype)
    x[torch.arange(M), picked] = 1
    assert_bitwise_equal(cpu.linear(x, *case.weight, None), w[:, picked].t().contiguous(), "y")
    picked = torch.linspace(0, N - 1, M).round().long()
    dy = torch.zeros(M, N, dtype=dtype)
    dy[torch.arange(M), picked] = 1
    assert_bitwise_equal(cpu.linear_dx(dy, *case.weight), w[picked].contiguous(), "dx")


def test_dropout_mask_is_the_reference(dtype):
    M, N, K, p = 21, 24, 70, 0.4
    case = Case(M, N, K, K, dtype, p=p, dense=True)
    eye = torch.eye(K, dtype=dtype)
    case.adapter = (eye, torch.ones(N, K, dtype=dtype), None, 1.0)
    z = case.forward()[1]
    assert_bitwise_equal(z, reference.dropout(case.x, p, case.seed), "z")
    case.weight = (torch.zeros(N, K, dtype=dtype), *case.weight[1:])
    case.dy = torch.ones(M, N, dtype=dtype)  # every element of (u s) A is N
    expected = reference.dropout(torch.full((M, K), float(N)), p, case.seed).to(dtype)
    assert_bitwise_equal(case.backward(z)[0], expected, "dx")


def test_rows_do_not_depend_on_the_batch(dtype, isa):
    """Bits of a row are the same in every batch that the same kernels serve.

    Where there are bf16 units, up to 4 rows of bf16 still take the fp32 kernels (linear.cpp), so
    there a batch of 70 is compared with larger parts of itself and one of 4 with smaller ones.
    """
    case = Case(70, 96, 320, 12, dtype)
    two_kernels = dtype == torch.bfloat16 and isa in ("avx512_bf16", "amx")
    few = (slice(0, 1), slice(2, 3), slice(1, 3))
    if two_kernels:
        _compare_rows(case, slice(0, 4), few)
        _compare_rows(case, slice(0, 70), (slice(0, 20), slice(30, 35)))
    else:
        _compare_rows(case, slice(0, 70), (*few, slice(69, 70), slice(10, 13), slice(0, 20)))
    y, z = case.forward()
    case.x[7] = float("nan")
    y_nan, z_nan = case.forward()
    others = torch.arange(70) != 7
    assert_bitwise_equal(y_nan[others], y[others], "y beside a row of NaN")
    assert_bitwise_equal(z_nan[others], z[others], "z beside a row of NaN")
    assert y_nan[7].isnan().all()


def _compare_rows(case, whole, parts):
    x, dy = case.x[whole].contiguous(), case.dy[whole].contiguous()
    y, z = case.forward(x=x)
    dx = cpu.linear_dx(dy, *case.weight)
    for rows in parts:
        y_part, z_part = case.forward(x=x[rows].contiguous())
        assert_bitwise_equal(y_part, y[rows], f"y of rows {rows}")
        assert_bitwise_equal(z_part, z[rows], f"z of rows {rows}")
        dx_part = cpu.linear_dx(dy[rows].contiguous(), *case.weight)
        assert_bitwise_equal(dx_part, dx[rows], f"dx of rows {rows}")


@pytest.mark.parametrize("M", [1, 200])
def test_bits_do_not_depend_on_the_threads(dtype, M):
    case = Case(M, 200, 320, 12, dtype, p=0.2)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            y, z = case.forward()
            results.append((y, z, *case.backward(z)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for label, a, b in zip(("y", "z", *GRADIENTS), other, results[0], strict=True):
            assert_bitwise_equal(a, b, label)


@pytest.mark.parametrize("M", [1, 3, 70])
def test_what_an_earlier_product_left_in_memory_does_not_matter(dtype, M):
    """The products keep their memory: rows are padded in it, with zeros, whatever it held."""
    case, earlier = Case(M, 96, 320, 12, dtype), Case(200, 96, 320, 64, dtype)
    for tensor in (earlier.x, earlier.dy, *earlier.adapter[:2]):
        tensor.fill_(float("nan"))
    y, z = case.forward()
    clean = (y, z, *case.backward(z))
    earlier.backward(earlier.forward()[1])
    y, z = case.forward()
    for label, a, b in zip(("y", "z", *GRADIENTS), (y, z, *case.backward(z)), clean, strict=True):
        assert_bitwise_equal(a, b, label)


# ---- contract ------------------------------------------------------------------------------------


@pytest.mark.parametrize("only", range(5))
def test_only_the_wanted_gradients(only):
    case = Case(9, 40, 64, 4, torch.float32, p=0.2)
    z = case.forward()[1]
    everything = case.backward(z)
    wanted = tuple(i == only for i in range(5))
    for i, (label, g) in enumerate(zip(GRADIENTS, case.backward(z, needs=wanted), strict=True)):
        if i == only:
            assert_bitwise_equal(g, everything[i], label)
        else:
            assert g.numel() == 0, label
            assert g.dtype == everything[i].dtype, label


@pytest.mark.parametrize("M", [2, 20])  # products in fp32, and in bf16 where there are such
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=("bf16", "fp16"))
def test_fp32_adapters_are_rounded_before_the_products(dtype, M):
    case = Case(M, 48, 96, 8, dtype, master=torch.float32)
    y, z = case.forward()
    dx, d_lora_A, d_lora_B, *_ = case.backward(z)
    A, B, *rest = case.adapter
    case.adapter = (A.to(dtype), B.to(dtype), *rest)
    actual = (y, z, dx, d_lora_A.to(dtype), d_lora_B.to(dtype))
    expected = (*case.forward(), *case.backward(z)[:3])
    for name, a, e in zip(("y", "z", *GRADIENTS[:3]), actual, expected, strict=True):
        assert_bitwise_equal(a, e, name)


def test_no_tokens():
    case = Case(0, 40, 64, 4, torch.bfloat16)
    y, z = case.forward()
    assert y.shape == (0, 40)
    assert z.shape == (0, 4)
    dx, d_lora_A, d_lora_B, d_bias, d_scaling = case.backward(z)
    assert dx.shape == (0, 64)
    for g in (d_lora_A, d_lora_B, d_bias, d_scaling):
        assert not g.any()


def test_bias_of_another_dtype():
    case = Case(5, 40, 64, 4, torch.bfloat16)
    bias = torch.randn(40)  # fp32: added before the one rounding of y
    y = cpu.linear(case.x, *case.weight, bias)
    y64 = case.x.double() @ case.w64.t() + bias.double()
    assert_close_to_float64("y", y, y64, reference.linear(case.x, case.w64.bfloat16(), bias))


def test_bad_arguments_are_refused():
    case = Case(5, 40, 64, 4, torch.float32, p=0.5)
    with pytest.raises(RuntimeError, match=r"x must be \[M, 64\]"):
        cpu.linear(case.x[:, :63].contiguous(), *case.weight, None)
    with pytest.raises(RuntimeError, match="x must be contiguous"):
        cpu.linear(case.x.t().contiguous().t(), *case.weight, None)
    with pytest.raises(RuntimeError, match="bias must have N = 40"):
        cpu.linear(case.x, *case.weight, torch.zeros(41))
    with pytest.raises(RuntimeError, match="seed is required"):
        cpu.lora_linear(case.x, *case.weight, *case.adapter, None, 0.5, None)
    with pytest.raises(RuntimeError, match="x must be float32, bfloat16 or float16"):
        cpu.linear(case.x.double(), *case.weight, None)
    A, B, s, scaling = case.adapter
    with pytest.raises(RuntimeError, match="lora_B must be"):
        cpu.lora_linear(case.x, *case.weight, A, B[:39], s, scaling, None, 0.0, None)


@pytest.mark.parametrize("freed", ["x", "lora_A", "lora_B", "lora_scaling", "bias"])
def test_what_has_no_memory_is_an_error(freed):
    """Not a layer without it: its storage was freed, as sharded parameters' is between uses."""
    case = Case(3, 64, 128, 4, torch.float32, vector=True)
    names = ("lora_A", "lora_B", "lora_scaling")
    tensors = {"x": case.x, "bias": case.bias, **dict(zip(names, case.adapter, strict=False))}
    tensors[freed].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"{freed} has no memory"):
        case.forward()
