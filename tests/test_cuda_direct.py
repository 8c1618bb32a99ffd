"""Calls of the CUDA library without an operator: the same bits, and what is left to operators."""

import struct

import pytest
import torch
from helpers import assert_bitwise_equal, kernel_unavailable
from layer_case import GRADIENTS, LayerCase

import lowbit
from lowbit import dispatch
from lowbit.backends import cuda, cuda_direct

BF16 = torch.bfloat16
DEVICE = torch.device("cuda", 0)
# With an M of each.
FORWARD = {"nf4_lora_gemv": 1, "nf4_lora_matmul_small": 8, "nf4_lora_matmul_mid": 100,
           "nf4_lora_matmul_large": 4096, "nf4_lora_matmul_portable": 40}  # fmt: skip


def _left_over(*_, **__):
    raise AssertionError("the call was left to the operator")


def _prepare(operation, case, otherwise=_left_over, kernel="", for_backward=True):
    M, r = case.x.shape[0], 0 if operation == "linear" else case.lora_A.shape[0]
    N, K = case.dy.shape[1], case.x.shape[1]
    device = case.x.device if case.x.is_cuda else DEVICE
    return cuda_direct.prepare(
        operation, kernel, device, case.dtype, M, N, K, r, for_backward, otherwise
    )


def _forward_args(case, x=None):
    return (
        case.x if x is None else x, *case.weight(), case.lora_A, case.lora_B, case.vector,
        case.scaling, case.bias, case.dropout_p, case.seed,
    )  # fmt: skip


# ---- without a GPU: what crosses the border


@pytest.fixture
def calls(monkeypatch):
    """A library that notes (function, weight, sizes, pointers) and returns `calls.result`."""

    class Calls(list):
        result = 0

    made = Calls()

    def c_function(name):
        return lambda *structures: made.append((name, *structures)) or made.result

    monkeypatch.setattr(cuda_direct, "_c_function", c_function)
    monkeypatch.setattr(cuda_direct, "accepted", set())
    monkeypatch.setattr(cuda_direct, "_current_device", lambda: DEVICE.index)
    on_cpu = torch._C._dynamo.guards._empty_strided_cpu
    monkeypatch.setattr(cuda_direct, "_empty_on_current", on_cpu)
    return made


def test_a_weight_is_taken_once_its_operator_has_accepted_it(calls):
    case = LayerCase((8, 64, 128, 4), BF16, "cpu")
    refused = _prepare("lora_linear", case, kernel="nf4_lora_matmul_small")
    with pytest.raises(AssertionError, match="left to the operator"):
        refused(*_forward_args(case))
    accepted = _prepare("lora_linear", case, lambda *args: "operator", "nf4_lora_matmul_small")
    assert accepted(*_forward_args(case)) == "operator"
    assert calls == []
    y, z = refused(*_forward_args(case))
    assert (y.shape, z.shape, y.dtype) == ((8, 64), (8, 4), BF16)
    (name, weight, sizes, pointers), q = calls[0], case.q
    assert name == "lowbit_product"
    addresses = (q.qweight, q.absmax, q.codebook, q.nested_absmax, q.nested_codebook)
    assert struct.unpack("6Q10q", weight)[:5] == tuple(t.data_ptr() for t in addresses)
    sizes_in_memory = q.qweight.numel(), *(t.numel() for t in addresses[1:])
    assert struct.unpack("6Q10q", weight)[6:] == (64, 128, 64, 256, 1, *sizes_in_memory)
    assert struct.unpack("7q", sizes) == (8, 4, 1, 1, 1, 0, 1)
    given = (case.x, case.lora_A, case.lora_B, None, case.bias, None, z, y)
    expected = [0 if t is None else t.data_ptr() for t in given]
    assert struct.unpack("8Qd", pointers) == (*expected, case.scaling)


def test_a_weight_that_has_become_shorter_goes_to_the_operator(calls):
    case = LayerCase((8, 64, 128, 4), BF16, "cpu")
    run = _prepare("lora_linear", case, lambda *args: "operator", "nf4_lora_matmul_small")
    args = list(_forward_args(case))
    run(*args)
    assert run(*args) != "operator"
    args[1] = args[1].view(-1)[:-1]  # the same address and numbers
    assert run(*args) == "operator"


def test_what_the_library_refuses_goes_to_the_operator(calls):
    case = LayerCase((8, 64, 128, 4), BF16, "cpu")
    run = _prepare("lora_linear", case, lambda *args: "operator", "nf4_lora_matmul_small")
    run(*_forward_args(case))
    calls.result = 1
    assert run(*_forward_args(case)) == "operator"
    assert len(calls) == 1
    calls.result = 0
    case.dropout_p = 0.5
    assert run(*_forward_args(case)) == "operator"
    case.dropout_p, case.bias = 0.0, torch.ones(128, dtype=BF16)[::2]
    assert run(*_forward_args(case)) == "operator"
    assert len(calls) == 1


def test_backward_makes_what_is_needed(calls):
    case = LayerCase((8, 64, 128, 4), BF16, "cpu", masters=True)
    cuda_direct._accept(case.weight())
    run = _prepare("lora_linear_backward", case, kernel=dispatch.BACKWARD_KERNELS[0])
    z = torch.zeros(8, 4, dtype=BF16)
    dx, d_lora_A, d_lora_B, d_bias, d_scaling = run(
        *case.backward_args(z, (True, True, True, False, False))
    )
    assert (d_bias, d_scaling) == (None, None)
    assert (dx.shape, dx.dtype) == ((8, 128), BF16)
    assert (d_lora_A.shape, d_lora_A.dtype) == ((4, 128), torch.float32)
    assert (d_lora_B.shape, d_lora_B.dtype) == ((64, 4), torch.float32)
    total = torch.zeros(8, 128, dtype=BF16)
    args = case.backward_args(z, (True, False, False, True, True))
    none, _, _, d_bias, d_scaling = run(*args, dx_sum=total)
    assert (none, d_bias.shape, d_scaling.dtype) == (None, (64,), torch.float32)
    (_, _, sizes, pointers) = calls[1]
    assert struct.unpack("7q", sizes) == (8, 4, 1, 0, 0, 0, 0)
    numbers = struct.unpack("11Qqd", pointers)
    assert numbers[6:9] == (total.data_ptr(), 0, 0)
    assert numbers[9:] == (d_bias.data_ptr(), d_scaling.data_ptr(), 1, case.scaling)


def test_backward_leaves_what_hooks_have_changed_to_the_operator(calls):
    case = LayerCase((8, 64, 128, 4), BF16, "cpu")
    cuda_direct._accept(case.weight())
    kernel = dispatch.BACKWARD_KERNELS[0]
    run = _prepare("lora_linear_backward", case, lambda *_, **__: "operator", kernel)
    z = torch.zeros(8, 4, dtype=BF16)
    args = list(case.backward_args(z))
    assert run(*args) != "operator"
    for place, changed in ((1, case.x.float()), (1, case.x[:4]), (2, z.double()), (2, z.t())):
        assert run(*args[:place], changed, *args[place + 1 :]) == "operator"
    assert len(calls) == 1


def test_what_fails_halfway_is_not_repeated(calls):
    case = LayerCase((8, 64, 128, 4), BF16, "cpu")
    cuda_direct._accept(case.weight())
    run = _prepare("lora_linear_backward", case, kernel=dispatch.BACKWARD_KERNELS[0])
    args, total = case.backward_args(torch.zeros(8, 4, dtype=BF16)), torch.zeros(8, 128, dtype=BF16)
    calls.result = 2
    with pytest.raises(RuntimeError, match="halfway"):
        run(*args, dx_sum=total)
    calls.result = 1
    with pytest.raises(AssertionError, match="left to the operator"):
        run(*args, dx_sum=total)


def test_a_weight_whose_parts_do_not_go_together_is_not_taken(calls):
    case = LayerCase((8, 64, 128, 4), BF16, "cpu")
    weight = list(case.weight())
    weight[1] = weight[1].float()  # beside the scales of 8-bit codes
    cuda_direct._accept(tuple(weight))
    assert cuda_direct.accepted == set()
    cuda_direct._accept(case.weight())
    assert len(cuda_direct.accepted) == 1


def test_results_lie_on_the_device_of_the_arguments(calls, monkeypatch):
    empty, made = torch.empty_strided, []
    monkeypatch.setattr(
        torch, "empty_strided",
        lambda *layout, dtype, device: made.append(device) or empty(*layout, dtype=dtype),
    )  # fmt: skip
    case = LayerCase((8, 64, 128, 4), BF16, "cpu")
    cuda_direct._accept(case.weight())
    run = _prepare("lora_linear", case, kernel="nf4_lora_matmul_small")
    run(*_forward_args(case))
    assert made == []
    monkeypatch.setattr(cuda_direct, "_current_device", lambda: DEVICE.index + 1)
    y, z = run(*_forward_args(case))
    assert (y.shape, z.shape, made) == ((8, 64), (8, 4), [DEVICE, DEVICE])


# ---- on a GPU


def _skip_without(kernel):
    if (why := kernel_unavailable(kernel)) is not None:
        pytest.skip(why)


not_current = pytest.param(
    "cuda:1",
    marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda:0", not_current])
@pytest.mark.parametrize("masters", [False, True], ids=["bf16 adapters", "fp32 adapters"])
@pytest.mark.parametrize(("kernel", "M"), FORWARD.items())
def test_direct_calls_give_the_bits_of_the_operators(kernel, M, masters, device):
    _skip_without(kernel)
    case = LayerCase((M, 272, 1024, 16), BF16, device, vector=M == 8, masters=masters)
    with dispatch.force(f"cuda:{kernel}"):
        operator = dispatch.select("lora_linear", _forward_args(case))
    _prepare("lora_linear", case, operator, kernel)(*_forward_args(case))  # accepts the weight
    y, z = operator(*_forward_args(case))
    direct = _prepare("lora_linear", case, kernel=kernel)
    for actual, expected, name in zip(direct(*_forward_args(case)), (y, z), "yz", strict=True):
        assert_bitwise_equal(actual, expected, name)
    plain = _prepare("linear", case, kernel=kernel)
    args = (case.x, *case.weight(), case.bias)
    assert_bitwise_equal(plain(*args), cuda.linear(*args, kernel=kernel), "linear")
    args = (case.x, *case.weight(), z, case.lora_B, case.vector, case.scaling, None)
    expected = cuda.linear_low_rank(*args, kernel=kernel)
    actual = _prepare("linear_low_rank", case, kernel=kernel)(*args)
    assert_bitwise_equal(actual, expected, "linear_low_rank")


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda:0", not_current])
@pytest.mark.parametrize("masters", [False, True], ids=["bf16 adapters", "fp32 adapters"])
@pytest.mark.parametrize("M", FORWARD.values())
@pytest.mark.parametrize("kernel", dispatch.BACKWARD_KERNELS)
def test_direct_calls_of_backward_give_the_bits_of_the_operators(kernel, M, masters, device):
    _skip_without(kernel)
    case = LayerCase((M, 272, 1024, 16), BF16, device, vector=M == 8, masters=masters)
    cuda_direct._accept(case.weight())
    args = case.backward_args(torch.randn(M, 16, device=device).to(BF16))
    expected = cuda.lora_linear_backward(*args, kernel=kernel)
    actual = _prepare("lora_linear_backward", case, kernel=kernel)(*args)
    for name, a, b in zip(GRADIENTS, actual, expected, strict=True):
        assert_bitwise_equal(a, b, name)


@pytest.mark.gpu
def test_a_bias_whose_memory_was_freed_is_an_error():
    """It has no address, as a layer without bias."""
    kernel = "nf4_lora_matmul_portable"
    _skip_without(kernel)
    case = LayerCase((8, 272, 1024, 16), BF16, "cuda")
    x, lora_A, lora_B = case.x, case.lora_A, case.lora_B
    for _ in range(2):
        lowbit.lora_matmul(x, case.q, lora_A, lora_B, 2.0, bias=case.bias)
    case.bias.untyped_storage().resize_(0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="bias has no memory"):
            lowbit.lora_matmul(x, case.q, lora_A, lora_B, 2.0, bias=case.bias)


@pytest.mark.gpu
def test_a_view_that_no_kernel_can_read_goes_to_the_operator():
    kernel = "nf4_lora_matmul_portable"
    _skip_without(kernel)
    case = LayerCase((8, 272, 1024, 16), BF16, "cuda")
    run = _prepare("lora_linear", case, lambda *args: "operator", kernel)
    run(*_forward_args(case))
    shifted = torch.empty(8 * 1024 + 1, dtype=BF16, device="cuda")[1:].view(8, 1024)
    assert run(*_forward_args(case, shifted)) == "operator"
    assert run(*_forward_args(case)) != "operator"
