"""Whom `lowbit bench model` times: lowbit, and PEFT on bitsandbytes, each with its optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from .. import optim
from ..capture import CapturedBackward, backward
from ..causal import is_only_causal, without_mask
from ..cli.loss import head_loss
from ..nn import QLoRALinear
from . import model_build
from .model_inputs import Batch

if TYPE_CHECKING:
    from .model import Options

DTYPE = torch.bfloat16
RATE, CLIP = 1e-3, 1.0
HOST_BOUND_TOKENS = 2048  # below, the host takes longer for an eager step than the GPU
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(
        parameters, lr=RATE, weight_decay=0.0, fused=True
    ),
    "paged-adamw": lambda parameters: optim.PagedAdamW(parameters, lr=RATE, weight_decay=0.0),
    "paged-adamw-8bit": lambda parameters: optim.PagedAdamW8bit(
        parameters, lr=RATE, weight_decay=0.0
    ),
}


class Contender:
    """A model with its optimizer; `step()` trains on the one batch and returns the loss."""

    def __init__(
        self, name: str, model: nn.Module, o: Options, optimizer, loss: Callable, batch: Batch
    ):
        self.name, self.model, self.ids, self.loss = name, model, batch.ids, loss
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.make_optimizer, self.optimizer = optimizer, optimizer(self.parameters)
        self.captured: CapturedBackward | None = None
        self.checkpointing = o.checkpointing
        self.checkpoint()

    def checkpoint(self, graph: bool = False) -> None:
        """Let transformers recompute every block in backward.

        With few tokens by torch's reentrant kind, which spares the host the hooks of 27 saved
        tensors of a block and an autograd graph; with more, or in a graph, by the other one, which
        stops before a block's last product.
        """
        if not self.checkpointing:
            return
        model = self.model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        reentrant = not graph and self.ids.numel() < HOST_BOUND_TOKENS
        # Nothing random is in the blocks, so that no generator's state has to be kept.
        arguments = {"use_reentrant": reentrant, "preserve_rng_state": False}
        # transformers 5.23 renamed the method and warns about the old name.
        enable = getattr(base, "activation_checkpointing_enable", None)
        (enable or base.gradient_checkpointing_enable)(arguments)
        if reentrant:
            base.enable_input_require_grads()

    def capture(self) -> None:
        """Start anew with forward and backward as a CUDA graph: fresh adapters and optimizer."""
        del self.optimizer  # first, it may hold much memory
        self.checkpoint(graph=True)
        for module in self.model.modules():
            if isinstance(module, QLoRALinear):
                module.reset_adapter()
        self.optimizer = self.make_optimizer(self.parameters)
        self.captured = CapturedBackward(self.loss, self.parameters)

    def step(self) -> torch.Tensor:
        if self.captured is not None:
            self.captured.zero()
            loss = self.captured(self.ids)
        else:
            loss = self.loss(self.ids)
            backward(loss)
        self.clip()
        self.optimizer.step()
        if self.captured is None:
            self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def clip(self) -> None:
        optim.clip_grad_norm_(self.parameters, CLIP)

    def gradient_bytes(self) -> int:
        return sum(p.nbytes for p in self.parameters)

    def state_bytes(self) -> dict[str, int]:
        """Bytes of optimizer state on the device and on the host."""
        if hasattr(self.optimizer, "state_bytes"):
            return self.optimizer.state_bytes()
        states, where = self.optimizer.state.values(), self.ids.device.type
        tensors = [t for s in states for t in s.values() if isinstance(t, torch.Tensor)]
        return {"device": sum(t.nbytes for t in tensors if t.device.type == where), "host": 0}


class PeftContender(Contender):
    """PEFT on bitsandbytes, as its users write it: the model's own loss, torch's clipping."""

    def clip(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, CLIP)


def build_lowbit(o: Options, batch: Batch) -> Contender:
    model = model_build.lowbit_model(o.config, o.rank, DTYPE, batch.ids.device, o.fuse)
    maskless = is_only_causal(model)

    def loss(ids: torch.Tensor) -> torch.Tensor:
        """Mean over the tokens that are predicted."""
        with without_mask(model) if maskless else contextlib.nullcontext():
            hidden = model.base_model(input_ids=ids, use_cache=False, **batch.more)[0]
        rows = hidden[:, batch.prefix - 1 : -1].reshape(-1, hidden.shape[-1])
        targets = ids[:, batch.prefix :].reshape(-1)
        return head_loss(rows, model.lm_head, targets) / rows.shape[0]

    name = "lowbit" if o.fuse else "lowbit, not fused"
    return Contender(name, model, o, OPTIMIZERS[o.optimizer], loss, batch)


def build_peft(o: Options, batch: Batch) -> Contender:
    import bitsandbytes as bnb

    model = model_build.peft_model(o.config, o.rank, DTYPE, batch.ids.device)
    labels = batch.ids.clone()
    labels[:, : batch.prefix] = -100
    optimizers = {
        "adamw": OPTIMIZERS["adamw"],
        "paged-adamw": lambda p: bnb.optim.PagedAdamW32bit(p, lr=RATE, weight_decay=0.0),
        "paged-adamw-8bit": lambda p: bnb.optim.PagedAdamW8bit(p, lr=RATE, weight_decay=0.0),
    }

    def loss(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=labels, use_cache=False, **batch.more).loss

    return PeftContender("peft-bnb", model, o, optimizers[o.optimizer], loss, batch)
