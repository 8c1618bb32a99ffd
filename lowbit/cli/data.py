"""Read training data: JSONL, JSON or CSV, in the formats people have, into one form.

Record formats, recognised per record by their fields:
    conversations | messages   list of {"role", "content"}, or of {"from", "value"} (ShareGPT)
    prompt + completion        two strings
    instruction [+ input] + output
    text                       one string; every token is trained on
A list of turns in a CSV file is a cell that holds JSON. Every fault names the file and the line
(JSONL, CSV) or record (JSON).
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CliError, first_sentence

Message = dict[str, str]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
CHAT_FIELDS = ("conversations", "messages")
KNOWN_FORMATS = "conversations, messages, prompt + completion, instruction + output, or text"


@dataclass(frozen=True)
class Example:
    """One record. `messages` for chats and pairs, `text` for plain text; `where` names its place in
    the file.

    `raw_pair` is true for prompt/completion: without a chat template the two strings are joined as
    they are.
    """

    where: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    raw_pair: bool = False

    @property
    def question(self) -> list[Message]:
        """The messages before the last assistant turn."""
        return list(self.messages[: self._last_answer()])

    @property
    def answer(self) -> str:
        """The content of the last assistant turn."""
        return self.messages[self._last_answer()]["content"]

    def _last_answer(self) -> int:
        return max(i for i, message in enumerate(self.messages) if message["role"] == "assistant")


def read_examples(path: str | Path) -> list[Example]:
    """Read every record of a file.

    Args:
        path: file ending in .jsonl (or .ndjson), .json or .csv.
    Returns: the examples in file order, at least one.
    Raises: CliError naming the file, the line or record, and the reason.
    """
    path = Path(path)
    if not path.exists():
        raise CliError(f"data file {path} does not exist")
    if path.is_dir():
        raise CliError(f"data file {path} is a folder; name a .jsonl, .json or .csv file in it")
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise CliError(
            f"data file {path} must end in .jsonl, .json or .csv, got {path.suffix or 'no suffix'}"
        )
    try:
        examples = [parse_record(record, where) for where, record in reader(path)]
    except UnicodeDecodeError as error:
        raise CliError(
            f"data file {path} is not UTF-8 text (byte {error.start} of a block)"
        ) from None
    if not examples:
        raise CliError(f"data file {path} has no records")
    return examples


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                yield where, json.loads(line.rstrip("\n"))
            except json.JSONDecodeError as error:
                raise CliError(
                    f"{where}: not valid JSON: {error.msg} at column {error.colno}"
                ) from None
            except RecursionError:
                raise CliError(f"{where}: not valid JSON: nested too deeply") from None


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        place = f"{path} line {error.lineno}"
        raise CliError(f"{place}: not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise CliError(f"{path}: not valid JSON: nested too deeply") from None
    if not isinstance(records, list):
        raise CliError(f"{path} must hold a JSON list of records, got {_kind(records)}")
    for number, record in enumerate(records, start=1):
        yield f"{path} record {number}", record


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            for row in reader:
                where = f"{path} line {reader.line_num}"
                if None in row:
                    raise CliError(
                        f"{where}: more fields than the header has ({len(reader.fieldnames or ())})"
                    )
                short = [name for name, value in row.items() if value is None]
                if short:
                    raise CliError(f"{where}: field {short[0]!r} is missing")
                yield where, _with_chats(dict(row), where)
        except csv.Error as error:
            raise CliError(f"{path} line {reader.line_num}: not valid CSV: {error}") from None


def _with_chats(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row whose cells of turns are read as JSON."""
    for field in CHAT_FIELDS:
        if field in row:
            try:
                row[field] = json.loads(row[field])
            except (json.JSONDecodeError, RecursionError) as error:
                reason = first_sentence(error)
                raise CliError(f"{where}: {field} is not valid JSON: {reason}") from None
    return row


def parse_record(record: Any, where: str) -> Example:
    """Recognise one record's format and check it; CliError starts with `where`."""
    if not isinstance(record, dict):
        raise CliError(f"{where}: must be a JSON object, got {_kind(record)}")
    for field in CHAT_FIELDS:
        if field in record:
            return Example(where, messages=_messages(record[field], field, where))
    if "prompt" in record and "completion" in record:
        return _pair(record, where)
    if "instruction" in record and "output" in record:
        return _instruction(record, where)
    if "text" in record:
        return Example(where, text=_text(record["text"], "text", where))
    fields = ", ".join(map(str, record)) or "none"
    raise CliError(f"{where}: no known format ({KNOWN_FORMATS}); its fields are: {fields}")


def _pair(record: dict[str, Any], where: str) -> Example:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = _messages([*prompt, *completion], "prompt + completion", where)
        return Example(where, messages=messages)
    return Example(
        where,
        messages=(
            {"role": "user", "content": _text(prompt, "prompt", where)},
            {"role": "assistant", "content": _text(completion, "completion", where)},
        ),
        raw_pair=True,
    )


def _instruction(record: dict[str, Any], where: str) -> Example:
    question = _text(record["instruction"], "instruction", where)
    if record.get("input"):
        question += "\n\n" + _text(record["input"], "input", where)
    answer = _text(record["output"], "output", where)
    return Example(
        where,
        messages=({"role": "user", "content": question}, {"role": "assistant", "content": answer}),
    )


def _messages(turns: Any, field: str, where: str) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not turns:
        raise CliError(f"{where}: {field} must be a non-empty list of turns, got {_kind(turns)}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        place = f"{field} turn {number}"
        if not isinstance(turn, dict):
            raise CliError(
                f"{where}: {place} must be an object with role and content, got {_kind(turn)}"
            )
        role = turn.get("role", turn.get("from"))
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise CliError(
                f"{where}: {place} has role {role!r}; it must be system, user or assistant"
            )
        content = turn.get("content", turn.get("value"))
        role = ROLES[role.lower()]
        # An empty system prompt is a real choice: it turns off the chat template's default one.
        text = "" if role == "system" and content == "" else _text(content, place, where)
        messages.append({"role": role, "content": text})
    if all(message["role"] != "assistant" for message in messages):
        raise CliError(f"{where}: {field} has no assistant turn, so there is nothing to learn from")
    return tuple(messages)


def _text(value: Any, name: str, where: str) -> str:
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        other = [part.get("type") for part in value if part.get("type") != "text"]
        if other:
            raise CliError(
                f"{where}: {name} has a part of type {other[0]!r}; lowbit finetune reads text only"
            )
        value = "".join(str(part.get("text", "")) for part in value)
    if not isinstance(value, str):
        raise CliError(f"{where}: {name} must be a string, got {_kind(value)}")
    if not value.strip():
        raise CliError(f"{where}: {name} is empty")
    return value


def _kind(value: Any) -> str:
    if isinstance(value, (list, str, dict)) and not value:
        return f"an empty {type(value).__name__}"
    names = {
        "NoneType": "null",
        "dict": "an object",
        "list": "a list",
        "str": "a string",
        "bool": "a boolean",
    }
    return names.get(type(value).__name__, "a number")
