"""Codebooks against their published values, and the thresholds that decide between neighbours."""

import subprocess
import sys

import pytest
import scipy.stats
import torch
from helpers import assert_bitwise_equal

import lowbit
from lowbit import codebooks
from lowbit.optim import tables


def test_normal_float_4_equals_the_published_values():
    torch.testing.assert_close(lowbit.normal_float(4), lowbit.codebook("nf4"), rtol=0, atol=0)


def test_normal_float_4_has_equal_mass_between_its_quantiles():
    """Each NF4 value sits in the middle of 1/30 (below zero) or 1/32 (above) of the probability
    mass.

    The codebook is scaled by its largest value, the quantile of the offset; undoing that must give
    probabilities in equal steps on either side of zero, which is what "quantile quantization"
    promises.
    """
    offset = 0.9677083
    values = lowbit.codebook("nf4").double().numpy() * scipy.stats.norm.ppf(offset)
    steps = torch.from_numpy(scipy.stats.norm.cdf(values)).diff()
    negative, positive = steps[:7], steps[7:]
    torch.testing.assert_close(
        negative, torch.full_like(negative, (offset - 0.5) / 7), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        positive, torch.full_like(positive, (offset - 0.5) / 8), rtol=1e-5, atol=0
    )


def test_nf4_spreads_normal_data_evenly_over_its_codes():
    """On normal blocks every inner code gets close to the mass its quantile interval has; none is
    idle or crowded.
    """
    quantized = lowbit.quantize(torch.randn(4096, 1024), double_quant=False)
    counts = torch.bincount(lowbit.unpack(quantized.qweight).flatten().int(), minlength=16).double()
    share = counts / counts.sum()
    assert share.min() > 0.01, share.tolist()
    assert share.max() < 0.12, share.tolist()
    entropy = -(share * share.log2()).sum()
    assert entropy > 3.8, f"{entropy:.3f} bits of 4"


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_normal_float_is_sorted_and_has_an_exact_zero(bits):
    values = lowbit.normal_float(bits)
    assert values.shape == (2**bits,)
    assert values.diff().gt(0).all()
    assert values[0] == -1
    assert values[-1] == 1
    assert values[2 ** (bits - 1) - 1] == 0


@pytest.mark.parametrize("bits", [1, 9, 0, 4.0])
def test_normal_float_refuses_other_widths(bits):
    with pytest.raises(ValueError, match=f"bits must be between 2 and 8, got {bits}"):
        lowbit.normal_float(bits)


def test_fp4_is_symmetric_and_indexed_by_its_bits():
    values = lowbit.codebook("fp4")
    assert torch.equal(values[8:], -values[:8])
    assert values[3] == 1.0
    assert values[2] == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", ["nf3", "nf2"])
def test_short_formats_are_padded_without_new_codes(name):
    values = lowbit.codebook(name)
    used = 2 ** int(name[2])
    assert torch.equal(values[:used], lowbit.normal_float(int(name[2])))
    assert (values[used:] == 1).all()
    quantized = lowbit.quantize(torch.randn(64, 256), quant_type=name)
    assert int(lowbit.unpack(quantized.qweight).max()) < used


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="quant_type must be one of nf4, fp4, nf3, nf2, got 'nf5'"):
        lowbit.codebook("nf5")
    with pytest.raises(ValueError, match="double_quant_type must be"):
        lowbit.nested_codebook("int8")


def test_codebooks_are_copies():
    lowbit.codebook("nf4").zero_()
    assert lowbit.codebook("nf4")[0] == -1


@pytest.mark.parametrize("name", codebooks.NAMES)
def test_every_value_keeps_its_own_code(name):
    """Thresholds must separate: quantizing the codebook itself returns the codebook."""
    values = lowbit.codebook(name)
    bounds, order = codebooks.thresholds(values, name)
    assert bounds.diff().ge(0).all()
    codes = order.long()[torch.bucketize(values, bounds)]
    assert torch.equal(values[codes], values)


def test_ties_go_to_the_lower_code():
    values = lowbit.codebook("nf4")
    bounds, order = codebooks.thresholds(values)
    codes = order.long()[torch.bucketize(bounds, bounds)]
    assert codes.tolist() == list(range(15))
    above = torch.nextafter(bounds, torch.tensor(2.0))
    assert order.long()[torch.bucketize(above, bounds)].tolist() == list(range(1, 16))


def test_fp4_decides_by_magnitude_and_sign():
    bounds, order = codebooks.thresholds(lowbit.codebook("fp4"), "fp4")

    def code(x):
        return int(order[torch.bucketize(torch.tensor([x]), bounds)])

    for t, below, above in (
        (0.0859375, 1, 6),
        (0.20833333, 6, 7),
        (0.29166667, 7, 4),
        (0.8333333, 2, 3),
    ):
        t = float(torch.tensor(t))
        up = float(torch.nextafter(torch.tensor(t), torch.tensor(2.0)))
        assert (code(t), code(up)) == (below, above)
        assert (code(-t), code(-up)) == (below + 8, above + 8)
    assert code(0.0) == 0
    assert code(-0.0) == 0
    assert code(1e-30) == 0
    assert code(-1e-30) == 8  # bitsandbytes stores the sign of values that round to zero


@pytest.mark.parametrize("name", ["dynamic", "fp8"])
def test_nested_codebooks_ascend_and_hold_zero_and_one(name):
    values = lowbit.nested_codebook(name)
    assert values.shape == (256,)
    assert values.diff().gt(0).all()
    assert codebooks.nested_thresholds(values).diff().gt(0).all()
    assert (values == 1).any()
    assert (values == 0).any()


def test_fp8_codebook_is_e4m3():
    """Rounding to the table equals rounding to float8_e4m3fn, ties included."""
    values = lowbit.nested_codebook("fp8")
    x = torch.cat([torch.linspace(-1, 1, 10001), (values[1:] + values[:-1]) / 2])
    codes = torch.bucketize(x, codebooks.nested_thresholds(values))
    expected = (x * 448).to(torch.float8_e4m3fn).float()
    actual = values[codes] * 448
    # Not farther than e4m3's own choice; at a tie the fp32 division by 448 may tip the balance by
    # an ulp.
    farther = (actual - x * 448).abs() > (expected - x * 448).abs() * (1 + 1e-5)
    assert not farther.any(), x[farther].tolist()[:5]


def test_nested_ties_go_to_the_even_code():
    values = lowbit.nested_codebook("dynamic")
    middle = (values[:-1] + values[1:]) * 0.5
    codes = torch.bucketize(middle, codebooks.nested_thresholds(values))
    assert (codes % 2 == 0).all()


def test_tables_do_not_follow_a_device_context():
    """Cached tables made inside torch.device("meta") would break every later call."""
    code = (
        "import torch, lowbit\n"
        "with torch.device('meta'):\n"
        "    tables = [lowbit.codebook(n) for n in ('nf4', 'fp4', 'nf3')]\n"
        "    tables += [lowbit.nested_codebook(n) for n in ('dynamic', 'fp8')]\n"
        "assert all(t.device.type == 'cpu' for t in tables)\n"
        "assert lowbit.quantize(torch.randn(4, 64)).dequantize().isfinite().all()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


TABLES = [(codebooks._table, name) for name in codebooks.NAMES]
TABLES += [(t,) for t in (codebooks._fp4_thresholds, codebooks._dynamic_map, codebooks._fp8_map)]
TABLES += [(tables._unsigned_map,), (tables.state_tables, 2)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", TABLES, ids=lambda call: "-".join(map(str, call[1:])))
def test_tables_do_not_depend_on_the_default_dtype(call, dtype):
    """Whoever comes first makes them for all: models are built under their own default dtype."""
    make, *arguments = call
    expected = make(*arguments)
    torch.set_default_dtype(dtype)
    try:
        made = make.__wrapped__(*arguments)
    finally:
        torch.set_default_dtype(torch.float32)
    for actual, right in zip(
        *(t if isinstance(t, tuple) else (t,) for t in (made, expected)), strict=True
    ):
        assert_bitwise_equal(actual, right)


def test_tables_made_under_a_mode_are_not_kept():
    """In a process of its own, where nobody has made them before."""
    code = """
import torch, lowbit
from lowbit import codebooks
from torch._subclasses.fake_tensor import FakeTensorMode
def make():
    fp4 = codebooks.thresholds(lowbit.codebook("fp4"), "fp4")
    return lowbit.codebook("nf4"), *fp4
with FakeTensorMode():
    tables = make()
tables = make()
assert all(type(table) is torch.Tensor for table in tables)
assert lowbit.quantize(torch.randn(2, 64)).dequantize().isfinite().all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_compiler_finds_the_codebook():
    compiled = torch.compile(
        lambda x: x + lowbit.codebook("nf4").sum(), backend="eager", fullgraph=True
    )
    x = torch.zeros(2)
    assert_bitwise_equal(compiled(x), x + lowbit.codebook("nf4").sum())
