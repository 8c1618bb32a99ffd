"""What an autograd function saves for backward, with parameters kept from hooks of saved tensors.

Such hooks, those of non-reentrant gradient checkpointing above all, cost microseconds of Python for
each tensor. To pack a parameter away would free nothing: its module holds it. So where there are
hooks, parameters stay on the function's context, and what autograd does for a saved tensor is done
here: a parameter that was changed in place is an error.
"""

from __future__ import annotations

import torch
from torch.nn import Parameter


def hooked() -> bool:
    """Whether hooks take what is saved now."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def dense(weight: tuple) -> torch.Tensor | None:
    """What to save of a frozen weight (WeightArgs): one that is not packed may be changed in place
    before the backward pass, and autograd then finds out.
    """
    return weight[0] if weight[1] is None else None


def save(ctx, *tensors: torch.Tensor | None) -> None:
    """ctx.save_for_backward."""
    parameters = None
    if hooked():
        parameters = {}
        for i, tensor in enumerate(tensors):
            if type(tensor) is Parameter:
                parameters[i] = tensor, tensor._version
        tensors = tuple(None if i in parameters else t for i, t in enumerate(tensors))
    ctx.parameters = parameters
    ctx.save_for_backward(*tensors)


def saved(ctx) -> tuple[torch.Tensor | None, ...]:
    """What `save` was given."""
    tensors = ctx.saved_tensors
    if not ctx.parameters:
        return tensors
    whole = list(tensors)
    for i, (parameter, version) in ctx.parameters.items():
        if parameter._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a parameter of shape {list(parameter.shape)} is at version "
                f"{parameter._version}, expected version {version}"
            )
        whole[i] = parameter
    return tuple(whole)
