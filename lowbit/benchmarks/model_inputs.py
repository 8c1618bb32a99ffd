"""What `lowbit bench model` trains on: random tokens, with a random image in front where the model
sees.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .model_configs import ModelConfig, VisionTower

# Of Qwen2.5-VL's vocabulary; a smaller one keeps its last token for the image.
IMAGE_TOKEN, FIRST_SPECIAL_TOKEN = 151655, 151643
PATCHES = torch.bfloat16


@dataclass
class Batch:
    """One step's input.

    ids is [batch, seq]; `more` are further arguments of the model; the first `prefix` tokens are
    not predicted (the first one, and the image behind it).
    """

    ids: torch.Tensor
    more: dict[str, torch.Tensor] = field(default_factory=dict)
    prefix: int = 1


def image_token(config: ModelConfig) -> int:
    """The token that stands for a part of an image."""
    return min(IMAGE_TOKEN, config.vocabulary - 1)


def draw(
    config: ModelConfig, batch: int, seq: int, image: int | None, device: torch.device | str
) -> Batch:
    """Random tokens; with `image`, one of image x image pixels behind the first token of each.

    Raises:
        ValueError: the image does not fit the model or the sequence.
    """
    torch.manual_seed(0)
    if image is None:
        return Batch(torch.randint(0, config.vocabulary, (batch, seq), device=device))
    config.check_image(seq, image)
    text = min(FIRST_SPECIAL_TOKEN, config.vocabulary - 1)
    ids = torch.randint(0, text, (batch, seq), device=device)
    prefix = 1 + config.vision.tokens(image)
    ids[:, 1:prefix] = image_token(config)
    edge = config.vision.grid(image)
    patches = torch.randn(batch * edge**2, VisionTower.PATCH_VALUES, dtype=PATCHES, device=device)
    more = {
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, edge, edge]] * batch, device=device),
        "mm_token_type_ids": (ids == image_token(config)).int(),
    }
    return Batch(ids, more, prefix)
