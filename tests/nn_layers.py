"""Layers of the tests of lowbit.nn: small, with rows that end in a short block."""

import torch
from helpers import assert_bitwise_equal
from torch import nn

from lowbit.nn import Linear4bit, QLoRALinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BUFFERS = (
    "weight_absmax",
    "weight_codebook",
    "weight_nested_absmax",
    "weight_nested_codebook",
    "weight_nested_offset",
)
N, K, R = 48, 96, 4  # K = 96: one and a half blocks of 64, so rows end in a short block


def linear(dtype=torch.float32, device="cpu", bias=True):
    return nn.Linear(K, N, bias=bias, dtype=dtype, device=device)


def qlora(dtype=torch.float32, device="cpu", **options):
    """A layer whose adapter is not zero, so that it takes part."""
    layer = QLoRALinear.from_linear(linear(dtype, device), r=R, alpha=8, **options)
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer


def both(dtype=torch.float32, device="cpu"):
    return [Linear4bit.from_linear(linear(dtype, device)), qlora(dtype, device)]


def expected_output(layer, x):
    """The formula in x's dtype, from the dequantized weight."""
    weight = layer.quantized_weight.dequantize(torch.float32).to(x.dtype)
    y = x @ weight.t() + layer.bias.to(x.dtype)
    if isinstance(layer, QLoRALinear):
        y = y + (x @ layer.lora_A.to(x.dtype).t() * layer.scaling) @ layer.lora_B.to(x.dtype).t()
    return y


def all_tensors(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def assert_same_state(actual, expected):
    actual, expected = actual.state_dict(), expected.state_dict()
    assert list(actual) == list(expected)
    for key in expected:
        assert_bitwise_equal(actual[key], expected[key], key)
