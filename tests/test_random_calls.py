"""Random layers, groups and gated MLPs through the public functions, over memory full of NaN.

Sizes, formats, ranks, dtypes, strides, what trains and what changes between two calls are drawn at
random, as nobody would combine them by hand. Outputs and all gradients are compared with float64
block by block, and must repeat bit for bit.
"""

import pytest
import torch
from helpers import assert_bitwise_equal, assert_blocks_close_to_float64
from random_case import MEMBERS, RandomCase, gradients, strided

CALLS = 3  # of a case, each with something else than the one before
FEW = 256  # elements of which plain torch may be right by luck
LUCKY_STEPS = 48  # of rounding that are then allowed on top: the root of the longest sums' length


def _poison(device):
    """What the allocator hands out next is NaN in every type."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    most = 64 if device.type == "cuda" else 1
    sizes = (most << 20, 2 << 20, 1 << 20, 300000, 65536, 8192, 2048, 512)
    held = [torch.full((size,), 0xFF, dtype=torch.uint8, device=device) for size in sizes]
    held.clear()


def _upstream(case, ys):
    dys = [torch.randn_like(y) for y in ys]
    return [strided(case.draw, dy) if dy.dim() == 2 else dy for dy in dys]


def _results(case, key, dys=None):
    """(y and gradients by name, upstream gradients)."""
    _poison(case.device)
    torch.manual_seed(key)
    ys = case.outputs()
    dys = _upstream(case, ys) if dys is None else dys
    _poison(case.device)
    grads = gradients(ys, dys, case.leaves, case.wanted())
    return _named(ys, grads), dys


def _named(ys, grads):
    named = {f"y{i}": y.detach() for i, y in enumerate(ys)}
    return named | {f"d_{name}": grad for name, grad in grads.items()}


def _check(case, key, actual, dys):
    exact, plain = (_named(*case.formula(t, key, dys)) for t in (torch.float64, case.dtype))
    for name, value in actual.items():
        like = dys[int(name[1:])] if name[0] == "y" else case.leaves[name[2:]]
        assert (value.dtype, value.shape) == (like.dtype, like.shape), name
        lucky = value.numel() < FEW or case.dtype == torch.float32
        steps = LUCKY_STEPS if lucky else 0
        assert_blocks_close_to_float64(name, value, exact[name], plain[name], steps)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", MEMBERS)
def test_values_gradients_and_bits(device, kind, seed):
    case = RandomCase(kind, seed, device)
    for key in range(CALLS):
        first, dys = _results(case, key)
        _check(case, key, first, dys)
        again, _ = _results(case, key, dys)
        for name, value in first.items():
            assert_bitwise_equal(again[name], value, name)
        case.change()
    _, dys = _results(case, key)
    with torch.inference_mode():
        _poison(device)
        torch.manual_seed(key)
        ys = case.outputs()
    _check(case, key, _named(ys, {}), dys)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(100, 104))
@pytest.mark.parametrize("kind", MEMBERS)
def test_recorded_calls_take_new_values(kind, seed):
    case = RandomCase(kind, seed, torch.device("cuda"), dropout=False)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            _, dys = _results(case, 0)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        ys = case.outputs()
        recorded = _named(ys, gradients(ys, dys, case.leaves, case.wanted()))
    del ys
    for _ in range(2):
        with torch.no_grad():
            for leaf in case.leaves.values():
                leaf.copy_(leaf.flip(0) * 0.5)
            for dy in dys:
                dy.normal_()
        graph.replay()
        _check(case, 0, recorded, dys)
