"""Attention within the pieces of a packed sequence, all of them in one launch.

    y = softmax(s q k^T) v      of each piece by itself: an image, or a window of one

transformers' vision towers take "sdpa" once for every piece: 81 calls for the windows of an
image of 1008 x 1008 pixels, forward, in each of 28 blocks of Qwen2.5-VL, and the host waits for the
lengths of the pieces three times in each block. Here the host asks once for all blocks for the
extremes; pieces of several lengths in fp32, or with fewer heads of k than of q, still go one by
one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.utils.weak import WeakTensorKeyDictionary

_HALVES = (torch.float16, torch.bfloat16)
_known = WeakTensorKeyDictionary()  # {offsets: (their version, what `extent` says)}


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    dropout: float,
    cu_seq_lens_q: torch.Tensor,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers, for pieces that attend to all of themselves.

    Args:
        module: whose attention it is.
        query, key, value: [1, heads, tokens, d].
        scaling: of the scores.
        dropout: probability.
        cu_seq_lens_q: int32 [pieces + 1], where pieces begin, and the end of the last.

    Returns:
        ([1, tokens, heads, d], None)

    Raises:
        ValueError: the pieces are not all of the tokens.
    """
    offsets, tokens = cu_seq_lens_q, query.shape[2]
    pieces, qkv = offsets.shape[0] - 1, (query, key, value)
    if pieces < 1:
        raise ValueError("pieces must have a beginning and an end")
    first, shortest, longest, end = extent(offsets)
    if (first, end) != (0, tokens) or shortest < 0:
        raise ValueError(
            f"pieces from {first} to {end}, the shortest of {shortest}, were given for {tokens} "
            "tokens"
        )

    def attention(q, k, v):
        grouped = k.shape[1] != q.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, scale=scaling, enable_gqa=grouped
        )

    if longest * pieces == tokens:  # equal ones are a batch
        q, k, v = (x.squeeze(0).unflatten(1, (pieces, longest)).transpose(0, 1) for x in qkv)
        return attention(q, k, v).transpose(1, 2).reshape(1, tokens, *query.shape[1::2]), None
    if _varying(query, key, value, scaling, dropout, offsets):
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in qkv)
        return varlen_attn(q, k, v, offsets, offsets, longest, longest).unsqueeze(0), None
    lengths = offsets.diff().tolist()
    parts = zip(*(x.split(lengths, dim=2) for x in qkv), strict=True)
    return torch.cat([attention(*part).transpose(1, 2) for part in parts], dim=1), None


def _varying(query, key, value, scaling, dropout, offsets) -> bool:
    """Whether flash attention takes pieces of several lengths: its scale is the usual one, and it
    has no dropout.
    """
    d = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in _HALVES
        and query.dtype == key.dtype == value.dtype
        and query.shape[1] == key.shape[1]
        and d % 8 == 0
        and d <= 256
        and dropout == 0.0
        and abs(scaling * d**0.5 - 1.0) < 1e-6
        and offsets.dtype == torch.int32
        and offsets.device == query.device
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and torch.backends.cuda.flash_sdp_enabled()
    )


def extent(offsets: torch.Tensor) -> tuple[int, int, int, int]:
    """(Where the first piece begins, the least and the greatest length, where the last one ends);
    blocks that share the offsets wait for it once, but in inference mode, whose tensors do not tell
    that they were changed.
    """
    if offsets.is_inference():
        return _look(offsets)
    version, found = _known.get(offsets, (None, (0, 0, 0, 0)))
    if version != offsets._version:
        found = _look(offsets)
        _known[offsets] = (offsets._version, found)
    return found


def _look(offsets: torch.Tensor) -> tuple[int, int, int, int]:
    lengths = offsets.diff()
    return tuple(torch.stack([offsets[0], lengths.min(), lengths.max(), offsets[-1]]).tolist())
