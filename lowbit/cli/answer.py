"""Let a model answer: greedy or sampled, one prompt or a batch."""

from collections.abc import Sequence
from typing import Any

import torch

from .data import Message
from .encode import Renderer

GROUP = 8  # prompts answered together; the padding of more would cost what it gains


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """End tokens of the model's generation settings and of its tokenizer."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [*ids, tokenizer.eos_token_id] if token is not None})


def generation_config(
    model: Any,
    tokenizer: Any,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> Any:
    """Settings for `generate`; temperature 0 is greedy. The model's own defaults (often
    sampling) are not used.
    """
    from transformers import GenerationConfig

    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    return GenerationConfig(
        max_new_tokens=max_tokens,
        eos_token_id=stop_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )


@torch.inference_mode()
def continue_texts(
    model: Any, renderer: Renderer, prompts: Sequence[str], config: Any, *, streamer: Any = None
) -> list[str]:
    """Continue each prompt text; answers cut off by the token limit end in "..."."""
    tokenizer, device = renderer.tokenizer, next(model.parameters()).device
    was_training = model.training
    model.eval()
    tokenizer.padding_side = "left"  # answers must follow their prompts directly
    answers = []
    for start in range(0, len(prompts), GROUP):
        inputs = tokenizer(
            list(prompts[start : start + GROUP]),
            return_tensors="pt",
            padding=True,
            add_special_tokens=not renderer.has_template,
            return_token_type_ids=False,
        ).to(device)
        output = model.generate(**inputs, generation_config=config, streamer=streamer)
        for row in output[:, inputs["input_ids"].shape[1] :].tolist():
            text = tokenizer.decode(row, skip_special_tokens=True).strip()
            finished = any(token in config.eos_token_id for token in row)
            answers.append(text if finished else f"{text} ...".lstrip())
    model.train(was_training)
    return answers


def answer_questions(
    model: Any, renderer: Renderer, questions: Sequence[list[Message]], *, max_tokens: int
) -> list[str]:
    """Greedy answers to conversations."""
    config = generation_config(model, renderer.tokenizer, max_tokens=max_tokens)
    prompts = [renderer.prompt(question) for question in questions]
    return continue_texts(model, renderer, prompts, config)
