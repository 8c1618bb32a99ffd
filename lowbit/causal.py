"""Causal attention without a mask, for training on right-padded batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

NAME = "lowbit_causal"


def is_only_causal(model: nn.Module) -> bool:
    """Whether every layer of a transformers model attends to all tokens before its own, by "sdpa",
    and to nothing else.
    """
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return False
    if config.model_type not in ("llama", "mistral", "qwen2"):
        return False
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    return window is None and set(kinds) == {"full_attention"} and _register()


def _register() -> bool:
    """Make transformers' own function for sdpa known under a name without a mask function."""
    try:
        from transformers import AttentionInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    except ImportError:  # a transformers from before 4.53
        return False
    if NAME in ALL_MASK_ATTENTION_FUNCTIONS:
        return False
    AttentionInterface.register(NAME, sdpa_attention_forward)
    return True


@contextlib.contextmanager
def without_mask(model: nn.Module) -> Iterator[None]:
    """Let a model for which `is_only_causal` holds run without looking for a mask.

    transformers looks at the position ids of every batch to find packed sequences, which waits for
    the GPU and cannot be captured in a CUDA graph. It skips that for an attention function without
    a mask function. Batches must need no mask besides the causal one: no padding on the left, one
    sequence in a row. Gradient checkpointing may recompute outside of the context.
    """
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
