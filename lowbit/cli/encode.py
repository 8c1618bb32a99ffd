"""Turn examples into token ids with the answer tokens marked, and group them into batches of like
length.

The loss is taken only on answers. With a chat template the whole conversation is rendered once, the
answer spans are found in that text, and the tokenizer's offsets carry them over to tokens; so the
ids are exactly those the model sees in use. Right padding needs no attention mask under causal
attention: padding comes after every real token.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .data import Example, Message
from .errors import CliError, first_sentence

Span = tuple[int, int]
# Batches sorted by length together: wide enough to save padding, narrow enough to stay random.
SORT_WINDOW = 16


@dataclass(frozen=True)
class Encoded:
    """Token ids [T] of one example and, for each, whether it is an answer token to learn."""

    ids: list[int]
    learn: list[bool]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def answers(self) -> int:
        """Number of tokens that count in the loss (the first token of all has no prediction)."""
        return sum(self.learn[1:])


@dataclass(frozen=True)
class Batch:
    """ids [B, T] int64, right-padded; learn [B, T] bool; tokens = real tokens; answers = tokens
    in the loss.
    """

    ids: torch.Tensor
    learn: torch.Tensor
    tokens: int
    answers: int


class Renderer:
    """Renders examples to text with answer spans, with the tokenizer's chat template where there is
    one.

    Args:
        tokenizer: a transformers tokenizer. system: system prompt for conversations that bring
        none; None keeps the template's own default. use_template: False ignores the chat template.
    """

    def __init__(
        self, tokenizer: Any, *, system: str | None = None, use_template: bool = True
    ) -> None:
        self.tokenizer = tokenizer
        self.system = system
        self.has_template = bool(use_template and getattr(tokenizer, "chat_template", None))

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        """Put the system prompt in front unless the conversation has its own."""
        if self.system is None or (messages and messages[0]["role"] == "system"):
            return list(messages)
        return [{"role": "system", "content": self.system}, *messages]

    def prompt(self, messages: Sequence[Message], *, raw: bool = False) -> str:
        """The text after which the model should write its answer to `messages`."""
        if self.has_template:
            return self._template(self.with_system(messages), answer_next=True)
        if raw:
            return "".join(message["content"] for message in messages)
        return _plain_chat(self.with_system(messages), "")[0] + "Assistant:"

    def render(self, example: Example) -> tuple[str, list[Span]]:
        """The whole text of an example and the character spans of its answers."""
        eos = self.tokenizer.eos_token or ""
        if example.text:
            text = example.text + eos
            return text, [(0, len(text))]
        if self.has_template:
            return self._render_chat(self.with_system(example.messages), example.where)
        if example.raw_pair:
            prompt, completion = (message["content"] for message in example.messages)
            text = prompt + completion + eos
            return text, [(len(prompt), len(text))]
        return _plain_chat(self.with_system(example.messages), eos)

    def _template(self, messages: list[Message], *, answer_next: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer_next
        )

    def _render_chat(self, messages: list[Message], where: str) -> tuple[str, list[Span]]:
        try:
            full = self._template(messages, answer_next=False)
            spans, position = [], 0
            for index, message in enumerate(messages):
                if message["role"] != "assistant":
                    continue
                # A conversation may open with the assistant; there is no prompt to render then.
                before = self._template(messages[:index], answer_next=True) if index else None
                after = self._template(messages[: index + 1], answer_next=False)
                span = _answer_span(full, before, after, message["content"], position)
                if span is None:
                    raise CliError(
                        f"{where}: the chat template drops an assistant turn; it cannot be learned"
                    )
                spans.append(span)
                position = span[1]
            return full, spans
        except CliError:
            raise
        # A template is a program of the model's author; it refuses, for instance, two user turns in
        # a row.
        except Exception as error:
            raise CliError(
                f"{where}: the chat template refused it: {first_sentence(error)}"
            ) from None


def _answer_span(
    full: str, before: str | None, after: str, content: str, position: int
) -> Span | None:
    """Place of one assistant turn in the rendered conversation, its end-of-turn mark included.

    Usually the conversation starts with `before` (the prompt) and `after` (prompt and answer).
    Templates that rewrite earlier turns (dropping old reasoning) break that; then the content
    itself is looked up from `position` on.
    """
    if (
        before is not None
        and full.startswith(before)
        and full.startswith(after)
        and len(after) > len(before)
    ):
        # Newlines after the end-of-turn mark belong to the template, not to the answer.
        return len(before), len(before) + len(full[len(before) : len(after)].rstrip("\n"))
    content = content.strip()
    start = full.find(content, position)
    return None if start < 0 else (start, start + len(content))


def _plain_chat(messages: Sequence[Message], eos: str) -> tuple[str, list[Span]]:
    """A conversation for tokenizers without a chat template: `User: ...`, `Assistant: ...`, one
    turn per line.
    """
    text, spans = "", []
    for message in messages:
        if message["role"] == "system" and not message["content"]:
            continue
        text += message["role"].capitalize() + ":"
        start = len(text)
        text += " " + message["content"]
        if message["role"] == "assistant":
            text += eos
            spans.append((start, len(text)))
        text += "\n"
    return text, spans


def encode(renderer: Renderer, example: Example, max_length: int) -> Encoded:
    """Tokenize one example and mark its answer tokens; longer ones are cut at `max_length`
    tokens.
    """
    text, spans = renderer.render(example)
    tokenizer = renderer.tokenizer
    # A chat template writes the special tokens itself; plain text gets the tokenizer's own (usually
    # BOS).
    special = not renderer.has_template or bool(example.text)
    if getattr(tokenizer, "is_fast", False):
        out = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        ids, offsets = out["input_ids"], out["offset_mapping"]
        learn = [
            any(begin < end and end > a and begin < b for a, b in spans) for begin, end in offsets
        ]
    else:
        ids, learn = _encode_pieces(tokenizer, text, spans, special)
    if special and list(ids[-2:]) == [tokenizer.eos_token_id] * 2:
        ids, learn = ids[:-1], learn[:-1]  # this tokenizer adds an end token by itself
    return Encoded(list(ids[:max_length]), learn[:max_length])


def _encode_pieces(
    tokenizer: Any, text: str, spans: list[Span], special: bool
) -> tuple[list[int], list[bool]]:
    """For tokenizers without offsets: tokenize the stretches between span borders one by one."""
    ids: list[int] = []
    learn: list[bool] = []
    position = 0
    borders = [edge for a, b in spans for edge in ((a, False), (b, True))] + [(len(text), False)]
    for edge, is_answer in borders:
        piece = text[position:edge]
        if piece:
            new = tokenizer(piece, add_special_tokens=special and not ids)["input_ids"]
            ids += new
            learn += [is_answer] * len(new)
        position = edge
    return ids, learn


def encode_all(
    renderer: Renderer, examples: Sequence[Example], max_length: int
) -> tuple[list[Encoded], int]:
    """Encode all examples; returns them and how many had no answer token within `max_length`."""
    encoded = [encode(renderer, example, max_length) for example in examples]
    kept = [item for item in encoded if item.answers]
    if not kept:
        raise CliError(
            f"no example has an answer token within --max-length {max_length}; "
            "give a larger --max-length"
        )
    return kept, len(encoded) - len(kept)


def epoch_order(lengths: Sequence[int], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of each batch of one epoch: shuffled, grouped by length, a function of (seed,
    epoch) only.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    window = batch * SORT_WINDOW
    batches = []
    for start in range(0, len(order), window):
        part = sorted(order[start : start + window], key=lambda i: lengths[i])
        batches += [part[i : i + batch] for i in range(0, len(part), batch)]
    rng.shuffle(batches)
    return batches


def sorted_batches(lengths: Sequence[int], batch: int) -> list[list[int]]:
    """Batches in order of length, for evaluation."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[i : i + batch] for i in range(0, len(order), batch)]


def widened(batch: Batch, width: int, pad_id: int) -> Batch:
    """The same batch with more padding."""
    missing = (0, width - batch.ids.shape[1])
    ids = torch.nn.functional.pad(batch.ids, missing, value=pad_id)
    learn = torch.nn.functional.pad(batch.learn, missing, value=False)
    return replace(batch, ids=ids, learn=learn)


def collate(items: Sequence[Encoded], pad_id: int) -> Batch:
    """Stack examples into one right-padded batch."""
    width = max(len(item) for item in items)
    ids = torch.full((len(items), width), pad_id, dtype=torch.int64)
    learn = torch.zeros((len(items), width), dtype=torch.bool)
    for row, item in enumerate(items):
        ids[row, : len(item)] = torch.tensor(item.ids, dtype=torch.int64)
        learn[row, : len(item)] = torch.tensor(item.learn)
    learn[:, 0] = False  # nothing predicts the first token
    return Batch(ids, learn, sum(map(len, items)), int(learn.sum()))
