"""The kernels for one and for 2 to 64 tokens beyond what test_nf4_lora_matmul.py asks of all.

z comes from CTAs of the same launch, and hand-overs go through memory that no launch has cleared.
The operator of the library is called itself, with a z of its own or a given one.
"""

import pytest
import torch
from helpers import assert_bitwise_equal, assert_close_to_float64, kernel_unavailable

import lowbit
from lowbit import reference

pytestmark = pytest.mark.gpu

ONE, FEW = "nf4_lora_gemv", "nf4_lora_matmul_small"
# One token by either; tile edges, one before and one beyond each.
CASES = [(ONE, 1), *((FEW, M) for M in (1, 2, 3, 7, 8, 9, 16, 17, 32, 33, 64))]
# No adapter; a single row of lora_A; odd ones; each number of 16 rows.
RANKS = (0, 1, 5, 16, 17, 40, 64)
# N, K: one unit of one tile; an odd number of blocks, fewer than warpgroups compute z; many; tiles
# that are whole and in parts, of which several end in a CTA's piece.
LAYERS = [(16, 64), (272, 320), (208, 18944), (4096, 4096), (18944, 448)]


@pytest.fixture(autouse=True)
def _gpu():
    if (why := kernel_unavailable(ONE) or kernel_unavailable(FEW)) is not None:
        pytest.skip(why)


def _inside(values: torch.Tensor) -> torch.Tensor:
    """The same as a view of memory that is NaN around it, 16-byte aligned and no more."""
    around = torch.full((values.numel() + 128,), torch.nan, dtype=values.dtype, device="cuda")
    around[8 : 8 + values.numel()] = values.flatten()
    view = around[8 : 8 + values.numel()].view_as(values)
    assert view.data_ptr() % 32 == 16
    return view


class _Call:
    """A layer and its input, as the operator takes them."""

    def __init__(self, kernel, M, N, K, r, dtype=torch.bfloat16, *, vector=False):
        def randn(*shape):
            return torch.randn(shape, device="cuda")

        self.operator = getattr(torch.ops.lowbit_cuda, kernel)
        self.q = lowbit.quantize((randn(N, K) / K**0.5).to(dtype))
        self.x = _inside(randn(M, K).to(dtype))
        self.lora_A = _inside((randn(r, K) / K**0.5).to(dtype)) if r else None
        self.lora_B = _inside(randn(N, r).to(dtype)) if r else None
        self.bias, self.scaling = randn(N).to(dtype), 1.7
        self.vector = torch.rand(r, device="cuda") + 0.5 if vector and r else None

    def run(self, z_in=None, *, z=True):
        """(y, z); z is None where it is given, or not asked for."""
        z_out = None
        if self.lora_A is not None and z_in is None and z:
            z_out = self.x.new_full((self.x.shape[0], self.lora_A.shape[0]), torch.nan)
        lora_A = self.lora_A if z_in is None else None
        y = self.operator(
            self.x, *self.q.args(), lora_A, self.lora_B, self.vector, self.scaling, self.bias,
            z_in, z_out,
        )  # fmt: skip
        return y, z_out

    def formula(self, dtype):
        weight = reference.dequantize_4bit(*self.q.args(), torch.float64)
        weight = weight.to(self.x.dtype).to(dtype) if dtype != torch.float64 else weight
        x, bias = self.x.to(dtype), self.bias.to(dtype)
        if self.lora_A is None:
            return x @ weight.t() + bias, None
        adapter = self.lora_A.to(dtype), self.lora_B.to(dtype), self.vector, self.scaling
        return reference.lora_linear(x, weight, *adapter, bias, 0.0, None)


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize(("kernel", "M"), CASES)
@pytest.mark.parametrize(("N", "K"), LAYERS)
def test_with_z_of_its_own_and_given(N, K, kernel, M, r):
    call = _Call(
        kernel, M, N, K, r, torch.float16 if r == 5 else torch.bfloat16, vector=r in (1, 40)
    )
    y, z = call.run()
    exact, low = call.formula(torch.float64), call.formula(call.x.dtype)
    assert_close_to_float64("y", y, exact[0], low[0])
    for _ in range(3):
        again, z_again = call.run()
        assert_bitwise_equal(again, y, "y")
        if r:
            assert_bitwise_equal(z_again, z, "z")
    if r == 0:
        return
    assert_close_to_float64("z", z, exact[1], low[1])
    assert_bitwise_equal(call.run(z=False)[0], y, "y without z")
    assert_close_to_float64("y of a given z", call.run(z)[0], exact[0], low[0])


@pytest.mark.parametrize("exponent", [-110, -100, -20, 0, 40, 100, 120])
def test_one_token_of_columns_of_any_size(exponent):
    """Each 32 columns of x have a scale of their own: one by itself, and beside smaller ones."""
    call = _Call(ONE, 1, 272, 96 * 64, 0)
    weight = reference.dequantize_4bit(*call.q.args(), torch.float64)

    def multiply(x):
        return call.operator(x, *call.q.args(), None, None, None, 1.0, None, None, None)

    x = torch.zeros_like(call.x)
    x[:, 4000:4032] = torch.randn(32, device="cuda") * 2.0**exponent
    for smaller in (0.0, 2.0 ** (exponent - 8)):
        x[:, 64:2048] = torch.randn(1984, device="cuda") * smaller
        low = x @ weight.to(x.dtype).t()
        assert_close_to_float64("y", multiply(x), x.double() @ weight.t(), low)
    for strange in (torch.inf, torch.nan):
        x[:, 5000] = strange
        assert not multiply(x).isfinite().any()


def test_one_token_of_more_nested_scales_than_threads():
    """A CTA keeps those of its rows in shared memory: 640 or 704 on a card of 132 SMs."""
    q = lowbit.quantize(torch.randn(5440, 32768, device="cuda"), nested_blocksize=32)
    x = torch.randn(1, 32768, device="cuda", dtype=torch.bfloat16)
    y = torch.ops.lowbit_cuda.nf4_lora_gemv(x, *q.args(), None, None, None, 1.0, None, None, None)
    weight = lowbit.dequantize(q)
    exact = x.double() @ weight.double().t()
    assert_close_to_float64("y", y, exact, x @ weight.to(x.dtype).t())


def _capture(call, memory=()):
    """(graph, (y, z)): a call, and behind it copies of `memory` to what it leaves free."""
    call.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call.run()
        taken = [torch.empty_like(t) for t in memory]
        for to, source in zip(taken, memory, strict=True):
            to.copy_(source)
    return graph, results


@pytest.mark.parametrize(
    ("kernel", "M", "r"), [(ONE, 1, 16), (ONE, 1, 64), (FEW, 16, 16), (FEW, 64, 64), (FEW, 3, 0)]
)
def test_a_graph_replays_over_memory_that_holds_anything(kernel, M, r):
    """Its runs have one mark. In between others write where the workspace was."""
    call = _Call(kernel, M, 1040, 4096, r)
    small = [torch.empty(1 << 16, dtype=torch.uint8, device="cuda") for _ in range(32)]
    large = [torch.empty(2 << 20, dtype=torch.uint8, device="cuda") for _ in range(9)]
    memory = small + large
    graph, (y, z) = _capture(call, memory)
    for run in range(20):
        for t in memory:
            t.random_() if run != 10 else t.zero_()
        call.x.copy_(torch.randn_like(call.x))
        expected, z_expected = call.run()
        graph.replay()
        assert_bitwise_equal(y, expected, "y")
        if r:
            assert_bitwise_equal(z, z_expected, "z")


@pytest.mark.parametrize(
    ("kernel", "M", "r"), [(ONE, 1, 17), (FEW, 2, 64), (FEW, 16, 16), (FEW, 64, 16)]
)
def test_a_graph_replays_without_a_pause(kernel, M, r):
    """Runs that all have one mark, one behind the other. The first one for another x finds the sums
    of the run before where it waits for its own."""
    call = _Call(kernel, M, 4096, 4096, r)
    graph, results = _capture(call)
    for _ in range(20):
        call.x.copy_(torch.randn_like(call.x))
        expected = call.run()
        for runs in (1, 50):
            for t in results:
                t.fill_(torch.nan)
            for _ in range(runs):
                graph.replay()
            for name, actual, exact in zip("yz", results, expected, strict=True):
                assert_bitwise_equal(actual, exact, name)


@pytest.mark.parametrize(("M", "r"), [(2, 1), (16, 16), (64, 16)])
def test_z_of_which_one_slice_comes_late(M, r):
    """K is one step, which the last of those that project takes, from beyond L2; the others have
    nothing to do. What lies in the place of a slice is that of another x."""
    call = _Call(FEW, M, 4096, 128, r)
    others = torch.empty(96 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(20):
        call.x.copy_(torch.randn_like(call.x))
        others.zero_()
        results, again = call.run(), call.run()
        for name, actual, expected in zip("yz", results, again, strict=True):
            assert_bitwise_equal(actual, expected, name)


def test_several_calls_in_a_graph():
    """One behind the other in the same workspace, each for another x: what is left of the call
    before, read too early, gives other bits."""
    sizes = (FEW, 8, 4096, 16), (ONE, 1, 528, 16), (FEW, 64, 528, 64), (FEW, 2, 272, 1)
    calls = [_Call(kernel, M, N, 2048, r) for kernel, M, N, r in sizes]
    tasks = [(call, torch.randn_like(call.x)) for call in calls for _ in range(4)]

    def run_all():
        for call, x in tasks:
            call.x = x
            yield call.run()

    expected = list(run_all())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = list(run_all())
    for _ in range(10):
        graph.replay()
    for actual, exact in zip(results, expected, strict=True):
        for name, a, e in zip("yz", actual, exact, strict=True):
            assert_bitwise_equal(a, e, name)


def test_graphs_on_several_streams():
    calls = [
        _Call(FEW, 16, 4096, 4096, 64), _Call(FEW, 64, 14336, 1024, 16),
        _Call(ONE, 1, 14336, 4096, 64), _Call(ONE, 1, 4096, 8192, 16),
    ]  # fmt: skip
    expected = [call.run() for call in calls]
    graphs = [_capture(call) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(100):
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for (_, results), exact in zip(graphs, expected, strict=True):
        for name, a, e in zip("yz", results, exact, strict=True):
            assert_bitwise_equal(a, e, name)
