"""lowbit.memory: paged tensors are ordinary tensors, go with their last reference, and move."""

import ctypes
import gc

import pytest
import torch

from lowbit import memory

MIB = 1 << 20


def _paging_obstacle():
    if not torch.cuda.is_available():
        return "needs a CUDA device and torch built with CUDA"
    return None if memory.can_page() else "this device cannot page"


_why = _paging_obstacle()
pages = pytest.mark.skipif(_why is not None, reason=str(_why))


def _used():
    """Memory in use on the whole card: tests that ask are exclusive."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def _host_bytes():
    """Memory of this process on the host, managed pages included."""
    with open("/proc/self/smaps_rollup") as rollup:
        return next(int(line.split()[1]) << 10 for line in rollup if line.startswith("Rss:"))


# ---- without a GPU -------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu():
    assert not memory.can_page()
    with memory.paged():
        assert torch.zeros(3).tolist() == [0, 0, 0]
        assert (torch.ones(2) + 1).device.type == "cpu"
    for function in (lambda: memory.empty((3,), kind="pinned"), lambda: memory.paged("cuda")):
        with pytest.raises(memory.PagedMemoryError, match="CUDA device's, and there is none"):
            function()


def test_bad_arguments():
    with pytest.raises(ValueError, match="device must be a CUDA device, got cpu"):
        memory.empty((3,), device="cpu")
    with pytest.raises(ValueError, match="kind must be"):
        memory.empty((3,), kind="flash")
    with pytest.raises(ValueError, match="tensor must be a paged CUDA tensor, got one on cpu"):
        memory.prefetch(torch.zeros(3), "cpu")
    with pytest.raises(TypeError, match="tensor must be a paged CUDA tensor, got list"):
        memory.residency([0.0])
    with pytest.raises(ValueError, match="to and source must be contiguous and of equal size"):
        memory.copy_async(torch.zeros(3), torch.zeros(4), None)
    with pytest.raises(ValueError, match="advice must be one of"):
        memory.advise(torch.zeros(3), "hope")


def test_making_a_capsule_is_nobody_elses_business():
    """ctypes.pythonapi's functions are shared: types set there are set for every library."""
    shared = ctypes.pythonapi.PyCapsule_New
    before = shared.argtypes, shared.restype
    capsule = memory._new_capsule(1, b"dltensor", None)
    assert "dltensor" in repr(capsule)
    assert (shared.argtypes, shared.restype) == before


# ---- allocation ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pages
def test_tensors_in_the_context_are_paged():
    outside = torch.randn(1 << 18, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with memory.paged():
        tensors = [
            torch.empty(3, 4, device="cuda"),
            torch.zeros(5, device="cuda", dtype=torch.bfloat16),
            torch.zeros_like(outside),
            outside.new_ones(7, 2),
            torch.full((3,), 2.5, device="cuda"),
            torch.arange(9, device="cuda"),
            outside + 1,
            outside.clone(),
            *outside.view(2, -1).max(dim=1),
            torch.nn.functional.one_hot(torch.tensor([1, 2], device="cuda"), 3),
        ]
        viewed = outside[3:]
        host = torch.zeros(4)
        outside.mul_(1.0)
    for tensor in tensors:
        memory.prefetch(tensor, "cpu")  # raises for memory that is not managed
        assert memory.residency(tensor) == memory.HOST
    assert viewed.data_ptr() == outside.data_ptr() + 12
    assert host.device.type == "cpu"
    torch.testing.assert_close(tensors[6], outside + 1)
    assert tensors[4].tolist() == [2.5, 2.5, 2.5]
    assert tensors[2].abs().max() == 0
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < MIB  # results of checks
    with pytest.raises(memory.PagedMemoryError, match="invalid argument"):
        memory.prefetch(outside, "cpu")


@pytest.mark.gpu
@pages
def test_any_optimizer_can_have_paged_state():
    def train(parameter, context):
        optimizer = torch.optim.AdamW([parameter], lr=1e-2, foreach=False)
        for step in range(3):
            parameter.grad = torch.full_like(parameter, step + 1.0)
            with context() if step == 0 else memory.paged("cuda"):
                optimizer.step()
        return optimizer.state[parameter]["exp_avg"]

    values = torch.randn(1 << 18, device="cuda")
    plain, paged = (torch.nn.Parameter(values.clone()) for _ in range(2))
    expected = torch.optim.AdamW([plain], lr=1e-2, foreach=False)
    for step in range(3):
        plain.grad = torch.full_like(plain, step + 1.0)
        expected.step()
    state = train(paged, memory.paged)
    memory.prefetch(state, "cpu")
    torch.testing.assert_close(paged, plain, rtol=0, atol=0)
    torch.testing.assert_close(state, expected.state[plain]["exp_avg"], rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.exclusive
@pages
def test_memory_goes_with_the_last_reference():
    """Watched on the card and on the host, whatever holds the last reference."""
    count = 256 * MIB
    with memory.paged():  # at first use it imports torch's compiler, and kernels are loaded
        warm = torch.zeros(MIB, dtype=torch.uint8, device="cuda")
    memory.prefetch(warm, "cpu")
    warm.fill_(1)[5:7].view(2).tolist()
    device_before, host_before = _used(), _host_bytes()
    with memory.paged():
        tensor = torch.zeros(count, dtype=torch.uint8, device="cuda")
    assert _used() - device_before > 0.9 * count
    part = tensor[5:7].view(2)
    del tensor
    gc.collect()
    assert _used() - device_before > 0.9 * count
    memory.prefetch(part, "cpu")
    assert part.tolist() == [0, 0]
    del part
    gc.collect()
    assert _used() - device_before < 32 * MIB

    on_host = memory.empty((count,), torch.uint8)
    memory.advise(on_host, "preferred_location", "cpu")
    memory.prefetch(on_host, "cpu")
    on_host.fill_(1)
    assert _used() - device_before < 32 * MIB
    assert _host_bytes() - host_before > count // 2
    del on_host
    gc.collect()
    assert _host_bytes() - host_before < 32 * MIB


@pytest.mark.gpu
@pytest.mark.exclusive
@pages
def test_repeated_allocation_leaks_nothing():
    memory.empty((MIB,)).zero_()
    before = _used()
    for _ in range(50):
        memory.empty((16 * MIB,), torch.uint8).zero_()
    gc.collect()
    assert _used() - before < 32 * MIB


@pytest.mark.gpu
@pages
def test_more_than_the_system_has_is_one_exception():
    with pytest.raises(
        memory.PagedMemoryError, match=r"MiB of paged memory cannot be had for cuda"
    ):
        memory.empty((1 << 50,), torch.uint8)
    with pytest.raises(memory.PagedMemoryError, match="MiB of pinned memory cannot be had"):
        memory.empty((1 << 50,), torch.uint8, kind="pinned")
    assert torch.ones(3, device="cuda").sum() == 3  # no error is left behind


# ---- moving --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pages
def test_prefetch_advice_and_residency():
    tensor = memory.empty((8 * MIB,), torch.float32)
    assert memory.residency(tensor) is None
    memory.prefetch(tensor, "cuda")
    assert memory.residency(tensor) == torch.device("cuda", torch.cuda.current_device())
    tensor.fill_(3)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    memory.prefetch(tensor[: 4 * MIB], "cpu", stream)
    assert memory.residency(tensor[: 4 * MIB]) == memory.HOST
    assert memory.residency(tensor) is None
    memory.advise(tensor, "accessed_by", "cuda")
    memory.advise(tensor, "preferred_location", "cpu")
    memory.advise(tensor, "preferred_location", "cpu", set=False)
    assert tensor.add_(1).sum().item() == 4.0 * tensor.numel()


@pytest.mark.gpu
@pytest.mark.exclusive
def test_pinned_memory_is_used_in_place():
    tensor = memory.empty((3, 1000), kind="pinned")
    before = _used()
    tensor.copy_(torch.arange(3000.0).view(3, 1000))
    tensor.mul_(2)
    assert tensor.sum().item() == 2 * sum(range(3000))
    assert tensor.cpu()[2, 999] == 5998
    assert _used() - before < 8 * MIB


@pytest.mark.gpu
def test_empty_tensors():
    for kind in ("pinned", *(("managed",) if _why is None else ())):
        tensor = memory.empty((0, 3), kind=kind)
        assert tensor.shape == (0, 3)
        if kind == "managed":
            memory.prefetch(tensor, "cpu")
            assert memory.residency(tensor) is None
