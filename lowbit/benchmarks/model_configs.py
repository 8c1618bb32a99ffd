"""Models that `lowbit bench model` builds with random weights, by name. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelConfig:
    """A causal language model of transformers, by the numbers of its configuration.

    full_bytes is what the QLoRA paper's comparison needs: 16-bit fine-tuning of every parameter
    takes 2 bytes for it, 2 for its gradient and 8 for Adam's two moments.
    """

    name: str
    family: str  # transformers' model_type
    hidden: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    more: dict = field(default_factory=dict)  # other fields of the configuration

    @property
    def block_linears(self) -> list[tuple[int, int]]:
        """(N, K) of the linear layers of one block: q, k, v, o, gate, up, down."""
        kv = self.hidden // self.heads * self.kv_heads
        return [
            (self.hidden, self.hidden), (kv, self.hidden), (kv, self.hidden),
            (self.hidden, self.hidden), (self.ffn, self.hidden), (self.ffn, self.hidden),
            (self.hidden, self.ffn),
        ]  # fmt: skip

    @property
    def linear_parameters(self) -> int:
        return self.layers * sum(N * K for N, K in self.block_linears)

    @property
    def parameters(self) -> int:
        """All but norms and biases; embeddings and head count apart."""
        return self.linear_parameters + 2 * self.vocabulary * self.hidden

    @property
    def full_bytes(self) -> int:
        return 12 * self.parameters

    def step_flops(self, tokens: int, r: int, checkpointing: bool) -> float:
        """Multiply-adds of a training step, counted as two, attention left out: forward and dx of
        every layer and the head, once more forward under checkpointing, and of the adapters also
        their own gradients.
        """
        adapters = self.layers * sum(r * (N + K) for N, K in self.block_linears)
        passes = 3 if checkpointing else 2
        head = 2 * self.vocabulary * self.hidden
        return 2.0 * tokens * (
            passes * self.linear_parameters + (passes + 1) * adapters + head
        )  # fmt: skip


CONFIGS = {
    config.name: config
    for config in (
        ModelConfig("tiny", "llama", 64, 2, 128, 4, 2, 512),
        ModelConfig("llama-8b", "llama", 4096, 32, 14336, 32, 8, 128256, {"rope_theta": 500000.0}),
        ModelConfig("llama-65b", "llama", 8192, 80, 22016, 64, 64, 32000),
        ModelConfig("qwen2.5-7b", "qwen2", 3584, 28, 18944, 28, 4, 152064, {"rope_theta": 1e6}),
    )
}

# What the QLoRA paper says of LLaMA 65B (Dettmers et al. 2023, abstract and section 1), in GB.
PAPER_FULL_GB, PAPER_QLORA_GB = 780, 48
