"""Optimizers whose state is packed, optionally 8-bit, and optionally paged.

    optimizer = lowbit.optim.PagedAdamW(model.parameters(), lr=2e-4)

torch.optim's interface: parameter groups, closures, learning-rate schedulers, GradScaler, gradient
clipping, state dicts. Paged state moves to the host when the card runs full instead of ending the
run (paging.py says how). On a CPU paged and plain classes are the same.
"""

from .adamw import AdamW8bit, PagedAdamW, PagedAdamW8bit
from .clipping import clip_grad_norm_
from .lion import PagedLion, PagedLion8bit

__all__ = [
    "AdamW8bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedLion",
    "PagedLion8bit",
    "clip_grad_norm_",
]
