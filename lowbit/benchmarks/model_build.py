"""Models with random weights for `lowbit bench model`, made on the device that trains them.

The model is built on the meta device, then every weight is drawn, packed and freed before the next
one is drawn: no more than one layer exists in 16 bits, so a card that can train the packed model
can also build it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch
from torch import nn

from ..materialize import restore_buffers
from ..preparation import prepare
from .model_configs import ModelConfig, VisionTower
from .model_inputs import image_token

BLOCKSIZE = 64
STD = 0.02  # of the random weights
SEED = 0


def skeleton(config: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """transformers' model on the meta device."""
    import transformers

    language = {
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "intermediate_size": config.ffn,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "vocab_size": config.vocabulary,
        "use_cache": False,
        **config.more,
    }
    if config.vision is None:
        kind, settings = transformers.AutoModelForCausalLM, language
    else:
        kind = transformers.AutoModelForImageTextToText
        settings = {
            "text_config": language,
            "vision_config": _vision(config.vision),
            "image_token_id": image_token(config),
        }
    settings |= {"tie_word_embeddings": False, "attn_implementation": "sdpa"}
    with torch.device("meta"):
        return kind.from_config(
            transformers.AutoConfig.for_model(config.family, **settings), dtype=dtype
        )


def _vision(tower: VisionTower) -> dict:
    return {
        "hidden_size": tower.hidden,
        "depth": tower.layers,
        "intermediate_size": tower.ffn,
        "num_heads": tower.heads,
        "out_hidden_size": tower.out,
        "fullatt_block_indexes": list(tower.full_attention),
    }


def random_weights(
    model: nn.Module, device: torch.device | str
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every parameter of a model on the meta device, drawn one at a time."""
    shapes = [(name, p.shape, p.dtype) for name, p in model.named_parameters()]  # now: they change
    return _drawn(shapes, device)


def _drawn(shapes, device):
    generator = torch.Generator(device).manual_seed(SEED)
    for name, shape, dtype in shapes:
        if len(shape) == 1:  # norms are one, biases zero
            fill = 0.0 if name.endswith("bias") else 1.0
            yield name, torch.full(shape, fill, dtype=dtype, device=device)
        else:
            tensor = torch.empty(shape, dtype=dtype, device=device)
            yield name, tensor.normal_(0.0, STD, generator=generator)


def lowbit_model(
    config: ModelConfig, r: int, dtype: torch.dtype, device: torch.device | str, fuse: bool
) -> nn.Module:
    """All linear layers of the blocks in double-quantized NF4 with adapters in `dtype`."""
    model = skeleton(config, dtype)
    weights = random_weights(model, device)
    torch.manual_seed(SEED)
    return prepare(
        model, r, 2 * r, weights=weights, device=device, lora_dtype=dtype, blocksize=BLOCKSIZE,
        fuse=fuse,
    ).train()  # fmt: skip


def peft_model(
    config: ModelConfig, r: int, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """The same with bitsandbytes' layers and PEFT's adapters, both as fast as they come: adapters
    in `dtype`, not in PEFT's default fp32.
    """
    import peft
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    model = skeleton(config, dtype)
    options = {"quant_type": "nf4", "compress_statistics": True, "blocksize": BLOCKSIZE}
    layers = {
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name != "lm_head"
    }
    for name, tensor in random_weights(model, device):
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        if path not in layers or leaf != "weight":
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            continue
        layer = Linear4bit(
            owner.in_features, owner.out_features, bias=owner.bias is not None,
            compute_dtype=dtype, quant_type="nf4", device="meta",
        )  # fmt: skip
        packed, state = quantize_4bit(tensor, **options)
        layer.weight = Params4bit(
            packed, requires_grad=False, quant_state=state, bnb_quantized=True, module=layer
        )
        layer.quant_state = state
        model.set_submodule(path, layer)
        del tensor
    restore_buffers(model, device)
    lora = peft.LoraConfig(
        r=r, lora_alpha=2 * r, target_modules=sorted(layers), task_type="CAUSAL_LM"
    )
    torch.manual_seed(SEED)
    wrapped = peft.get_peft_model(model, lora, autocast_adapter_dtype=False).to(device)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return wrapped.train()


def why_no_peft() -> str | None:
    """Why PEFT with bitsandbytes cannot be compared here, or None."""
    for package in ("bitsandbytes", "peft"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    return None
