"""State dicts: how packed state is written, and the forms that can be read.

    fp32 state    step, exp_avg, exp_avg_sq         as torch.optim.AdamW
    8-bit state   step, state1, state2, absmax1, absmax2, qmap1, qmap2     as bitsandbytes

Lion has one moment. Read are both forms, for any optimizer that has the moments; also
bitsandbytes' 32-bit form (state1, state2 in fp32) and its wrapping of the 8-bit tensors in one
more dict. Attributes that other libraries put on tensors are ignored: state is always copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from . import tables

if TYPE_CHECKING:
    from .packing import Pack

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",)}
WRAPPED = "__bnb_optimizer_quant_state__"
# What torch's and bitsandbytes' groups hold for their own use.
FOREIGN = {"foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay", "params",
           "alpha", "t_alpha", "t_beta3"}  # fmt: skip


# ---- writing -------------------------------------------------------------------------------------


def entry(pack: Pack, row: int) -> dict[str, torch.Tensor]:
    """state[parameter]: views of the packed state."""
    state: dict[str, torch.Tensor] = {"step": pack.steps[row]}
    for i, (values, scales) in enumerate(pack.moments(row)):
        if scales is None:
            state[MOMENTS[pack.rule][i]] = values
        else:
            state[f"state{i + 1}"] = values
            state[f"absmax{i + 1}"] = scales
            state[f"qmap{i + 1}"] = pack.tables[i, 0]
    return state


def with_float_moments(state_dict: dict, rule: str) -> dict:
    """A state dict whose 8-bit moments are written as fp32 under torch's names."""
    state = {}
    for key, item in state_dict["state"].items():
        moments = {name: _read(item, i, str(key)) for i, name in enumerate(MOMENTS[rule])}
        state[key] = {"step": item["step"]} | {n: m.floats() for n, m in moments.items()}
    return {**state_dict, "state": state}


# ---- reading -------------------------------------------------------------------------------------


@dataclass
class Moment:
    """One moment as it was saved: fp32 values, or codes and scales."""

    values: torch.Tensor
    scales: torch.Tensor | None
    state: int

    def floats(self) -> torch.Tensor:
        if self.scales is None:
            return self.values
        flat = tables.dequantize_state(self.values.reshape(-1), self.scales, self.state)
        return flat.view(self.values.shape)


@dataclass
class Loaded:
    """The saved state of one parameter."""

    step: float
    moments: list[Moment]

    def write(self, state: int, view, write_moment: Callable) -> None:
        """Copy a moment into its view of a slab; codes to codes byte for byte."""
        moment = self.moments[state]
        values, scales = view
        if scales is not None and moment.scales is not None:
            values.copy_(moment.values.view(values.shape))
            scales.copy_(moment.scales)
        else:
            floats = moment.floats().to(values.device, torch.float32)
            write_moment(view, state, floats.reshape(values.shape))


def parse(
    state_dict: dict, groups: list[dict], rule: str, name: Callable[[torch.Tensor], str]
) -> tuple[list[dict], dict[torch.Tensor, Loaded]]:
    """Check a state dict against the optimizer's groups.

    Returns:
        For each group what is to be updated in it, and for each parameter its saved state.

    Raises:
        ValueError: they do not fit.
    """
    missing = [key for key in ("state", "param_groups") if key not in state_dict]
    if missing:
        raise ValueError(f"the state dict is no optimizer's: it has no {' and no '.join(missing)}")
    saved = state_dict["param_groups"]
    if [len(g["params"]) for g in saved] != [len(g["params"]) for g in groups]:
        raise ValueError(
            "the state dict has groups of "
            f"{[len(g['params']) for g in saved]} parameters, the optimizer of "
            f"{[len(g['params']) for g in groups]}"
        )
    if any(g.get("amsgrad") for g in saved):
        raise ValueError("the state dict is of an optimizer with amsgrad, which is not offered")
    loaded = {}
    for new, old in zip(groups, saved, strict=True):
        for parameter, key in zip(new["params"], old["params"], strict=True):
            item = state_dict["state"].get(key)
            if item:
                loaded[parameter] = _read_entry(item, parameter, rule, name(parameter))
    updates = [{k: v for k, v in g.items() if k not in FOREIGN} for g in saved]
    return [_tidy(u, g) for u, g in zip(updates, groups, strict=True)], loaded


def _tidy(update: dict, group: dict) -> dict:
    """Keep what this optimizer's groups have, and what schedulers add; bitsandbytes writes four
    betas or three for rules that use two.
    """
    if "betas" in update:
        update["betas"] = tuple(update["betas"])[:2]
    extra = ("initial_lr", "param_names", "max_lr", "min_lr", "max_momentum", "base_momentum")
    return {k: v for k, v in update.items() if k in group or k in extra}


def _read_entry(item: dict[str, Any], parameter: torch.Tensor, rule: str, name: str) -> Loaded:
    item = {**item, **item.get(WRAPPED, {})}
    wanted = len(MOMENTS[rule])
    found = sum(f"state{i}" in item for i in (1, 2)) or sum(m in item for m in MOMENTS["adamw"])
    if found != wanted:
        raise ValueError(
            f"the saved state of {name} has {found} moments ({', '.join(map(str, item))}), "
            f"{rule} has {wanted}"
        )
    moments = [_read(item, state, name) for state in range(wanted)]
    blocks = -(-parameter.numel() // tables.BLOCK)
    for moment in moments:
        if moment.values.numel() != parameter.numel():
            raise ValueError(
                f"the saved state of {name} has {moment.values.numel()} elements, the parameter "
                f"{parameter.numel()}"
            )
        if moment.scales is not None and moment.scales.numel() != blocks:
            raise ValueError(
                f"the saved state of {name} has {moment.scales.numel()} scales, blocks of "
                f"{tables.BLOCK} elements make it {blocks}"
            )
    return Loaded(_step(item, rule, name), moments)


def _step(item: dict[str, Any], rule: str, name: str) -> float:
    """How often the parameter was stepped; Lion does not use it, and not all write it."""
    step = item.get("step", 0 if rule == "lion" else None)
    if isinstance(step, torch.Tensor) and step.numel() == 1:
        step = step.item()
    if not isinstance(step, (int, float)) or not 0 <= step < math.inf:
        raise ValueError(f"the saved state of {name} has step {step}, which is no number of steps")
    return float(step)


def _read(item: dict[str, Any], state: int, name: str) -> Moment:
    item = {**item, **item.get(WRAPPED, {})}
    values = item.get(f"state{state + 1}", item.get(MOMENTS["adamw"][state]))
    scales = item.get(f"absmax{state + 1}")
    if not isinstance(values, torch.Tensor):
        raise ValueError(f"the saved state of {name} has no tensor for moment {state + 1}")
    if (values.dtype == torch.uint8) != (scales is not None):
        raise ValueError(
            f"the saved state of {name} is damaged: state{state + 1} is {values.dtype} "
            f"{'without' if scales is None else 'with'} absmax{state + 1}"
        )
    if scales is None:
        return Moment(values, None, state)
    qmap, table = item.get(f"qmap{state + 1}"), tables.state_codebook(state)
    if qmap is not None and (
        qmap.shape != table.shape or not torch.allclose(qmap.cpu(), table, atol=1e-7)
    ):
        raise ValueError(
            f"the saved state of {name} uses an 8-bit map that is not bitsandbytes' dynamic one"
        )
    return Moment(values, scales, state)
