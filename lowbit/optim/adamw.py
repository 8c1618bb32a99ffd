"""AdamW with packed state: paged, 8-bit, or both."""

from __future__ import annotations

from collections.abc import Iterable

from .base import PackedOptimizer


class _AdamW(PackedOptimizer):
    rule = "adamw"

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        skip_nonfinite: bool = False,
        seed: int | None = None,
        **paging,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
        }
        super().__init__(
            params,
            defaults,
            stochastic_rounding=stochastic_rounding,
            skip_nonfinite=skip_nonfinite,
            seed=seed,
            **paging,
        )


class AdamW8bit(_AdamW):
    """AdamW with 8-bit moments: blocks of 256 share a scale, the codebooks are bitsandbytes'.

    Two bytes of state per parameter instead of eight, in the device's own memory.

    Args:
        params: parameters, groups, or (name, parameter) pairs; fp32, bf16 or fp16.
        lr, betas, eps, weight_decay, maximize: as torch.optim.AdamW; weight decay is decoupled.
        amsgrad: refused.
        stochastic_rounding: round bf16 parameters up or down at random, right in the mean, so that
            updates below half a unit in the last place are not lost.
        skip_nonfinite: leave out a step whose gradients hold a NaN or an Inf. By default they go
            into parameters and state, as in torch.optim.
        seed: of the random rounding; drawn from the system if not given. Several processes must be
            given the same one, or their parameters would drift apart.

    Raises:
        ValueError, TypeError: bad numbers, dtypes or layouts; the message names the parameter.

    Notes:
        All arithmetic is fp32; the parameter is rounded to its dtype once per step. Equal seeds and
        inputs give equal bits.

    Source: Decoupled Weight Decay Regularization (Loshchilov and Hutter 2019); 8-bit Optimizers via
        Block-wise Quantization (Dettmers et al. 2022).
    """

    coded = True


class PagedAdamW(_AdamW):
    """AdamW with fp32 moments that page between device and host.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, stochastic_rounding,
            skip_nonfinite, seed: as AdamW8bit.
        paging: "managed" memory, which the driver also moves by itself when the card runs full;
            "pinned" host memory, copied in and out by every step; "auto": managed where the driver
            can do it.
        policy: "auto", or one way to step state: "resident", "prefetch" or "zero_copy"
            (lowbit/optim/paging.py).

    Notes:
        With state on the device a step takes little longer than an unpaged one. With state on the
        host it takes as long as the link needs for the state once each way.

    Source: QLoRA (Dettmers et al. 2023), section 3.
    """

    paged = True


class PagedAdamW8bit(PagedAdamW):
    """PagedAdamW with the 8-bit moments of AdamW8bit."""

    coded = True
