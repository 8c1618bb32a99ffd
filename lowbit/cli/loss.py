"""Cross-entropy on the answer tokens only.

    loss = sum over answer tokens of  -log softmax(h W_head^T)[target]

Only the answer positions go through the output head: with short answers and a large vocabulary the
head is otherwise the most expensive layer. Its weight is frozen, so the gradient of h is formed in
the forward pass, chunk by chunk, and the logits [tokens, vocab] are never kept. Sums (not means)
are returned: gradients of many small batches then add up token by token, and 16-bit gradients stay
far from underflow; the trainer divides once, in 32 bits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .encode import Batch

CHUNK_BYTES = (
    64 << 20
)  # fp32 logits of one chunk; larger chunks fall out of the cache and gain nothing


class _FrozenHeadLoss(torch.autograd.Function):
    """h [T, K], weight [V, K] frozen, bias [V] or None, targets [T] -> summed loss (fp32
    scalar).
    """

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        need_grad = ctx.needs_input_grad[0]
        d_h = torch.empty_like(h) if need_grad else None
        loss = h.new_zeros((), dtype=torch.float32)
        rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        for start in range(0, h.shape[0], rows):
            part = slice(start, start + rows)
            logits = F.linear(h[part], weight, bias).float()
            log_z = torch.logsumexp(logits, dim=-1, keepdim=True)
            target = targets[part, None]
            loss += (log_z - logits.gather(-1, target)).sum()
            if d_h is not None:
                d_logits = logits.sub_(log_z).exp_()  # softmax, in place
                d_logits.scatter_add_(-1, target, torch.full_like(target, -1, dtype=torch.float32))
                d_h[part] = d_logits.to(h.dtype) @ weight
        ctx.save_for_backward(d_h)
        return loss

    @staticmethod
    def backward(ctx, d_loss: Tensor) -> tuple[Tensor | None, None, None, None]:
        (d_h,) = ctx.saved_tensors
        return (None if d_h is None else d_h * d_loss.to(d_h.dtype)), None, None, None


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

    def __call__(self, batch: Batch, device: torch.device) -> Tensor:
        ids, learn = batch.ids.to(device), batch.learn.to(device)
        targets = ids[:, 1:][learn[:, 1:]]
        if not self.short:
            logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1][learn[:, 1:]]
            return F.cross_entropy(logits.float(), targets, reduction="sum")
        hidden = self.decoder(input_ids=ids, use_cache=False)[0][:, :-1][learn[:, 1:]]
        return _FrozenHeadLoss.apply(hidden, self.head.weight, self.head.bias, targets)

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
