"""The fused forward kernels of the CUDA library, each forced by name, against float64.

Weights, scales and adapters are those the kernels read, so quantization error plays no part. All of
it needs a GPU; a kernel that is not compiled for it skips with the reason.
"""

import pytest
import torch
from helpers import (
    assert_bitwise_equal,
    assert_close_to_float64,
    kernel_unavailable,
    zeros_of_many_sizes,
)

import lowbit
from lowbit import dispatch, reference

pytestmark = pytest.mark.gpu

# Each kernel with values of M in its range: the least, odd ones, tile edges and one beyond, many.
TOKENS = {
    "nf4_lora_gemv": (1,),
    "nf4_lora_matmul_small": (1, 2, 7, 8, 16, 17, 33, 64),
    "nf4_lora_matmul_mid": (65, 128, 200, 256, 257, 1000),
    "nf4_lora_matmul_large": (300, 2048, 2500),
    "nf4_lora_matmul_portable": (1, 8, 9, 17, 33, 128),
}
CASES = [(kernel, M) for kernel, values in TOKENS.items() for M in values]
# N, K: the least; N a multiple of 16 only; one row tile and a long K; a layer with K = 1280 (a
# vision tower); more row tiles than an H100 has SMs and a K that is an odd number of blocks; more
# tiles of few steps than the large kernel has at work at once.
LAYERS = [(16, 64), (208, 512), (128, 18944), (1280, 1280), (18944, 448), (8192, 128)]


@pytest.fixture(autouse=True)
def _gpu():
    if (why := dispatch.unavailable("cuda")) is not None:
        pytest.skip(f"the compiled CUDA backend is not there: {why}")


class _Case:
    """A layer and its input; options are those of lowbit.quantize and lowbit.lora_matmul."""

    def __init__(
        self, M, N, K, r=16, dtype=torch.bfloat16, *, bias=True, vector=False, dropout_p=0.0,
        scaling=1.7, **options,
    ):  # fmt: skip
        def randn(*shape):
            return torch.randn(shape, device="cuda")

        self.q = lowbit.quantize((randn(N, K) / K**0.5).to(dtype), **options)
        self.x = randn(M, K).to(dtype)
        self.lora_A = (randn(r, K) / K**0.5).to(dtype) if r else None
        self.lora_B = randn(N, r).to(dtype) if r else None
        self.bias = randn(N).to(dtype) if bias else None
        self.vector = torch.rand(r, device="cuda") + 0.5 if vector else None
        self.scaling, self.dropout_p = scaling, dropout_p
        self.seed = torch.tensor([1234567890123], device="cuda") if dropout_p else None

    def run(self, kernel):
        """(y, z), or (y, None) without an adapter."""
        if (why := kernel_unavailable(kernel)) is not None:
            pytest.skip(why)
        with dispatch.force(f"cuda:{kernel}"):
            if self.lora_A is None:
                return torch.ops.lowbit.linear(self.x, *self.q.args(), self.bias), None
            return torch.ops.lowbit.lora_linear(
                self.x, *self.q.args(), self.lora_A, self.lora_B, self.vector, self.scaling,
                self.bias, self.dropout_p, self.seed,
            )  # fmt: skip

    def formula(self, dtype):
        """reference.py in `dtype`; for 16 bits the weight is rounded to them first, as torch has
        it.
        """
        weight = reference.dequantize_4bit(*self.q.args(), torch.float64)
        weight = weight.to(self.x.dtype).to(dtype) if dtype != torch.float64 else weight
        x = self.x.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if self.lora_A is None:
            y = x @ weight.t()
            return (y if bias is None else y + bias), None
        return reference.lora_linear(
            x, weight, self.lora_A.to(dtype), self.lora_B.to(dtype), self.vector, self.scaling,
            bias, self.dropout_p, self.seed,
        )  # fmt: skip

    def check(self, kernel):
        for name, actual, exact, low in zip(
            "yz",
            self.run(kernel),
            self.formula(torch.float64),
            self.formula(self.x.dtype),
            strict=True,
        ):
            if exact is not None:
                assert_close_to_float64(name, actual, exact, low)

    def check_repeats(self, kernel, times):
        """The same bits each time."""
        y, z = self.run(kernel)
        for _ in range(times):
            again, z_again = self.run(kernel)
            assert_bitwise_equal(again, y, "y")
            if z is not None:
                assert_bitwise_equal(z_again, z, "z")


@pytest.mark.parametrize(("kernel", "M"), CASES)
@pytest.mark.parametrize(("N", "K"), LAYERS)
def test_layers_against_float64(kernel, M, N, K):
    _Case(M, N, K).check(kernel)


@pytest.mark.parametrize(("kernel", "M"), CASES)
@pytest.mark.parametrize("r", [0, 1, 8, 24, 32, 64])
def test_ranks_against_float64(kernel, M, r):
    """r = 0 is a layer without an adapter."""
    _Case(M, 320, 768, r, vector=r > 8).check(kernel)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("r", [17, 24, 50, 64])
@pytest.mark.parametrize("M", [1, 2, 16, 64])
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (272, 18944), (16, 192)])
def test_ranks_above_16_of_few_tokens(M, N, K, r, dtype, dropout_p):
    """Several steps and slices of z; the columns a lower rank has are the same bits. z of one
    token is added up in one order up to rank 16, 32 and 64."""
    kernel = "nf4_lora_gemv" if M == 1 else "nf4_lora_matmul_small"
    case = _Case(M, N, K, r, dtype, vector=r != 24, dropout_p=dropout_p)
    case.check(kernel)
    y, z = case.run(kernel)
    again, z_again = case.run(kernel)
    assert_bitwise_equal(again, y, "y")
    assert_bitwise_equal(z_again, z, "z")
    if dropout_p:
        return  # z is made by another kernel
    case.vector = None
    lower = 16 if M > 1 else 17 if r <= 32 else 33
    case.lora_A, case.lora_B = case.lora_A[:lower].contiguous(), case.lora_B[:, :lower].contiguous()
    assert_bitwise_equal(case.run(kernel)[1], z[:, :lower].contiguous(), f"z of rank {lower}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("r", [1, 16, 17, 40, 64])
@pytest.mark.parametrize(("N", "K"), [(18944, 448), (208, 18944), (16, 64)])
def test_z_of_one_token_from_the_kernel_and_given(N, K, r, dtype):
    """Rows of a CTA that each of its warps for z takes in one turn, in several, and none."""
    case = _Case(1, N, K, r, dtype, vector=r != 40)
    case.check("nf4_lora_gemv")
    z = case.run("nf4_lora_gemv")[1]
    with dispatch.force("cuda:nf4_lora_gemv"):
        y = torch.ops.lowbit.linear_low_rank(
            case.x, *case.q.args(), z, case.lora_B, case.vector, case.scaling, case.bias
        )
    exact, low = (case.formula(t)[0] for t in (torch.float64, dtype))
    assert_close_to_float64("y", y, exact, low)


# For the kernel of some hundred tokens, as an H100 divides them. First z by CTAs of the product's
# grid, by groups of 64, 128, 192 and 256 tokens, one or two of 64 to a warpgroup; two CTAs and one
# to a group, then one for two groups; a group without tokens. Then in front: eight, four, two CTAs,
# one for two groups; CTAs without a step; a single token in the last group.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("M", "N", "K", "r"),
    [
        (100, 4096, 2048, 50), (66, 4096, 4096, 17), (250, 4096, 4096, 64), (500, 4096, 4096, 1),
        (700, 4096, 2048, 48), (1000, 4096, 4096, 16), (1000, 4096, 4096, 24),
        (1100, 4096, 2048, 8), (1030, 4096, 4096, 64), (520, 4096, 4096, 40),
        (250, 8192, 192, 64), (257, 8208, 128, 24), (600, 8192, 192, 64), (513, 5392, 4096, 64),
        (1500, 272, 64, 64), (1500, 4096, 4096, 33), (2048, 4096, 64, 64), (4095, 1024, 1024, 64),
        (8000, 1536, 512, 24), (31000, 272, 128, 8),
    ],
)  # fmt: skip
def test_projections(M, N, K, r, dtype):
    case = _Case(M, N, K, r, dtype, vector=True)
    case.check("nf4_lora_matmul_mid")
    case.check_repeats("nf4_lora_matmul_mid", 3)


@pytest.mark.parametrize(("M", "r"), [(100, 64), (300, 16), (300, 64), (1000, 8)])
def test_lora_B_that_is_not_16_byte_aligned(M, r):
    """Single elements of lora_B are read instead of vectors, to the same bits."""
    case = _Case(M, 272, 768, r)
    y, _ = case.run("nf4_lora_matmul_mid")
    shifted = torch.empty(case.lora_B.numel() + 1, dtype=case.lora_B.dtype, device="cuda")[1:]
    case.lora_B = shifted.view_as(case.lora_B).copy_(case.lora_B)
    again, _ = case.run("nf4_lora_matmul_mid")
    assert_bitwise_equal(again, y, "y")


# For the large kernel: tiles of 1, 2, 3, 5, 7 and 17 steps of 64, some in one wave, others several
# for each cluster, which stores a part of one among the steps of the next; the last panel of 256
# rows with 16, 144 or 208 of them, the last tile of tokens full or short.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("M", "N", "K", "r"),
    [
        (4096, 144, 64, 5), (4096, 272, 192, 16), (9000, 1168, 128, 64), (5000, 2064, 192, 0),
        (4100, 4240, 320, 5), (4097, 4112, 448, 64), (8500, 2000, 64, 16), (2600, 2576, 1088, 0),
    ],
)  # fmt: skip
def test_tiles_of_few_steps(M, N, K, r, dtype):
    case = _Case(M, N, K, r, dtype)
    case.check("nf4_lora_matmul_large")
    case.check_repeats("nf4_lora_matmul_large", 3)


# On a card that holds 66 clusters the first wave makes only z, so no tile reads its chunks of W.
# They were decoded once, and now and then after those that had the same place in the ring.
@pytest.mark.parametrize(
    ("M", "N", "K", "r"), [(4096, 1024, 4096, 16), (2560, 3328, 8192, 64), (3500, 3584, 2048, 8)]
)
def test_a_first_wave_without_tiles(M, N, K, r):
    case = _Case(M, N, K, r)
    case.check("nf4_lora_matmul_large")
    case.check_repeats("nf4_lora_matmul_large", 10)


# Tiles of each of the mid kernel's shapes in 2, 3, 4, 6 and 8 level parts, behind whole tiles or
# alone, and in parts in a row, on a card of 132 SMs.
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [
        (65, 256, 1024), (65, 256, 2048), (65, 128, 3008), (65, 256, 4096), (65, 5632, 4096),
        (200, 5504, 1536), (200, 4224, 2048), (200, 2816, 3008), (200, 2304, 4096),
        (700, 5760, 2048), (200, 5632, 4096),
        (257, 2816, 1536), (257, 2688, 3008), (257, 1920, 4096), (512, 1152, 4096),
        (512, 896, 6144), (257, 4608, 4096),
    ],
)  # fmt: skip
def test_tiles_in_parts(M, N, K):
    case = _Case(M, N, K)
    case.check("nf4_lora_matmul_mid")
    scratch = torch.full((64 << 20,), 255, dtype=torch.uint8, device="cuda")
    del scratch
    case.check_repeats("nf4_lora_matmul_mid", 10)


OPTIONS = {
    "fp16": {"dtype": torch.float16},
    "fp32-absmax": {"double_quant": False},
    "fp16-fp32-absmax": {"dtype": torch.float16, "double_quant": False},
    "fp4": {"quant_type": "fp4"},
    "blocksize-128": {"blocksize": 128},
    "blocksize-512": {"blocksize": 512},
    "nested-blocksize-64": {"nested_blocksize": 64},
    "flat": {"layout": "flat"},
    "no-bias": {"bias": False},
    "dropout": {"dropout_p": 0.25},
    "dropout-vector": {"dropout_p": 0.25, "vector": True},
    "scaling-0": {"scaling": 0.0},
}


@pytest.mark.parametrize(("kernel", "M"), CASES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_against_float64(kernel, M, options):
    _Case(M, 272, 1536, **options).check(kernel)


@pytest.mark.parametrize(("kernel", "M"), CASES)
def test_one_hot_rows_read_the_weight(kernel, M):
    """x = e_k gives column k of the weight: every element in its place.

    A kernel may round codebook value, scale and their product to 16 bits before y: four times 2^-8.
    """
    N, K = 144, 512
    case = _Case(M, N, K, r=0, bias=False)
    weight = reference.dequantize_4bit(*case.q.args(), torch.float32)
    for first in range(0, K, M):
        k = (first + torch.arange(M, device="cuda")) % K
        case.x = torch.nn.functional.one_hot(k, K).to(torch.bfloat16)
        y, _ = case.run(kernel)
        torch.testing.assert_close(y.float(), weight[:, k].t(), rtol=2**-6, atol=0)


@pytest.mark.parametrize(("kernel", "M"), CASES)
def test_results_repeat_bit_for_bit(kernel, M):
    """Also on another stream, and after other work has used the same memory."""
    case = _Case(M, 1024, 4096)
    y, z = case.run(kernel)
    for _ in range(5):
        scratch = torch.full((8 << 20,), 255, dtype=torch.uint8, device="cuda")
        del scratch
        again, z_again = case.run(kernel)
        assert_bitwise_equal(again, y, "y")
        assert_bitwise_equal(z_again, z, "z")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other, _ = case.run(kernel)
    torch.cuda.current_stream().wait_stream(stream)
    assert_bitwise_equal(other, y, "y on a side stream")


@pytest.mark.parametrize(("kernel", "M"), CASES)
def test_inputs_written_by_the_kernel_before(kernel, M):
    """A kernel may start before its predecessor has ended; it must not read too early.

    A chain of layers, each reading what the one before wrote, against the same chain with a
    synchronization after every step.
    """
    cases = [_Case(M, 512, 512) for _ in range(6)]

    def chain(wait):
        x = cases[0].x
        for _ in range(4):
            for case in cases:
                case.x = x
                x = case.run(kernel)[0] * 0.5
                if wait:
                    torch.cuda.synchronize()
        return x

    start = cases[0].x
    expected = chain(wait=True)
    for _ in range(3):
        cases[0].x = start
        assert_bitwise_equal(chain(wait=False), expected, "y")


@pytest.mark.parametrize(("M", "N"), [(65, 4096), (128, 1024), (256, 4096), (600, 2048)])
def test_reads_in_time_what_the_kernel_before_writes(M, N):
    """What CTAs of the kernel for some hundred tokens wait for is told by marks, the same ones in
    all runs of a graph: behind a long kernel, right behind each other, and behind the run before.
    """
    kernel = "nf4_lora_matmul_mid"
    cases = [_Case(M, N, N) for _ in range(3)]
    x, given = cases[0].x, torch.randn(20, M, N, device="cuda").to(cases[0].x.dtype)
    expected, eager, replayed = (torch.empty_like(given) for _ in range(3))

    def chain(wait=False):
        result = x
        for case in cases:
            case.x = result
            result, _ = case.run(kernel)
            if wait:
                torch.cuda.synchronize()
        return result

    for i in range(len(given)):
        x.copy_(given[i])
        torch.cuda.synchronize()
        expected[i] = chain(wait=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain()
    for i in range(len(given)):
        torch.cuda._sleep(200_000)
        x.copy_(given[i])
        eager[i] = chain()
    for i in range(len(given)):
        x.copy_(given[i])
        graph.replay()
        replayed[i].copy_(y)
    for _ in range(20):
        graph.replay()
    assert_bitwise_equal(eager, expected, "y of eager calls")
    assert_bitwise_equal(replayed, expected, "y of a graph")
    assert_bitwise_equal(y, expected[-1], "y of a graph without a pause")


# z by CTAs of the grid, with tiles in level parts, in a row and whole; in front; and no adapter.
# The last two have their words in the same places: eight parts, of which four own tokens, leave
# some set that the next call's four ask for.
DIVISIONS = [
    (256, 4096, 4096, 16), (129, 5248, 1536, 64), (300, 528, 704, 5), (100, 1280, 4096, 64),
    (256, 4096, 4096, 0), (65, 256, 4096, 16), (128, 2048, 4096, 0), (128, 4096, 4096, 0),
]  # fmt: skip


def test_calls_of_different_divisions_in_one_workspace():
    """Where one call has its marks another one has sums or z. Marks of a graph's run before, which
    are those of this run, must be gone: no sums and no z of it are taken."""
    kernel = "nf4_lora_matmul_mid"
    cases = [_Case(*shape) for shape in DIVISIONS]
    given = [[case.x, case.x.flip(0).contiguous()] for case in cases]
    places = [case.x.clone() for case in cases]
    expected = [[], []]
    for case, of_case in zip(cases, given, strict=True):
        for turn in range(2):
            case.x = of_case[turn]
            expected[turn].append(case.run(kernel))
            torch.cuda.synchronize()
    for case, place in zip(cases, places, strict=True):
        case.x = place
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = [case.run(kernel) for case in cases]
    for i in range(20):
        for place, of_case in zip(places, given, strict=True):
            place.copy_(of_case[i % 2])
        graph.replay()
        for results in (recorded, [case.run(kernel) for case in cases]):
            for shape, (y, z), (y0, z0) in zip(DIVISIONS, results, expected[i % 2], strict=True):
                assert_bitwise_equal(y, y0, f"y of {shape}")
                if z0 is not None:
                    assert_bitwise_equal(z, z0, f"z of {shape}")


@pytest.mark.parametrize(("kernel", "M"), [(k, values[-1]) for k, values in TOKENS.items()])
def test_a_cuda_graph_replays_with_new_inputs(kernel, M):
    case = _Case(M, 512, 1024)
    case.run(kernel)
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        y, z = case.run(kernel)
    later = zeros_of_many_sizes(stream)
    for _ in range(3):
        case.x.copy_(torch.randn_like(case.x))
        graph.replay()
        expected = case.run(kernel)
        assert_bitwise_equal(y, expected[0], "y")
        assert_bitwise_equal(z, expected[1], "z")
    assert not any(tensor.any() for tensor in later), "a workspace is not the graph's own"


@pytest.mark.parametrize(("kernel", "M"), [(k, values[-1]) for k, values in TOKENS.items()])
def test_two_streams_at_once(kernel, M):
    """The kernels of two streams may share the card; neither may wait for the other's CTAs."""
    cases = [_Case(M, 2048, 2048) for _ in range(2)]
    expected = [case.run(kernel)[0] for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    results = [[], []]
    for _ in range(10):
        for case, stream, out in zip(cases, streams, results, strict=True):
            with torch.cuda.stream(stream):
                out.append(case.run(kernel)[0])
    torch.cuda.synchronize()
    for out, y in zip(results, expected, strict=True):
        for result in out:
            assert_bitwise_equal(result, y, "y")


@pytest.mark.parametrize(("kernel", "M"), CASES)
def test_views_that_are_not_16_byte_aligned(kernel, M):
    case = _Case(M, 128, 256)
    y, _ = case.run(kernel)
    storage = torch.empty(M * 256 + 1, dtype=case.x.dtype, device="cuda")
    case.x = storage[1:].view(M, 256).copy_(case.x)
    assert case.x.data_ptr() % 16 != 0
    assert_bitwise_equal(case.run(kernel)[0], y, "y")
    shifted = torch.empty(case.q.qweight.numel() + 1, dtype=torch.uint8, device="cuda")
    case.q.qweight = shifted[1:].view_as(case.q.qweight).copy_(case.q.qweight)
    assert_bitwise_equal(case.run(kernel)[0], case.run("panels")[0], "y by panels")


@pytest.mark.parametrize("M", [1, 4, 64, 256, 1024, 4096])
def test_memory_of_a_call(M):
    """Output, z and at most 32 MiB, whatever the weight."""
    case = _Case(M, 14336, 4096)

    def call():
        return lowbit.lora_matmul(
            case.x, case.q, case.lora_A, case.lora_B, case.scaling, bias=case.bias
        )

    with torch.no_grad():
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = call()
    extra = torch.cuda.max_memory_allocated() - before - y.numel() * y.element_size()
    assert extra <= (32 << 20) + 2 * M * 16 + (2 << 20)
    del y
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("M", [1, 5, 64, 300, 2100])
def test_compiled_model_gives_the_same(M):
    case = _Case(M, 512, 512)

    def layer(x):
        y = lowbit.lora_matmul(x, case.q, case.lora_A, case.lora_B, 1.7, bias=case.bias)
        return torch.relu(y)

    with torch.no_grad():
        expected = layer(case.x)
        assert_bitwise_equal(torch.compile(layer, fullgraph=True)(case.x), expected, "y")


def test_the_table_has_a_kernel_for_every_m():
    device = torch.device("cuda")
    layer = dispatch.Layer(4096, 4096, 64, True, 16)
    many = (65, 1024, 4096, 100_000) if kernel_unavailable("nf4_lora_matmul_mid") is None else ()
    for M in (1, 2, 64, *many):
        row = dispatch.choose("lora_linear", device, torch.bfloat16, M, layer)
        assert row.kernel != "panels", f"M = {M}"
    ragged = dispatch.Layer(4096, 3420, 64, True, 16)
    assert dispatch.choose("lora_linear", device, torch.bfloat16, 1, ragged).kernel == "panels"
    assert dispatch.choose("lora_linear", device, torch.float32, 1, layer).kernel == "panels"


@pytest.mark.parametrize("kernel", TOKENS)
def test_what_a_kernel_does_not_serve_is_refused(kernel):
    case = _Case(TOKENS[kernel][0], 128, 96)
    with pytest.raises(RuntimeError, match=f"kernel '{kernel}' was forced but does not serve"):
        case.run(kernel)
    op = getattr(torch.ops.lowbit_cuda, kernel)
    weight = lowbit.quantize(torch.randn(128, 96, device="cuda", dtype=torch.bfloat16)).args()
    with pytest.raises(RuntimeError, match="does not serve these sizes"):
        op(case.x, *weight, None, None, None, 1.0, None, None, None)


def test_one_token_of_a_weight_without_columns_is_refused():
    """lowbit.quantize makes none; the operator may be given one, and steps of 0 divide nothing."""
    if (why := kernel_unavailable("nf4_lora_gemv")) is not None:
        pytest.skip(why)
    x = torch.empty(1, 0, device="cuda", dtype=torch.bfloat16)
    qweight = torch.empty(16, 0, device="cuda", dtype=torch.uint8)
    absmax = torch.empty(0, device="cuda")
    codebook = lowbit.codebook("nf4").cuda()
    weight = (qweight, absmax, codebook, None, None, None, 16, 0, 64, 256, True)
    with pytest.raises(RuntimeError, match="nf4_lora_gemv does not serve these sizes"):
        torch.ops.lowbit_cuda.nf4_lora_gemv(x, *weight, None, None, None, 1.0, None, None, None)
