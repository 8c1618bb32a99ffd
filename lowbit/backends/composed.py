"""Operations a backend may leave out: composed of others that every backend has.

dispatch.select looks here when the chosen backend exports no function of the operation's name.
"""

from __future__ import annotations

from .. import dispatch

_WEIGHT_COUNT = 11


def linear_low_rank(x, *rest):
    """The product without an adapter, then one pass over y: in 16 bits y is rounded twice."""
    weight, (z, lora_B, lora_scaling, scaling, bias) = rest[:_WEIGHT_COUNT], rest[_WEIGHT_COUNT:]
    args = (x, *weight, bias)
    y = dispatch.select("linear", args, for_backward=False)(*args)
    lora_B = lora_B.to(x.dtype)
    if lora_scaling is None:
        return y.addmm_(z, lora_B.t(), alpha=scaling)
    return y.addmm_((z * (lora_scaling * scaling)).to(x.dtype), lora_B.t())
