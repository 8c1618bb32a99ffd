"""What lowbit.lora_matmul says of wrong arguments."""

import pytest
import torch

import lowbit
from lowbit import repeated


def operands() -> dict:
    """Of a call that is right: M = 5, N = 48, K = 64, r = 4."""
    return {
        "x": torch.randn(5, 64),
        "w": lowbit.quantize(torch.randn(48, 64)),
        "lora_A": torch.randn(4, 64),
        "lora_B": torch.randn(48, 4),
        "scaling": 2.0,
        "bias": torch.randn(48),
    }


def test_the_call_is_right_without_a_change():
    assert lowbit.lora_matmul(**operands()).shape == (5, 48)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"x": torch.ones(3, 64, dtype=torch.int32)},
            TypeError,
            "x must be a float32, float16, bfloat16 or float64 tensor, got torch.int32",
        ),
        (
            {"x": torch.randn(3, 63)},
            ValueError,
            r"x must be \[\.\.\., K\] with K = 64, got \[3, 63\]",
        ),
        (
            {"x": torch.randn(5, 64).to_sparse()},
            TypeError,
            "x must be a dense tensor, got torch.spa",
        ),
        ({"w": torch.ones(48, 32, dtype=torch.uint8)}, ValueError, "w must be a floating tensor"),
        ({"w": "nf4"}, TypeError, "w must be a QuantizedWeight or a tensor"),
        ({"w": torch.randn(48, 64).half()}, TypeError, "w must have x's dtype torch.float32"),
        ({"w": torch.randn(64, 48).t()}, ValueError, "w must be contiguous"),
        ({"w": torch.randn(0, 64)}, ValueError, r"w must not be empty, got \[0, 64\]"),
        (
            {"x": torch.randn(5, 0), "w": torch.randn(48, 0), "lora_A": torch.randn(4, 0)},
            ValueError,
            "w must not be empty",
        ),
        ({"lora_A": torch.randn(4, 63)}, ValueError, r"lora_A must be \[r, K\] with K = 64"),
        ({"lora_A": torch.randn(0, 64)}, ValueError, "r >= 1"),
        (
            {"lora_B": torch.randn(4, 48)},
            ValueError,
            r"lora_B must be \[N, r\] = \[48, 4\], got \[4, 48\]",
        ),
        (
            {"lora_A": torch.randn(4, 64).half()},
            TypeError,
            "lora_A must be torch.float32 like x, got torch.float16; cast one of them",
        ),
        (
            {"scaling": torch.ones(3)},
            ValueError,
            r"scaling must be a number or a tensor \[r\] = \[4\]",
        ),
        (
            {"x": torch.randn(5, 64).half(), "lora_B": torch.randn(48, 4).bfloat16()},
            TypeError,
            "lora_B must be torch.float16 like x, or float32, got torch.bfloat16",
        ),
        ({"lora_A": None}, TypeError, "lora_A must be a tensor, got NoneType"),
        ({"lora_B": [1.0]}, TypeError, "lora_B must be a tensor, got list"),
        ({"scaling": None}, TypeError, r"scaling must be a number or a tensor .* got None"),
        ({"scaling": "two"}, TypeError, "scaling must be a number or a tensor .* got 'two'"),
        ({"scaling": "2"}, TypeError, "scaling must be a number or a tensor .* got '2'"),
        (
            {
                "scaling": "2",
                "lora_A": torch.ones(1, 4, 64),
                "lora_B": torch.ones(1, 48, 4),
                "adapter_index": torch.zeros(5, dtype=torch.int32),
            },
            TypeError,
            r"with adapter_index, scaling must be a number or \[1\], got '2'",
        ),
        ({"bias": [0.0] * 48}, TypeError, "bias must be a tensor, got list"),
        (
            {"bias": torch.ones(48, dtype=torch.int64)},
            TypeError,
            "bias must be a float32.* got torch.int64",
        ),
        (
            {"bias": torch.ones(48, dtype=torch.float64)},
            TypeError,
            "bias must be a float32.* got torch.float64",
        ),
        ({"adapter_index": [0, 0]}, TypeError, "adapter_index must be a tensor, got list"),
        ({"bias": torch.ones(47)}, ValueError, r"bias must be \[N\] = \[48\], got \[47\]"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must lie in \[0, 1\), got 1.0"),
        (
            {"dropout_p": "0.1"},
            TypeError,
            r"dropout_p must be a number in \[0, 1\), got str '0.1'",
        ),
        ({"dropout_p": None}, TypeError, "dropout_p must be a number .* got NoneType"),
        ({"adapter_index": torch.zeros(5)}, ValueError, "with adapter_index, lora_A must be"),
        (
            {
                "lora_A": torch.ones(1, 4, 64),
                "lora_B": torch.ones(1, 48, 4),
                "adapter_index": torch.zeros(5, dtype=torch.bool),
            },
            ValueError,
            "adapter_index must be an integer tensor .* got torch.bool",
        ),
        (
            {
                "lora_A": torch.ones(1, 4, 64),
                "lora_B": torch.ones(1, 48, 4),
                "adapter_index": torch.zeros(5, dtype=torch.int32, device="meta"),
            },
            ValueError,
            "adapter_index must be on x's device cpu, got meta",
        ),
        (
            {"scaling": torch.ones(4, dtype=torch.complex64)},
            TypeError,
            "scaling must be real, got torch.complex64",
        ),
        (
            {"w": lowbit.quantize(torch.randn(2, 24, 64))},
            ValueError,
            r"w must be a matrix \[N, K\]",
        ),
        (
            {"x": torch.randn(3, 64, device="meta")},
            ValueError,
            "w must be on x's device meta, got cpu",
        ),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        lowbit.lora_matmul(**operands() | changes)


def test_no_call_is_remembered_without_an_adapter():
    """On a GPU such calls are looked up before arguments are checked."""
    p = operands()
    for adapter in ((None, p["lora_B"]), (p["lora_A"], None), (None, None)):
        assert repeated.lora_matmul(p["x"], p["w"], *adapter, 2.0, None) is None
