"""Comparisons that say what differs and where, the error rule of the numerical tests, and which
kernels run here.
"""

import functools

import torch

from lowbit import dispatch

# One rounding step of the output: half a unit in the last place, relative.
ROUNDING = {
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8 / 2,
    torch.float64: 2.0**-53,
}
BLOCK = 64


def _bits(t: torch.Tensor) -> torch.Tensor:
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.contiguous().view(integer) if t.dim() else t.reshape(1).view(integer)


def assert_bitwise_equal(
    actual: torch.Tensor, expected: torch.Tensor, name: str = "tensor"
) -> None:
    """Same dtype, shape and bits; the message counts the differences and shows the first."""
    assert actual.dtype == expected.dtype, (
        f"{name}: dtype {actual.dtype}, expected {expected.dtype}"
    )
    assert actual.shape == expected.shape, (
        f"{name}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    )
    a, b = actual.detach().cpu(), expected.detach().cpu()
    different = _bits(a) != _bits(b)
    if different.any():
        first = tuple(int(i) for i in different.nonzero()[0]) if a.dim() else ()
        raise AssertionError(
            f"{name}: {int(different.sum())} of {a.numel()} elements differ, first at {first}: "
            f"got {a[first].item()!r}, expected {b[first].item()!r}"
        )


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS(actual - expected) / RMS(expected) in float64."""
    a, b = actual.detach().double().cpu(), expected.detach().double().cpu()
    scale = b.square().mean().sqrt()
    return float((a - b).square().mean().sqrt() / scale.clamp(min=1e-300))


def assert_close_to_float64(
    name: str, actual: torch.Tensor, expected: torch.Tensor, lowp: torch.Tensor, factor: float = 2.0
) -> None:
    """Error against float64 at most `factor` times that of plain torch in the same precision.

    One rounding step of the output is allowed on top, since a result that is exact in fp32 still
    has to be rounded once. The rule holds for the relative RMS and for the worst element (there
    relative to the largest output).

    Args:
        name: what is compared, for the message ("y", "d_lora_B").
        actual: the result under test.
        expected: the same in float64, from the same quantized weight.
        lowp: the same formula in plain torch in actual's precision.
        factor: 2 for outputs, 3 for gradients.
    """
    assert actual.shape == expected.shape, (
        f"{name}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    )
    a, e, low = (t.detach().double().cpu() for t in (actual, expected, lowp))
    assert torch.isfinite(a).all(), (
        f"{name}: {int((~torch.isfinite(a)).sum())} values are not finite"
    )
    if a.numel() == 0:
        return
    step = ROUNDING[actual.dtype]
    rms, rms_low = relative_rms(a, e), relative_rms(low, e)
    error = (a - e).abs()
    where = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    top = float(e.abs().max())
    worst, worst_low = float(error.max()), float((low - e).abs().max())
    message = (
        f"{name}: relative RMS error {rms:.3g} (plain torch {rms_low:.3g}), "
        f"worst {worst:.3g} at {where} "
        f"(plain torch {worst_low:.3g}, largest value {top:.3g})"
    )
    assert rms <= factor * rms_low + step, message
    assert worst <= factor * worst_low + step * top, message


def _block_rms(t: torch.Tensor) -> torch.Tensor:
    """[rows, columns] -> RMS of each block; the last ones may be smaller."""

    def sums(values):
        rows, columns = -t.shape[0] % BLOCK, -t.shape[1] % BLOCK
        padded = torch.nn.functional.pad(values, (0, columns, 0, rows))
        return padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).sum((1, 3))

    return (sums(t.square()) / sums(torch.ones_like(t))).sqrt()


def assert_blocks_close_to_float64(
    name: str, actual: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, steps: int = 0
) -> None:
    """No block is off by more than 4 times plain torch's error and a rounding step of the output.

    The error of plain torch is the larger of the block's own and the whole tensor's. So a small
    part that is wrong cannot hide in a large tensor.

    Args:
        name, actual, exact, plain: as in assert_close_to_float64.
        steps: rounding steps of the tensor's RMS that are allowed on top, where plain torch may be
            right by luck: it has few elements, or was computed in fp32.
    """
    a, e, p = (t.detach().double().reshape(-1, t.shape[-1]) for t in (actual, exact, plain))
    error, plain_error = _block_rms(a - e), _block_rms(p - e)
    allowed = 4 * torch.maximum(plain_error, plain_error.square().mean().sqrt())
    allowed += ROUNDING[actual.dtype] * _block_rms(e)
    step = max(ROUNDING[actual.dtype], ROUNDING[plain.dtype])
    allowed += steps * step * e.square().mean().sqrt()
    wrong = ~(error <= allowed)  # NaN as well
    assert not wrong.any(), (
        f"{name} {list(actual.shape)}: {int(wrong.sum())} of {wrong.numel()} blocks are wrong, "
        f"first at {wrong.nonzero()[0].tolist()}"
    )


def zeros_of_many_sizes(stream: torch.cuda.Stream) -> list[torch.Tensor]:
    """Device memory taken from what the allocator has free for a stream."""
    sizes = [1 << power for power in range(9, 26) for _ in range(4)]
    with torch.cuda.stream(stream):
        zeros = [torch.zeros(size, dtype=torch.uint8, device="cuda") for size in reversed(sizes)]
    stream.synchronize()
    return zeros


@functools.cache
def kernel_unavailable(kernel: str) -> str | None:
    """Why a kernel of the CUDA library cannot run here, or None if it can."""
    if (why := dispatch.unavailable("cuda")) is not None:
        return f"the compiled CUDA backend is not there: {why}"
    if (why := dispatch.obstacle("cuda", torch.device("cuda"))) is not None:
        return why
    card = torch.cuda.get_device_properties()
    capability = card.major, card.minor
    row = next(row for row in dispatch.TABLE if row.kernel == kernel)
    if capability < row.capability or row.newest not in (None, capability):
        return f"{kernel} is compiled for {row.newest or row.capability}, this card is {capability}"
    if card.multi_processor_count < row.sms:
        return f"{kernel} is for {row.sms} SMs or more"
    return None
