"""The skinny products of the low-rank branch, forward and backward.

    z[m, j] = sum_k drop(x)[m, k] * lora_A[j, k]
    u[m, j] = sum_n dy[m, n] * lora_B[n, j]
    d_lora_A[j, k] = s[j] * sum_m u[m, j] * drop(x)[m, k]
    d_lora_B[n, j] = s[j] * sum_m dy[m, n] * z[m, j]
    d_bias[n] = sum_m dy[m, n]
    d_lora_scaling[j] = scaling * sum_m u[m, j] * z[m, j]

x [M, K] and dy [M, N] bf16, fp16 or fp32, row-major; lora_A [r, K], lora_B [N, r] in any float
dtype, rounded to x's before use; z [M, r] in x's dtype; u [M, r] fp32, rounded to dy's dtype where
it enters a product; drop(x) regenerates its mask and is rounded to x's dtype.
Accumulates in fp32 and rounds once, on store, to the dtype of the result.
`project` contracts over features, one program per BLOCK_M rows; `reduce_tokens` over rows, one
program per BLOCK_C features. Where that makes too few programs for a GPU the contraction is cut
into slices: each writes its fp32 partial result to a workspace [slices, output], and `sum_slices`
adds them in order. No atomics, the same bits every time.
Bound by one read of x or dy at any M. Workspace: slices * r * (M, K or N) fp32, a few MB at most.
Callers have checked dtypes, devices, shapes and contiguity.
Source: dy read once for two results and sums split over rows are LoRAFusion's (Zhu et al. 2025),
which adds the parts with atomics.
"""

from __future__ import annotations

import torch

import triton
import triton.language as tl

from .common import (
    LAUNCH_OPTIONS,
    add_product,
    block_r,
    device_guard,
    dropout_arguments,
    dropout_keep,
    load_scaling,
)

# Programs to aim for: two per SM of the largest current GPUs (132 SMs).
TARGET_PROGRAMS = 264
# Tiles along the features and the rows: 128-byte lines of bf16, and few enough values per thread
# that regenerating the dropout mask does not spill. A slice is at least MIN_STEPS tiles long, or
# the partial sums cost more than they save.
BLOCK_C = 64
BLOCK_M = 64
MIN_STEPS = 4
# fp32 sums advance by short steps, each a plain sum that the running one then absorbs without loss
# (add_product): longer ones err more than twice as much as cuBLAS.
FP32_STEP = 16


@triton.jit
def load_features(
    a_ptr,  # [M, C]
    seed_ptr,  # int64 scalar; None: no dropout
    offs_m,  # int64 [BLOCK_M]
    c0,  # first column, a multiple of BLOCK_C
    M,
    C,
    p,
    keep_scale,
    BLOCK_C: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """drop(a)[offs_m, c0 : c0 + BLOCK_C] in a's dtype, 0 outside [M, C]."""
    offs_c = c0 + tl.arange(0, BLOCK_C)
    mask = (offs_m[:, None] < M) & (offs_c[None, :] < C)
    a = tl.load(a_ptr + offs_m[:, None] * C + offs_c[None, :], mask=mask, other=0.0)
    if seed_ptr is not None:
        keep = dropout_keep(seed_ptr, p, offs_m, c0, C, BLOCK_C, ALIGNED)
        a = tl.where(keep, a.to(tl.float32) * keep_scale, 0.0).to(a.dtype)
    return a


@triton.jit(do_not_specialize=["M", "slice_length"])
def project_kernel(
    a_ptr,  # [M, C]: x or dy
    lora_ptr,  # element (c, j) at c * stride_c + j * stride_j: lora_A transposed or lora_B
    seed_ptr,  # int64 scalar; None: no dropout
    out_ptr,  # [slices, M, r]
    M,
    C,
    r,
    stride_c,
    stride_j,
    slice_length,  # features per slice, a multiple of BLOCK_C
    p,
    keep_scale,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_j = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    pid_slice = tl.program_id(2)
    start = pid_slice * slice_length
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    lost = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for c0 in range(start, min(start + slice_length, C), BLOCK_C):
        a = load_features(a_ptr, seed_ptr, offs_m, c0, M, C, p, keep_scale, BLOCK_C, ALIGNED)
        offs_c = (c0 + tl.arange(0, BLOCK_C)).to(tl.int64)
        mask_l = (offs_c[:, None] < C) & (offs_j[None, :] < r)
        offs_l = offs_c[:, None] * stride_c + offs_j[None, :].to(tl.int64) * stride_j
        lora = tl.load(lora_ptr + offs_l, mask=mask_l, other=0.0)
        acc, lost = add_product(acc, lost, a, lora.to(dtype))
    offs_out = (pid_slice.to(tl.int64) * M + offs_m[:, None]) * r + offs_j[None, :]
    mask_out = (offs_m[:, None] < M) & (offs_j[None, :] < r)
    tl.store(out_ptr + offs_out, acc.to(out_ptr.dtype.element_ty), mask=mask_out)


@triton.jit(do_not_specialize=["M", "slice_length"])
def reduce_tokens_kernel(
    t_ptr,  # [M, r]: u or z
    a_ptr,  # [M, C]: x or dy
    lora_scaling_ptr,  # fp32 [r]; None: all ones
    seed_ptr,  # int64 scalar; None: no dropout
    out_ptr,  # [slices, r * C], element (j, c) of a slice at j * stride_j + c * stride_c
    column_sum_ptr,  # [slices, C]; None: not wanted
    M,
    C,
    r,
    stride_j,
    stride_c,
    slice_length,  # rows per slice, a multiple of BLOCK_M
    scaling,
    p,
    keep_scale,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    c0 = tl.program_id(0) * BLOCK_C
    offs_c = c0.to(tl.int64) + tl.arange(0, BLOCK_C)
    offs_j = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    pid_slice = tl.program_id(2).to(tl.int64)
    start = tl.program_id(2) * slice_length
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    lost = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    column_sum = tl.zeros((BLOCK_C,), tl.float32)
    for m0 in range(start, min(start + slice_length, M), BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M).to(tl.int64)
        a = load_features(a_ptr, seed_ptr, offs_m, c0, M, C, p, keep_scale, BLOCK_C, ALIGNED)
        mask_t = (offs_m[:, None] < M) & (offs_j[None, :] < r)
        t = tl.load(t_ptr + offs_m[:, None] * r + offs_j[None, :], mask=mask_t, other=0.0)
        acc, lost = add_product(acc, lost, tl.trans(t.to(dtype)), a)
        if column_sum_ptr is not None:
            column_sum += tl.sum(a.to(tl.float32), axis=0)
    acc = acc * load_scaling(lora_scaling_ptr, scaling, offs_j, r)[:, None]
    offs_out = offs_j[:, None].to(tl.int64) * stride_j + offs_c[None, :] * stride_c
    mask_out = (offs_j[:, None] < r) & (offs_c[None, :] < C)
    out_ptr += pid_slice * C * r
    tl.store(out_ptr + offs_out, acc.to(out_ptr.dtype.element_ty), mask=mask_out)
    if column_sum_ptr is not None:
        column_sum = column_sum.to(column_sum_ptr.dtype.element_ty)
        if tl.program_id(1) == 0:
            tl.store(column_sum_ptr + pid_slice * C + offs_c, column_sum, mask=offs_c < C)


@triton.jit(do_not_specialize=["M", "slice_length"])
def scaling_grad_kernel(
    u_ptr,  # fp32 [M, r]
    z_ptr,  # [M, r]
    out_ptr,  # fp32 [slices, r]
    M,
    r,
    slice_length,  # rows per slice, a multiple of BLOCK_M
    scaling,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    offs_j = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    pid_slice = tl.program_id(1)
    start = pid_slice * slice_length
    acc = tl.zeros((BLOCK_R,), tl.float32)
    for m0 in range(start, min(start + slice_length, M), BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (offs_m[:, None] < M) & (offs_j[None, :] < r)
        offs = offs_m[:, None] * r + offs_j[None, :]
        u = tl.load(u_ptr + offs, mask=mask, other=0.0)
        z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        acc += tl.sum(u * z, axis=0)
    tl.store(out_ptr + pid_slice * r + offs_j, acc * scaling, mask=offs_j < r)


@triton.jit
def sum_slices_kernel(
    partial_ptr,  # fp32 [slices, n]
    out_ptr,  # [n]
    n,
    slices,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    slice_ptr = partial_ptr + offs
    for _ in range(slices):
        acc += tl.load(slice_ptr, mask=offs < n, other=0.0)
        slice_ptr += n
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=offs < n)


def plan_slices(tiles: int, length: int, step: int) -> tuple[int, int]:
    """(number of slices, length of each) that give a GPU enough programs."""
    steps = max(1, triton.cdiv(length, step))
    wanted = max(1, min(TARGET_PROGRAMS // tiles, steps // MIN_STEPS))
    steps_per_slice = triton.cdiv(steps, wanted)
    return triton.cdiv(steps, steps_per_slice), steps_per_slice * step


def slice_buffer(out: torch.Tensor | None, slices: int) -> torch.Tensor | None:
    """Where slices write: a single one into the result, several into a workspace [slices, ...]."""
    if out is None or slices == 1:
        return out
    return torch.empty((slices, *out.shape), dtype=torch.float32, device=out.device)


def sum_slices(partial: torch.Tensor | None, out: torch.Tensor | None) -> None:
    """Add the slices in order into out, unless they were written there directly."""
    if partial is out:
        return
    block = 1024
    sum_slices_kernel[(triton.cdiv(out.numel(), block),)](
        partial, out, out.numel(), partial.shape[0], BLOCK=block, num_warps=4, **LAUNCH_OPTIONS
    )


def project(a, lora, feature_dim, out_dtype, p=0.0, seed=None) -> torch.Tensor:
    """out [M, r] = drop(a) [M, C] times lora, whose features run along dimension feature_dim."""
    M, C = a.shape
    r = lora.shape[1 - feature_dim]
    out = torch.empty((M, r), dtype=out_dtype, device=a.device)
    if out.numel() == 0:
        return out
    # 16 rows are the least tl.dot takes; decoding has few.
    rows = min(BLOCK_M, max(16, triton.next_power_of_2(M)))
    width = block_r(r)
    step = FP32_STEP if a.dtype == torch.float32 else BLOCK_C
    tiles_m, tiles_r = triton.cdiv(M, rows), triton.cdiv(r, width)
    slices, length = plan_slices(tiles_m * tiles_r, C, step)
    with device_guard(a):
        partial = slice_buffer(out, slices)
        project_kernel[(tiles_m, tiles_r, slices)](
            a_ptr=a,
            lora_ptr=lora,
            out_ptr=partial,
            M=M,
            C=C,
            r=r,
            stride_c=lora.stride(feature_dim),
            stride_j=lora.stride(1 - feature_dim),
            slice_length=length,
            **dropout_arguments(p, seed, C),
            BLOCK_M=rows,
            BLOCK_C=step,
            BLOCK_R=width,
            num_warps=4,
            num_stages=3,
            **LAUNCH_OPTIONS,
        )
        sum_slices(partial, out)
    return out


def reduce_tokens(
    t, a, out, rank_dim, lora_scaling, scaling, p=0.0, seed=None, column_sum=None
) -> None:
    """Fill out ([r, C] if rank_dim is 0, [C, r] if 1) with s[j] * sum_m t[m, j] * drop(a)[m, c].

    column_sum [C], if given, receives sum_m a[m, c] from the same pass.
    """
    M, C = a.shape
    r = t.shape[1]
    width = block_r(r)
    step = FP32_STEP if a.dtype == torch.float32 else BLOCK_M
    tiles_c, tiles_r = triton.cdiv(C, BLOCK_C), triton.cdiv(r, width)
    slices, length = plan_slices(tiles_c * tiles_r, M, step)
    with device_guard(a):
        partial, partial_sum = slice_buffer(out, slices), slice_buffer(column_sum, slices)
        reduce_tokens_kernel[(tiles_c, tiles_r, slices)](
            t_ptr=t,
            a_ptr=a,
            lora_scaling_ptr=lora_scaling,
            out_ptr=partial,
            column_sum_ptr=partial_sum,
            M=M,
            C=C,
            r=r,
            stride_j=out.stride(rank_dim),
            stride_c=out.stride(1 - rank_dim),
            slice_length=length,
            scaling=float(scaling),
            **dropout_arguments(p, seed, C),
            BLOCK_M=step,
            BLOCK_C=BLOCK_C,
            BLOCK_R=width,
            num_warps=4,
            num_stages=3,
            **LAUNCH_OPTIONS,
        )
        sum_slices(partial, out)
        sum_slices(partial_sum, column_sum)


def scaling_grad(u, z, scaling) -> torch.Tensor:
    """d_lora_scaling fp32 [r] = scaling * sum_m u[m, j] * z[m, j]."""
    M, r = u.shape
    out = torch.empty(r, dtype=torch.float32, device=u.device)
    width = block_r(r)
    tiles_r = triton.cdiv(r, width)
    slices, length = plan_slices(tiles_r, M, BLOCK_M)
    with device_guard(u):
        partial = slice_buffer(out, slices)
        scaling_grad_kernel[(tiles_r, slices)](
            u,
            z,
            partial,
            M,
            r,
            length,
            float(scaling),
            BLOCK_M=BLOCK_M,
            BLOCK_R=width,
            num_warps=4,
            **LAUNCH_OPTIONS,
        )
        sum_slices(partial, out)
    return out
