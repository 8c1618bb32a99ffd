"""Gated MLPs whose hidden layer no kernel serves, computed with one that is a little wider.

    y = down(act(gate(x)) * up(x))      gate, up [H, K], down [N, H]

Kernels take whole blocks of a row, and rows by 16; Qwen2.5-VL's vision tower has H = 3420. By
panels its products take three times as long (5184 rows, H200, 2026-12-01), as cuBLAS has nothing
fast for rows that begin at multiples of 8 bytes. With rows and columns of zeros up to whole blocks
(3456) everything fits, and as the new hidden units are exactly zero, so is all that they add.

What is stored stays as it is. The wider copies, half a byte per weight, are made anew in each call
and live as long as backward needs them: until it has passed the MLP, also under non-reentrant
gradient checkpointing (Qwen2.5-VL 7B: 220 MB in all), not under the reentrant kind.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import calls, codebooks, dispatch
from .dispatch_table import Layer
from .weight import WeightArgs

_HALVES = (torch.float16, torch.bfloat16)


class MLP(NamedTuple):
    """What gate, up and down take, a list of three each, as in `lora_gated_mlp`."""

    weights: list[WeightArgs]
    biases: list[torch.Tensor | None]
    lora_As: list[torch.Tensor | None]  # noqa: N815  (here and below: the mathematics' name)
    lora_Bs: list[torch.Tensor | None]  # noqa: N815
    scalings: list
    dropout_p: list[float]


def for_kernels(x: torch.Tensor, mlp: MLP, kinds: Sequence[str]) -> MLP:
    """The MLP with a hidden layer that kernels serve, if the one it has they do not.

    Args:
        x: [..., K], as the MLP gets it.
        kinds: quant_type of each weight.
    """
    H, blocksize = mlp.weights[0].N, mlp.weights[0].blocksize
    unit = max(64, blocksize)
    if H % unit == 0 or not _may_be(x, mlp):
        return mlp
    codes = [_code_of_zero(kind) for kind in kinds]
    more = unit - H % unit
    if None in codes or not _are_served(x, mlp, H + more):
        return mlp
    return widened(mlp, more, codes)


def widened(mlp: MLP, more: int, codes: Sequence[int]) -> MLP:
    """The MLP with `more` hidden units that are zero; `codes` are those of 0 in each weight."""
    (gate, up, down), (gate_bias, up_bias, down_bias) = mlp.weights, mlp.biases
    with torch.autocast(gate.qweight.device.type, enabled=False):  # cat would cast, or refuse to
        return mlp._replace(
            weights=[
                _with_rows(gate, more, codes[0]),
                _with_rows(up, more, codes[1]),
                _with_columns(down, more, codes[2]),
            ],
            biases=[_padded(gate_bias, 0, more), _padded(up_bias, 0, more), down_bias],
            lora_As=[*mlp.lora_As[:2], _padded(mlp.lora_As[2], 1, more)],
            lora_Bs=[*(_padded(lora_B, 0, more) for lora_B in mlp.lora_Bs[:2]), mlp.lora_Bs[2]],
        )


def _may_be(x: torch.Tensor, mlp: MLP) -> bool:
    """Not where down has dropout, whose mask would be another one, nor where somebody traces."""
    gate, up, down = mlp.weights
    return (
        x.is_cuda
        and calls.unwatched()
        and mlp.dropout_p[2] == 0.0
        and gate.N == up.N == down.K
        and gate.N % 2 == 0  # no row ends within a byte
        and gate.blocksize == up.blocksize == down.blocksize >= 64
        and all(weight.row_blocks for weight in mlp.weights)
        and calls.plain((x, gate.qweight, up.qweight, down.qweight))
    )


def _are_served(x: torch.Tensor, mlp: MLP, H: int) -> bool:
    """Whether kernels take the layers with that hidden width, forward and backward."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    if dtype not in _HALVES:
        return False
    M = x.shape[:-1].numel()
    shapes = ((H, x.shape[-1]), (H, x.shape[-1]), (mlp.weights[2].N, H))
    for (N, K), weight, lora_A in zip(shapes, mlp.weights, mlp.lora_As, strict=True):
        layer = Layer(N, K, weight.blocksize, True, 0 if lora_A is None else lora_A.shape[0])
        for operation in ("lora_linear", "lora_linear_backward"):
            row = dispatch.choose(operation, x.device, dtype, M, layer)
            if row.backend != "cuda" or row.kernel in ("", "panels"):
                return False
    return True


@functools.cache
def _code_of_zero(kind: str) -> int | None:
    """Of a codebook with a name; others need not have one."""
    if kind == "custom":
        return None
    values = codebooks.codebook(kind).tolist()
    return values.index(0.0) if 0.0 in values else None


def _with_rows(weight: WeightArgs, more: int, code: int) -> WeightArgs:
    """More rows of zeros. Their scales are any finite ones."""
    N = weight.N + more
    per_row = -(-weight.K // weight.blocksize)
    nested = weight.nested_absmax
    if nested is not None:
        nested = _padded(nested, 0, -(-N * per_row // weight.nested_blocksize) - nested.shape[0])
    return weight._replace(
        qweight=_padded(weight.qweight.view(weight.N, -1), 0, more, 17 * code),
        absmax=_padded(weight.absmax, 0, more * per_row),
        nested_absmax=nested,
        N=N,
    )


def _with_columns(weight: WeightArgs, more: int, code: int) -> WeightArgs:
    """More columns of zeros, in the last block of each row."""
    codes = _padded(weight.qweight.view(weight.N, -1), 1, more // 2, 17 * code)
    return weight._replace(qweight=codes, K=weight.K + more)


def _padded(t: torch.Tensor | None, dim: int, more: int, value: int = 0) -> torch.Tensor | None:
    """With more entries of that value at the end of a dimension; what is trained gets its gradient
    without them.
    """
    if t is None or more == 0:
        return t
    shape = list(t.shape)
    shape[dim] = more
    return torch.cat([t, _constant(tuple(shape), value, t.dtype, t.device)], dim)


def _constant(
    shape: tuple[int, ...], value: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A tensor that is kept, unless it would belong to a graph that is being recorded."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.full(shape, value, dtype=dtype, device=device)
    return _kept(shape, value, dtype, device)


@functools.lru_cache(maxsize=256)
def _kept(shape, value, dtype, device) -> torch.Tensor:
    with torch.inference_mode(False):
        made = torch.full(shape, value, dtype=dtype, device=device)
    if made.is_cuda:
        torch.cuda.current_stream(device).synchronize()  # for all streams
    return made
