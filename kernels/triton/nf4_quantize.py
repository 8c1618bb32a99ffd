"""Dense tensor -> 4-bit weight, and 8-bit codes for its scales.

    absmax[b] = max |w| over block b
    q         = order[#{j : x > thresholds[j]}]   with x = w * (1 / max(absmax, 1e-38))
    code[b]   = #{j : x > nested_thresholds[j]}   with x = c * (1 / max(nested_absmax, 1e-38)),
                c = absmax[b] - offset, nested_absmax = max |c| over nested_blocksize scales

w [rows, columns] bf16, fp16 or fp32, row-major; thresholds fp32 [15] ascending; order uint8 [16];
qweight uint8 [rows, ceil(columns / 2)], element 2i in the high nibble; absmax fp32
[rows, blocks_per_row]. A flat weight is one row. Short last blocks and the last nibble of an odd
row behave as if w were padded with zeros.
All arithmetic is fp32; the reciprocal is correctly rounded, then multiplied: bit-identical to
lowbit/reference.py. The maximum is taken over bit patterns, whose integer order is that of |w| with
Inf and NaN on top, so those reach absmax.
One program owns BLOCKS blocks of w; in the second kernel, one block of nested_blocksize scales.
Bound by the bytes of w (2 or 4 read and 0.5 written per element), next by some 40 instructions per
element.
The offset is torch's mean, which is deterministic.
Callers have checked dtypes, devices and blocksizes.
"""

from __future__ import annotations

import torch

import triton
import triton.language as tl

from .common import LAUNCH_OPTIONS, device_guard, lookup

TILE = 2048  # elements per program, 8 per thread at 8 warps (twice that for blocksize 4096)
# Smallest divisor, as in lowbit/reference.py: a zero block stays zero, 1 / absmax cannot overflow.
ABSMAX_FLOOR = tl.constexpr(1e-38)
NESTED_ENTRIES = tl.constexpr(256)


@triton.jit
def absolute_maximum(values):
    """max |values| along the last axis, fp32; NaN beats Inf beats everything."""
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def reciprocal(absmax):
    """1 / max(absmax, ABSMAX_FLOOR), correctly rounded."""
    # tl.full, since the floor is subnormal and a bare literal of that size becomes float64.
    divisor = tl.maximum(absmax, tl.full(absmax.shape, ABSMAX_FLOOR, tl.float32))
    return tl.math.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)


@triton.jit
def quantize_kernel(
    weight_ptr,  # [rows, columns]
    thresholds_ptr,  # fp32 [15] ascending
    order_ptr,  # uint8 [16]
    qweight_ptr,  # uint8 [rows, bytes_per_row]
    absmax_ptr,  # fp32 [rows, blocks_per_row]
    blocks,  # rows * blocks_per_row
    columns,
    bytes_per_row,
    blocks_per_row,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    mask_block = block < blocks
    row = block // blocks_per_row
    column = (block - row * blocks_per_row) * BLOCKSIZE  # first column of the block
    offs_column = column[:, None] + tl.arange(0, BLOCKSIZE)[None, :]
    values = tl.load(
        weight_ptr + row[:, None] * columns + offs_column,
        mask=mask_block[:, None] & (offs_column < columns),
        other=0.0,
    ).to(tl.float32)  # [BLOCKS, BLOCKSIZE]
    absmax = absolute_maximum(values)
    tl.store(absmax_ptr + block, absmax, mask=mask_block)
    scaled = values * reciprocal(absmax)[:, None]
    rank = tl.zeros((BLOCKS, BLOCKSIZE), tl.int32)
    for j in tl.static_range(15):
        rank += (scaled > tl.load(thresholds_ptr + j)).to(tl.int32)
    code = lookup(order_ptr, rank)
    high, low = tl.split(tl.reshape(code, (BLOCKS, BLOCKSIZE // 2, 2)))
    offs_byte = (column // 2)[:, None] + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(
        qweight_ptr + row[:, None] * bytes_per_row + offs_byte,
        (high << 4) | low,
        mask=mask_block[:, None] & (offs_byte < bytes_per_row),
    )


@triton.jit
def quantize_absmax_kernel(
    absmax_ptr,  # fp32 [blocks]
    offset_ptr,  # fp32 scalar
    thresholds_ptr,  # fp32 [255] ascending
    code_ptr,  # uint8 [blocks]
    nested_absmax_ptr,  # fp32 [ceil(blocks / NESTED_BLOCKSIZE)]
    blocks,
    NESTED_BLOCKSIZE: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    offs = pid * NESTED_BLOCKSIZE + tl.arange(0, NESTED_BLOCKSIZE)[None, :]
    mask = offs < blocks
    absmax = tl.load(absmax_ptr + offs, mask=mask, other=0.0)
    centred = tl.where(mask, absmax - tl.load(offset_ptr), 0.0)  # [1, NESTED_BLOCKSIZE]
    nested_absmax = absolute_maximum(centred)
    tl.store(nested_absmax_ptr + pid + tl.arange(0, 1), nested_absmax)
    scaled = centred * reciprocal(nested_absmax)[:, None]
    # Binary search for the number of thresholds below: the answer has 8 bits, settled from the top.
    code = tl.zeros((1, NESTED_BLOCKSIZE), tl.int32)
    step: tl.constexpr = NESTED_ENTRIES // 2
    for bit in tl.static_range(8):
        candidate = code + (step >> bit)
        code = tl.where(scaled > tl.load(thresholds_ptr + candidate - 1), candidate, code)
    tl.store(code_ptr + offs, code.to(tl.uint8), mask=mask)


def quantize_fwd(weight, thresholds, order, blocksize, row_blocks):
    """(qweight uint8 [N, ceil(K/2)] or flat, absmax fp32 [blocks]) of a contiguous [N, K]."""
    N, K = weight.shape
    rows, columns = (N, K) if row_blocks else (1, N * K)
    bytes_per_row = -(-columns // 2)
    blocks_per_row = -(-columns // blocksize)
    blocks = rows * blocks_per_row
    shape = (rows, bytes_per_row) if row_blocks else (bytes_per_row,)
    qweight = torch.empty(shape, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    if blocks == 0:
        return qweight, absmax
    tile_blocks = max(1, TILE // blocksize)
    with device_guard(weight):
        quantize_kernel[(triton.cdiv(blocks, tile_blocks),)](
            weight,
            thresholds,
            order,
            qweight,
            absmax,
            blocks,
            columns,
            bytes_per_row,
            blocks_per_row,
            BLOCKSIZE=blocksize,
            BLOCKS=tile_blocks,
            num_warps=8,
            **LAUNCH_OPTIONS,
        )
    return qweight, absmax


def quantize_absmax_fwd(absmax, nested_thresholds, nested_blocksize):
    """(codes uint8, nested_absmax fp32, nested_offset fp32 scalar) of absmax fp32 [blocks]."""
    blocks = absmax.numel()
    offset = absmax.mean() if blocks else absmax.new_zeros(())
    codes = torch.empty(blocks, dtype=torch.uint8, device=absmax.device)
    nested_absmax = torch.empty(
        -(-blocks // nested_blocksize), dtype=torch.float32, device=absmax.device
    )
    if blocks == 0:
        return codes, nested_absmax, offset
    with device_guard(absmax):
        quantize_absmax_kernel[(nested_absmax.numel(),)](
            absmax,
            offset,
            nested_thresholds,
            codes,
            nested_absmax,
            blocks,
            NESTED_BLOCKSIZE=nested_blocksize,
            num_warps=8,
            **LAUNCH_OPTIONS,
        )
    return codes, nested_absmax, offset
