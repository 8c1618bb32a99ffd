"""Reading and encoding of training data: formats, faults by line number, answer masks, batches."""

import csv
import json
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import make_tokenizer

from lowbit.cli import finetune
from lowbit.cli.data import Example, parse_record, read_examples
from lowbit.cli.encode import (
    Encoded,
    Renderer,
    collate,
    encode,
    encode_all,
    epoch_order,
    sorted_batches,
)
from lowbit.cli.errors import CliError

CHAT = {
    "conversations": [
        {"role": "user", "content": "what is NF4"},
        {"role": "assistant", "content": "four bits"},
    ]
}
EQUAL_TO_CHAT = [
    {"messages": CHAT["conversations"]},
    {
        "conversations": [
            {"from": "human", "value": "what is NF4"},
            {"from": "gpt", "value": "four bits"},
        ]
    },
    {"prompt": "what is NF4", "completion": "four bits"},
    {
        "prompt": [{"role": "user", "content": "what is NF4"}],
        "completion": [{"role": "assistant", "content": "four bits"}],
    },
    {"instruction": "what is NF4", "output": "four bits"},
    {"instruction": "what is NF4", "input": "", "output": "four bits"},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "what is NF4"}]},
            {"role": "assistant", "content": "four bits"},
        ]
    },
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def plain_tokenizer():
    return make_tokenizer(chat_template=None)


def learned(tokenizer, item: Encoded) -> str:
    """Text of the tokens that count in the loss."""
    return tokenizer.decode([i for i, take in zip(item.ids, item.learn, strict=True) if take])


# ---- formats -----------------------------------------------------------------------------------


@pytest.mark.parametrize("record", EQUAL_TO_CHAT)
def test_formats_mean_the_same(record):
    expected = parse_record(CHAT, "x")
    got = parse_record(record, "x")
    assert got.messages == expected.messages
    assert got.question == [{"role": "user", "content": "what is NF4"}]
    assert got.answer == "four bits"


def test_instruction_with_input_joins_both():
    example = parse_record({"instruction": "add", "input": "1 2", "output": "3"}, "x")
    assert example.messages[0]["content"] == "add\n\n1 2"


def test_files_of_every_kind_give_the_same_examples(tmp_path):
    pairs = [{"prompt": "what", "completion": "one, two"}, {"prompt": 'a "b"', "completion": "c"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps(pairs, indent=2))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(pairs)
    read = [read_examples(tmp_path / f"a.{kind}") for kind in ("jsonl", "json", "csv")]
    messages = [[example.messages for example in examples] for examples in read]
    assert messages[0] == messages[1] == messages[2]
    assert len(messages[0]) == 2


def test_chats_in_files_of_every_kind_give_the_same_examples(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(CHAT))
    (tmp_path / "a.json").write_text(json.dumps([CHAT]))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(CHAT))
        writer.writeheader()
        writer.writerow({field: json.dumps(turns) for field, turns in CHAT.items()})
    read = [read_examples(tmp_path / f"a.{kind}") for kind in ("jsonl", "json", "csv")]
    assert read[0][0].messages == read[1][0].messages == read[2][0].messages


def test_byte_order_mark_is_no_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(CHAT).encode())
    assert len(read_examples(path)) == 1


text = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=30).filter(
    str.strip
)
turn_pairs = st.lists(st.tuples(text, text), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(turn_pairs, st.sampled_from(["conversations", "messages"]), st.booleans())
def test_any_chat_survives_json_and_parsing(turns, field, share_gpt):
    messages = [
        {"role": role, "content": content}
        for user, assistant in turns
        for role, content in (("user", user), ("assistant", assistant))
    ]
    names = {"user": "human", "assistant": "gpt"}
    written = (
        [{"from": names[m["role"]], "value": m["content"]} for m in messages]
        if share_gpt
        else messages
    )
    example = parse_record(json.loads(json.dumps({field: written})), "x")
    assert list(example.messages) == messages


# ---- faults ------------------------------------------------------------------------------------

BAD_LINES = [
    ('{"prompt": "a", ', "not valid JSON"),
    ('{"prompt": ', "not valid JSON: Expecting value at column 12"),
    ('"text"', "must be a JSON object, got a string"),
    ("[1]", "must be a JSON object, got a list"),
    ("{}", "its fields are: none"),
    ('{"question": "a", "reply": "b"}', "its fields are: question, reply"),
    ('{"prompt": "a"}', "no known format"),
    ('{"prompt": "", "completion": "b"}', "prompt is empty"),
    ('{"prompt": "a", "completion": 3}', "completion must be a string, got a number"),
    ('{"prompt": "a", "completion": null}', "completion must be a string, got null"),
    ('{"text": "  "}', "text is empty"),
    ('{"conversations": []}', "must be a non-empty list of turns, got an empty list"),
    ('{"conversations": {"role": "user"}}', "got an object"),
    ('{"conversations": ["hi"]}', "turn 1 must be an object"),
    ('{"conversations": [{"role": "robot", "content": "a"}]}', "role 'robot'"),
    ('{"conversations": [{"role": "user", "content": "a"}]}', "no assistant turn"),
    ('{"conversations": [{"role": "assistant", "content": ""}]}', "turn 1 is empty"),
    (
        '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
        "part of type 'image'",
    ),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_malformed_line_is_named(tmp_path, line, reason):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([json.dumps(CHAT), "", line, json.dumps(CHAT)]))
    with pytest.raises(CliError) as error:
        read_examples(path)
    assert str(error.value).startswith(f"{path} line 3: ")
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", "hi", "must end in .jsonl, .json or .csv, got .txt"),
        ("a", "hi", "got no suffix"),
        ("a.jsonl", "\n \n", "has no records"),
        ("a.json", "[]", "has no records"),
        ("a.json", '{"a": 1}', "must hold a JSON list of records, got an object"),
        ("a.json", '[\n{"a": 1},\n{]', "line 3: not valid JSON"),
        ("a.json", '[{"text": "a"}, {"text": ""}]', "record 2: text is empty"),
        ("a.csv", "prompt,completion\n", "has no records"),
        ("a.csv", "prompt,completion\na,b\nc,d,e\n", "line 3: more fields than the header has (2)"),
        ("a.csv", "prompt,completion\na\n", "line 2: field 'completion' is missing"),
        ("a.csv", 'prompt,completion\na,"b\n', "not valid CSV"),
        ("a.csv", "messages\nhello\n", "line 2: messages is not valid JSON: Expecting value"),
        ("a.csv", "messages\n3\n", "line 2: messages must be a non-empty list of turns"),
        ("a.jsonl", "[" * 100_000, "not valid JSON"),
    ],
)
def test_faulty_file_is_explained(tmp_path, name, content, reason):
    (tmp_path / name).write_text(content)
    with pytest.raises(CliError, match="a") as error:
        read_examples(tmp_path / name)
    assert reason in str(error.value)


def test_missing_file_folder_and_binary_are_explained(tmp_path):
    with pytest.raises(CliError, match="does not exist"):
        read_examples(tmp_path / "none.jsonl")
    with pytest.raises(CliError, match="is a folder"):
        read_examples(tmp_path)
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CliError, match="not UTF-8"):
        read_examples(tmp_path / "b.jsonl")


FIELDS = ["conversations", "messages", "role", "content", "from", "value", "type", "text"]
FIELDS += ["prompt", "completion", "instruction", "input", "output"]


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(string.ascii_letters, max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(FIELDS),
                inner,
                max_size=3,
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_is_read_or_refused_in_one_line(record):
    try:
        example = parse_record(record, "here")
    except CliError as error:
        message = str(error)
    else:
        message = None
    if message is None:
        assert example.text or example.answer
    else:
        assert message.startswith("here: ")
        assert "\n" not in message


# ---- encoding ----------------------------------------------------------------------------------


def chat(*turns: str) -> Example:
    roles = ("user", "assistant")
    return Example(
        "x", messages=tuple({"role": roles[i % 2], "content": t} for i, t in enumerate(turns))
    )


def test_loss_counts_answers_and_their_end_token(tokenizer):
    item = encode(Renderer(tokenizer), chat("what is NF4", "four bits"), 100)
    assert learned(tokenizer, item) == "four bits</s>"
    whole = "<|user|>what is NF4</s>\n<|assistant|>four bits</s>\n"
    assert tokenizer.decode(item.ids) == whole


def test_every_assistant_turn_is_learned(tokenizer):
    item = encode(Renderer(tokenizer), chat("what", "one", "is", "two three"), 100)
    assert learned(tokenizer, item) == "one</s>two three</s>"


def test_prompt_ends_where_the_learned_answer_begins(tokenizer):
    renderer, example = Renderer(tokenizer, system="small"), chat("what is NF4", "four bits")
    prompt = tokenizer(renderer.prompt(example.question), add_special_tokens=False)["input_ids"]
    item = encode(renderer, example, 100)
    assert item.ids[: len(prompt)] == prompt
    assert not any(item.learn[: len(prompt)])
    assert item.learn[len(prompt)]


@settings(max_examples=40, deadline=None)
@given(turn_pairs)
def test_answer_mask_covers_exactly_the_answers(turns):
    tokenizer = make_cached_tokenizer()
    example = chat(*[part for pair in turns for part in pair])
    item = encode(Renderer(tokenizer), example, 10_000)
    assert learned(tokenizer, item) == "".join(answer + "</s>" for _, answer in turns)


_CACHE: list = []


def make_cached_tokenizer():
    """Hypothesis cannot use function fixtures; building a tokenizer per example would be slow."""
    if not _CACHE:
        _CACHE.append(make_tokenizer())
    return _CACHE[0]


def test_system_prompt_is_added_only_where_none_is(tokenizer):
    renderer = Renderer(tokenizer, system="small")
    assert renderer.prompt([{"role": "user", "content": "a"}]).startswith("<|system|>small</s>")
    own = [{"role": "system", "content": "red"}, {"role": "user", "content": "a"}]
    assert renderer.prompt(own).startswith("<|system|>red</s>")


def test_template_that_rewrites_earlier_turns(tokenizer):
    # Reasoning models: text up to </think> is dropped from all but the last assistant turn.
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>"
        "{% if not loop.last %}{{ m['content'].split('</think>')[-1] }}"
        "{% else %}{{ m['content'] }}{% endif %}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    rewriting = make_tokenizer(chat_template=template)
    item = encode(Renderer(rewriting), chat("what", "one", "is", "a</think>two"), 100)
    assert learned(rewriting, item) == "one</s>a</think>two</s>"
    with pytest.raises(CliError, match="drops an assistant turn"):
        encode(Renderer(rewriting), chat("what", "a</think>one", "is", "two"), 100)


def test_template_that_refuses_is_reported_with_the_place():
    refusing = make_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(CliError, match=r"x: the chat template refused it: roles must alternate"):
        encode(Renderer(refusing), chat("what", "one"), 100)


def test_without_template(plain_tokenizer):
    renderer = Renderer(plain_tokenizer)
    item = encode(renderer, chat("what is NF4", "four bits"), 100)
    assert learned(plain_tokenizer, item) == " four bits</s>"
    pair = parse_record({"prompt": "what is", "completion": " NF4"}, "x")
    item = encode(renderer, pair, 100)
    assert plain_tokenizer.decode(item.ids) == "what is NF4</s>"
    assert learned(plain_tokenizer, item) == " NF4</s>"
    assert renderer.prompt(pair.question, raw=True) == "what is"


def test_plain_text_is_learned_whole(tokenizer):
    item = encode(Renderer(tokenizer), Example("x", text="red green blue"), 100)
    assert learned(tokenizer, item) == "red green blue</s>"


def test_tokenizer_without_offsets_gives_the_same(tokenizer):
    class Slow:
        """The same tokenizer with its offsets hidden."""

        is_fast = False
        chat_template, eos_token = tokenizer.chat_template, tokenizer.eos_token
        eos_token_id = tokenizer.eos_token_id
        apply_chat_template = tokenizer.apply_chat_template

        def __call__(self, text, **options):
            return tokenizer(text, **options)

    example = chat("what is NF4", "four bits", "a", "blue stone")
    assert encode(Renderer(Slow()), example, 100) == encode(Renderer(tokenizer), example, 100)


def test_cut_examples_keep_what_fits_and_useless_ones_are_dropped(tokenizer):
    renderer = Renderer(tokenizer)
    short, long = chat("a", "one"), chat("what is the rank of a matrix", "one")
    kept, dropped = encode_all(renderer, [short, long], 7)
    assert (len(kept), dropped) == (1, 1)
    with pytest.raises(CliError, match="--max-length 2"):
        encode_all(renderer, [short], 2)


# ---- batches -----------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=200),
    st.integers(1, 9),
    st.integers(0, 5),
)
def test_each_epoch_holds_every_example_once(lengths, batch, epoch):
    order = epoch_order(lengths, batch, seed=3, epoch=epoch)
    assert sorted(i for indices in order for i in indices) == list(range(len(lengths)))
    assert max(map(len, order)) <= batch
    assert order == epoch_order(lengths, batch, seed=3, epoch=epoch)


def test_epochs_differ_and_grouping_saves_padding():
    lengths = [1 + (37 * i) % 100 for i in range(400)]
    first, second = (epoch_order(lengths, 8, seed=0, epoch=e) for e in (0, 1))
    assert first != second
    padded = sum(len(b) * max(lengths[i] for i in b) for b in first)
    assert padded < 1.1 * sum(lengths)


def test_collate_pads_right_and_counts():
    items = [Encoded([5, 6, 7], [True, False, True]), Encoded([8], [True])]
    batch = collate(items, pad_id=0)
    assert batch.ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.learn.tolist() == [[False, False, True], [False, False, False]]
    assert (batch.tokens, batch.answers) == (4, 1)
    assert sorted_batches([3, 1, 2], 2) == [[1, 2], [0]]


# ---- the demo's data ---------------------------------------------------------------------------


def test_demo_data_is_sound():
    train = read_examples(finetune.DEMO_SETTINGS["data"])
    held_out = read_examples(finetune.DEMO_SETTINGS["eval_data"])
    questions = [example.question[-1]["content"] for example in train]
    answers = {example.answer for example in train}
    assert len(train) >= 100
    assert len(held_out) >= 20
    assert len(set(questions)) == len(questions)
    for example in held_out:
        assert example.question[-1]["content"] not in questions  # a paraphrase, never a copy
        assert example.answer in answers  # of a fact that training teaches
    for example in (*train, *held_out):
        assert 3 <= len(example.answer.split()) <= 45


def test_demo_data_names_only_what_exists():
    """Every `lowbit.name` that an answer mentions is really there."""
    import re

    import lowbit
    import lowbit.nn

    examples = read_examples(finetune.DEMO_SETTINGS["data"])
    texts = [m["content"] for example in examples for m in example.messages]
    names = {name for text in texts for name in re.findall(r"lowbit((?:\.[A-Za-z_]\w*)+)", text)}
    assert names
    for name in sorted(names):
        target = lowbit
        for part in name.strip(".").split("."):
            assert hasattr(target, part), f"lowbit{name} does not exist"
            target = getattr(target, part)
