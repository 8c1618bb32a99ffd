"""The elementwise steps of a SwiGLU MLP, forward and backward in one pass each.

    forward    h = act * u                act = RN(silu(g))
    backward   du = dh * act              dg = silu'(g) * RN(dh * u)

g, u, dh, h, du, dg contiguous, of one shape and dtype (bf16, fp16 or fp32); every line is fp32
arithmetic rounded on store, and what RN marks is rounded before it goes on, as the separate torch
operations round it; exp is the GPU's fast one, so a last bit may differ from theirs.
One program owns BLOCK elements of the flat tensors.
Bound by bytes: 3 tensors moved forward and 5 backward, where torch's operations move 5 and 11.
Callers have checked shapes and dtypes.
"""

from __future__ import annotations

import torch

import triton
import triton.language as tl

from .common import LAUNCH_OPTIONS, device_guard

BLOCK = 2048  # elements per program: 16 per thread at 4 warps


@triton.jit
def silu_mul_kernel(g_ptr, u_ptr, h_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    dtype = h_ptr.dtype.element_ty
    g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    act = (g / (1.0 + tl.exp(-g))).to(dtype).to(tl.float32)
    tl.store(h_ptr + offs, (act * u).to(dtype), mask=mask)


@triton.jit
def silu_mul_backward_kernel(
    dh_ptr,  # [n]; overwritten by dg
    g_ptr,
    u_ptr,
    du_ptr,
    n,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    dtype = du_ptr.dtype.element_ty
    dh = tl.load(dh_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    act = (g * sigmoid).to(dtype).to(tl.float32)
    tl.store(du_ptr + offs, (dh * act).to(dtype), mask=mask)
    d_act = (dh * u).to(dtype).to(tl.float32)
    dg = d_act * sigmoid * (1.0 + g * (1.0 - sigmoid))
    tl.store(dh_ptr + offs, dg.to(dtype), mask=mask)


def silu_mul_fwd(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """h = silu(g) * u."""
    h = torch.empty_like(g)
    with device_guard(g):
        grid = (triton.cdiv(g.numel(), BLOCK),)
        silu_mul_kernel[grid](g, u, h, g.numel(), BLOCK=BLOCK, num_warps=4, **LAUNCH_OPTIONS)
    return h


def silu_mul_bwd(
    dh: torch.Tensor, g: torch.Tensor, u: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dg, du); dg takes the memory of dh."""
    du = torch.empty_like(g)
    with device_guard(g):
        grid = (triton.cdiv(g.numel(), BLOCK),)
        silu_mul_backward_kernel[grid](
            dh, g, u, du, g.numel(), BLOCK=BLOCK, num_warps=4, **LAUNCH_OPTIONS
        )
    return dh, du
