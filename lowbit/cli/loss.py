"""Cross-entropy on the answer tokens only.

    loss = sum over answer tokens of  -log softmax(h W_head^T)[target]

Only the answer positions go through the output head: with short answers and a large vocabulary the
head is otherwise the most expensive layer. Its weight is frozen, so the gradient of h is formed in
the forward pass, chunk by chunk, and the logits [tokens, vocab] are never kept. Sums (not means)
are returned: gradients of many small batches then add up token by token, and 16-bit gradients stay
far from underflow; the trainer divides once, in 32 bits.
"""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..causal import is_only_causal, without_mask
from .encode import Batch

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}  # fp32 logits of one chunk: in the cache, and
# on a GPU tokens enough for products that are not bound by reading the head
IGNORED = -100  # target of a row that only fills up a shape


class _FrozenHeadLoss(torch.autograd.Function):
    """h [T, K], weight [V, K] frozen, bias [V] or None, targets [T] -> summed loss (fp32
    scalar).
    """

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        need_grad = ctx.needs_input_grad[0]
        d_h = torch.empty_like(h) if need_grad else None
        loss = h.new_zeros((), dtype=torch.float32)
        rows = max(1, CHUNK_BYTES.get(h.device.type, CHUNK_BYTES["cpu"]) // (4 * weight.shape[0]))
        for start in range(0, h.shape[0], rows):
            part = slice(start, start + rows)
            target = targets[part, None]
            counts = target != IGNORED
            target = target.clamp(min=0)
            logits = F.linear(h[part], weight, bias)
            log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
            del logits
            loss -= (log_p.gather(-1, target) * counts).sum()
            if d_h is not None:
                d_logits = log_p.exp_()  # in place
                d_logits.scatter_add_(-1, target, torch.full_like(target, -1, dtype=torch.float32))
                d_h[part] = (d_logits.to(h.dtype) @ weight) * counts
        ctx.save_for_backward(d_h)
        return loss

    @staticmethod
    def backward(ctx, d_loss: Tensor) -> tuple[Tensor | None, None, None, None]:
        (d_h,) = ctx.saved_tensors
        return (None if d_h is None else d_h * d_loss.to(d_h.dtype)), None, None, None


def head_loss(h: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Summed cross-entropy of head(h) [T, V] with targets [T], those of IGNORED left out; the head
    is frozen.
    """
    return _FrozenHeadLoss.apply(h, head.weight, head.bias, targets)


class AnswerLoss:
    """Summed loss of a causal language model over the answer tokens of a batch.

    The short way (decoder, pick positions, head) is taken only if it gives the model's own logits;
    models that scale or cap their logits, or whose decoder is not reachable, take the full forward.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.decoder = getattr(model, "base_model", None)
        self.head: Any = (
            model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        )
        self.short = self._short_way_agrees()
        self.maskless = is_only_causal(model)  # batches are padded on the right

    def __call__(self, batch: Batch, device: torch.device) -> Tensor:
        inputs = (batch.ids, *answer_places(batch))
        return self.of(*(tensor.to(device) for tensor in inputs))

    def of(self, ids: Tensor, places: Tensor, targets: Tensor) -> Tensor:
        """From ids [B, T] and the `answer_places`, all on the model's device; shapes alone decide
        what is launched.
        """
        if not self.short:
            logits = self.model(input_ids=ids, use_cache=False).logits
            chosen = logits.flatten(0, 1).index_select(0, places).float()
            return F.cross_entropy(chosen, targets, reduction="sum", ignore_index=IGNORED)
        with without_mask(self.model) if self.maskless else contextlib.nullcontext():
            hidden = self.decoder(input_ids=ids, use_cache=False)[0]
        return head_loss(hidden.flatten(0, 1).index_select(0, places), self.head, targets)

    @torch.no_grad()
    def _short_way_agrees(self) -> bool:
        head, decoder = self.head, self.decoder
        if (
            decoder is None
            or decoder is self.model
            or type(head) is not nn.Linear
            or head.weight.requires_grad
        ):
            return False
        was_training = self.model.training
        self.model.eval()
        ids = torch.arange(3, 9, device=head.weight.device)[None] % head.weight.shape[0]
        try:
            full = self.model(input_ids=ids, use_cache=False).logits.float()
            short = head(decoder(input_ids=ids, use_cache=False)[0]).float()
        except (TypeError, ValueError, IndexError, AttributeError):
            return False  # a decoder with another signature or output
        finally:
            self.model.train(was_training)
        return full.shape == short.shape and torch.allclose(full, short, rtol=1e-3, atol=1e-3)


def answer_places(batch: Batch, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Where a batch predicts its answer tokens, and these: positions in the flattened [B, T], and
    ids, both int64 [answers]; filled up to `count` with positions that are not counted.
    """
    learn = batch.learn.clone()
    learn[:, 0] = False  # nothing predicts the first token
    places = learn.flatten().nonzero().flatten()
    targets = batch.ids.flatten()[places]
    missing = 0 if count is None else count - places.numel()
    return F.pad(places - 1, (0, missing)), F.pad(targets, (0, missing), value=IGNORED)
