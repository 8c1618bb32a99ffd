"""Quantize, dequantize and dropout of the compiled CPU backend, at every instruction set here.

These promise bits, so every comparison with lowbit/reference.py is exact.
"""

import os
import subprocess
import sys

import pytest
import torch
from helpers import assert_bitwise_equal

import lowbit
from lowbit import codebooks, dispatch, reference

if (_why := dispatch.unavailable("cpu")) is not None:
    pytest.skip(f"the compiled CPU backend is not there: {_why}", allow_module_level=True)

from lowbit.backends import cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INFINITY = float("inf")

# avx512_bf16 and amx add nothing to these kernels: they run the avx512 ones.
LEVELS = ("generic", "avx2", "avx512")

# Rows x columns, and why. One step of a kernel is 32 elements, one block 64.
SHAPES = [
    (1, 64),  # one block
    (3, 256),  # whole blocks only
    (5, 100),  # short last block: one whole step and a ragged one
    (7, 65),  # odd K, last block of one element
    (2, 31),  # below one step
    (4, 1),  # below one byte
    (9, 3420),  # Qwen2.5-VL's vision tower: 3420 = 53 * 64 + 28; several threads
    (600, 320),  # more blocks than a thread's least share, nested blocks of 256 scales and a rest
]
EMPTY = [(0, 64), (3, 0)]


@pytest.fixture(params=LEVELS)
def isa(request):
    """Every level of this machine; the highest one is restored afterwards."""
    before = cpu.isa()
    try:
        cpu.set_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    cpu.set_isa(before)


def _shape_id(shape):
    return f"N{shape[0]}-K{shape[1]}"


def _dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


def _rule(quant_type):
    return codebooks.thresholds(lowbit.codebook(quant_type), quant_type)


def _expected(weight, thresholds, order, nested_codebook, blocksize, nested_blocksize, rows):
    with dispatch.force("reference"):
        return torch.ops.lowbit.quantize_4bit(
            weight, thresholds, order, nested_codebook, blocksize, nested_blocksize, rows
        )


def _check_quantize(weight, rule, *, blocksize=64, nested=None, nested_blocksize=256, rows=True):
    rest = (*rule, nested, blocksize, nested_blocksize, rows)
    names = ("qweight", "absmax", "nested_absmax", "nested_offset")
    actual = cpu.quantize_4bit(weight, *rest)
    for name, a, e in zip(names, actual, _expected(weight, *rest), strict=True):
        assert_bitwise_equal(a, e, name)
    return actual


# ---- quantize ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=_dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=_shape_id)
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "flat"])
@pytest.mark.parametrize("nested", [None, "dynamic", "fp8"])
def test_quantize_equals_the_reference(isa, shape, dtype, rows, nested):
    weight = (torch.randn(shape) * 0.02).to(dtype)
    table = None if nested is None else lowbit.nested_codebook(nested)
    _check_quantize(weight, _rule("nf4"), nested=table, rows=rows)


@pytest.mark.parametrize("shape", EMPTY, ids=_shape_id)
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "flat"])
def test_an_empty_weight(isa, shape, rows):
    table = lowbit.nested_codebook()
    out = cpu.quantize_4bit(torch.empty(shape), *_rule("nf4"), table, 64, 256, rows)
    packed = (shape[0], shape[1] // 2) if rows else (0,)
    assert [tuple(tensor.shape) for tensor in out] == [packed, (0,), (0,), ()]
    assert out[3] == 0.0
    args = (out[0], out[1], lowbit.codebook("nf4"), out[2], table, out[3], *shape, 64, 256, rows)
    assert cpu.dequantize_4bit(*args, torch.bfloat16).shape == shape


@pytest.mark.parametrize("quant_type", codebooks.NAMES)
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_every_blocksize_and_format(isa, quant_type, blocksize):
    """K = 8290 leaves a short and odd last step for every blocksize."""
    weight = torch.randn(3, 8290).bfloat16()
    _check_quantize(weight, _rule(quant_type), blocksize=blocksize, nested_blocksize=32)


@pytest.mark.parametrize("nested_blocksize", [32, 256, 4096])
@pytest.mark.parametrize("nested", ["dynamic", "fp8"])
def test_every_nested_blocksize(isa, nested, nested_blocksize):
    """9 * 1000 scales of very different size: every 8-bit code, a short last nested block."""
    spread = torch.logspace(-6, 2, 9).unsqueeze(1)
    weight = torch.randn(9, 32000) * spread
    _check_quantize(
        weight,
        _rule("nf4"),
        blocksize=32,
        nested=lowbit.nested_codebook(nested),
        nested_blocksize=nested_blocksize,
    )


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "custom"])
def test_values_on_and_beside_every_threshold(isa, quant_type):
    """A threshold itself takes the lower rank, the next float the upper. absmax 1 makes x = w."""
    if quant_type == "custom":  # unsorted, with a repeated value and both zeros
        table = torch.tensor(
            [0.5, -1, 0.25, 0, -0.0, 1, 0.25, -0.3, 0.1, -0.7, 0.9, 0.05, -0.05, 0.6, -0.2, 0.3]
        )
        thresholds, order = codebooks.thresholds(table)
    else:
        thresholds, order = _rule(quant_type)
    one = torch.ones(1)
    above, below = (torch.nextafter(thresholds, one * end) for end in (INFINITY, -INFINITY))
    weight = torch.cat([thresholds, above, below, one, -one, one * 0, -one * 0])
    weight = torch.cat([weight, one.repeat(64 - weight.numel())]).view(1, 64)
    assert float(weight.abs().max()) == 1.0
    _check_quantize(weight, (thresholds, order))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=_dtype_id)
def test_every_finite_16_bit_weight(isa, dtype):
    """All 2^16 bit patterns, in order (blocks of like magnitude, or all subnormal) and shuffled."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    patterns = patterns[patterns.isfinite()]
    for weight in (patterns, patterns[torch.randperm(patterns.numel())]):
        _check_quantize(weight.view(1, -1), _rule("nf4"))


@pytest.mark.parametrize("dtype", DTYPES, ids=_dtype_id)
def test_zero_and_tiny_blocks(isa, dtype):
    weight = torch.zeros(4, 128)
    weight[0, 70] = 1.0  # a zero block before it
    weight[1, :64] = -0.0
    weight[2] = torch.randn(128) * 1e-39  # subnormal absmax, in fp32 and bf16
    weight[3, 3] = 2.0**-149
    qweight, absmax, *_ = _check_quantize(weight.to(dtype), _rule("nf4"))
    assert qweight[1].unique().tolist() == [0x77]  # 7 is NF4's code of zero
    assert absmax[0] == 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=_dtype_id)
@pytest.mark.parametrize("value", [float("nan"), INFINITY, -INFINITY], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("column", [0, 37, 63, 64, 127, 128, 150])
def test_nan_and_inf_reach_absmax(isa, dtype, value, column):
    """At the ends of a block, in its middle, in the short last one; only that block is affected."""
    clean = torch.randn(2, 151).to(dtype)
    weight = clean.clone()
    weight[1, column] = value
    weight[1, (column + 1) % 64 + column // 64 * 64 if column < 128 else 149] = (
        3.0  # NaN wins in either order
    )
    _, absmax, *_ = cpu.quantize_4bit(weight, *_rule("nf4"), None, 64, 256, True)
    broken = torch.zeros(2, 3, dtype=torch.bool)
    broken[1, column // 64] = True
    assert torch.equal(absmax.view(2, 3).isnan(), broken & torch.tensor(value != value))
    assert torch.equal(absmax.view(2, 3).isinf(), broken & torch.tensor(value == value))
    _, _, _, offset = cpu.quantize_4bit(
        weight, *_rule("nf4"), lowbit.nested_codebook(), 64, 256, True
    )
    assert not offset.isfinite()


def test_the_number_of_threads_changes_nothing(isa):
    weight = torch.randn(257, 3420).bfloat16()
    threads = torch.get_num_threads()
    rest = (*_rule("nf4"), None, 64, 256, True)
    many = cpu.quantize_4bit(weight, *rest)
    torch.set_num_threads(1)
    try:
        one = cpu.quantize_4bit(weight, *rest)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(many, one, strict=True):
        assert_bitwise_equal(a, b)


# ---- dequantize ----------------------------------------------------------------------------------


def _check_dequantize(args):
    for dtype in DTYPES:
        actual = cpu.dequantize_4bit(*args, dtype)
        assert_bitwise_equal(actual, reference.dequantize_4bit(*args, dtype), f"W in {dtype}")


@pytest.mark.parametrize("shape", SHAPES, ids=_shape_id)
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "flat"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantize_equals_the_reference(isa, shape, rows, nested, quant_type):
    N, K = shape
    weight = torch.randn(shape) * 0.02
    table = lowbit.nested_codebook() if nested else None
    qweight, absmax, nested_absmax, offset = _expected(
        weight, *_rule(quant_type), table, 64, 256, rows
    )
    nested_args = (nested_absmax, table, offset) if nested else (None, None, None)
    _check_dequantize(
        (qweight, absmax, lowbit.codebook(quant_type), *nested_args, N, K, 64, 256, rows)
    )


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
def test_dequantize_every_rounding(isa, blocksize):
    """Scales and codebooks of random bits: ties, subnormals, overflow to Inf, both signs."""
    N, K = 16, 4096

    def random_floats(*shape):
        bits = torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)
        values = bits.view(torch.float32)
        return torch.where(values.isfinite(), values, 1.0)

    for _ in range(8):
        qweight = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
        absmax = random_floats(N * K // blocksize)
        table = random_floats(16)
        # Products near fp16's and bf16's range as well: one table of bits, one of ordinary size.
        for codebook in (
            table,
            torch.rand(16) * 2 - 1,
            table.sign() * 2.0 ** torch.randint(-20, 20, (16,)),
        ):
            for scale in (absmax, torch.randn_like(absmax) * 100):
                _check_dequantize(
                    (qweight, scale, codebook, None, None, None, N, K, blocksize, 256, True)
                )


def test_a_non_finite_scale_stays_visible(isa):
    """NaN comes out as NaN, Inf as Inf, and 0 * Inf as NaN. A NaN's payload is not promised."""
    qweight = torch.arange(256, dtype=torch.uint8).view(1, 256)
    absmax = torch.tensor([float("nan"), INFINITY, -INFINITY, 1.0]).repeat(2)
    args = (qweight, absmax, lowbit.codebook("nf4"), None, None, None, 1, 512, 64, 256, True)
    for dtype in DTYPES:
        expected = reference.dequantize_4bit(*args, dtype)
        actual = cpu.dequantize_4bit(*args, dtype)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# From 16 MiB on the kernel streams past the caches, if rows are aligned; flat is one row.
@pytest.mark.parametrize(
    ("shape", "rows"),
    [((2200, 4096), True), ((4200, 2100), True), ((4200, 2100), False)],
    ids=["aligned", "odd-rows", "flat"],
)
def test_large_outputs(isa, shape, rows):
    weight = torch.randn(shape).bfloat16()
    out = cpu.quantize_4bit(weight, *_rule("nf4"), None, 64, 256, rows)
    args = (out[0], out[1], lowbit.codebook("nf4"), None, None, None, *shape, 64, 256, rows)
    _check_dequantize(args)


def test_a_dense_weight_is_only_cast():
    weight = torch.randn(3, 5)
    args = (weight, None, None, None, None, None, 3, 5, 64, 256, True)
    assert_bitwise_equal(cpu.dequantize_4bit(*args, torch.bfloat16), weight.bfloat16(), "W")


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(isa):
    """Only the last rows hold anything but zeros, so the 4 GiB weight costs no time to make."""
    needed = 14 << 30
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < needed:
        pytest.skip("needs 14 GiB of free memory")
    N, K = 2**19 + 3, 4097  # odd K: the flat layout crosses rows
    weight = torch.zeros(N, K, dtype=torch.bfloat16)
    tail = torch.randn(4, K).bfloat16()
    weight[-4:] = tail
    qweight, absmax, *_ = cpu.quantize_4bit(weight, *_rule("nf4"), None, 64, 256, True)
    expected = _expected(tail, *_rule("nf4"), None, 64, 256, True)
    assert_bitwise_equal(qweight[-4:], expected[0], "qweight")
    assert_bitwise_equal(absmax.view(N, -1)[-4:].reshape(-1), expected[1], "absmax")
    args = (qweight, absmax, lowbit.codebook("nf4"), None, None, None, N, K, 64, 256, True)
    del weight
    back = cpu.dequantize_4bit(*args, torch.bfloat16)
    assert_bitwise_equal(
        back[-4:],
        reference.dequantize_4bit(
            *expected[:2],
            lowbit.codebook("nf4"),
            None,
            None,
            None,
            4,
            K,
            64,
            256,
            True,
            torch.bfloat16,
        ),
        "W",
    )
    assert not back[: N - 4 : 4099].any()


# ---- dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=_dtype_id)
@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, 0x123456789ABCDEF])
def test_dropout_equals_the_reference(isa, dtype, p, seed):
    """17 * 1001 elements: several pieces of 4096, the last one no multiple of any step."""
    x, seed = torch.randn(17, 1001).to(dtype), torch.tensor([seed])
    assert_bitwise_equal(cpu.dropout(x, p, seed), reference.dropout(x, p, seed), "dropped")


@pytest.mark.parametrize(
    "shape", [(0, 8), (1, 1), (1, 3), (5, 13), (1, 4096), (3, 4099)], ids=_shape_id
)
def test_dropout_of_every_ragged_end(isa, shape):
    x, seed = torch.randn(shape).bfloat16(), torch.tensor([42])
    assert_bitwise_equal(cpu.dropout(x, 0.3, seed), reference.dropout(x, 0.3, seed), "dropped")


def test_dropped_nan_is_zero(isa):
    """A dropped element is 0 whatever it was; a kept NaN stays one."""
    x, seed = torch.full((1, 256), float("nan")), torch.tensor([7])
    keep = reference.dropout_mask(1, 256, 0.5, seed)
    out = cpu.dropout(x, 0.5, seed)
    assert torch.equal(out.isnan(), keep)
    assert_bitwise_equal(out[~keep], torch.zeros(int((~keep).sum())), "dropped")


# ---- the interface -------------------------------------------------------------------------------


def test_unknown_and_unavailable_levels_are_refused():
    before = cpu.isa()
    with pytest.raises(RuntimeError, match=r'must be one of generic, avx2.*got "sse9"'):
        cpu.set_isa("sse9")
    assert cpu.isa() == before in cpu.ISA_LEVELS


@pytest.mark.parametrize(
    ("cap", "expected"),
    [("generic", "generic"), ("sse9", "LOWBIT_CPU_ISA must be one of generic, avx2")],
)
def test_the_environment_caps_the_level(cap, expected):
    code = "from lowbit.backends import cpu; print(cpu.isa())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LOWBIT_CPU_ISA": cap},
        capture_output=True,
        text=True,
    )
    assert expected in run.stdout + run.stderr


def test_operators_check_their_arguments():
    weight, (thresholds, order) = torch.randn(4, 64), _rule("nf4")
    good = dict(
        zip(
            ("qweight", "absmax"),
            cpu.quantize_4bit(weight, thresholds, order, None, 64, 256, True),
            strict=False,
        )
    )

    def quantize(weight=weight, thresholds=thresholds, order=order, nested=None, blocksize=64):
        return cpu.quantize_4bit(weight, thresholds, order, nested, blocksize, 256, True)

    def dequantize(qweight=good["qweight"], absmax=good["absmax"], K=64, blocksize=64):
        table = lowbit.codebook("nf4")
        return cpu.dequantize_4bit(
            qweight, absmax, table, None, None, None, 4, K, blocksize, 256, True, torch.float32
        )

    for call, message in (
        (lambda: quantize(weight.double()), "weight must be float32, bfloat16 or float16"),
        (lambda: quantize(weight.t()), "weight must be contiguous"),
        (lambda: quantize(blocksize=48), "blocksize must be a power of two, got 48"),
        (lambda: quantize(blocksize=16), "blocksize must be at least 32, got 16"),
        (lambda: quantize(thresholds=thresholds[:14]), "thresholds must have 15 elements, got 14"),
        (lambda: quantize(order=order.int()), "order must be Byte"),
        (lambda: quantize(nested=torch.zeros(255)), "nested_codebook must have 256 elements"),
        (lambda: dequantize(K=66), "qweight must have 132 elements, got 128"),
        (lambda: dequantize(blocksize=32), "absmax must have 8 elements, got 4"),
        (lambda: dequantize(absmax=good["absmax"].byte()), "nested_blocksize|nested_absmax"),
        (lambda: cpu.dropout(weight, 1.0, torch.tensor([0])), r"p must be in \[0, 1\), got 1"),
        (lambda: cpu.dropout(weight, 0.5, torch.tensor([0.0])), "seed must be Long"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


# ---- bitsandbytes --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")


def _assert_weight_of_bitsandbytes(ours, theirs):
    """Bit for bit, except where bitsandbytes itself depends on the CPU.

    With AVX-512 it (0.50.2) rounds fp16 weights by another route, one unit in the last place away
    in about 1 of 10000, and from blocksize 2048 on reads FP4's code 8 as +0 instead of -0. Without
    AVX-512 it gives lowbit's bytes.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        assert_bitwise_equal(ours, theirs, "W")
        return
    if ours.dtype != torch.float16:
        assert torch.equal(ours, theirs)  # -0 == +0
        return
    steps = (ours.view(torch.int16).int() - theirs.view(torch.int16).int()).abs()
    steps[(ours == 0) & (theirs == 0)] = 0
    assert steps.max() <= 1
    assert (steps > 0).float().mean() < 1e-3


def _bnb_rule(quant_type):
    """bitsandbytes' CPU rule. For FP4 it is not the rule of its CUDA kernel, which lowbit follows.

    The boundaries are fp32 midpoints instead of the kernel's decimal constants, and the two zeros
    have changed places: small positive values take code 8 (-0), small negative ones code 0.
    """
    from bitsandbytes.backends.default.ops import _get_4bit_quantize_bounds

    thresholds, order = _get_4bit_quantize_bounds(quant_type, torch.device("cpu"))
    return thresholds.float(), order.to(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=_dtype_id)
@pytest.mark.parametrize("blocksize", [64, 128, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_bytes_equal_bitsandbytes(isa, bnb, quant_type, blocksize, dtype, nested):
    """Codes, scales, offset and dequantized weights, for K a multiple of the blocksize.

    The one thing left out are the 8-bit codes, see the next test.
    """
    weight = (torch.randn(64, 4096) * 0.02).to(dtype)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
    )
    table = lowbit.nested_codebook() if nested else None
    qweight, absmax, nested_absmax, offset = cpu.quantize_4bit(
        weight, *_bnb_rule(quant_type), table, blocksize, 256, True
    )
    assert_bitwise_equal(qweight.view(-1), packed.view(-1), "qweight")
    # FP4's state.code has +0 for code 8, but bitsandbytes' kernel makes it -0, as lowbit's table.
    codebook = lowbit.codebook(quant_type)
    assert torch.equal(codebook, state.code)
    nested_args = (None, None, None)
    if nested:
        assert_bitwise_equal(offset, state.offset, "nested_offset")
        assert_bitwise_equal(nested_absmax, state.state2.absmax, "nested_absmax")
        assert_bitwise_equal(table, state.state2.code, "nested_codebook")
        nested_args = (state.state2.absmax, state.state2.code, state.offset)
    else:
        assert_bitwise_equal(absmax, state.absmax, "absmax")
    args = (
        packed.view(-1),
        state.absmax,
        codebook,
        *nested_args,
        *weight.shape,
        blocksize,
        256,
        True,
    )
    _assert_weight_of_bitsandbytes(
        cpu.dequantize_4bit(*args, dtype), bnb.dequantize_4bit(packed, state)
    )


def test_nf4_rule_is_that_of_bitsandbytes(bnb):
    for ours, theirs, name in zip(
        _rule("nf4"), _bnb_rule("nf4"), ("thresholds", "order"), strict=True
    ):
        assert_bitwise_equal(ours, theirs, name)


def test_8_bit_codes_differ_from_bitsandbytes_only_beside_a_threshold(isa, bnb):
    """bitsandbytes (0.50.2) looks x up in a table of 65536 equidistant points, lowbit does not.

    lowbit takes the nearest code, so the two may differ where a boundary lies within half a grid
    step, 1/65535, of x: about 2 in 1000 scales.
    """
    weight = torch.randn(512, 4096)
    _, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    table = lowbit.nested_codebook()
    _, codes, *_ = cpu.quantize_4bit(weight, *_rule("nf4"), table, 64, 256, True)
    absmax = cpu.quantize_4bit(weight, *_rule("nf4"), None, 64, 256, True)[1]
    centred = (absmax - absmax.mean()).view(-1, 256)
    x = (centred / centred.abs().amax(dim=1, keepdim=True)).view(-1)
    boundaries = (table[:-1].double() + table[1:].double()) / 2
    nearest = (x.double().unsqueeze(1) - boundaries).abs().amin(dim=1)
    different = codes != state.absmax
    assert different.float().mean() < 0.005
    assert (nearest[different] <= 1 / 65535 + 2**-23).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=_dtype_id)
def test_flat_blocks_that_cross_rows_equal_bitsandbytes(isa, bnb, dtype):
    """K = 100, even numel.

    In the short last block bitsandbytes divides by absmax, elsewhere it multiplies by the
    reciprocal; for 16-bit weights both choose the same codes.
    """
    weight = torch.randn(33, 100).to(dtype)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    qweight, absmax, *_ = cpu.quantize_4bit(weight, *_rule("nf4"), None, 64, 256, False)
    assert_bitwise_equal(qweight, packed.view(-1), "qweight")
    assert_bitwise_equal(absmax, state.absmax, "absmax")
    args = (qweight, absmax, lowbit.codebook("nf4"), None, None, None, 33, 100, 64, 256, False)
    _assert_weight_of_bitsandbytes(
        cpu.dequantize_4bit(*args, dtype), bnb.dequantize_4bit(packed, state)
    )
