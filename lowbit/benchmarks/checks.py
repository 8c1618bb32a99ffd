"""What the benchmarks of linear layers compute is held to float64 before it is timed."""

from __future__ import annotations

import torch

from .implementations import SCALING, Implementation, Prepared, Weights, peft_formula

CHECKED_TOKENS, CHECKED_OUTPUTS = 32, 512  # spread over all of them, so that every tile is met
ERROR_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
CHUNK_ROWS = 4096  # of a weight in float64 at a time


class CheckError(Exception):
    """lowbit is further from float64 than it may be, or a model does not train."""


def spread(total: int, count: int, device: str | torch.device = "cpu") -> torch.Tensor:
    """At most `count` indices below `total`, the first and the last among them."""
    steps = torch.linspace(0, total - 1, min(total, count), dtype=torch.float64)
    return steps.round().long().to(device)


def relative_rms(got: torch.Tensor, exact: torch.Tensor) -> float:
    """RMS(got - exact) / RMS(exact)."""
    error = got.double() - exact
    return float(error.square().mean().sqrt() / exact.square().mean().sqrt())


def errors(
    implementation: Implementation, prepared: Prepared, weights: Weights, x: torch.Tensor
) -> tuple[float, float]:
    """Relative RMS error against float64 of an implementation, and of PEFT's formula in 16 bits."""
    some = spread(x.shape[0], CHECKED_TOKENS, x.device)
    outputs = spread(weights.N, CHECKED_OUTPUTS, x.device)
    y = prepared.call(x, 0)[some][:, outputs]
    parts = (x[some], prepared.exact_rows(outputs), weights.A[0], weights.B[0][outputs])
    exact = _formula(*(part.double() for part in parts), lora=implementation.lora)
    plain = _formula(*(part.to(x.dtype) for part in parts), lora=implementation.lora)
    return relative_rms(y, exact), relative_rms(plain, exact)


def _formula(x, W, A, B, *, lora: bool) -> torch.Tensor:
    y = torch.nn.functional.linear(x, W)
    return peft_formula(y, x, A, B) if lora else y


def check(name: str, error: float, plain: float, where: str, factor: float = ERROR_FACTOR) -> None:
    """Hold lowbit to `factor` times the error of the plain formula; others are only reported."""
    if name.startswith("lowbit") and not error <= factor * plain:
        raise CheckError(
            f"{name} is wrong at {where}: relative RMS error {error:.3g} against float64, allowed "
            f"{factor * plain:.3g}, {factor:g} times that of the 16-bit formula"
        )


# ---- gradients -----------------------------------------------------------------------------------


@torch.no_grad()
def gradient_errors(
    gradients: tuple[torch.Tensor, ...],
    prepared: Prepared,
    weights: Weights,
    x: torch.Tensor,
    dy: torch.Tensor,
) -> tuple[float, float]:
    """Relative RMS error against float64 and that of the 16-bit formulas, of the gradient (dx, and
    d_lora_A and d_lora_B if there are any) for which the two are furthest apart.
    """
    tokens = spread(x.shape[0], CHECKED_TOKENS, x.device)
    inputs = spread(weights.K, CHECKED_OUTPUTS, x.device)
    outputs = spread(weights.N, CHECKED_OUTPUTS, x.device)
    parts = [
        prepared.exact_rows(torch.arange(n, min(n + CHUNK_ROWS, weights.N), device=x.device))[
            :, inputs
        ]
        for n in range(0, weights.N, CHUNK_ROWS)
    ]
    operands = (x, dy, torch.cat(parts), weights.A[0], weights.B[0])
    lora = len(gradients) > 1
    exact = _gradient_formulas(*(t.double() for t in operands), tokens, inputs, outputs, lora=lora)
    plain = _gradient_formulas(
        *(t.to(x.dtype) for t in operands), tokens, inputs, outputs, lora=lora
    )
    dx, *others = gradients
    got = [dx[tokens][:, inputs]]
    if lora:
        d_A, d_B = others
        got += [d_A[:, inputs], d_B[outputs]]
    pairs = [
        (relative_rms(g, e), relative_rms(p, e)) for g, p, e in zip(got, plain, exact, strict=True)
    ]
    return max(pairs, key=lambda pair: pair[0] / pair[1])


def _gradient_formulas(x, dy, W, A, B, tokens, inputs, outputs, *, lora: bool):
    """dx [tokens, inputs], d_lora_A [:, inputs], d_lora_B [outputs], from the columns of W."""
    dx = dy[tokens] @ W
    if not lora:
        return (dx,)
    u = dy @ B
    dx = dx + u[tokens] @ A[:, inputs] * SCALING
    d_A = u.t() @ x[:, inputs] * SCALING
    d_B = dy[:, outputs].t() @ (x @ A.t()) * SCALING
    return dx, d_A, d_B
