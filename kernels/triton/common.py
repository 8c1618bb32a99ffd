"""What every Triton kernel of lowbit shares: 4-bit weights, nested scales, the dropout mask.

    W[n, k] = RN_dtype(codebook[q[n, k]] * absmax[block(n, k)])
    absmax  = nested_codebook[code] * nested_absmax[block / NESTED_BLOCKSIZE] + nested_offset
    keep[m, c] = uniform(Philox(seed, (m * C + c) / 4), word (m * C + c) % 4) >= p

qweight uint8, element 2i in the high nibble of byte i; absmax fp32 or uint8 codes; codebook fp32
[16]. Row-aligned weights restart bytes and blocks with each row; flat ones number them over the
whole weight, across rows. A weight without a codebook is dense: qweight is then the [N, K] float
tensor itself.

The product and the sum of a nested scale must be rounded separately, and no product may be joined
to a later addition. Triton contracts such pairs into one FMA by default, so every launch passes
LAUNCH_OPTIONS. The matrix products do not suffer: tl.dot names its fused operations itself.

Under TRITON_INTERPRET=1 the same code runs on CPU tensors. The interpreter of triton 3.8 rounds
fp32 -> bf16 toward zero and multiplies bf16 tiles as integers, so bf16 can be judged on a GPU only.
"""

from __future__ import annotations

import contextlib

import torch

import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret
LAUNCH_OPTIONS = {"enable_fp_fusion": False}

# Low-rank tiles: tl.dot needs at least 16 columns, and wider ones than 64 would spill registers.
MIN_BLOCK_R = 16
MAX_BLOCK_R = 64


@triton.jit
def add_product(acc, lost, a, b):
    """(acc + a @ b, what rounding lost), all fp32.

    fp32 operands add tile by tile with Kahan's correction: one running sum over thousands of terms
    would err several times more than cuBLAS, which cuts the contraction up. The subtraction also
    keeps Triton from folding the sum back into the product. 16-bit operands need none of it, since
    their own rounding dominates; `lost` then stays the constant it came in as.
    """
    if a.dtype == tl.float32:
        part = tl.dot(a, b, input_precision="ieee") - lost
        total = acc + part
        lost = (total - acc) - part
        acc = total
    else:
        acc = tl.dot(a, b, acc)
    return acc, lost


@triton.jit
def load_absmax(
    absmax_ptr,  # fp32 [blocks], or uint8 [blocks] codes if double-quantized
    nested_absmax_ptr,  # fp32 [ceil(blocks / NESTED_BLOCKSIZE)]; None: absmax is plain
    nested_codebook_ptr,  # fp32 [256]; None with nested_absmax
    nested_offset_ptr,  # fp32 scalar; None with nested_absmax
    block,  # integer tile of block numbers
    mask,  # tile of the same shape; where False the result is finite but meaningless
    NESTED_BLOCKSIZE: tl.constexpr,
):
    """Scales of the given blocks, fp32."""
    absmax = tl.load(absmax_ptr + block, mask=mask, other=0)
    if nested_absmax_ptr is not None:
        value = tl.load(nested_codebook_ptr + absmax.to(tl.int32))
        scale = tl.load(nested_absmax_ptr + block // NESTED_BLOCKSIZE, mask=mask, other=0.0)
        absmax = value * scale + tl.load(nested_offset_ptr)
    return absmax


@triton.jit
def unpack(packed):
    """Codes int32 [..., 2n] of packed bytes [..., n].

    The nibbles are brought side by side before anything else is done with them, not as the last
    step: triton 3.6 moves a reshape that feeds tl.dot directly into the shared-memory operand and
    then rejects the layout it made ("Illegal shared layout", sm_90 with 64 rows and more).
    """
    return tl.interleave(packed >> 4, packed & 15).to(tl.int32)


@triton.jit
def lookup(
    table_ptr,  # [16]
    code,  # int32 tile
):
    """table[code].

    tl.gather keeps the table in shared memory, 16 words in 16 banks: one read without conflicts per
    element, whatever the codes. Loading from table_ptr + code instead takes 64-bit addresses and a
    third more instructions for the whole product (SASS counted for sm_90, triton 3.6).
    """
    table = tl.load(table_ptr + tl.arange(0, 16))
    return tl.reshape(tl.gather(table, tl.ravel(code), 0), code.shape)


@triton.jit
def load_row_tile(
    qweight_ptr,
    absmax_ptr,
    codebook_ptr,
    nested_absmax_ptr,
    nested_codebook_ptr,
    nested_offset_ptr,
    offs_n,  # int64 [BLOCK_N]
    k0,  # first column, a multiple of BLOCK_K
    N,
    bytes_per_row,
    blocks_per_row,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Tile [BLOCK_N, BLOCK_K] of a row-aligned weight; each byte is read once."""
    # Columns of the tile that share a scale: BLOCKSIZE of them, or all when a block is wider than
    # the tile.
    GROUP: tl.constexpr = BLOCKSIZE if BLOCKSIZE < BLOCK_K else BLOCK_K
    mask_n = offs_n[:, None] < N
    offs_byte = k0 // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
    offs_block = k0 // BLOCKSIZE + tl.arange(0, BLOCK_K // GROUP)[None, :]
    packed = tl.load(
        qweight_ptr + offs_n[:, None] * bytes_per_row + offs_byte,
        mask=mask_n & (offs_byte < bytes_per_row),
        other=0,
    )  # [BLOCK_N, BLOCK_K / 2]
    absmax = load_absmax(
        absmax_ptr,
        nested_absmax_ptr,
        nested_codebook_ptr,
        nested_offset_ptr,
        offs_n[:, None] * blocks_per_row + offs_block,
        mask_n & (offs_block < blocks_per_row),
        NESTED_BLOCKSIZE,
    )  # [BLOCK_N, BLOCK_K / GROUP]
    if GROUP < BLOCK_K:
        absmax = tl.broadcast_to(absmax[:, :, None], (BLOCK_N, BLOCK_K // GROUP, GROUP))
        absmax = tl.reshape(absmax, (BLOCK_N, BLOCK_K))
    return (lookup(codebook_ptr, unpack(packed)) * absmax).to(DTYPE)


@triton.jit
def load_flat_tile(
    qweight_ptr,
    absmax_ptr,
    codebook_ptr,
    nested_absmax_ptr,
    nested_codebook_ptr,
    nested_offset_ptr,
    offs_n,  # int64 [BLOCK_N]
    k0,
    N,
    K,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The same tile of a flat weight: nibble and block are found element by element."""
    offs_k = k0 + tl.arange(0, BLOCK_K)[None, :]
    mask = (offs_n[:, None] < N) & (offs_k < K)
    # A row starts anywhere in a byte and a block. 64-bit numbers stay in one column; inside a row
    # 32 bits suffice.
    start = offs_n[:, None] * K
    nibble = (start % 2).to(tl.int32) + offs_k
    within_block = (start % BLOCKSIZE).to(tl.int32) + offs_k
    packed = tl.load(qweight_ptr + start // 2 + nibble // 2, mask=mask, other=0).to(tl.int32)
    absmax = load_absmax(
        absmax_ptr,
        nested_absmax_ptr,
        nested_codebook_ptr,
        nested_offset_ptr,
        start // BLOCKSIZE + within_block // BLOCKSIZE,
        mask,
        NESTED_BLOCKSIZE,
    )
    code = tl.where(nibble % 2 == 0, packed >> 4, packed & 15)
    return (lookup(codebook_ptr, code) * absmax).to(DTYPE)


@triton.jit
def load_weight_tile(
    qweight_ptr,  # uint8 packed codes, or float [N, K] when codebook_ptr is None
    absmax_ptr,  # see load_absmax; None when dense
    codebook_ptr,  # fp32 [16]; None: dense weight
    nested_absmax_ptr,
    nested_codebook_ptr,
    nested_offset_ptr,
    offs_n,  # int64 [BLOCK_N] rows
    k0,  # first column, a multiple of BLOCK_K
    N,
    K,
    bytes_per_row,  # ceil(K / 2)
    blocks_per_row,  # ceil(K / BLOCKSIZE)
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    FLAT: tl.constexpr,  # blocks cross rows
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """W[offs_n, k0 : k0 + BLOCK_K] in DTYPE.

    Outside [N, K] the values are meaningless but finite, so zeros in the other operand suffice.
    """
    if codebook_ptr is None:
        offs_k = k0 + tl.arange(0, BLOCK_K)[None, :]
        mask = (offs_n[:, None] < N) & (offs_k < K)
        weight = tl.load(qweight_ptr + offs_n[:, None] * K + offs_k, mask=mask, other=0.0).to(DTYPE)
    elif FLAT:
        weight = load_flat_tile(
            qweight_ptr, absmax_ptr, codebook_ptr, nested_absmax_ptr, nested_codebook_ptr,
            nested_offset_ptr, offs_n, k0, N, K, BLOCKSIZE, NESTED_BLOCKSIZE, BLOCK_K, DTYPE,
        )  # fmt: skip
    else:
        weight = load_row_tile(
            qweight_ptr, absmax_ptr, codebook_ptr, nested_absmax_ptr, nested_codebook_ptr,
            nested_offset_ptr, offs_n, k0, N, bytes_per_row, blocks_per_row,
            BLOCKSIZE, NESTED_BLOCKSIZE, BLOCK_N, BLOCK_K, DTYPE,
        )  # fmt: skip
    return weight


@triton.jit
def load_scaling(
    lora_scaling_ptr,  # fp32 [r]; None: all ones
    scaling,
    offs_j,
    r,
):
    """s[j] = scaling * lora_scaling[j], fp32, 0 beyond r."""
    s = tl.where(offs_j < r, scaling, 0.0).to(tl.float32)
    if lora_scaling_ptr is not None:
        s = s * tl.load(lora_scaling_ptr + offs_j, mask=offs_j < r, other=0.0)
    return s


@triton.jit
def philox_words(seed, counter):
    """Words 0..3 of Philox4x32-10 for int64 counters [..., n], in order: uint32 [..., 4n]."""
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, low * 0, low * 0)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def is_kept(word, p):
    """Whether the element that drew this uint32 word survives. Exact: the number has 24 bits."""
    return (word >> 8).to(tl.float32) * (2.0**-24) >= p


@triton.jit
def dropout_keep(
    seed_ptr,  # int64 scalar
    p,
    offs_m,  # int64 [BLOCK_M] rows
    c0,  # first column, a multiple of 4
    C,  # columns of the whole matrix
    BLOCK_C: tl.constexpr,
    ALIGNED: tl.constexpr,  # C % 4 == 0: four neighbours share one Philox block
):
    """Keep mask [BLOCK_M, BLOCK_C] of a [M, C] matrix."""
    seed = tl.load(seed_ptr)
    if ALIGNED:
        counter = offs_m[:, None] * (C // 4) + (c0 // 4 + tl.arange(0, BLOCK_C // 4))[None, :]
        keep = is_kept(philox_words(seed, counter), p)
    else:
        element = offs_m[:, None] * C + (c0 + tl.arange(0, BLOCK_C))[None, :]
        counter = element // 4
        low = counter.to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, low, (counter >> 32).to(tl.uint32), low * 0, low * 0)
        lane = element % 4
        word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
        keep = is_kept(word, p)
    return keep


def weight_arguments(weight) -> dict:
    """Kernel arguments for the eleven arguments by which operations take a weight."""
    qweight, absmax, codebook, nested_absmax, nested_codebook, nested_offset, N, K, *rest = weight
    blocksize, nested_blocksize, row_blocks = rest
    nested = nested_absmax is not None and nested_absmax.numel() > 0
    dense = absmax is None
    return {
        "qweight_ptr": qweight,
        "absmax_ptr": absmax,
        "codebook_ptr": None if dense else codebook,
        "nested_absmax_ptr": nested_absmax if nested else None,
        "nested_codebook_ptr": nested_codebook if nested else None,
        "nested_offset_ptr": nested_offset if nested else None,
        "N": N,
        "K": K,
        "bytes_per_row": -(-K // 2),
        "blocks_per_row": 0 if dense else -(-K // blocksize),
        "BLOCKSIZE": 0 if dense else blocksize,
        "NESTED_BLOCKSIZE": nested_blocksize if nested else 0,
        "FLAT": not dense and not row_blocks and K % blocksize != 0,
    }


def dropout_arguments(p: float, seed: torch.Tensor | None, columns: int) -> dict:
    """Kernel arguments for dropout on a matrix with that many columns; p = 0 compiles it away."""
    active = p > 0
    return {
        "seed_ptr": seed if active else None,
        "p": float(p),
        "keep_scale": 1.0 / (1.0 - p),
        "ALIGNED": columns % 4 == 0,
    }


def block_r(r: int) -> int:
    """Tile width for rank r."""
    return min(MAX_BLOCK_R, max(MIN_BLOCK_R, triton.next_power_of_2(r)))


def device_guard(tensor: torch.Tensor):
    """Make the tensor's GPU current: Triton launches on the current device and stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
