"""Products where a context has a few SMs of the device, and on several streams beside each other:
none waits for CTAs that find no room.

A child process computes them: what waits for good can only be ended with its process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_partition
import streams_beside
from helpers import kernel_unavailable

import lowbit

pytestmark = pytest.mark.gpu


def _skip_without(kernels) -> None:
    for kernel in kernels:
        if (why := kernel_unavailable(kernel)) is not None:
            pytest.skip(why)


def _lines_of(program: str) -> list[str]:
    """What a program prints, which must end."""
    where = str(Path(lowbit.__file__).parent.parent)
    try:
        done = subprocess.run(
            [sys.executable, program], capture_output=True, text=True, timeout=90,
            env={**os.environ, "PYTHONPATH": where},
        )  # fmt: skip
    except subprocess.TimeoutExpired as hung:
        pytest.fail(f"hung after:\n{(hung.stdout or b'').decode()}")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_products_on_eight_sms():
    green_contexts = pytest.importorskip("torch.cuda.green_contexts")
    if not green_contexts.SUPPORTED:
        pytest.skip("this torch has no green contexts")
    _skip_without(kernel for kernel, *_ in small_partition.PRODUCTS)
    lines = _lines_of(small_partition.__file__)
    assert len(lines) == len(small_partition.PRODUCTS), lines
    for line in lines:
        kernel, *_, distance = line.split()
        # The sums over parts of K are added up in another order there, before bf16 rounds them.
        limit = 1e-3 if kernel == "nf4_lora_matmul_mid" else 0.0
        assert float(distance) <= limit, line


def test_products_of_several_streams_end_with_the_same_bits():
    _skip_without(streams_beside.KERNELS)
    lines = _lines_of(streams_beside.__file__)
    assert lines == [f"round {i}: 0 differ" for i in range(streams_beside.ROUNDS)]
