"""Fixtures shared by all tests."""

import os

# Waiting threads of libgomp spin for milliseconds; on a busy machine that stretches tests of tiny
# layers many times over. Read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Triton decides when it is imported whether it compiles or interprets; without a GPU only the
# latter can run.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

import lowbit.ops  # noqa: F401  (registers torch.ops.lowbit, which some tests call directly)

NO_CUDA = "needs a CUDA device and torch built with CUDA"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_CUDA))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """Every device a test should run on."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
