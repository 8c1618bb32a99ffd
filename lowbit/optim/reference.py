"""The definition of the optimizer steps, in plain torch, for one tensor.

    g = sign * gradient                       p = decay * parameter
    AdamW:  m += (1 - beta1) (g - m)          v = beta2 v + (1 - beta2) g g
            p -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    Lion:   p -= lr * sign(beta1 m + (1 - beta1) g)                 m = beta2 m + (1 - beta2) g

with decay = 1 - lr * weight_decay. Everything is fp32, in the order of torch.optim.AdamW, and the
parameter is rounded to its type once. The kernels equal this bit for bit; where no compiled library
is there it is what runs.

Source: Decoupled Weight Decay Regularization (Loshchilov and Hutter 2019); Symbolic Discovery of
Optimization Algorithms (Chen et al. 2023).
"""

from __future__ import annotations

import math

import torch

from ..reference import philox_4x32

STEP_SHIFT = 40  # the random counter is (step << 40) + element / 4


def adamw(p, g, moments, step: int, group: dict) -> torch.Tensor:
    """The new fp32 parameter; moments [m, v] change in place."""
    m, v = moments
    beta1, beta2 = group["betas"]
    lr = group["lr"]
    w = _fp32(1 - beta1)
    m.copy_(m + w * (g - m) if w < 0.5 else g - (g - m) * _fp32(beta1))
    v.mul_(_fp32(beta2)).add_(_fp32(1 - beta2) * g * g)
    # IEEE results: torch's fp32 sqrt may be off in the last bit, and it divides by a number by
    # multiplying with the reciprocal.
    root, correction = v.double().sqrt().float(), v.new_full((1,), math.sqrt(1 - beta2**step))
    denominator = root / correction + _fp32(group["eps"])
    return p * _fp32(1 - lr * group["weight_decay"]) - (
        _fp32(lr / (1 - beta1**step)) * m / denominator
    )


def lion(p, g, moments, step: int, group: dict) -> torch.Tensor:
    """The new fp32 parameter; moments [m] change in place."""
    (m,) = moments
    beta1, beta2 = group["betas"]
    u = m * _fp32(beta1) + _fp32(1 - beta1) * g
    direction = (u > 0).float() - (u < 0).float()
    m.mul_(_fp32(beta2)).add_(_fp32(1 - beta2) * g)
    lr = group["lr"]
    return p * _fp32(1 - lr * group["weight_decay"]) - _fp32(lr) * direction


def _fp32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64, device="cpu").float())


RULES = {"adamw": adamw, "lion": lion}


def round_randomly(x: torch.Tensor, seed: int, step: int, position: int) -> torch.Tensor:
    """fp32 to bf16, up or down at random so that the mean is x.

    Element i adds the upper half of word i % 4 of Philox counter (step << 40) + (position + i) / 4
    below bf16's last place and truncates. NaN and Inf stay what they are.
    """
    flat = x.reshape(-1)
    counters = torch.arange(-(-flat.numel() // 4), device=x.device) + position // 4
    counters += step << STEP_SHIFT
    words = philox_4x32(torch.tensor(seed, device=x.device), counters).view(-1)[: flat.numel()]
    bits = (flat.view(torch.int32).long() & 0xFFFFFFFF) + (words >> 16)
    truncated = (bits >> 16).to(torch.int32).to(torch.int16).view(torch.bfloat16)
    return torch.where(flat.isfinite(), truncated, flat.to(torch.bfloat16)).view_as(x)


def gradient_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """sqrt of the sum of all squares, fp32, summed in fp64."""
    squares = [g.double().square().sum() for g in gradients]
    return torch.stack(squares).sum().sqrt().float()
