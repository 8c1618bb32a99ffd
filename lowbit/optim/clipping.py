"""The norm of all gradients in two launches per device, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.autograd.graph import increment_version

from . import reference
from .packing import host_table, is_wrapper, operators

GRADIENT_ROW = 4  # int64 numbers of the kernels' GradientRow


@torch._disable_dynamo
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    error_if_nonfinite: bool = False,
) -> torch.Tensor:
    """Scale gradients in place so that their norm over all parameters is at most max_norm.

        norm = sqrt(sum g^2)          g *= min(1, max_norm / (norm + 1e-6))

    Args:
        parameters: parameters, or one; those without a gradient are left out.
        max_norm: the largest norm allowed.
        error_if_nonfinite: raise if the norm is NaN or infinite. That waits for the device.

    Returns:
        The norm before clipping, fp32, on the first gradient's device.

    Raises:
        RuntimeError: the norm is not finite and error_if_nonfinite is set, or a gradient is sparse.
        TypeError: a gradient is a DTensor (FSDP2).

    Notes:
        torch.nn.utils.clip_grad_norm_ with the 2-norm, in two launches for the norm and one for the
        scaling, whatever the number of parameters. Squares are summed in fp64 in a fixed order:
        repeated runs give the same bits.
    """
    if isinstance(parameters, torch.Tensor):
        parameters = [parameters]
    gradients = [p.grad for p in parameters if p.grad is not None]
    for gradient in gradients:
        if gradient.layout is not torch.strided:
            raise RuntimeError(f"clip_grad_norm_ needs dense gradients, got {gradient.layout}")
        if is_wrapper(gradient):
            raise TypeError(
                f"clip_grad_norm_ needs ordinary tensors, got a {type(gradient).__name__}; "
                "torch.nn.utils.clip_grad_norm_ clips those of FSDP2"
            )
    if not gradients:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    tables = {device: _table(group) for device, group in _by_device(gradients).items()}
    norm, _ = _norm(tables, gradients[0].device)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"the norm of the gradients is {norm.item()}; set error_if_nonfinite=False to go on"
        )
    for group, table, chunks in tables.values():
        _scale(group, table, chunks, norm, float(max_norm))
    return norm


def found_nonfinite(gradients: list[torch.Tensor]) -> torch.Tensor:
    """1.0 if any gradient holds a NaN or an Inf, else 0.0; on the first gradient's device."""
    tables = {device: _table(group) for device, group in _by_device(gradients).items()}
    return _norm(tables, gradients[0].device)[1]


def _by_device(gradients: list[torch.Tensor]) -> dict[torch.device, list[torch.Tensor]]:
    groups: dict[torch.device, list[torch.Tensor]] = {}
    for gradient in gradients:
        groups.setdefault(gradient.device, []).append(gradient)
    return groups


def _kernels(gradients: list[torch.Tensor]):
    """The operators, if there are kernels for these gradients."""
    fit = all(
        g.is_contiguous() and g.dtype in (torch.float32, torch.bfloat16, torch.float16)
        for g in gradients
    )
    return operators(gradients[0].device) if fit else None


def _table(gradients: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor | None, int]:
    """(gradients, the kernels' table on their device or None, chunks)."""
    ops, device = _kernels(gradients), gradients[0].device
    if ops is None:
        return gradients, None, 0
    table = host_table(GRADIENT_ROW * len(gradients), device.type == "cuda")
    chunks = ops.gradient_table(gradients, table)
    return gradients, table.to(device, non_blocking=True), chunks


def _norm(tables: dict, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm, found_inf) over all devices, fp32 scalars on `device`."""
    parts = []
    for at, (gradients, table, chunks) in tables.items():
        if table is None:
            norm = reference.gradient_norm(gradients)
            parts.append((norm, (~norm.isfinite()).float()))
        else:
            parts.append(operators(at).gradient_norm(table, chunks))
    if len(parts) == 1:
        return parts[0]
    norms = torch.stack([norm.double().to(device) for norm, _ in parts])
    flags = torch.stack([flag.to(device) for _, flag in parts])
    return norms.square().sum().sqrt().float(), flags.max()


@torch.no_grad()
def _scale(gradients, table, chunks: int, norm: torch.Tensor, max_norm: float) -> None:
    device = gradients[0].device
    norm = norm.to(device)
    if table is not None:
        operators(device).clip_gradients(table, chunks, norm, max_norm)
        increment_version(gradients)  # a kernel that gets addresses leaves that to us
        return
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:  # mul_ may round the factor to the gradient's dtype
        wide = torch.promote_types(gradient.dtype, torch.float32)
        gradient.copy_(gradient.to(wide) * factor)
