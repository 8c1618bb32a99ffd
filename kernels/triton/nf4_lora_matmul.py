"""4-bit dequantize + matmul with the low-rank term in the same accumulator, and the gradient for x.

    y[m, n]  = sum_k x[m, k] * W[n, k]  +  sum_j (z[m, j] * s[j]) * lora_B[n, j]  +  bias[n]
    dx[m, k] = sum_n dy[m, n] * W[n, k]  +  drop'(sum_j (u[m, j] * s[j]) * lora_A[j, k])
    W[n, k]  = RN_dtype(codebook[q[n, k]] * absmax[block(n, k)]),  s[j] = scaling * lora_scaling[j]

x, dy, y, dx bf16, fp16 or fp32, row-major; W as in common.py: 4-bit row-aligned or flat, or a dense
float [N, K]; z [M, r] in x's dtype, u [M, r] fp32; lora_A [r, K] and lora_B [N, r] in any float
dtype, rounded to x's before use, as are z * s and u * s; bias [N] in any float dtype.
Accumulates in fp32 and rounds once, on store. fp32 operands are multiplied in fp32, never TF32.
One program owns a BLOCK_M x BLOCK_N tile of y, or BLOCK_M x BLOCK_K of dx, and walks the whole
contraction: every output is a sum in one fixed order. A weight is decoded once per BLOCK_M rows.
The low-rank term goes first: dropout can then mask it in the accumulator before the main product
lands on top.
Bound for small M by the decode's table lookups (weight bytes would be the floor up to M of about
64), above by tensor cores and the shared-memory round trip of the decoded tile.
Callers have checked dtypes, devices, shapes and contiguity.
Source: one accumulator for both terms is the algebra of LoRAFusion (Zhu et al. 2025).
"""

from __future__ import annotations

from typing import NamedTuple

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
    load_weight_tile,
    weight_arguments,
)

# Row tiles that sweep the columns together, so that their weights are read from L2 but once.
GROUP = 8


class Config(NamedTuple):
    """Tile [rows, columns] of the output, step along the contraction, and launch parameters."""

    rows: int
    columns: int
    step: int
    num_warps: int
    num_stages: int


# (largest M, config). 16 rows are the least tl.dot takes; below 17 rows narrow tiles give N = 4096
# one program per SM. fp32 products run on the FMA units out of registers, so their tiles stay
# small. A flat weight computes an address per element; pipelining that needs more registers and
# shared memory than it is worth. Not yet tuned by measurement.
CONFIGS_16BIT = (
    (16, Config(16, 32, 128, 4, 4)),
    (64, Config(64, 64, 64, 4, 3)),
    (None, Config(128, 128, 64, 8, 3)),
)
CONFIGS_32BIT = ((16, Config(16, 32, 32, 4, 2)), (None, Config(64, 32, 32, 8, 2)))
CONFIGS_FLAT = ((16, Config(16, 32, 32, 4, 1)), (None, Config(64, 32, 32, 4, 1)))


def choose_config(M: int, dtype: torch.dtype, flat: bool) -> Config:
    """The first configuration whose range holds M."""
    table = CONFIGS_32BIT if dtype == torch.float32 else CONFIGS_FLAT if flat else CONFIGS_16BIT
    return next(config for limit, config in table if limit is None or limit >= M)


@triton.jit
def tile_position(M, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile) of this program: GROUP row tiles sweep the columns together."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_c = tl.cdiv(C, BLOCK_C)
    first_m = pid // (GROUP * tiles_c) * GROUP
    group_m = min(tiles_m - first_m, GROUP)
    within = pid % (GROUP * tiles_c)
    return first_m + within % group_m, within // group_m


@triton.jit
def low_rank_term(
    t_ptr,  # [M, r]
    lora_scaling_ptr,  # fp32 [r]; None: all ones
    lora_ptr,  # element (j, c) at j * stride_j + c * stride_c
    offs_m,  # int64 [BLOCK_M]
    offs_c,  # int64 [BLOCK_C]
    M,
    C,
    r,
    stride_j,
    stride_c,
    scaling,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """sum_j (t[m, j] * s[j]) * lora[j, c], fp32 [BLOCK_M, BLOCK_C]."""
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for j0 in range(0, r, BLOCK_R):
        offs_j = j0 + tl.arange(0, BLOCK_R)
        mask_t = (offs_m[:, None] < M) & (offs_j[None, :] < r)
        t = tl.load(t_ptr + offs_m[:, None] * r + offs_j[None, :], mask=mask_t, other=0.0).to(
            tl.float32
        )
        t = t * load_scaling(lora_scaling_ptr, scaling, offs_j, r)[None, :]
        mask_l = (offs_j[:, None] < r) & (offs_c[None, :] < C)
        offs_l = offs_j[:, None].to(tl.int64) * stride_j + offs_c[None, :] * stride_c
        lora = tl.load(lora_ptr + offs_l, mask=mask_l, other=0.0)
        acc = tl.dot(t.to(DTYPE), lora.to(DTYPE), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    x_ptr,  # [M, K]
    qweight_ptr,  # uint8 [N, bytes_per_row] or flat; float [N, K] when codebook_ptr is None
    absmax_ptr,  # fp32 or uint8 [blocks]; None: dense weight
    codebook_ptr,  # fp32 [16]; None: dense weight
    nested_absmax_ptr,  # fp32 [ceil(blocks / NESTED_BLOCKSIZE)]; None: absmax is fp32
    nested_codebook_ptr,  # fp32 [256]; None with nested_absmax
    nested_offset_ptr,  # fp32 scalar; None with nested_absmax
    bias_ptr,  # [N]; None: no bias
    z_ptr,  # [M, r]; None: no low-rank term
    lora_B_ptr,  # [N, r]; None with z
    lora_scaling_ptr,  # fp32 [r]; None: all ones
    y_ptr,  # [M, N]
    M,
    N,
    K,
    r,
    scaling,
    bytes_per_row,
    blocks_per_row,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tile_m, tile_n = tile_position(M, N, BLOCK_M, BLOCK_N, GROUP)
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    if z_ptr is not None:
        acc = low_rank_term(
            z_ptr, lora_scaling_ptr, lora_B_ptr, offs_m, offs_n, M, N, r, 1, r, scaling,
            BLOCK_M, BLOCK_N, BLOCK_R, dtype,
        )  # fmt: skip
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    lost = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask_x = (offs_m[:, None] < M) & (offs_k[None, :] < K)
        x = tl.load(x_ptr + offs_m[:, None] * K + offs_k[None, :], mask=mask_x, other=0.0)
        weight = load_weight_tile(  # [BLOCK_N, BLOCK_K]
            qweight_ptr, absmax_ptr, codebook_ptr, nested_absmax_ptr, nested_codebook_ptr,
            nested_offset_ptr, offs_n, k0, N, K, bytes_per_row, blocks_per_row,
            BLOCKSIZE, NESTED_BLOCKSIZE, FLAT, BLOCK_N, BLOCK_K, dtype,
        )  # fmt: skip
        acc, lost = add_product(acc, lost, x, tl.trans(weight))
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    mask_y = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(dtype), mask=mask_y)


@triton.jit(do_not_specialize=["M"])
def matmul_dx_kernel(
    dy_ptr,  # [M, N]
    qweight_ptr,  # the weight as in matmul_kernel
    absmax_ptr,
    codebook_ptr,
    nested_absmax_ptr,
    nested_codebook_ptr,
    nested_offset_ptr,
    u_ptr,  # fp32 [M, r]; None: no low-rank term
    lora_A_ptr,  # [r, K]; None with u
    lora_scaling_ptr,  # fp32 [r]; None: all ones
    seed_ptr,  # int64 scalar; None: no dropout
    dx_ptr,  # [M, K]
    M,
    N,
    K,
    r,
    scaling,
    p,
    keep_scale,  # 1 / (1 - p)
    bytes_per_row,
    blocks_per_row,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    tile_m, tile_k = tile_position(M, K, BLOCK_M, BLOCK_K, GROUP)
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k0 = tile_k * BLOCK_K
    offs_k = k0.to(tl.int64) + tl.arange(0, BLOCK_K)
    if u_ptr is not None:
        acc = low_rank_term(
            u_ptr, lora_scaling_ptr, lora_A_ptr, offs_m, offs_k, M, K, r, K, 1, scaling,
            BLOCK_M, BLOCK_K, BLOCK_R, dtype,
        )  # fmt: skip
        if seed_ptr is not None:
            keep = dropout_keep(seed_ptr, p, offs_m, k0, K, BLOCK_K, ALIGNED)
            acc = tl.where(keep, acc * keep_scale, 0.0)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    lost = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        offs_n = n0 + tl.arange(0, BLOCK_N).to(tl.int64)
        mask_dy = (offs_m[:, None] < M) & (offs_n[None, :] < N)
        dy = tl.load(dy_ptr + offs_m[:, None] * N + offs_n[None, :], mask=mask_dy, other=0.0)
        weight = load_weight_tile(  # [BLOCK_N, BLOCK_K]
            qweight_ptr, absmax_ptr, codebook_ptr, nested_absmax_ptr, nested_codebook_ptr,
            nested_offset_ptr, offs_n, k0, N, K, bytes_per_row, blocks_per_row,
            BLOCKSIZE, NESTED_BLOCKSIZE, FLAT, BLOCK_N, BLOCK_K, dtype,
        )  # fmt: skip
        acc, lost = add_product(acc, lost, dy, weight)
    mask_dx = (offs_m[:, None] < M) & (offs_k[None, :] < K)
    tl.store(dx_ptr + offs_m[:, None] * K + offs_k[None, :], acc.to(dtype), mask=mask_dx)


def _launch(kernel, out, factor, columns: str, step: str, **arguments) -> None:
    """Fill out [M, N or K]: `columns` says which, `step` what the contraction runs along. factor is
    z or u [M, r], None without the low-rank term.
    """
    if out.numel() == 0:
        return
    M, r = out.shape[0], 0 if factor is None else factor.shape[1]
    config = choose_config(M, out.dtype, arguments["FLAT"])
    tile = {f"BLOCK_{columns}": config.columns, f"BLOCK_{step}": config.step}
    grid = (triton.cdiv(M, config.rows) * triton.cdiv(out.shape[1], config.columns),)
    with device_guard(out):
        kernel[grid](
            M=M,
            r=r,
            **arguments,
            BLOCK_M=config.rows,
            **tile,
            BLOCK_R=block_r(r),
            GROUP=GROUP,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **LAUNCH_OPTIONS,
        )


def matmul_fwd(
    x, weight, bias=None, z=None, lora_B=None, lora_scaling=None, scaling=1.0
) -> torch.Tensor:
    """y [M, N] in x's dtype; z None leaves the low-rank term out."""
    weight = weight_arguments(weight)
    y = torch.empty((x.shape[0], weight["N"]), dtype=x.dtype, device=x.device)
    _launch(
        matmul_kernel, y, z, "N", "K", x_ptr=x, bias_ptr=bias, z_ptr=z, lora_B_ptr=lora_B,
        lora_scaling_ptr=lora_scaling, y_ptr=y, scaling=float(scaling), **weight,
    )  # fmt: skip
    return y


def matmul_dx(
    dy, weight, u=None, lora_A=None, lora_scaling=None, scaling=1.0, p=0.0, seed=None
) -> torch.Tensor:
    """dx [M, K] in dy's dtype; u None leaves the low-rank term out."""
    weight = weight_arguments(weight)
    dx = torch.empty((dy.shape[0], weight["K"]), dtype=dy.dtype, device=dy.device)
    _launch(
        matmul_dx_kernel, dx, u, "K", "N", dy_ptr=dy, u_ptr=u, lora_A_ptr=lora_A,
        lora_scaling_ptr=lora_scaling, dx_ptr=dx, scaling=float(scaling),
        **dropout_arguments(p, seed, weight["K"]), **weight,
    )  # fmt: skip
    return dx
