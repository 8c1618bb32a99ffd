"""Models that `lowbit bench model` builds with random weights, by name. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class VisionTower:
    """Qwen2.5-VL's vision tower: patches of 14 x 14 pixels in two frames, of which its merger makes
    one token of four neighbours.
    """

    hidden: int
    layers: int
    ffn: int
    heads: int
    out: int  # the language model's width
    full_attention: tuple[int, ...]  # blocks that attend beyond windows

    PATCH, MERGE = 14, 2
    PATCH_VALUES = 3 * 2 * PATCH * PATCH  # pixels of three colours in two frames

    @property
    def block_linears(self) -> list[tuple[int, int]]:
        """(N, K) of the linear layers of one block: qkv, proj, gate, up, down."""
        return [
            (3 * self.hidden, self.hidden), (self.hidden, self.hidden), (self.ffn, self.hidden),
            (self.ffn, self.hidden), (self.hidden, self.ffn),
        ]  # fmt: skip

    @property
    def merger_linears(self) -> list[tuple[int, int]]:
        """(N, K) of the two layers that see a row per token instead of one per patch."""
        width = self.hidden * self.MERGE**2
        return [(width, width), (self.out, width)]

    @property
    def parameters(self) -> int:
        """All but norms and biases."""
        linears = self.layers * _weights(self.block_linears) + _weights(self.merger_linears)
        return linears + self.hidden * self.PATCH_VALUES

    def grid(self, side: int) -> int:
        """Patches along an edge of a square image of side x side pixels."""
        return side // self.PATCH

    def tokens(self, side: int) -> int:
        """Tokens that the image becomes."""
        return (self.grid(side) // self.MERGE) ** 2

    def step_flops(self, images: int, side: int, r: int, passes: int) -> float:
        """As ModelConfig.step_flops, for images of side x side pixels."""
        patches, tokens = images * self.grid(side) ** 2, images * self.tokens(side)
        blocks = passes * _weights(self.block_linears)
        blocks += (passes + 1) * _adapters(self.block_linears, r)
        # The merger is not recomputed.
        merger = 2 * _weights(self.merger_linears) + 3 * _adapters(self.merger_linears, r)
        embedding = self.hidden * self.PATCH_VALUES
        return 2.0 * (patches * (self.layers * blocks + embedding) + tokens * merger)


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
    vision: VisionTower | None = None

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
        """Of the language model's blocks."""
        return self.layers * _weights(self.block_linears)

    @property
    def parameters(self) -> int:
        """All but norms and biases; embeddings and head count apart."""
        language = self.linear_parameters + 2 * self.vocabulary * self.hidden
        return language + (0 if self.vision is None else self.vision.parameters)

    @property
    def full_bytes(self) -> int:
        return 12 * self.parameters

    def check_image(self, seq: int, image: int) -> None:
        """Raise ValueError, in terms of the command's options, if sequences cannot have such an
        image.
        """
        unit = VisionTower.PATCH * VisionTower.MERGE
        if self.vision is None:
            raise ValueError(f"--image is for models that see, not for {self.name}")
        if image < unit or image % unit:
            raise ValueError(f"--image must be a multiple of {unit} pixels, got {image}")
        least = self.vision.tokens(image) + 2
        if seq < least:
            raise ValueError(
                f"an image of {image} x {image} pixels is {least - 2} tokens; --seq must be at "
                f"least {least}, got {seq}"
            )

    def step_flops(
        self, batch: int, seq: int, r: int, checkpointing: bool, image: int | None = None
    ) -> float:
        """Multiply-adds of a training step, counted as two, attention left out: forward and dx of
        every layer and the head, once more forward under checkpointing, and of the adapters also
        their own gradients. With an image of `image` x `image` pixels in each sequence.
        """
        adapters = self.layers * _adapters(self.block_linears, r)
        passes = 3 if checkpointing else 2
        head = 2 * self.vocabulary * self.hidden
        per_token = passes * self.linear_parameters + (passes + 1) * adapters + head
        seen = 0.0 if image is None else self.vision.step_flops(batch, image, r, passes)
        return 2.0 * batch * seq * per_token + seen


def _weights(linears: list[tuple[int, int]]) -> int:
    return sum(N * K for N, K in linears)


def _adapters(linears: list[tuple[int, int]], r: int) -> int:
    return sum(r * (N + K) for N, K in linears)


def _qwen_vl(
    name: str, sizes: tuple[int, ...], sections: tuple[int, int, int], tower: VisionTower
) -> ModelConfig:
    """A Qwen2.5-VL; its rotary embedding has `sections` of a head for time, height and width."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)}
    return ModelConfig(name, "qwen2_5_vl", *sizes, {"rope_parameters": rope}, tower)


_LAST_OF_EIGHT = (7, 15, 23, 31)
CONFIGS = {
    config.name: config
    for config in (
        ModelConfig("tiny", "llama", 64, 2, 128, 4, 2, 512),
        ModelConfig("llama-8b", "llama", 4096, 32, 14336, 32, 8, 128256, {"rope_theta": 500000.0}),
        ModelConfig("llama-65b", "llama", 8192, 80, 22016, 64, 64, 32000),
        ModelConfig("qwen2.5-7b", "qwen2", 3584, 28, 18944, 28, 4, 152064, {"rope_theta": 1e6}),
        _qwen_vl(
            "tiny-vl", (64, 2, 128, 4, 2, 512), (2, 3, 3), VisionTower(32, 2, 44, 2, 64, (1,))
        ),
        _qwen_vl(
            "qwen2.5-vl-7b",
            (3584, 28, 18944, 28, 4, 152064),
            (16, 24, 24),
            VisionTower(1280, 32, 3420, 16, 3584, _LAST_OF_EIGHT),
        ),
        _qwen_vl(
            "qwen2.5-vl-72b",
            (8192, 80, 29568, 64, 8, 152064),
            (16, 24, 24),
            VisionTower(1280, 32, 3456, 16, 8192, _LAST_OF_EIGHT),
        ),
    )
}

# What the QLoRA paper says of LLaMA 65B (Dettmers et al. 2023, abstract and section 1), in GB.
PAPER_FULL_GB, PAPER_QLORA_GB = 780, 48
