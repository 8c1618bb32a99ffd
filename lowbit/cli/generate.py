"""`lowbit generate`: answers of a 4-bit base model with a trained adapter."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from .errors import CliError, guard
from .options import (
    MAX_SEED,
    Adapter,
    BlocksizeChoice,
    ChatTemplateChoice,
    Device,
    DoubleQuantChoice,
    Dtype,
    Model,
    QuantTypeChoice,
    System,
    Text,
    option,
)
from .settings import Settings

HELP = """Answer prompts with a 4-bit base model and, if given, a trained adapter.

The base model, its quantization and the system prompt are those of the fine-tuning run that wrote
the adapter, unless options say otherwise. Without --prompt, prompts are read line by line from
standard input; at a terminal, Ctrl-D ends. Each line is answered on its own.
"""

EXAMPLES = """Examples:

\b
  lowbit generate --adapter out/demo --prompt "What is NF4?"
\b
  lowbit generate --model Qwen/Qwen2.5-0.5B-Instruct --temperature 0.7 \\
      --prompt "Write a haiku about sorting."
\b
  lowbit generate --adapter out/demo < questions.txt
"""


def _sampling(*names: str, help: str, **limits: Any) -> Any:
    return option(*names, panel="Sampling", help=help, **limits)


Prompt = Annotated[Text, option("--prompt", "-p", help="What to answer.")]
MaxTokens = Annotated[int, _sampling("--max-tokens", help="Longest answer, in tokens.", min=1)]
Temperature = Annotated[
    float, _sampling("--temperature", help="0 always takes the likeliest token.", min=0.0)
]
TopP = Annotated[
    float, _sampling("--top-p", help="Sample from the likeliest tokens up to this sum.")
]
TopK = Annotated[int, _sampling("--top-k", help="Sample from so many tokens; 0: all.", min=0)]
Seed = Annotated[int, _sampling("--seed", help="Seed of the sampling.", min=0, max=MAX_SEED)]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int


def generate(
    adapter: Adapter = None,
    model: Model = None,
    prompt: Prompt = None,
    max_tokens: MaxTokens = 200,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    system: System = None,
    chat_template: ChatTemplateChoice = None,
    quant_type: QuantTypeChoice = None,
    blocksize: BlocksizeChoice = None,
    double_quant: DoubleQuantChoice = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    choice = {
        "model": model,
        "system": system,
        "chat_template": chat_template,
        "quant_type": quant_type,
        "blocksize": blocksize,
        "double_quant": double_quant,
        "device": device,
        "dtype": dtype,
    }
    with guard():
        if not 0 < top_p <= 1:
            raise CliError(f"--top-p must be above 0 and at most 1, got {top_p}")
        settings = base_settings(adapter, choice)
        run(settings, adapter, prompt, Sampling(max_tokens, temperature, top_p, top_k, seed))


def base_settings(adapter: Path | None, choice: dict[str, Any]) -> Settings:
    """Settings of the run that wrote the adapter, with the options that were given on top.

    Raises CliError if the folder is no adapter, or no model is named anywhere.
    """
    from . import adapt, checkpoint

    values: dict[str, Any] = {}
    if adapter is not None:
        base = adapt.adapter_base(adapter)
        values = checkpoint.read_run(adapter).get("settings", {}) | (
            {"model": base} if base else {}
        )
    values |= {name: value for name, value in choice.items() if value is not None}
    settings = Settings.from_dict(values)
    if not settings.model:
        cure = "give --model" if adapter else "give --model or --adapter"
        raise CliError(f"no base model is named; {cure}")
    settings.check_model()
    return settings


def run(settings: Settings, adapter: Path | None, prompt: str | None, sampling: Sampling) -> None:
    """Load once, then answer every prompt."""
    if prompt is not None and not prompt.strip():
        raise CliError("--prompt is empty")
    from . import source

    where = source.resolve(settings.model)
    source.quiet(offline=where.is_local)
    model, renderer = _load(settings, where, adapter)
    import torch

    torch.manual_seed(sampling.seed)
    for text in [prompt] if prompt is not None else _prompts():
        _answer(model, renderer, text, sampling)


def _load(settings: Settings, where: Any, adapter: Path | None) -> tuple[Any, Any]:
    from . import adapt, device, source
    from .encode import Renderer

    place = device.resolve_device(settings.device)
    dtype = device.resolve_dtype(settings.dtype, place)
    tokenizer = source.load_tokenizer(where)
    model = source.load_model(where, dtype)
    model = adapt.prepare_model(model, settings, place, rank=0)
    if adapter is not None:
        model = adapt.load_adapter(model, adapter, trainable=False)
    if place.type == "cuda" and settings.fuse:  # as in training: the same roundings
        adapt.fuse(model)
    renderer = Renderer(tokenizer, system=settings.system, use_template=settings.chat_template)
    return model, renderer


def _prompts() -> Iterator[str]:
    """Lines of standard input that say something; with a `> ` in front at a terminal."""
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            break
        if line.strip():
            yield line.strip()
    if terminal:
        print()


def _answer(model: Any, renderer: Any, text: str, sampling: Sampling) -> None:
    """Print one answer as it comes."""
    from transformers import TextStreamer

    from .answer import continue_texts, generation_config

    config = generation_config(
        model,
        renderer.tokenizer,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
    )
    streamer = TextStreamer(renderer.tokenizer, skip_prompt=True, skip_special_tokens=True)
    prompt = renderer.prompt([{"role": "user", "content": text}], raw=True)
    continue_texts(model, renderer, [prompt], config, streamer=streamer)
