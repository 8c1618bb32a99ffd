"""The definition of every operation, in plain torch, for any device and dtype.

Nothing here is fast and nothing is clever: these functions say what the kernels must compute.
Arithmetic whose bits are promised (quantize, dequantize, the dropout mask) is spelled out step by
step; products are ordinary matmuls.

A weight is W[n, k] = codebook[q[n, k]] * absmax[block(n, k)]. Its two layouts:

    row_blocks=True   row n occupies ceil(K/2) bytes and ceil(K/blocksize) blocks; the last block of
                      a row may be short
    row_blocks=False  nibbles and blocks run over the flattened weight and may cross rows
                      (bitsandbytes)

They coincide when K is a multiple of the blocksize. Element 2i is the high nibble of byte i.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .codebooks import nested_thresholds

# Smallest divisor, as in bitsandbytes: an all-zero block divides by this and stays zero, 1/amax
# never overflows.
ABSMAX_FLOOR = 1e-38


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes [..., n] (0..15) two per byte, first one high: uint8 [..., ceil(n/2)]. Odd n pads
    with code 0.
    """
    codes = codes.to(torch.uint8)
    if codes.shape[-1] % 2:
        codes = F.pad(codes, (0, 1))
    return (codes[..., 0::2] << 4) | codes[..., 1::2]


def unpack(packed: torch.Tensor, n: int | None = None) -> torch.Tensor:
    """Separate nibbles: uint8 [..., b] -> uint8 [..., n], n = 2b unless given."""
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).flatten(-2)
    return codes if n is None else codes[..., :n]


def as_rows(n_rows: int, n_columns: int, row_blocks: bool) -> tuple[int, int]:
    """Rows and columns over which nibbles and blocks run: the flat layout is one long row."""
    return (n_rows, n_columns) if row_blocks else (1, n_rows * n_columns)


def quantize_4bit(weight, thresholds, order, blocksize, row_blocks=True):
    """Blockwise 4-bit quantization of weight [N, K]: (packed bytes, absmax fp32 [blocks])."""
    rows, columns = as_rows(*weight.shape, row_blocks)
    values = weight.reshape(rows, columns).float()
    blocks = -(-columns // blocksize)
    padded = F.pad(values, (0, blocks * blocksize - columns)).view(rows, blocks, blocksize)
    absmax = padded.abs().amax(dim=-1)  # NaN propagates
    scaled = padded * (1.0 / absmax.clamp(min=ABSMAX_FLOOR)).unsqueeze(-1)
    rank = torch.bucketize(scaled, thresholds)  # number of thresholds strictly below
    # An odd row is padded by the code of 0: blocksize is even, so the padded block holds one more
    # zero.
    codes = order.to(torch.int64)[rank].view(rows, blocks * blocksize)
    codes = codes[:, : columns + columns % 2]
    packed = pack(codes)
    return (packed if row_blocks else packed.view(-1)), absmax.view(-1)


def quantize_absmax(absmax, nested_codebook, nested_blocksize):
    """Second quantization: (codes uint8 [blocks], nested_absmax fp32, nested_offset fp32 scalar).

    offset = mean(absmax); the centred values are quantized blockwise to the nearest entry of the
    ascending 8-bit codebook, ties to the even code, after multiplication by the reciprocal of the
    block's absolute maximum.
    """
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    centred = absmax - offset
    blocks = -(-centred.numel() // nested_blocksize)
    padded = F.pad(centred, (0, blocks * nested_blocksize - centred.numel())).view(
        blocks, nested_blocksize
    )
    nested_absmax = padded.abs().amax(dim=-1) if blocks else centred.new_zeros(0)
    scaled = padded * (1.0 / nested_absmax.clamp(min=ABSMAX_FLOOR)).unsqueeze(-1)
    codes = torch.bucketize(scaled, nested_thresholds(nested_codebook)).to(torch.uint8)
    return codes.view(-1)[: absmax.numel()], nested_absmax, offset


def decode_absmax(absmax, nested_absmax, nested_codebook, nested_offset, nested_blocksize):
    """absmax fp32 [blocks] of a plain or double-quantized weight; the product and the sum are
    rounded separately.
    """
    if nested_absmax is None or nested_absmax.numel() == 0:
        return absmax
    scale = nested_absmax.repeat_interleave(nested_blocksize)[: absmax.numel()]
    return nested_codebook[absmax.to(torch.int64)] * scale + nested_offset


def dequantize_4bit(
    qweight, absmax, codebook, nested_absmax, nested_codebook, nested_offset,
    N, K, blocksize, nested_blocksize, row_blocks, dtype,
):  # fmt: skip
    """W [N, K] = RN_dtype(codebook[q] * absmax): one fp32 product, one rounding."""
    if absmax is None:
        return qweight.to(dtype)
    scale = decode_absmax(absmax, nested_absmax, nested_codebook, nested_offset, nested_blocksize)
    rows, columns = as_rows(N, K, row_blocks)
    codes = unpack(qweight.reshape(rows, -(-columns // 2)), columns)
    values = codebook[codes.to(torch.int64)]
    blocks = -(-columns // blocksize)
    scale = scale.view(rows, blocks).repeat_interleave(blocksize, dim=1)[:, :columns]
    return (values * scale).to(dtype).view(N, K)


def philox_4x32(seed: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    """Philox4x32-10: counter int64 [n] (each < 2^64) -> int64 [n, 4] words below 2^32.

    Key = (low, high) half of the int64 seed, counter = (low, high, 0, 0). Source: Salmon et al.
    2011, Random123.
    """
    mask = 0xFFFFFFFF
    key0, key1 = seed.view(-1)[0] & mask, (seed.view(-1)[0] >> 32) & mask
    c0, c1 = counter & mask, (counter >> 32) & mask
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(c0, 0xD2511F53)
        hi2, lo2 = _mul_hi_lo(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi2 ^ c1 ^ key0, lo2, hi0 ^ c3 ^ key1, lo0
        key0, key1 = (key0 + 0x9E3779B9) & mask, (key1 + 0xBB67AE85) & mask
    return torch.stack([c0, c1, c2, c3], dim=-1)


def _mul_hi_lo(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Halves of the 64-bit product of two 32-bit numbers, without leaving int64."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    middle = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def dropout_mask(m: int, k: int, p: float, seed: torch.Tensor) -> torch.Tensor:
    """Boolean keep mask [m, k]: element i = m*K + k takes word i%4 of Philox block i//4 and is kept
    iff u >= p.
    """
    n = m * k
    words = philox_4x32(seed, torch.arange(-(-n // 4), device=seed.device)).view(-1)[:n]
    uniform = (words >> 8).float() * 2.0**-24
    return (uniform >= torch.tensor(p, dtype=torch.float32, device=seed.device)).view(m, k)


def dropout(x, p, seed):
    """x * keep / (1 - p), one rounding; p = 0 returns x unchanged."""
    if p == 0.0:
        return x.clone()
    keep = dropout_mask(*x.shape, p, seed)
    scale = torch.tensor(1.0 / (1.0 - p), dtype=torch.float32, device=x.device)
    return torch.where(keep, x.to(_wide(x)) * scale, 0.0).to(x.dtype)


def _wide(x):
    """fp32, or float64 for float64 input."""
    return torch.promote_types(x.dtype, torch.float32)


def _scaling_vector(lora_A, lora_scaling, scaling, dtype):
    s = torch.full((lora_A.shape[0],), scaling, dtype=dtype, device=lora_A.device)
    return s if lora_scaling is None else s * lora_scaling.to(dtype)


def linear(x, weight, bias=None):
    """y [M, N] = x W^T + bias for a dense weight [N, K] in x.dtype."""
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def lora_linear(
    x, weight, lora_A, lora_B, lora_scaling, scaling, bias=None, dropout_p=0.0, seed=None
):
    """y = x W^T + bias + (z * s) B^T and z = drop(x) A^T, every product in x.dtype."""
    dropped = dropout(x, dropout_p, seed) if dropout_p > 0 else x
    z = dropped @ lora_A.to(x.dtype).t()
    return linear_low_rank(x, weight, z, lora_B, lora_scaling, scaling, bias), z


def linear_low_rank(x, weight, z, lora_B, lora_scaling, scaling, bias=None):
    """y = x W^T + bias + (z * s) B^T."""
    s = scaling if lora_scaling is None else lora_scaling.to(_wide(x)) * scaling
    low_rank = (z.to(_wide(x)) * s).to(x.dtype) @ lora_B.to(x.dtype).t()
    return linear(x, weight, bias) + low_rank


def lora_linear_backward(
    dy, x, z, weight, lora_A, lora_B, lora_scaling, scaling, dropout_p=0.0, seed=None
):
    """All gradients: (dx, d_lora_A, d_lora_B, d_bias, d_lora_scaling), accumulated in fp32 or
    better.
    """
    wide = _wide(x)
    s = _scaling_vector(lora_A, lora_scaling, scaling, wide)
    u = (dy @ lora_B.to(dy.dtype)).to(wide)
    us = u * s
    dropped = dropout(x, dropout_p, seed) if dropout_p > 0 else x
    through = us.to(dy.dtype) @ lora_A.to(dy.dtype)
    if dropout_p > 0:
        through = dropout(through, dropout_p, seed)
    dx = dy @ weight.to(dy.dtype) + through
    d_lora_A = (us.t() @ dropped.to(wide)).to(lora_A.dtype)
    d_lora_B = ((dy.to(wide).t() @ z.to(wide)) * s).to(lora_B.dtype)
    d_bias = dy.to(wide).sum(dim=0).to(dy.dtype)
    d_scaling = (u * z.to(wide)).sum(dim=0) * scaling
    return dx, d_lora_A, d_lora_B, d_bias, d_scaling
