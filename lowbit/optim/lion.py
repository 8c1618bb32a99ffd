"""Lion with packed, paged state."""

from __future__ import annotations

from collections.abc import Iterable

from .base import PackedOptimizer


class PagedLion(PackedOptimizer):
    """Lion, the sign of an interpolated momentum, with fp32 momentum that pages.

        u = beta1 m + (1 - beta1) g      p = (1 - lr weight_decay) p - lr sign(u)
        m = beta2 m + (1 - beta2) g

    Args:
        params: parameters, groups, or (name, parameter) pairs; fp32, bf16 or fp16.
        lr: about a tenth of AdamW's.
        betas: of the update and of the momentum.
        weight_decay: decoupled; about ten times AdamW's.
        maximize, stochastic_rounding, skip_nonfinite, seed, paging, policy: as PagedAdamW.

    Source: Symbolic Discovery of Optimization Algorithms (Chen et al. 2023).
    """

    rule = "lion"
    paged = True

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        skip_nonfinite: bool = False,
        seed: int | None = None,
        **paging,
    ):
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(
            params,
            defaults,
            stochastic_rounding=stochastic_rounding,
            skip_nonfinite=skip_nonfinite,
            seed=seed,
            **paging,
        )


class PagedLion8bit(PagedLion):
    """PagedLion with 8-bit momentum: blocks of 256, bitsandbytes' signed dynamic map."""

    coded = True
