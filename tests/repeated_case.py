"""A layer of which is counted what goes without a check (lowbit/repeated.py)."""

import torch
from helpers import assert_bitwise_equal
from library_on_cpu import Library

import lowbit
from lowbit import repeated
from lowbit.backends import cuda_direct

N, K, R = 272, 1024, 16
BF16 = torch.bfloat16


class RepeatedCase:
    """Operands, and how often a call or its backward pass went without a check."""

    def __init__(self, device, monkeypatch, shape=(2, 4, K), bias=False):
        def randn(*shape):
            return torch.randn(shape, device=device).to(BF16)

        # Nothing is left of other tests, whose weights may have had the same addresses.
        monkeypatch.setattr(repeated, "_calls", {})
        monkeypatch.setattr(cuda_direct, "accepted", set())
        self.library = Library(monkeypatch) if device.type == "cpu" else None
        self.x = randn(*shape).requires_grad_()
        self.q = lowbit.quantize(randn(N, K))
        self.lora_A = torch.nn.Parameter(randn(R, K) / 8)
        self.lora_B = torch.nn.Parameter(randn(N, R))
        self.bias = randn(N).requires_grad_() if bias else None
        self.dy = randn(*shape[:-1], N)
        self.unchecked, self.checked_backward = [], 0
        forward, backward = repeated.lora_matmul, repeated._checked_gradients

        def count_forward(*args):
            self.unchecked.append(True)  # also where saving stops a recomputation
            y = forward(*args)
            self.unchecked[-1] = y is not None
            return y

        def count_backward(*args):
            self.checked_backward += 1
            return backward(*args)

        monkeypatch.setattr(repeated, "lora_matmul", count_forward)
        monkeypatch.setattr(repeated, "_checked_gradients", count_backward)

    def leaves(self):
        return [t for t in (self.x, self.lora_A, self.lora_B, self.bias) if t is not None]

    def y(self, **changes):
        values = {"x": self.x, "w": self.q, "lora_A": self.lora_A, "lora_B": self.lora_B}
        values |= {"scaling": 2.0, "bias": self.bias} | changes
        return lowbit.lora_matmul(**values)

    def step(self, **changes):
        y = self.y(**changes)
        return y.detach(), *torch.autograd.grad(y, self.leaves(), self.dy, allow_unused=True)

    def warm(self):
        """The results of a call that was checked, when the next one needs it no more."""
        first = self.step()
        self.step()
        assert_same(self.step(), first)
        assert (self.unchecked, self.checked_backward) == ([False, True, True], 1)
        self.unchecked.clear()
        return first


def assert_same(actual, expected):
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_bitwise_equal(a, b, f"result {i}")
