"""Layers of random sizes through every kernel of the CUDA library, over memory full of NaN.

A kernel that reads what it has not written yet, or overwrites what is still to be read, may do so
for few sizes only, and in a small part of the result. So sizes are drawn at random, memory that the
allocator hands out is poisoned, results are compared block by block, and must repeat bit for bit.
"""

import random

import pytest
import torch
from helpers import assert_bitwise_equal, assert_blocks_close_to_float64, kernel_unavailable
from layer_case import LayerCase

from lowbit import dispatch

pytestmark = pytest.mark.gpu

# Each forward kernel with the least and greatest M to draw.
FORWARD = {
    "nf4_lora_gemv": (1, 1),
    "nf4_lora_matmul_portable": (1, 128),
    "nf4_lora_matmul_small": (1, 64),
    "nf4_lora_matmul_mid": (65, 3000),
    "nf4_lora_matmul_large": (256, 6000),
    "panels": (1, 3000),
}
BACKWARD = {"nf4_lora_backward": (1, 3000), "nf4_lora_backward_large": (256, 6000)}
SEEDS = range(12)


def _poison():
    """What the allocator hands out next is NaN in every type."""
    torch.cuda.empty_cache()
    sizes = (64 << 20, 40 << 20, 32 << 20, 8 << 20, 2 << 20, 1 << 20)
    held = [torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda") for size in sizes]
    held.clear()


def _case(kernel, tokens, seed):
    if (why := kernel_unavailable(kernel)) is not None:
        pytest.skip(why)
    draw = random.Random(f"{kernel} {seed}")
    torch.manual_seed(seed)
    least, most = tokens
    M = min(most, max(least, draw.choice([draw.randint(least, most), 256 * draw.randint(1, 16)])))
    N = 16 * draw.choice([draw.randint(1, 40), draw.randint(1, 300), 16 * draw.randint(1, 16)])
    K = 64 * draw.choice([draw.randint(1, 12), draw.randint(1, 120), 8 * draw.randint(1, 12)])
    size = (M, N, K, draw.choice([1, 5, 8, 16, 16, 16, 17, 24, 32, 64]))
    dtype = draw.choice([torch.bfloat16, torch.bfloat16, torch.float16])
    options = {"double_quant": draw.random() < 0.7, "masters": draw.random() < 0.3}
    return LayerCase(size, dtype, "cuda", **options)


def _run(case, call, names, results):
    """Three times the same bits, and all of them near `results` of the formulas."""
    exact, plain = case.formulas(torch.float64), case.formulas(case.dtype)
    first = None
    for _ in range(3):
        _poison()
        actual = call()
        if first is None:
            first = actual
        for name, a, f, i in zip(names, actual, first, results, strict=True):
            assert_blocks_close_to_float64(name, a, exact[i], plain[i])
            assert_bitwise_equal(a, f, name)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("kernel", "tokens"), FORWARD.items(), ids=FORWARD)
def test_forward(kernel, tokens, seed):
    case = _case(kernel, tokens, seed)
    factors = (case.lora_A.to(case.dtype), case.lora_B.to(case.dtype))
    adapter = (*factors, None, case.scaling, case.bias, 0.0, None)

    def call():
        with dispatch.force(f"cuda:{kernel}"):
            return torch.ops.lowbit.lora_linear(case.x, *case.weight(), *adapter)

    _run(case, call, "yz", (0, 1))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("kernel", "tokens"), BACKWARD.items(), ids=BACKWARD)
def test_backward(kernel, tokens, seed):
    case = _case(kernel, tokens, seed)
    z = case.x @ case.lora_A.to(case.dtype).t()
    needs = (True, True, True, False, False)

    def call():
        return case.backward(z, needs, kernel=kernel)[:3]

    _run(case, call, ("dx", "d_lora_A", "d_lora_B"), (2, 3, 4))
