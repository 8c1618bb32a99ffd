"""The compiled CUDA kernels: quantize and dequantize, bit for bit as the reference on the CPU.

One exception: the offset of a double quantization is a mean, whose last bits depend on the order of
summation. It is compared with the rounded fp64 mean, and the codes with those that the reference
gives from that same offset.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_bitwise_equal

import lowbit
from lowbit import codebooks, dispatch, reference
from lowbit.backends import cuda

_why = dispatch.unavailable("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_why is not None, reason=f"the compiled CUDA backend is not there: {_why}"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INFINITY = float("inf")
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]

# Rows x columns, and why.
SHAPES = [
    (1, 64),  # one block
    (3, 256),  # whole blocks
    (5, 100),  # short last block; K is a multiple of 4 only: dequantize to 16 bits goes by scalars
    (7, 65),  # odd K: rows start inside a byte of the flat layout; last block of one element
    (2, 31),  # below one block
    (4, 1),  # below one byte
    (16, 72),  # K % 8 == 0 but not 64: vector kernels with rows
    (9, 3420),  # Qwen2.5-VL's vision tower; flat it is a multiple of 4 only
    (16, 3420),  # flat, a multiple of 64
    (33, 512),  # a partial CTA
    (1000, 1024),  # several steps of every CTA of a small grid
    (0, 64),  # nothing at all
    (3, 0),
]


def _shape_id(shape):
    return f"N{shape[0]}-K{shape[1]}"


def _dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


def _rule(quant_type):
    return codebooks.thresholds(lowbit.codebook(quant_type), quant_type)


def _to_cuda(values):
    return tuple(v.cuda() if isinstance(v, torch.Tensor) else v for v in values)


def _random_weight(shape, dtype):
    weight = (torch.randn(shape) * 0.02).to(dtype)
    weight[shape[0] // 2 :][:1] = 0  # a row of zero blocks
    return weight


def _quantize(weight, rule, nested=None, blocksize=64, nested_blocksize=256, rows=True):
    arguments = (weight, *rule, _table(nested), blocksize, nested_blocksize, rows)
    return cuda.quantize_4bit(*_to_cuda(arguments))


def _table(nested):
    return lowbit.nested_codebook(nested) if isinstance(nested, str) else nested


def _check_quantize(weight, rule, nested=None, blocksize=64, nested_blocksize=256, rows=True):
    actual = _quantize(weight, rule, nested, blocksize, nested_blocksize, rows)
    qweight, absmax = reference.quantize_4bit(weight, *rule, blocksize, rows)
    assert_bitwise_equal(actual[0], qweight, "qweight")
    if nested is None:
        assert_bitwise_equal(actual[1], absmax, "absmax")
        assert actual[2].shape == actual[3].shape == (0,)
    elif absmax.numel() == 0:
        assert actual[1].numel() == actual[2].numel() == 0
        assert actual[3].item() == 0.0
    else:
        offset = actual[3].cpu()
        assert_bitwise_equal(offset, absmax.double().mean().float(), "nested_offset")
        codes, nested_absmax = _nested_codes(absmax, offset, _table(nested), nested_blocksize)
        assert_bitwise_equal(actual[1], codes, "absmax")
        assert_bitwise_equal(actual[2], nested_absmax, "nested_absmax")
    return actual


def _nested_codes(absmax, offset, table, nested_blocksize):
    """reference.quantize_absmax after the mean."""
    centred = F.pad(absmax - offset, (0, -absmax.numel() % nested_blocksize))
    centred = centred.view(-1, nested_blocksize)
    nested_absmax = centred.abs().amax(dim=-1)
    scaled = centred * (1.0 / nested_absmax.clamp(min=reference.ABSMAX_FLOOR)).unsqueeze(-1)
    codes = torch.bucketize(scaled, codebooks.nested_thresholds(table)).to(torch.uint8)
    return codes.view(-1)[: absmax.numel()], nested_absmax


# ---- quantize ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=_dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=_shape_id)
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "flat"])
@pytest.mark.parametrize("nested", [None, "dynamic", "fp8"])
def test_quantize_equals_the_reference(shape, dtype, rows, nested):
    _check_quantize(_random_weight(shape, dtype), _rule("nf4"), nested, rows=rows)


@pytest.mark.parametrize("quant_type", codebooks.NAMES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("K", [8192, 8296, 8292, 8290, 8291], ids=lambda K: f"K{K}")
def test_every_blocksize_and_format(quant_type, blocksize, K):
    """K: whole blocks; short last block in steps of 8, of 4, of 2; an odd one."""
    weight = torch.randn(3, K).bfloat16()
    _check_quantize(weight, _rule(quant_type), blocksize=blocksize, nested_blocksize=32)


@pytest.mark.parametrize("dtype", DTYPES, ids=_dtype_id)
@pytest.mark.parametrize("K", [4104, 3420, 3421], ids=lambda K: f"K{K}")
def test_many_rows_of_ragged_blocks(K, dtype):
    """More of them than the device takes at once, from an aligned start and from others."""
    for start in (0, 4, 2, 1):
        storage = torch.randn(1500 * K + start).to(dtype)
        weight = storage[start:].view(1500, K)
        qweight, absmax = reference.quantize_4bit(weight, *_rule("nf4"), 64, True)
        view = storage.cuda()[start:].view(1500, K)
        actual = cuda.quantize_4bit(view, *_to_cuda(_rule("nf4")), None, 64, 256, True)
        assert_bitwise_equal(actual[0], qweight, f"qweight from {start}")
        assert_bitwise_equal(actual[1], absmax, f"absmax from {start}")


@pytest.mark.parametrize("nested_blocksize", [32, 256, 512, 4096])
@pytest.mark.parametrize("nested", ["dynamic", "fp8"])
def test_every_nested_blocksize(nested, nested_blocksize):
    """Scales of very different size: codes from the whole 8-bit table, a short last block."""
    weight = torch.randn(9, 32000) * torch.logspace(-6, 2, 9).unsqueeze(1)
    _check_quantize(weight, _rule("nf4"), nested, 32, nested_blocksize)


@pytest.mark.parametrize("shape", [(64, 1024), (2048, 4096)], ids=_shape_id)
def test_any_nested_codebook(shape):
    """Repeated values, and values too close for one lookup per code, in either kernel."""
    steps = [
        torch.linspace(-1, -0.3, 60),
        torch.linspace(0.1, 0.105, 56),
        torch.linspace(0.3, 1, 80),
    ]
    table = torch.cat([*steps, torch.full((40,), -0.25), torch.zeros(20)]).sort()[0]
    _check_quantize(_random_weight(shape, torch.bfloat16), _rule("nf4"), table)


# Unsorted; repeated values and both zeros; values too close for one compare per element.
CUSTOM = {
    "unsorted": [0.3, -1, 0, 1, -0.5, 0.5, 0.2, -0.25, 0.8, -0.8, 0.1, -0.1, 0.9, -0.9, 0.6, -0.7],
    "repeated": [0, 1, 1, 1, -0.5, -0.5, 0.2, 0.2, 0.2, -1, -1, -0.0, 0, 0.7, 0.7, 0.7],
    "close": [0, 1, -1, 1e-3, 2e-3, 3e-3, 0.5, 0.501, -0.5, -0.501, .9, .901, 0.2, -0.2, 0.8, 0.7],
}  # fmt: skip


@pytest.mark.parametrize("columns", [64, 63], ids=["eights", "pairs"])
@pytest.mark.parametrize("name", [*codebooks.NAMES, *CUSTOM])
def test_values_on_and_beside_every_threshold(name, columns):
    """A threshold itself takes the lower rank, the next float the upper. absmax 1 makes x = w."""
    rule = codebooks.thresholds(torch.tensor(CUSTOM[name])) if name in CUSTOM else _rule(name)
    thresholds, one = rule[0], torch.ones(1)
    above, below = (torch.nextafter(thresholds, one * end) for end in (INFINITY, -INFINITY))
    weight = torch.cat([thresholds, above, below, one, -one, one * 0, -one * 0]).clamp(-1, 1)
    weight = torch.cat([weight, one.repeat(64 - weight.numel())])[:columns].view(1, -1)
    _check_quantize(weight.contiguous(), rule)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=_dtype_id)
def test_every_finite_16_bit_weight(dtype, quant_type):
    """All bit patterns, in order (blocks of like magnitude, or all subnormal) and shuffled."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    patterns = patterns[patterns.isfinite()]
    for weight in (patterns, patterns[torch.randperm(patterns.numel())]):
        _check_quantize(weight.view(1, -1), _rule(quant_type))


@pytest.mark.parametrize("scale", [2.0**-149, 1e-39, 1e-38, 2e-38, 1e37, 8e37])
def test_extreme_scales(scale):
    """Reciprocals at both ends of fp32, where the fast instruction sequence does not hold."""
    _check_quantize(torch.randn(16, 256).clamp(-4, 4) * scale, _rule("nf4"))


@pytest.mark.parametrize("blocksize", [64, 1024], ids=lambda b: f"bs{b}")
@pytest.mark.parametrize("dtype", DTYPES, ids=_dtype_id)
@pytest.mark.parametrize("value", [float("nan"), INFINITY, -INFINITY], ids=["nan", "inf", "-inf"])
def test_nan_and_inf_reach_absmax(dtype, value, blocksize):
    weight = torch.randn(2, 2048 + 7).to(dtype)
    clean = _quantize(weight, _rule("nf4"), blocksize=blocksize)[1].view(2, -1).cpu()
    for column in (0, 37, blocksize - 1, 2048, 2054):
        broken = weight.clone()
        broken[1, column] = value
        absmax = _quantize(broken, _rule("nf4"), blocksize=blocksize)[1].view(2, -1).cpu()
        hit = torch.zeros(absmax.shape, dtype=torch.bool)
        hit[1, column // blocksize] = True
        assert torch.equal(~absmax.isfinite(), hit), column
        assert torch.equal(absmax.isnan(), hit & (value != value)), column
        assert torch.equal(absmax[~hit], clean[~hit])
        offset = _quantize(broken, _rule("nf4"), "dynamic", blocksize)[3]
        assert not offset.isfinite(), column


def test_the_public_error_names_the_first_bad_weight():
    weight = torch.randn(8, 128, device="cuda", dtype=torch.bfloat16)
    weight[5, 77] = float("nan")
    with pytest.raises(ValueError, match=r"1 NaN or Inf value of 1024, the first at \(5, 77\)"):
        lowbit.quantize(weight)


def test_views_that_start_anywhere():
    """A weight that is not 16-byte aligned takes the pairwise path."""
    base = torch.randn(64 * 256 + 1).bfloat16().cuda()
    weight = base[1:].view(64, 256)
    out = cuda.quantize_4bit(weight, *_to_cuda(_rule("nf4")), None, 64, 256, True)
    expected = reference.quantize_4bit(weight.cpu(), *_rule("nf4"), 64, True)
    for name, a, e in zip(("qweight", "absmax"), out, expected, strict=False):
        assert_bitwise_equal(a, e, name)


def test_double_quantization_is_deterministic():
    weight = torch.randn(4096, 4096).bfloat16()
    first = _check_quantize(weight, _rule("nf4"), "dynamic")
    for _ in range(3):
        for a, b in zip(first, _quantize(weight, _rule("nf4"), "dynamic"), strict=True):
            assert_bitwise_equal(a, b)


# ---- dequantize ----------------------------------------------------------------------------------


def _stored(shape, quant_type, blocksize, nested, rows, dtype=torch.float32):
    """WEIGHT arguments on the CPU, from the reference."""
    weight, (N, K) = _random_weight(shape, dtype), shape
    qweight, absmax = reference.quantize_4bit(weight, *_rule(quant_type), blocksize, rows)
    rest = (None, None, None)
    if nested:
        table = lowbit.nested_codebook()
        absmax, nested_absmax, offset = reference.quantize_absmax(absmax, table, 256)
        rest = (nested_absmax, table, offset)
    return (qweight, absmax, lowbit.codebook(quant_type), *rest, N, K, blocksize, 256, rows)


def _check_dequantize(args, windows=()):
    on_gpu, (N, K) = _to_cuda(args), args[6:8]
    for dtype in DTYPES:
        expected = reference.dequantize_4bit(*args, dtype)
        assert_bitwise_equal(cuda.dequantize_4bit(*on_gpu, dtype), expected, f"W in {dtype}")
        for row0, rows, column0, columns in windows:
            if rows <= 0 or columns <= 0 or row0 + rows > N or column0 + columns > K:
                continue
            # The frame around `out` would show a store outside of it.
            frame = torch.full((rows * columns + 128,), 7.0, dtype=dtype, device="cuda")
            out = frame[64:-64].view(rows, columns)
            torch.ops.lowbit_cuda.dequantize_4bit_out(*on_gpu, row0, out, column0)
            part = expected[row0 : row0 + rows, column0 : column0 + columns]
            assert_bitwise_equal(out, part, f"W[{row0}:+{rows}, {column0}:+{columns}] in {dtype}")
            assert (frame[:64] == 7).all()
            assert (frame[-64:] == 7).all()


@pytest.mark.parametrize("shape", SHAPES, ids=_shape_id)
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "flat"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantize_equals_the_reference(shape, rows, nested, quant_type):
    N, K = shape
    windows = [
        (0, 1, 0, K),  # first row
        (N // 2, N - N // 2, 0, K),  # a panel of rows
        (0, N, K // 64 // 2 * 64, 64),  # a panel of columns, aligned
        (0, N, 8, K - K % 8 - 8),  # aligned to a vector
        (0, N, 4, K - K % 4 - 4),  # to half of one
        (N // 3, 1, 3, K - 5),  # starts at an odd code
    ]
    _check_dequantize(_stored(shape, quant_type, 64, nested, rows), windows)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("K", [8192, 8256, 8296, 8292, 8290], ids=lambda K: f"K{K}")
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_dequantize_every_blocksize(blocksize, K, nested):
    """K: whole blocks up to 4096; a ragged multiple of 64; of 8; of 4; of 2."""
    windows = [(1, 2, 0, K), (0, 3, 4096, 4096), (0, 3, 64, K - 64)]
    _check_dequantize(_stored((3, K), "nf4", blocksize, nested, True), windows)


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
def test_dequantize_every_rounding(blocksize):
    """Scales and codebooks of random bits: ties, subnormals, overflow to Inf, both signs."""
    N, K = 16, 4096

    def random_floats(*shape):
        bits = torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)
        values = bits.view(torch.float32)
        return torch.where(values.isfinite(), values, 1.0)

    for _ in range(8):
        qweight = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
        absmax, table = random_floats(N * K // blocksize), random_floats(16)
        for codebook in (table, torch.rand(16) * 2 - 1):
            for scale in (absmax, torch.randn_like(absmax) * 100):
                _check_dequantize(
                    (qweight, scale, codebook, None, None, None, N, K, blocksize, 256, True)
                )


def test_a_non_finite_scale_stays_visible():
    """NaN comes out as NaN, Inf as Inf, and 0 * Inf as NaN. A NaN's payload is not promised."""
    qweight = torch.arange(256, dtype=torch.uint8).view(1, 256)
    absmax = torch.tensor([float("nan"), INFINITY, -INFINITY, 1.0]).repeat(2)
    args = (qweight, absmax, lowbit.codebook("nf4"), None, None, None, 1, 512, 64, 256, True)
    for dtype in DTYPES:
        expected = reference.dequantize_4bit(*args, dtype)
        actual = cuda.dequantize_4bit(*_to_cuda(args), dtype).cpu()
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_unaligned_storage():
    """qweight, codebook and out at odd addresses leave the fast paths, not the right answer."""
    args = list(_stored((8, 256), "nf4", 64, False, True))
    on_gpu = list(_to_cuda(args))
    for index in (0, 2):
        flat = on_gpu[index].reshape(-1)
        on_gpu[index] = torch.cat([flat[:1], flat])[1:].view(args[index].shape)
    expected = reference.dequantize_4bit(*args, torch.bfloat16)
    assert_bitwise_equal(cuda.dequantize_4bit(*on_gpu, torch.bfloat16), expected, "W")
    out = torch.empty(8 * 256 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(8, 256)
    torch.ops.lowbit_cuda.dequantize_4bit_out(*_to_cuda(args), 0, out)
    assert_bitwise_equal(out, expected, "W")


def test_a_dense_weight_is_only_cast():
    weight = torch.randn(3, 5, device="cuda")
    args = (weight, None, None, None, None, None, 3, 5, 64, 256, True)
    assert_bitwise_equal(cuda.dequantize_4bit(*args, torch.bfloat16), weight.bfloat16(), "W")


def test_operators_refuse_what_would_read_out_of_bounds():
    args = list(_to_cuda(_stored((8, 256), "nf4", 64, False, True)))
    out = torch.empty(4, 256, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(RuntimeError, match="window must lie within"):
        torch.ops.lowbit_cuda.dequantize_4bit_out(*args, 5, out)
    short = [*args[:1], args[1][:-1], *args[2:]]
    with pytest.raises(RuntimeError, match="absmax must have 32 elements, got 31"):
        cuda.dequantize_4bit(*short, torch.bfloat16)
    with pytest.raises(RuntimeError, match="blocksize must be a power of two from 32 to 4096"):
        cuda.dequantize_4bit(*args[:8], 48, *args[9:], torch.bfloat16)


# ---- streams, devices, graphs, sizes -------------------------------------------------------------


def test_side_stream_sees_its_own_order():
    """The launch must follow a slow producer on the same side stream."""
    weight = torch.randn(2048, 4096).bfloat16()
    expected = reference.quantize_4bit(weight, *_rule("nf4"), 64, True)[0]
    rule, source = _to_cuda(_rule("nf4")), weight.cuda()
    target = torch.zeros_like(source)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        target.copy_(source)
        qweight, absmax, *_ = cuda.quantize_4bit(target, *rule, None, 64, 256, True)
        args = (qweight, absmax, lowbit.codebook("nf4").cuda(), None, None, None)
        back = cuda.dequantize_4bit(*args, 2048, 4096, 64, 256, True, torch.bfloat16)
    stream.synchronize()
    assert_bitwise_equal(qweight, expected, "qweight")
    cpu = [a if a is None else a.cpu() for a in args]
    again = reference.dequantize_4bit(*cpu, 2048, 4096, 64, 256, True, torch.bfloat16)
    assert_bitwise_equal(back, again, "W")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_current():
    weight = torch.randn(256, 512).bfloat16()
    with torch.cuda.device(0):
        q = lowbit.quantize(weight.to("cuda:1"))
        x = torch.randn(4, 512, dtype=torch.bfloat16, device="cuda:1")
        y = lowbit.matmul(x, q)
        assert torch.cuda.current_device() == 0
    assert q.device == y.device == torch.device("cuda:1")
    assert_bitwise_equal(
        q.qweight, reference.quantize_4bit(weight, *_rule("nf4"), 64)[0], "qweight"
    )


def _capture(call):
    """Warm up on a side stream, then capture: (graph, outputs)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


def test_a_graph_captures_quantize_and_dequantize():
    """Double quantization is a cooperative launch; a replay must meet its grid barrier again."""
    weight = torch.zeros(512, 4096, dtype=torch.bfloat16, device="cuda")
    rule = (*_to_cuda(_rule("nf4")), lowbit.nested_codebook().cuda(), 64, 256, True)
    codebook = lowbit.codebook("nf4").cuda()

    def call():
        qweight, absmax, nested_absmax, offset = cuda.quantize_4bit(weight, *rule)
        stored = (
            qweight,
            absmax,
            codebook,
            nested_absmax,
            rule[2],
            offset,
            512,
            4096,
            64,
            256,
            True,
        )
        return cuda.dequantize_4bit(*stored, torch.bfloat16)

    graph, out = _capture(call)
    for _ in range(2):
        weight.normal_()
        graph.replay()
        assert_bitwise_equal(out, call(), "W")


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_a_graph_captures_lora_linear(dropout_p, monkeypatch):
    monkeypatch.setattr(cuda, "PANEL_BYTES", 256 * 512 * 2)  # several panels
    q = lowbit.quantize(torch.randn(1024, 512, device="cuda").bfloat16())
    x, lora_A, lora_B = (
        torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
        for shape in ((64, 512), (8, 512), (1024, 8))
    )
    seed = torch.tensor([7], device="cuda")

    def call():
        return cuda.lora_linear(x, *q.args(), lora_A, lora_B, None, 2.0, None, dropout_p, seed)

    graph, (y, _) = _capture(call)
    for tensor in (x, lora_A, lora_B):
        tensor.normal_()
    graph.replay()
    assert_bitwise_equal(y, call()[0], "y")


@pytest.mark.slow
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "flat"])
def test_more_than_2_to_the_31_elements(rows):
    """Only the last rows hold anything but zeros."""
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("needs 14 GiB of free GPU memory")
    N, K = 2**19 + 8, 4096
    weight = torch.zeros(N, K, dtype=torch.bfloat16, device="cuda")
    tail = torch.randn(4, K).bfloat16()
    weight[-4:] = tail.cuda()
    table = lowbit.nested_codebook().cuda()
    qweight, absmax, *_ = cuda.quantize_4bit(weight, *_to_cuda(_rule("nf4")), None, 64, 256, rows)
    expected = reference.quantize_4bit(tail, *_rule("nf4"), 64, True)
    assert_bitwise_equal(qweight.view(N, -1)[-4:], expected[0], "qweight")
    assert_bitwise_equal(absmax[-4 * 64 :], expected[1], "absmax")
    del qweight, absmax
    qweight, absmax, nested_absmax, offset = cuda.quantize_4bit(
        weight, *_to_cuda(_rule("nf4")), table, 64, 256, rows
    )
    del weight
    nested = (nested_absmax, table, offset, N, K, 64, 256, rows)
    args = (qweight, absmax, lowbit.codebook("nf4").cuda(), *nested)
    back = cuda.dequantize_4bit(*args, torch.bfloat16)
    scale = reference.decode_absmax(absmax[-256:], nested_absmax[-1:], table, offset, 256).cpu()
    stored = (expected[0], scale, lowbit.codebook("nf4"), None, None, None, 4, K, 64, 256, True)
    assert_bitwise_equal(back[-4:], reference.dequantize_4bit(*stored, torch.bfloat16), "W")
    assert not back[: N - 4 : 4099].any()
