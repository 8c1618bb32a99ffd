"""Several devices in one process: each call runs on the device of its tensors."""

import threading

import pytest
import torch
from helpers import assert_bitwise_equal
from test_cuda_direct import FORWARD

import lowbit

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
