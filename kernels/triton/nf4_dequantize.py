"""4-bit weight -> dense tensor.

    y[i] = RN_dtype(codebook[q[i]] * absmax[i / BLOCKSIZE])

qweight uint8, element 2i of a row in the high nibble of byte i; absmax fp32 [blocks], or uint8
codes with nested scales; codebook fp32 [16] in any order; y [N, K] bf16, fp16 or fp32.
Rows hold `columns` elements, ceil(columns / 2) bytes and blocks_per_row blocks, the last of which
may be short. A flat weight is one row of N * K elements.
The product is fp32 and rounded once, on store: bit-identical to lowbit/reference.py.
One program owns BLOCKS blocks, numbered over the whole weight, as a tile [BLOCKS, BLOCKSIZE].
Bound by bytes: 0.5 read and 2 or 4 written per element.
Callers have checked dtypes, devices and that qweight and absmax have the right number of elements.
"""

from __future__ import annotations

import torch

import triton
import triton.language as tl

from .common import LAUNCH_OPTIONS, device_guard, load_absmax, lookup, unpack, weight_arguments

# Elements per program: 16 per thread at 4 warps, so that a thread's stores are 16 bytes or more.
TILE = 2048


@triton.jit
def dequantize_kernel(
    qweight_ptr,  # uint8 [rows, bytes_per_row]
    absmax_ptr,  # fp32 or uint8 [rows, blocks_per_row]
    codebook_ptr,  # fp32 [16]
    nested_absmax_ptr,  # fp32 [ceil(blocks / NESTED_BLOCKSIZE)]; None: absmax is fp32
    nested_codebook_ptr,  # fp32 [256]; None with nested_absmax
    nested_offset_ptr,  # fp32 scalar; None with nested_absmax
    y_ptr,  # [rows, columns]
    blocks,  # rows * blocks_per_row
    columns,
    bytes_per_row,
    blocks_per_row,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    mask_block = block < blocks
    row = block // blocks_per_row
    column = (block - row * blocks_per_row) * BLOCKSIZE  # first column of the block
    absmax = load_absmax(
        absmax_ptr,
        nested_absmax_ptr,
        nested_codebook_ptr,
        nested_offset_ptr,
        block,
        mask_block,
        NESTED_BLOCKSIZE,
    )[:, None]
    offs_byte = (column // 2)[:, None] + tl.arange(0, BLOCKSIZE // 2)[None, :]
    packed = tl.load(
        qweight_ptr + row[:, None] * bytes_per_row + offs_byte,
        mask=mask_block[:, None] & (offs_byte < bytes_per_row),
        other=0,
    )
    y = lookup(codebook_ptr, unpack(packed)) * absmax
    offs_column = column[:, None] + tl.arange(0, BLOCKSIZE)[None, :]
    tl.store(
        y_ptr + row[:, None] * columns + offs_column,
        y.to(y_ptr.dtype.element_ty),
        mask=mask_block[:, None] & (offs_column < columns),
    )


def dequantize_fwd(weight, dtype: torch.dtype) -> torch.Tensor:
    """W [N, K] in dtype for the eleven weight arguments of a 4-bit weight."""
    qweight, N, K, blocksize, row_blocks = weight[0], weight[6], weight[7], weight[8], weight[10]
    y = torch.empty((N, K), dtype=dtype, device=qweight.device)
    if y.numel() == 0:
        return y
    rows, columns = (N, K) if row_blocks else (1, N * K)
    blocks_per_row = -(-columns // blocksize)
    blocks = rows * blocks_per_row
    tile_blocks = max(1, TILE // blocksize)
    arguments = weight_arguments(weight)
    pointers = {name: value for name, value in arguments.items() if name.endswith("_ptr")}
    with device_guard(y):
        dequantize_kernel[(triton.cdiv(blocks, tile_blocks),)](
            **pointers,
            y_ptr=y,
            blocks=blocks,
            columns=columns,
            bytes_per_row=-(-columns // 2),
            blocks_per_row=blocks_per_row,
            BLOCKSIZE=blocksize,
            NESTED_BLOCKSIZE=arguments["NESTED_BLOCKSIZE"],
            BLOCKS=tile_blocks,
            num_warps=4,
            **LAUNCH_OPTIONS,
        )
    return y
