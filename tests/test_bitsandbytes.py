"""Weights and state dicts go to bitsandbytes and back bit for bit, weights without a copy."""

import json

import pytest
import torch
from helpers import assert_bitwise_equal, assert_close_to_float64
from tiny_model import make_llama

import lowbit
from lowbit.integrations.bitsandbytes import from_bnb, to_bnb
from lowbit.nn import Linear4bit, QLoRALinear
from lowbit.state import CheckpointError, from_state_entries, state_entries

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")

# N, K, blocksize: many whole blocks; K = 100 leaves flat blocks that cross rows; 3 x 100 also ends
# in a short last block; K = 33 puts two rows into one byte; one block in all.
SHAPES = [(96, 256, 64), (64, 100, 64), (3, 100, 64), (5, 33, 32), (1, 64, 64)]
KINDS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
PARTS = ("qweight", "absmax", "codebook", "nested_absmax", "nested_codebook", "nested_offset")


def bnb_weight(n, k, blocksize, quant_type="nf4", nested=True, dtype=torch.float32):
    weight = torch.randn(n, k, dtype=dtype)
    return bnb.functional.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
    )


def bnb_layer(n=96, k=256, quant_type="nf4", nested=True, dtype=torch.float32, storage=torch.uint8):
    layer = bnb.nn.Linear4bit(
        k, n, compress_statistics=nested, quant_type=quant_type, quant_storage=storage
    )
    return layer.to(dtype).to("cpu")


def bnb_stats(entries):
    """The entries as transformers hands them to Params4bit.from_prequantized."""
    prefix = "weight."
    return {k.removeprefix(prefix): v.clone() for k, v in entries.items() if k.startswith(prefix)}


def assert_same_values(actual, expected, name):
    """Equal in every bit but the sign of zero.

    bitsandbytes decodes FP4 by a table in its code that has -0 for code 8, where quant_map has +0.
    """
    assert actual.dtype == expected.dtype, name
    assert_bitwise_equal(actual + 0.0, expected + 0.0, name)  # -0 + 0 = +0


def assert_same_weight(actual, expected):
    for part in PARTS:
        a, b = getattr(actual, part), getattr(expected, part)
        assert (a is None) == (b is None), part
        if a is not None:
            assert_bitwise_equal(a.reshape(-1), b.reshape(-1), part)
    for field in ("shape", "blocksize", "quant_type", "dtype", "row_blocks"):
        assert getattr(actual, field) == getattr(expected, field), field


@pytest.mark.parametrize(("quant_type", "nested"), KINDS)
@pytest.mark.parametrize(("n", "k", "blocksize"), SHAPES)
def test_from_bnb_shares_storage_and_reads_the_same_weight(n, k, blocksize, quant_type, nested):
    packed, state = bnb_weight(n, k, blocksize, quant_type, nested)
    qw = from_bnb(packed, state)
    pairs = [(qw.qweight, packed), (qw.absmax, state.absmax), (qw.codebook, state.code)]
    if nested:
        pairs += [
            (qw.nested_absmax, state.state2.absmax),
            (qw.nested_codebook, state.state2.code),
            (qw.nested_offset, state.offset),
        ]
    for ours, theirs in pairs:
        assert ours.data_ptr() == theirs.data_ptr()
    assert qw.shape == (n, k)
    assert qw.double_quant == nested
    expected = bnb.functional.dequantize_4bit(packed, state)
    assert_same_values(qw.dequantize(), expected, "dequantized")


@pytest.mark.parametrize(("quant_type", "nested"), KINDS)
@pytest.mark.parametrize(("n", "k", "blocksize"), SHAPES)
def test_to_bnb_shares_storage_and_reads_the_same_weight(n, k, blocksize, quant_type, nested):
    qw = lowbit.quantize(
        torch.randn(n, k),
        quant_type=quant_type,
        blocksize=blocksize,
        double_quant=nested,
        layout="flat",
    )
    packed, state = to_bnb(qw)
    assert packed.data_ptr() == qw.qweight.data_ptr()
    assert state.absmax.data_ptr() == qw.absmax.data_ptr()
    assert state.code.data_ptr() == qw.codebook.data_ptr()
    if nested:
        assert state.state2.absmax.data_ptr() == qw.nested_absmax.data_ptr()
        assert state.offset.data_ptr() == qw.nested_offset.data_ptr()
    read = bnb.functional.dequantize_4bit(packed, state)
    assert_same_values(read, qw.dequantize(), "dequantized by bitsandbytes")
    assert_same_weight(from_bnb(packed, state), qw)


def test_methods_of_quantized_weight_lead_here():
    layer = bnb_layer()
    qw = lowbit.QuantizedWeight.from_bnb(layer.weight)
    assert qw.qweight.data_ptr() == layer.weight.data_ptr()
    packed, state = qw.to_bnb()
    assert packed.data_ptr() == layer.weight.data_ptr()
    assert state == layer.weight.quant_state


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_from_bnb_reads_other_storage_dtypes(storage):
    layer = bnb_layer(storage=storage)
    qw = from_bnb(layer.weight)
    assert qw.qweight.dtype == torch.uint8
    assert qw.qweight.data_ptr() == layer.weight.data_ptr()
    expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert_same_values(qw.dequantize(), expected, "dequantized")


def test_from_bnb_refuses_what_it_cannot_read():
    fresh = bnb.nn.Linear4bit(64, 64)
    with pytest.raises(ValueError, match="no quant_state: move the bitsandbytes layer to a device"):
        from_bnb(fresh.weight)
    with pytest.raises(TypeError, match="weight must be a Params4bit"):
        from_bnb([1, 2])
    layer = bnb_layer()
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="repacked by a bitsandbytes forward"):
        from_bnb(layer.weight)
    packed, state = bnb_weight(64, 64, 64)
    with pytest.raises(ValueError, match="must be contiguous"):
        from_bnb(packed.expand(-1, 2), state)


@pytest.mark.parametrize("options", [{"blocksize": 64}, {"quant_type": "nf3", "layout": "flat"}])
def test_to_bnb_refuses_what_bitsandbytes_cannot_express(options):
    qw = lowbit.quantize(torch.randn(4, 100), **options)
    with pytest.raises(ValueError, match="must be nf4 or fp4 with flat blocks"):
        qw.to_bnb()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("quant_type", "nested"), KINDS)
def test_state_dict_of_bitsandbytes_loads_strictly(quant_type, nested, dtype):
    theirs = bnb_layer(quant_type=quant_type, nested=nested, dtype=dtype)
    ours = Linear4bit(256, 96, dtype=dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours.quant_type == quant_type
    assert ours.double_quant == nested
    assert ours.weight_dtype == dtype
    assert_same_weight(ours.quantized_weight, from_bnb(theirs.weight))
    x = torch.randn(3, 256, dtype=dtype)
    weight = ours.quantized_weight.dequantize(torch.float32).double()
    expected = x.double() @ weight.t() + theirs.bias.double()
    assert_close_to_float64("y", ours(x), expected, theirs(x).to(dtype))


@pytest.mark.parametrize(("quant_type", "nested"), KINDS)
def test_state_dicts_are_equal_byte_for_byte(quant_type, nested):
    theirs = bnb_layer(quant_type=quant_type, nested=nested, dtype=torch.bfloat16)
    expected = theirs.state_dict()
    actual = Linear4bit.from_linear(theirs).state_dict()
    assert list(actual) == list(expected)
    for key in expected:
        assert_bitwise_equal(actual[key], expected[key].as_subclass(torch.Tensor), key)


@pytest.mark.parametrize(("quant_type", "nested"), KINDS)
@pytest.mark.parametrize(("n", "k"), [(96, 256), (64, 100)])
def test_bitsandbytes_reads_our_state_dict(n, k, quant_type, nested):
    ours = Linear4bit.from_linear(
        torch.nn.Linear(k, n), quant_type=quant_type, double_quant=nested, layout="flat"
    )
    entries = ours.state_dict()
    theirs = bnb.nn.Params4bit.from_prequantized(
        data=entries["weight"], quantized_stats=bnb_stats(entries), device="cpu"
    )
    read = bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state)
    assert_same_values(read, ours.quantized_weight.dequantize(), "weight read by bitsandbytes")
    assert_same_weight(from_bnb(theirs), ours.quantized_weight)


def test_wide_storage_of_bitsandbytes_loads():
    theirs = bnb_layer(storage=torch.bfloat16)
    ours = Linear4bit(256, 96)
    ours.load_state_dict(theirs.state_dict())
    assert_same_weight(ours.quantized_weight, from_bnb(theirs.weight))


@pytest.mark.parametrize("layer_type", [Linear4bit, QLoRALinear])
def test_from_linear_takes_a_bitsandbytes_layer_without_a_copy(layer_type):
    theirs = bnb_layer()
    ours = layer_type.from_linear(theirs)
    assert ours.weight.data_ptr() == theirs.weight.data_ptr()
    assert ours.bias.data_ptr() == theirs.bias.data_ptr()
    x = torch.randn(5, 256)
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_model_that_transformers_loaded_in_4_bits_is_an_ordinary_one(tmp_path):
    """Its marks go with bitsandbytes' layers: by them casts, Trainer and files are refused."""
    transformers = pytest.importorskip("transformers")
    make_llama(64).save_pretrained(tmp_path / "dense")
    packing = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def load():
        return transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=packing, device_map="cpu"
        )

    some = lowbit.prepare(load(), r=2, skip_modules=["q_proj"])
    assert some.is_quantized  # not all layers are lowbit's
    model = lowbit.prepare(load(), r=2)
    assert not model.is_quantized
    model.to(torch.float32)
    merged = lowbit.adapters.merge(model, dtype=torch.float32)
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    )
    layer = "model.layers.1.mlp.up_proj"
    actual, expected = (m.get_submodule(layer).weight.detach() for m in (again, merged))
    assert_bitwise_equal(actual, expected, layer)


def test_our_ragged_rows_are_refused_by_bitsandbytes():
    """K = 100 with blocks that restart per row has other blocks than bitsandbytes would read."""
    entries = state_entries(lowbit.quantize(torch.randn(8, 100)))
    blob = entries["weight.quant_state.lowbit__nf4"]
    assert json.loads(bytes(blob.tolist()))["layout"] == "rows"
    with pytest.raises(ValueError, match="exactly one"):
        bnb.nn.Params4bit.from_prequantized(
            data=entries["weight"], quantized_stats=bnb_stats(entries), device="cpu"
        )
    assert from_state_entries(entries).row_blocks


@pytest.mark.parametrize("layout", ["rows", "flat"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "nf3", "nf2", "custom"])
@pytest.mark.parametrize("nested_type", [None, "dynamic", "fp8"])
@pytest.mark.parametrize(("n", "k", "blocksize"), SHAPES)
def test_entries_round_trip(n, k, blocksize, quant_type, layout, nested_type):
    qw = lowbit.quantize(
        torch.randn(n, k, dtype=torch.bfloat16),
        quant_type="nf4" if quant_type == "custom" else quant_type,
        codebook=torch.arange(-7, 9) / 8 if quant_type == "custom" else None,
        blocksize=blocksize,
        double_quant=nested_type is not None,
        double_quant_type=nested_type or "dynamic",
        nested_blocksize=32,
        layout=layout,
    )
    entries = state_entries(qw, "a.b.weight")
    assert all(key.startswith("a.b.weight") for key in entries)
    assert_same_weight(from_state_entries(entries, "a.b.weight"), qw)


def damage(entries, key, change):
    entries[key] = change(entries[key])


def blob_with(**fields):
    def change(blob):
        stored = json.loads(bytes(blob.tolist()))
        stored |= fields
        return torch.tensor(list(json.dumps(stored).encode()), dtype=torch.uint8)

    return change


BLOB = "weight.quant_state.bitsandbytes__nf4"
DAMAGES = {
    "short packed weight": ("weight", lambda t: t[:-1], "weight must hold 4096 packed bytes"),
    "packed weight of int64": ("weight", lambda t: t.long(), "weight must hold 4096 packed bytes"),
    "short absmax": ("weight.absmax", lambda t: t[:-1], r"weight.absmax must be uint8 \[128\]"),
    "absmax of fp32": ("weight.absmax", lambda t: t.float(), "weight.absmax must be uint8"),
    "long nested_absmax": (
        "weight.nested_absmax",
        lambda t: torch.cat([t, t]),
        r"weight.nested_absmax must be float32 \[1\]",
    ),
    "nan in nested_absmax": (
        "weight.nested_absmax",
        lambda t: t * float("nan"),
        "weight.nested_absmax has NaN or Inf",
    ),
    "half quant_map": ("weight.quant_map", lambda t: t.half(), "weight.quant_map must be float32"),
    "other quant_map": ("weight.quant_map", lambda t: t * 2, "quant_map is not the nf4 table"),
    "cut JSON": (BLOB, lambda t: t[:-3], "does not hold valid JSON"),
    "binary JSON": (BLOB, lambda t: t + 128, "does not hold valid JSON"),
    "JSON list": (BLOB, lambda t: torch.tensor([91, 93], dtype=torch.uint8), "a JSON object"),
    "JSON as floats": (BLOB, lambda t: t.float(), "must be uint8"),
    "other type inside": (BLOB, blob_with(quant_type="fp4"), "quant_type = 'fp4'"),
    "odd blocksize": (BLOB, blob_with(blocksize=48), "blocksize = 48"),
    "unknown dtype": (BLOB, blob_with(dtype="int8"), "dtype = 'int8'"),
    "text shape": (BLOB, blob_with(shape="64x128"), "shape = '64x128'"),
    "offset beyond fp32": (BLOB, blob_with(nested_offset=1e300), "nested_offset = 1e"),
    "broken blocksize": (BLOB, blob_with(blocksize=64.0), "blocksize = 64.0"),
    "dtype of a list": (BLOB, blob_with(dtype=["float32"]), "dtype = "),
    "infinite offset": (BLOB, blob_with(nested_offset=float("inf")), "nested_offset = inf"),
    "other blocksize": (BLOB, blob_with(blocksize=128), r"weight.absmax must be uint8 \[64\]"),
}
MISSING = ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", BLOB)


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_entries_are_refused_by_name(case):
    key, change, message = DAMAGES[case]
    entries = state_entries(lowbit.quantize(torch.randn(64, 128)))
    damage(entries, key, change)
    with pytest.raises(CheckpointError, match=message):
        from_state_entries(entries)


@pytest.mark.parametrize("key", MISSING)
def test_missing_entries_are_refused_by_name(key):
    entries = state_entries(lowbit.quantize(torch.randn(64, 128)))
    del entries[key]
    with pytest.raises(CheckpointError, match=key.partition("bitsandbytes")[0]):
        from_state_entries(entries)


def test_surplus_and_foreign_entries_are_refused():
    entries = state_entries(lowbit.quantize(torch.randn(64, 128)))
    with pytest.raises(CheckpointError, match=r"weight.SCB does not belong"):
        from_state_entries({**entries, "weight.SCB": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="must have one quant_state"):
        from_state_entries({**entries, "weight.quant_state.lowbit__nf4": entries[BLOB]})
    foreign = {k.replace("bitsandbytes__nf4", "other__nf4"): v for k, v in entries.items()}
    with pytest.raises(CheckpointError, match="of a kind lowbit does not know"):
        from_state_entries(foreign)
    with pytest.raises(CheckpointError, match="weight is not quantized: float32"):
        from_state_entries({"weight": torch.zeros(4, 4)})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [64, 256, 4096])
def test_codes_on_a_gpu_are_bitsandbytes(dtype, quant_type, blocksize):
    """The same bytes, except for weights that lie on a threshold.

    bitsandbytes compiles with fast-math, so its reciprocal of absmax may be one unit in the last
    place off. FP4's boundaries are simple fractions that a ratio of two 16-bit numbers can hit
    exactly; NF4's are not, and 16-bit weights never differ there.
    """
    weight = (torch.randn(512, 4096, device="cuda") * 0.02).to(dtype)
    ours = lowbit.quantize(weight, quant_type=quant_type, blocksize=blocksize, double_quant=False)
    data, state = bnb.functional.quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type)
    assert torch.equal(ours.absmax, state.absmax)
    differs = lowbit.unpack(ours.qweight).view(-1) != lowbit.unpack(data.view(-1)).view(-1)
    if quant_type == "nf4" and dtype != torch.float32:
        assert not differs.any()
    x = (weight.double().view(-1, blocksize) / ours.absmax.double().unsqueeze(1)).view(-1)
    boundaries = lowbit.codebooks.thresholds(lowbit.codebook(quant_type), quant_type)[0]
    boundaries = boundaries.to(x).unsqueeze(0)
    distance = (x[differs].unsqueeze(1) - boundaries).abs() / boundaries.abs()
    assert (distance.amin(dim=1) <= 2.0**-22).all()  # two roundings on either side
    assert differs.float().mean() < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_values_on_a_gpu_are_bitsandbytes(dtype, nested):
    """The same packed weight reads back to the same bits."""
    weight = (torch.randn(512, 4096, device="cuda") * 0.02).to(dtype)
    data, state = bnb.functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=nested
    )
    wrapped = lowbit.QuantizedWeight.from_bnb(data, state)
    expected = bnb.functional.dequantize_4bit(data, state)
    assert torch.equal(wrapped.dequantize(), expected)
