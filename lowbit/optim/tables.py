"""The 8-bit formats of optimizer state, blocks of 256 values that share a scale.

bitsandbytes' dynamic maps: a run of zeros that sets a power of ten, then linear fraction bits. The
momentum takes the signed map, the mean square the unsigned one, which has a bit more of fraction. A
code is the nearest value's, except that a mean square above 0 never takes the code of 0: the next
update would divide by epsilon alone.

Source: 8-bit Optimizers via Block-wise Quantization (Dettmers et al. 2022), section 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import codebooks
from ..reference import ABSMAX_FLOOR

BLOCK = 256  # elements per scale; the kernels' kStateBlock
EXPONENT_BITS = 7


@codebooks.cached
def _unsigned_map() -> torch.Tensor:
    values = [0.0, 1.0]
    for i in range(EXPONENT_BITS):
        edges = torch.linspace(0.1, 1, 2 ** (i + 1) + 1, dtype=torch.float32, device="cpu")
        values += (10.0 ** (i - EXPONENT_BITS + 1) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


def state_codebook(state: int) -> torch.Tensor:
    """The 256 ascending fp32 values of state 0 (momentum, signed) or 1 (mean square)."""
    return codebooks.nested_codebook("dynamic") if state == 0 else _unsigned_map().clone()


def zero_code(state: int) -> int:
    """The code of 0."""
    return int((state_codebook(state) == 0).nonzero())


@codebooks.cached
def state_tables(states: int) -> torch.Tensor:
    """[states, 2, 256] fp32: each state's codebook, and its 255 thresholds with an infinity."""
    rows = []
    for state in range(states):
        values = state_codebook(state)
        bounds = F.pad(codebooks.nested_thresholds(values), (0, 1), value=float("inf"))
        rows.append(torch.stack([values, bounds]))
    return torch.stack(rows)


def quantize_state(values: torch.Tensor, state: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize flat fp32 values: (codes uint8 [n], scales fp32 [ceil(n / 256)])."""
    table = state_tables(state + 1)[state].to(values.device)
    blocks = F.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    inverse = 1.0 / scales.clamp(min=ABSMAX_FLOOR)
    codes = torch.bucketize(blocks * inverse.unsqueeze(1), table[1, :-1])
    if state == 1:
        codes = torch.where((codes == 0) & (blocks > 0), 1, codes)
    return codes.to(torch.uint8).view(-1)[: values.numel()], scales


def dequantize_state(codes: torch.Tensor, scales: torch.Tensor, state: int) -> torch.Tensor:
    """The fp32 values [n] that codes [n] and scales stand for."""
    values = state_codebook(state).to(codes.device)[codes.view(-1).long()]
    return values * scales.repeat_interleave(BLOCK)[: codes.numel()]
