"""The fused backward pass of the CUDA library against float64.

Weights, scales and adapters are those the kernels read, so quantization error plays no part. All of
it needs a card the kernels are compiled for; a GPU they do not serve skips with the reason.
"""

import concurrent.futures
import functools

import beside_dx
import pytest
import torch
from grouping import arguments, gradients, leaves_of, make_member, separate
from helpers import assert_bitwise_equal, assert_close_to_float64, zeros_of_many_sizes
from layer_case import GRADIENTS, LayerCase

import lowbit
from lowbit import dispatch, reference
from lowbit.backends import cuda

pytestmark = pytest.mark.gpu

KERNEL, LARGE = dispatch.BACKWARD_KERNELS
BF16 = torch.bfloat16
# One row; below and at a tile of tokens and beyond; odd numbers of clusters; several rounds.
TOKENS = (1, 64, 65, 200, 257, 1030)
# N, K: the least; N a multiple of 8 only; an odd number of blocks per row; the last tile of columns
# half full; more tiles than an H100 has clusters, so that some are split along N; many tiles of few
# steps.
LAYERS = [(8, 64), (400, 192), (1040, 1088), (1096, 9216), (72, 8704)]
ALL = (True,) * 5
# But for a scaling vector's: then one launch reads dy and x.
ONE_LAUNCH = (True, True, True, True, False)
both_ways = pytest.mark.parametrize("needs", [ALL, ONE_LAUNCH], ids=["all", "one-launch"])


@functools.cache
def _why_not() -> str | None:
    if (why := dispatch.unavailable("cuda")) is not None:
        return f"the compiled CUDA backend is not there: {why}"
    capability = torch.cuda.get_device_capability()
    served = {row.newest for row in dispatch.TABLE if row.kernel in dispatch.BACKWARD_KERNELS}
    if capability not in served:
        return f"the kernels are compiled for {sorted(served)}, this card is {capability}"
    return None


@pytest.fixture(autouse=True)
def _gpu():
    if (why := _why_not()) is not None:
        pytest.skip(why)


@pytest.fixture(params=dispatch.BACKWARD_KERNELS, ids=("in-loop", "large"))
def kernel(request):
    return request.param


def _case(M, N, K, r=16, dtype=BF16, **options):
    return LayerCase((M, N, K, r), dtype, "cuda", **options)


def _z(case):
    """z by the formula: the forward kernels have their own tests."""
    dropped = reference.dropout(case.x, case.dropout_p, case.seed) if case.dropout_p else case.x
    return dropped @ case.lora_A.to(case.dtype).t()


def _check(case, kernel, *needs):
    """Each of `needs`, or else ALL and ONE_LAUNCH."""
    z = _z(case)
    exact, low = case.formulas(torch.float64), case.formulas(case.dtype)
    for needed in needs or (ALL, ONE_LAUNCH):
        actual = case.backward(z, needed, kernel=kernel)
        rows = zip(GRADIENTS, needed, actual, exact[2:], low[2:], strict=True)
        for name, need, a, e, plain in rows:
            if need:
                assert_close_to_float64(name, a, e, plain, 3.0)
            else:
                assert a is None
        if needed[1]:
            assert actual[1].dtype == case.lora_A.dtype
        if needed[2]:
            assert actual[2].dtype == case.lora_B.dtype


def _same(actual, expected, names=GRADIENTS):
    for name, a, e in zip(names, actual, expected, strict=True):
        if e is None:
            assert a is None, name
        else:
            assert_bitwise_equal(a, e, name)


def _check_other_memory(case, kernel, needs, count):
    """The first `count` gradients are the same whatever the workspace holds."""
    z = _z(case)
    expected = case.backward(z, needs, kernel=kernel)
    for _ in range(5):
        scratch = torch.full((24 << 20,), 255, dtype=torch.uint8, device="cuda")
        del scratch
        actual = case.backward(z, needs, kernel=kernel)
        _same(actual[:count], expected[:count], GRADIENTS[:count])


@pytest.mark.parametrize("M", TOKENS)
@pytest.mark.parametrize(("N", "K"), LAYERS)
def test_layers_against_float64(M, N, K, kernel):
    _check(_case(M, N, K, vector=True), kernel)


@pytest.mark.parametrize("M", [37, 600])
@pytest.mark.parametrize("masters", [False, True], ids=["16-bit", "fp32-masters"])
@pytest.mark.parametrize("r", [1, 8, 20, 24, 33, 64])
def test_ranks_against_float64(M, r, masters, kernel):
    _check(_case(M, 328, 768, r, masters=masters, vector=r > 8), kernel)


@pytest.mark.parametrize("r", [16, 20])
@pytest.mark.parametrize("M", [64, 600])
def test_fp32_adapters_are_rounded_before_the_products(M, r, kernel):
    case = _case(M, 328, 768, r, masters=True)
    z = _z(case)
    actual = case.backward(z, kernel=kernel)
    case.lora_A, case.lora_B = case.lora_A.to(BF16), case.lora_B.to(BF16)
    expected = case.backward(z, kernel=kernel)
    _same([a.to(e.dtype) for a, e in zip(actual, expected, strict=True)], expected)


OPTIONS = {
    "fp16": {"dtype": torch.float16},
    "fp16-fp32-absmax": {"dtype": torch.float16, "double_quant": False},
    "fp32-absmax": {"double_quant": False},
    "fp4": {"quant_type": "fp4"},
    "blocksize-128": {"blocksize": 128},
    "blocksize-512": {"blocksize": 512},
    "nested-blocksize-64": {"nested_blocksize": 64},
    "flat": {"layout": "flat"},
    "dropout": {"dropout_p": 0.25},
    "dropout-masters-vector": {"dropout_p": 0.25, "masters": True, "vector": True},
    "scaling-0": {"scaling": 0.0},
}


@pytest.mark.parametrize("M", [48, 300])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_against_float64(M, options, kernel):
    _check(_case(M, 272, 1536, **options), kernel)


@pytest.mark.parametrize("adds", [False, True])
def test_several_groups_of_tokens(adds):
    """More token tiles than the large kernel takes together, and chunks that use its ring again."""
    case = _case(4400, 2120, 9216, masters=True)
    _check(case, LARGE)
    if adds:
        z, total = _z(case), torch.randn_like(case.x)
        expected = total + case.backward(z, kernel=LARGE)[0]
        case.backward(z, kernel=LARGE, dx_sum=total)
        assert_bitwise_equal(total, expected, "dx_sum")


# Tiles of 1, 2, 3 and 5 steps of 64, several for each cluster, which stores a part of one among the
# steps of the next; a quarter of the last tile's columns.
@pytest.mark.parametrize("r", [5, 16, 64])
@pytest.mark.parametrize("N", [56, 72, 136, 264])
def test_tiles_of_few_steps(N, r):
    only_dx = (True, False, False, False, False)
    case = _case(8500, N, 2112, r)
    _check(case, LARGE, only_dx)
    z, start = _z(case), torch.randn_like(case.x)
    dx = case.backward(z, only_dx, kernel=LARGE)[0]
    for _ in range(3):
        assert_bitwise_equal(case.backward(z, only_dx, kernel=LARGE)[0], dx, "dx")
        total = start.clone()
        case.backward(z, only_dx, kernel=LARGE, dx_sum=total)
        assert_bitwise_equal(total, start + dx, "dx_sum")


# What the large kernel makes beside dx: no gradient of the bias or of a scaling vector.
BESIDE_DX = (True, True, True, False, False)
BESIDE = {
    "plain": {},
    "vector": {"vector": True},
    "fp16-masters": {"dtype": torch.float16, "masters": True},
    "fp32-absmax-masters-vector": {"double_quant": False, "masters": True, "vector": True},
    "scaling-0": {"scaling": 0.0},
}


@pytest.mark.parametrize("M", [1, 65, 257, 1030])
@pytest.mark.parametrize(("N", "K"), LAYERS)
def test_gradients_beside_dx(M, N, K):
    _check(_case(M, N, K, masters=M > 256), LARGE, BESIDE_DX)


# As the forward test of that name.
@pytest.mark.parametrize(("M", "N", "K"), [(4096, 4096, 1024), (2560, 8192, 3328)])
def test_a_first_wave_without_tiles(M, N, K):
    case = _case(M, N, K)
    _check(case, LARGE, BESIDE_DX)
    z = _z(case)
    gradients = case.backward(z, BESIDE_DX, kernel=LARGE)
    for _ in range(10):
        _same(case.backward(z, BESIDE_DX, kernel=LARGE), gradients)


@pytest.mark.parametrize("r", [1, 5, 8, 15, 16, 17])
@pytest.mark.parametrize("options", BESIDE.values(), ids=BESIDE)
def test_gradients_beside_dx_options(r, options):
    _check(_case(600, 328, 768, r, **options), LARGE, BESIDE_DX)


# Groups of 16, 17 and fewer token tiles, the last tile short; several groups in a wave, and several
# waves for one. d_lora_A among the steps of dx in one part and in two, with half a tile of columns;
# in a pass of its own, as there are too few tiles (K 192 to 1088) or steps (N 136).
@pytest.mark.parametrize(
    ("M", "N", "K", "options"),
    [
        (4096, 1024, 4096, {}), (4100, 1032, 4160, {"masters": True}),
        (8500, 1288, 4096, {"vector": True}), (8500, 136, 4096, {}), (4097, 264, 192, {}),
        (9000, 1096, 1088, {"dtype": torch.float16}), (20000, 72, 256, {}),
    ],
)  # fmt: skip
def test_gradients_beside_dx_of_several_groups(M, N, K, options):
    case = _case(M, N, K, **options)
    alone = (True, True, False, False, False), (True, False, True, False, False)
    _check(case, LARGE, BESIDE_DX, *alone)
    _check_other_memory(case, LARGE, BESIDE_DX, 3)


# More parts of u, or of sums over the tokens, than the workspace holds at a time: two passes over
# dy that leave parts of u, and four.
@pytest.mark.parametrize(("M", "N"), [(33000, 520), (115000, 64)])
def test_gradients_in_several_passes(M, N):
    case = _case(M, N, 64, 33, vector=True)
    _check(case, KERNEL)
    _check_other_memory(case, KERNEL, ALL, 5)


@pytest.mark.parametrize(
    "options",
    [{}, {"masters": True, "double_quant": False}, {"dtype": torch.float16}],
    ids=["plain", "fp32-masters-absmax", "fp16"],
)
@pytest.mark.parametrize("layer", beside_dx.LAYERS, ids=str)
def test_gradients_on_few_sms_beside_dx(layer, options):
    case = _case(*layer, **options)
    # All but a scaling vector's; without d_bias and d_lora_A.
    _check(case, KERNEL, ONE_LAUNCH, (True, False, True, False, False))
    _check_other_memory(case, KERNEL, ONE_LAUNCH, 4)


@pytest.mark.parametrize(
    ("M", "of", "needs", "masters", "launches"),
    [
        (64, KERNEL, ONE_LAUNCH, False, 2), (64, KERNEL, ONE_LAUNCH, True, 3),
        (4096, LARGE, BESIDE_DX, False, 2), (4096, LARGE, BESIDE_DX, True, 2),
    ],
    ids=["few", "few-masters", "many", "many-masters"],
)  # fmt: skip
def test_two_launches_make_all_gradients(M, of, needs, masters, launches):
    """And one in front that rounds the factors, where that of many tokens does not anyway."""
    case = _case(M, 1024, 4096, masters=masters)
    z = _z(case)

    def kernels(needs):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            case.backward(z, needs, kernel=of)
            torch.cuda.synchronize()
        return len([e for e in profile.events() if "kernel" in e.name])

    assert kernels(needs) == launches
    assert kernels(ALL) > launches


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize(
    "needs",
    [*(tuple(i == j for j in range(5)) for i in range(5)), (True, False, True, False, False),
     (True, True, False, False, False), (False, True, True, True, False)],
    ids=[*GRADIENTS, "frozen-A", "frozen-B", "first-layer"],
)  # fmt: skip
def test_only_what_is_needed(needs, dropout_p, kernel):
    _check(_case(150, 264, 512, 12, vector=True, dropout_p=dropout_p), kernel, needs)


@pytest.mark.parametrize(("N", "K"), LAYERS)
def test_one_hot_rows_read_the_weight(N, K, kernel):
    """dy = e_n gives row n of the weight, bit for bit."""
    q = lowbit.quantize(torch.randn(N, K, device="cuda"))
    for M in (70, 600):
        n = torch.randint(N, (M,), device="cuda")
        dy = torch.nn.functional.one_hot(n, N).to(BF16)
        dx = cuda.linear_dx(dy, *q.args(), kernel=kernel)
        assert_bitwise_equal(dx, cuda.dequantize_4bit(*q.args(), BF16)[n], "dx")


def test_a_weight_of_more_than_two_to_the_29_elements(kernel):
    """The head of a model with a large vocabulary."""
    N, K = 128256, 4608
    q = lowbit.quantize(torch.randn(N, K, device="cuda", dtype=BF16))
    n = torch.cat([torch.randint(N, (60,), device="cuda"), torch.arange(N - 10, N, device="cuda")])
    dy = torch.zeros(70, N, device="cuda", dtype=BF16)
    dy[torch.arange(70, device="cuda"), n] = 1
    dx = cuda.linear_dx(dy, *q.args(), kernel=kernel)
    assert_bitwise_equal(dx, cuda.dequantize_4bit(*q.args(), BF16)[n], "dx")


@pytest.mark.parametrize(
    ("M", "dtype"), [(40, BF16), (300, BF16), (300, torch.float16), (1030, BF16)]
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@both_ways
def test_dx_is_added_to_a_sum(needs, M, dtype, dropout_p, kernel):
    """As another pass would: the product rounded, then the sum."""
    case = _case(M, 1096, 9216, dtype=dtype, dropout_p=dropout_p)
    z, start = _z(case), torch.randn_like(case.x)
    dx, *others = case.backward(z, needs, kernel=kernel)
    total = start.clone()
    nothing, *again = case.backward(z, needs, kernel=kernel, dx_sum=total)
    assert nothing is None
    wanted = [i for i in range(1, 5) if needs[i]]
    _same(
        [again[i - 1] for i in wanted], [others[i - 1] for i in wanted],
        [GRADIENTS[i] for i in wanted],
    )  # fmt: skip
    if dropout_p == 0:
        assert_bitwise_equal(total, start + dx, "dx_sum")
        total = start.clone()
        plain = cuda.linear_dx(case.dy, *case.q.args(), kernel=kernel)
        assert cuda.linear_dx(case.dy, *case.q.args(), kernel=kernel, dx_sum=total) is None
        assert_bitwise_equal(total, start + plain, "dx_sum without adapter")
    else:  # the masked term is added after the product
        torch.testing.assert_close(total, start + dx, rtol=2**-6, atol=2**-6)


@both_ways
@pytest.mark.parametrize("M", TOKENS)
def test_results_repeat_bit_for_bit(M, needs, kernel):
    """Also on another stream, and after other work has used the same memory; inputs stay."""
    case = _case(M, 1040, 4096, 24, vector=True, masters=True)
    z = _z(case)
    inputs = [case.dy, case.x, z, case.lora_A, case.lora_B]
    before = [t.clone() for t in inputs]
    expected = case.backward(z, needs, kernel=kernel)
    for _ in range(5):
        scratch = torch.full((8 << 20,), 255, dtype=torch.uint8, device="cuda")
        del scratch
        _same(case.backward(z, needs, kernel=kernel), expected)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = case.backward(z, needs, kernel=kernel)
    torch.cuda.current_stream().wait_stream(stream)
    _same(other, expected)
    _same(inputs, before, ("dy", "x", "z", "lora_A", "lora_B"))


@both_ways
@pytest.mark.parametrize("masters", [False, True], ids=["16-bit", "fp32-masters"])
@pytest.mark.parametrize("M", [32, 256, 300])
def test_inputs_written_by_the_kernel_before(M, masters, needs, kernel):
    """A chain of layers, each of which reads what the one before wrote, against the same chain with
    a synchronization after every step: no kernel may read too early.
    """
    cases = [_case(M, 512, 512, masters=masters) for _ in range(6)]

    def chain(wait):
        dy = cases[0].dy
        for _ in range(4):
            for case in cases:
                case.dy = dy
                dx, *_ = case.backward(_z(case), needs, kernel=kernel)
                dy = dx * 0.5
                if wait:
                    torch.cuda.synchronize()
        return dy

    start = cases[0].dy
    expected = chain(wait=True)
    for _ in range(3):
        cases[0].dy = start
        assert_bitwise_equal(chain(wait=False), expected, "dx")


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("M", [8, 200, 300])
def test_a_weight_written_by_the_kernel_before(M, double_quant, kernel):
    case = _case(M, 512, 1024, double_quant=double_quant)
    z, written = _z(case), case.q
    weights = [
        lowbit.quantize(torch.randn(512, 1024), double_quant=double_quant).to("cuda")
        for _ in range(2)
    ]
    expected = []
    for case.q in weights:
        expected.append(case.backward(z, ONE_LAUNCH, kernel=kernel))
    case.q = written
    for i in range(20):
        torch.cuda.synchronize()
        for to, source in zip(written.args(), weights[i % 2].args(), strict=True):
            if isinstance(to, torch.Tensor):
                to.copy_(source)
        _same(case.backward(z, ONE_LAUNCH, kernel=kernel), expected[i % 2])


@both_ways
@pytest.mark.parametrize("M", [32, 1030])
def test_two_streams_at_once(M, needs, kernel):
    cases = [_case(M, 2048, 2048) for _ in range(2)]
    zs = [_z(case) for case in cases]
    expected = [case.backward(z, needs, kernel=kernel) for case, z in zip(cases, zs, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    results = [[], []]
    for _ in range(10):
        for case, z, stream, out in zip(cases, zs, streams, results, strict=True):
            with torch.cuda.stream(stream):
                out.append(case.backward(z, needs, kernel=kernel))
    torch.cuda.synchronize()
    for out, exact in zip(results, expected, strict=True):
        for result in out:
            _same(result, exact)


@both_ways
def test_two_threads_on_one_stream(needs, kernel):
    """Between two launches of a call there may be some of another."""
    cases = [_case(32, 1024, 1024) for _ in range(2)]
    zs = [_z(case) for case in cases]
    expected = [case.backward(z, needs, kernel=kernel) for case, z in zip(cases, zs, strict=True)]
    torch.cuda.synchronize()

    def work(case, z):
        return [case.backward(z, needs, kernel=kernel) for _ in range(50)]

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, cases, zs))
    for out, exact in zip(results, expected, strict=True):
        for result in out:
            _same(result, exact)


def _shifted(tensor):
    """The same values at an address that is no multiple of 16 bytes."""
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device="cuda")
    return storage[1:].view(tensor.shape).copy_(tensor)


def test_views_that_are_not_16_byte_aligned(kernel):
    case = _case(100, 128, 256, vector=True)
    z = _z(case)
    expected = case.backward(z, kernel=kernel)
    for name in ("dy", "x", "lora_A", "lora_B"):
        setattr(case, name, _shifted(getattr(case, name)))
    _same(case.backward(_shifted(z), kernel=kernel), expected)
    total = torch.zeros_like(case.x)
    case.q.qweight = _shifted(case.q.qweight)  # by panels
    _same(case.backward(z, kernel=kernel), case.backward(z))
    assert case.backward(z, kernel=kernel, dx_sum=total)[0] is None
    assert_bitwise_equal(total, case.backward(z)[0], "dx_sum")


def _leaves(case):
    return [t.detach().clone().requires_grad_() for t in (case.x, case.lora_A, case.lora_B)]


def _layer(case, x, lora_A, lora_B):
    return lowbit.lora_matmul(x, case.q, lora_A, lora_B, case.scaling, dropout_p=case.dropout_p)


@pytest.mark.parametrize("M", [16, 300])
@pytest.mark.parametrize("masters", [False, True])
def test_a_cuda_graph_of_forward_and_backward(M, masters, kernel):
    case = _case(M, 512, 1024, masters=masters)
    leaves = _leaves(case)

    def step():
        with dispatch.force(f"cuda:{kernel}"):  # the forward pass takes any
            y = _layer(case, *leaves)
            return y, *torch.autograd.grad(y, leaves, case.dy)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    later = zeros_of_many_sizes(stream)
    for _ in range(3):
        with torch.no_grad():
            leaves[0].copy_(torch.randn_like(case.x))
        case.dy.copy_(torch.randn_like(case.dy))
        graph.replay()
        _same(captured, step(), ("y", *GRADIENTS[:3]))
    assert not any(tensor.any() for tensor in later), "a workspace is not the graph's own"


@pytest.mark.parametrize(
    "layer",
    [(1, 3584, 18944, 16), (64, 3584, 18944, 64), (1, 8192, 28672, 16), (256, 2048, 8192, 16)],
    ids=str,
)
def test_thousands_of_runs_have_the_same_bits(layer):
    """What is loaded from a stage must be there before the stage is filled again. Where the loads
    were not waited for, one in 500 runs of the first layer was wrong (H200).
    """
    case = _case(*layer)
    leaves = _leaves(case)

    def step():
        y = _layer(case, *leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, case.dy)

    expected = [t.clone() for t in step()]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = [step() for _ in range(4)]
    wrong = torch.zeros(len(expected), dtype=torch.int64, device="cuda")
    for _ in range(600):
        graph.replay()
        for results in captured:
            wrong += torch.stack([(a != b).any() for a, b in zip(results, expected, strict=True)])
            for tensor in results:
                tensor.fill_(-1)
    runs = dict(zip(("y", *GRADIENTS[:3]), wrong.tolist(), strict=True))
    assert not any(runs.values()), f"of 2400 runs were wrong: {runs}"


# Gradients in front of dx, with several tiles of three steps for some CTAs, and beside it.
@pytest.mark.parametrize(
    "layer", [(16, 512, 1024, 16), (200, 72, 8704, 16), *beside_dx.LAYERS], ids=str
)
def test_a_cuda_graph_of_two_calls_in_one_workspace(layer):
    """Whatever says there that u has been made was set in the run before, too."""
    case = _case(*layer)
    z = _z(case)

    def two_calls():
        return [case.backward(z, ONE_LAUNCH, kernel=KERNEL) for _ in range(2)]

    two_calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = two_calls()
    for _ in range(5):
        case.dy.copy_(torch.randn_like(case.dy))
        graph.replay()
        for actual, expected in zip(captured, two_calls(), strict=True):
            _same(actual, expected)


def test_an_input_used_twice_and_a_graph_used_twice():
    case = _case(130, 256, 512)
    leaves = _leaves(case)
    y = _layer(case, *leaves)
    first = torch.autograd.grad(y, leaves, case.dy, retain_graph=True)
    _same(torch.autograd.grad(y, leaves, case.dy), first, GRADIENTS[:3])
    both = _layer(case, *leaves) + _layer(case, *leaves)
    for name, twice, once in zip(
        GRADIENTS, torch.autograd.grad(both, leaves, case.dy), first, strict=False
    ):
        assert_bitwise_equal(twice, once * 2, name)
    assert_bitwise_equal(leaves[0].detach(), case.x, "x")


def test_saved_tensors_may_wait_on_the_host():
    case = _case(130, 256, 512, masters=True)
    leaves = _leaves(case)
    expected = torch.autograd.grad(_layer(case, *leaves), leaves, case.dy)
    with torch.autograd.graph.save_on_cpu():
        y = _layer(case, *leaves)
    _same(torch.autograd.grad(y, leaves, case.dy), expected, GRADIENTS[:3])


def _extra_bytes(case, needs, kernel):
    """At the peak of a call, beside its results."""
    z = _z(case)
    case.backward(z, needs, kernel=kernel)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = case.backward(z, needs, kernel=kernel)
    made = sum(t.nbytes for t in results if t is not None)
    extra = torch.cuda.max_memory_allocated() - before - made
    del results
    assert torch.cuda.memory_allocated() == before
    return extra


@pytest.mark.parametrize("masters", [False, True], ids=["16-bit", "fp32-masters"])
@pytest.mark.parametrize("M", [1, 256, 4096])
@pytest.mark.parametrize("needs", [ALL, BESIDE_DX], ids=["all", "beside-dx"])
def test_memory_of_a_call(M, masters, needs, kernel):
    """Gradients and at most 32 MiB, whatever the weight."""
    assert _extra_bytes(_case(M, 14336, 4096, masters=masters), needs, kernel) <= 32 << 20


@pytest.mark.parametrize("M", [256, 1024])
def test_memory_of_wide_fp32_masters(M):
    """As wide as the widest layers there are: a rounded lora_A is 9 MiB, its gradient's sums 18."""
    case = _case(M, 2048, 73728, 64, masters=True)
    assert _extra_bytes(case, ONE_LAUNCH, KERNEL) <= 32 << 20


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("M", [20, 200])
def test_a_group_is_its_layers(M, dropout_p, kernel):
    """Gradients of q, k, v and a member without adapter, dx added member by member."""
    members = [
        make_member(N, 512, r, BF16, "cuda", lora_dtype=torch.float32)
        for N, r in ((512, 16), (128, 16), (128, 0), (256, 8))
    ]
    x, members, named = leaves_of(torch.randn(M, 512, device="cuda", dtype=BF16), members)
    columns, biases = arguments(members)
    dys = [torch.randn(M, m["w"].N, device="cuda", dtype=BF16) for m in members]
    results = []
    for grouped in (True, False):
        torch.manual_seed(1)
        if grouped:
            ys = lowbit.lora_matmul_group(x, *columns, biases=biases, dropout_p=dropout_p)
        else:
            ys = [separate(x, m, dropout_p) for m in members]
        with dispatch.force(f"cuda:{kernel}"):
            results.append(gradients(ys, dys, named))
    for name, value in results[1].items():  # where the order of additions differs, so do roundings
        scale = float(value.abs().max())
        torch.testing.assert_close(
            results[0][name], value, rtol=0, atol=2**-6 * scale, msg=f"{name} differs"
        )


def test_the_table_names_the_layers_that_are_served():
    device = torch.device("cuda")
    layer = dispatch.Layer(4096, 4096, 64, True, 16)
    for operation in ("lora_linear_backward", "linear_dx"):
        for M in (1, 64, 65, 1024, 2047):
            assert dispatch.choose(operation, device, BF16, M, layer).kernel == KERNEL
        for M in (2048, 4096, 1 << 19):
            assert dispatch.choose(operation, device, BF16, M, layer).kernel == LARGE
        wide = layer._replace(N=1024, K=1 << 17)  # whose fp32 lora_A would not fit beside a ring
        assert dispatch.choose(operation, device, BF16, 4096, wide).kernel == KERNEL
        for other in (
            layer._replace(K=3420), layer._replace(N=4100), layer._replace(blocksize=32),
            layer._replace(r=65), layer._replace(blocksize=0), layer._replace(N=(1 << 20) + 8),
            layer._replace(K=(1 << 18) + 64),
        ):  # fmt: skip
            assert dispatch.choose(operation, device, BF16, 64, other).kernel == "panels"
        assert dispatch.choose(operation, device, torch.float32, 64, layer).kernel == "panels"
        with dispatch.force("cuda:panels"):
            assert dispatch.choose(operation, device, BF16, 64, layer).kernel == "panels"
        with dispatch.force("cuda:nf4_lora_gemv"):  # says nothing about the backward pass
            assert dispatch.choose(operation, device, BF16, 64, layer).kernel == KERNEL


def test_what_a_kernel_does_not_serve_is_refused(kernel):
    case = _case(8, 128, 96, blocksize=32)
    with (
        dispatch.force(f"cuda:{kernel}"),
        pytest.raises(RuntimeError, match=f"kernel '{kernel}' was forced but does not serve"),
    ):
        torch.ops.lowbit.linear_dx(case.dy, *case.q.args())
    with pytest.raises(RuntimeError, match=r"nf4_lora_matmul_dx\w* does not serve these sizes"):
        cuda.linear_dx(case.dy, *case.q.args(), kernel=kernel)
    wide = _case(8, 128, 128, 65)
    with pytest.raises(RuntimeError, match="does not serve these sizes"):
        wide.backward(_z(wide), kernel=kernel)
