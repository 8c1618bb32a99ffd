"""Several devices in one process: each call runs on the device of its tensors."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import assert_bitwise_equal, kernel_unavailable
from test_cuda_direct import FORWARD

import lowbit
from lowbit import dispatch, memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
BF16 = torch.bfloat16
N, K, R = 528, 704, 16
TOKENS = FORWARD.values()


def _operands(M):
    generator = torch.Generator().manual_seed(0)
    shapes = {"W": (N, K), "x": (M, K), "A": (R, K), "B": (N, R), "dy": (M, N)}
    return {
        name: (torch.randn(shape, generator=generator) / shape[1] ** 0.5).to(BF16)
        for name, shape in shapes.items()
    }


def _step(operands, device):
    """(y, dx, dA, dB) of a layer on a device, whichever is current."""
    W, x, A, B, dy = (t.to(device) for t in operands.values())
    q = lowbit.quantize(W)
    leaves = [t.requires_grad_() for t in (x, A, B)]
    for _ in range(3):  # through the operator, past it, and without checks
        y = lowbit.lora_matmul(x, q, A, B, 0.5)
        gradients = torch.autograd.grad(y, leaves, dy)
    return y, *gradients


def _assert_equal(results, expected, where):
    for name, result, other in zip(("y", "dx", "dA", "dB"), results, expected, strict=True):
        assert_bitwise_equal(result, other, f"{where}: {name}")


@pytest.mark.parametrize("M", TOKENS)
def test_a_layer_on_a_device_that_is_not_current(M):
    operands = _operands(M)
    expected = _step(operands, "cuda:0")
    with torch.cuda.device(0):
        results = _step(operands, "cuda:1")
        assert torch.cuda.current_device() == 0
    _assert_equal(results, expected, f"M {M}")
    assert {t.device for t in results} == {torch.device("cuda:1")}


@pytest.mark.parametrize("backend", ["triton", "cuda:panels"])
def test_other_kernels_on_a_device_that_is_not_current(backend):
    """Triton divides the sums over K into slices, which a second launch adds."""
    if (why := dispatch.unavailable(backend.partition(":")[0])) is not None:
        pytest.skip(why)
    operands = _operands(96)
    with torch.cuda.device(0), dispatch.force(backend):
        _assert_equal(_step(operands, "cuda:1"), _step(operands, "cuda:0"), backend)


@pytest.mark.parametrize("name", ["w", "lora_A", "lora_B", "bias"])
def test_operands_on_two_devices_are_an_error_that_names_them(name):
    W, x, A, B, _ = (t.to("cuda:1") for t in _operands(8).values())
    args = {"w": lowbit.quantize(W), "lora_A": A, "lora_B": B, "bias": W[:, 0].contiguous()}

    def call(**changed):
        now = {**args, **changed}
        return lowbit.lora_matmul(x, now["w"], now["lora_A"], now["lora_B"], 0.5, bias=now["bias"])

    for _ in range(3):  # calls like these need no checks from now on
        call()
    with pytest.raises(ValueError) as error:
        call(**{name: args[name].to("cuda:0")})
    assert str(error.value).startswith(f"{name} must be on x's device cuda:1, got cuda:0")
    call()


def test_work_goes_to_the_current_stream_of_the_tensors_device():
    """With another device current: behind what was queued there before."""
    operands = _operands(64)
    _step(operands, "cuda:1")
    expected = _step(operands, "cuda:1")[0]
    W, x, A, B, _ = (t.to("cuda:1") for t in operands.values())
    q = lowbit.quantize(W)
    late = torch.zeros_like(x)
    lowbit.lora_matmul(late, q, A, B, 0.5)
    stream = torch.cuda.Stream("cuda:1")
    torch.cuda.synchronize("cuda:1")
    with torch.cuda.device(1), torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        with torch.cuda.device(0):
            y = lowbit.lora_matmul(late, q, A, B, 0.5)
    stream.synchronize()
    assert_bitwise_equal(y, expected, "y")


def test_a_thread_for_each_device():
    """Both at once, many times: what kernels keep per device is not mixed up."""
    operands = {M: _operands(M) for M in TOKENS}
    expected = {M: _step(operands[M], "cuda:0") for M in TOKENS}
    problems = []

    def work(device):
        try:
            for _ in range(5):
                for M in TOKENS:
                    _assert_equal(_step(operands[M], device), expected[M], f"{device}, M {M}")
        except BaseException as problem:  # seen by the test, not lost with the thread
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(f"cuda:{i}",)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems[0]


def test_a_graph_for_each_device():
    """Recorded and replayed while device 0 is current, both at the same time."""
    if (why := kernel_unavailable("nf4_lora_backward")) is not None:
        pytest.skip(f"cuBLAS may choose another kernel while recording; {why}")
    M = 100
    operands = _operands(M)
    expected = _step(operands, "cuda:0")
    recorded = []
    with torch.cuda.device(0):
        for device in ("cuda:0", "cuda:1"):
            _step(operands, device)  # what is initialized lazily
            W, x, A, B, dy = (t.to(device) for t in operands.values())
            q, seen = lowbit.quantize(W), torch.zeros_like(x)
            leaves = [t.requires_grad_() for t in (seen, A, B)]
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
            torch.cuda.synchronize(device)
            with torch.cuda.graph(graph, stream=stream):
                y = lowbit.lora_matmul(seen, q, A, B, 0.5)
                results = y, *torch.autograd.grad(y, leaves, dy)
            recorded.append((graph, seen, x, results))
        for _ in range(20):
            for graph, seen, x, _ in recorded:
                with torch.no_grad():
                    seen.copy_(x)
                graph.replay()
        for *_, results in recorded:
            torch.cuda.synchronize(results[0].device)
            _assert_equal(results, expected, str(results[0].device))


ONE_DEVICE = """
import threading, torch, lowbit
from test_cuda_devices import TOKENS, _operands, _step

def plain():
    x = torch.ones(64, 64, device="cuda:1", requires_grad=True)
    (x @ x).sum().backward()

def work():
    for M in TOKENS:
        _step(_operands(M), "cuda:1")
    parameter = torch.nn.Parameter(torch.ones(300, 70, device="cuda:1"))
    optimizer = lowbit.optim.PagedAdamW([parameter])
    for _ in range(2):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    optimizer.evict(release=True)

def in_threads(function):
    function()
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()

in_threads(plain)
by_torch = torch._C._cuda_hasPrimaryContext(0)
in_threads(work)
torch.cuda.synchronize("cuda:1")
print(by_torch, torch._C._cuda_hasPrimaryContext(0),
      torch.cuda.memory_stats(0).get("allocated_bytes.all.allocated", 0),
      torch.cuda.memory_stats(1)["allocated_bytes.all.allocated"] > 0)
"""


def test_a_process_that_uses_one_device_leaves_the_other_alone():
    """torch's current device is the unused one then, the runtime's is the other: workspaces must
    come from the one that is used. A context takes hundreds of MiB.
    """
    paths = os.pathsep.join((str(Path(__file__).parent), *filter(None, sys.path)))
    out = subprocess.run(
        [sys.executable, "-c", ONE_DEVICE], env={**os.environ, "PYTHONPATH": paths},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    by_torch, now, bytes_0, uses_1 = out.stdout.split()
    assert (now, bytes_0, uses_1) == (by_torch, "0", "True")


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW", "PagedAdamW8bit"])
def test_an_optimizer_on_a_device_that_is_not_current(name):
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(300, 70, generator=generator) for _ in range(2))

    def steps(device):
        parameter = torch.nn.Parameter(start.to(device))
        optimizer = getattr(lowbit.optim, name)([parameter], lr=0.1)
        for _ in range(3):
            parameter.grad = gradient.to(device)
            optimizer.step()
        return parameter

    with torch.cuda.device(0):
        assert_bitwise_equal(steps("cuda:1"), steps("cuda:0"), name)
        assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("name", ["PagedAdamW", "PagedAdamW8bit"])
def test_state_is_moved_behind_the_work_of_its_device(name):
    if not memory.can_page("cuda:1"):
        pytest.skip("this device cannot page")
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(300, 70, generator=generator) for _ in range(2))

    def state(device, evicts):
        parameter = torch.nn.Parameter(start.to(device))
        optimizer = getattr(lowbit.optim, name)([parameter], lr=0.1)
        parameter.grad = gradient.to(device)
        optimizer.step()
        torch.cuda.synchronize(device)
        if evicts:
            with torch.cuda.device(device):
                torch.cuda._sleep(int(1e9))  # about half a second
        optimizer.step()
        if evicts:
            optimizer.evict(release=True)
        torch.cuda.synchronize(device)
        kept = optimizer.state[parameter].values()
        return [t.clone() for t in kept if isinstance(t, torch.Tensor) and t.numel() > 1]

    with torch.cuda.device(0):
        results, expected = state("cuda:1", evicts=True), state("cuda:0", evicts=False)
    assert len(results) >= 2
    for i, (result, other) in enumerate(zip(results, expected, strict=True)):
        assert_bitwise_equal(result, other, f"state {i}")
