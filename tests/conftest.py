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
NOT_ALONE = "measures the whole card; run it without other workers beside it (-m exclusive, no -n)"


def pytest_collection_modifyitems(items):
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=NO_CUDA))
        elif item.get_closest_marker("exclusive") and not alone:
            item.add_marker(pytest.mark.skip(reason=NOT_ALONE))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """Every device a test should run on."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone."""
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / ".store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()
