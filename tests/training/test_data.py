"""Records to tokens and masks: the forms, what is learned in each, and what each bad line is told."""

import pathlib

import numpy as np
import pytest

from jaxlora.errors import SetupError
from jaxlora.text import Tokenizer
from tests.training import tiny
from training.data import Encoder
from training.method import Example
from training.records import BadLine, Record, TooLong, encode_all, read

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
END = 257


@pytest.fixture(scope="module")
def encoder(tiny_model: pathlib.Path) -> Encoder:
    return Encoder(Tokenizer.from_folder(tiny_model), END, 64)


def encoder_with(template: str, folder: pathlib.Path) -> Encoder:
    return Encoder(Tokenizer.from_folder(tiny.write_model(folder / "model", template)), END, 64)


def learned(encoder: Encoder, example: Example) -> str:
    """What is learned, as text with the end tokens shown."""
    tokens = example.arrays["tokens"][example.arrays["mask"] == 1]
    return "".join(encoder.tokenizer.token_text(token) for token in tokens.tolist())


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"text": "abc"}, "bc<|end|>"),
        ({"prompt": "ask ", "completion": "answer"}, "answer<|end|>"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "yo<|end|>\n"),
        ({"messages": [USER, ASSISTANT]}, "yo<|end|>\n"),
        ({"messages": [USER, ASSISTANT, USER, ASSISTANT]}, "yo<|end|>\nyo<|end|>\n"),
        ({"messages": [USER, ASSISTANT, USER]}, "yo<|end|>\n"),
        ({"messages": [USER, {"role": "assistant", "content": "hi hi"}]}, "hi hi<|end|>\n"),
    ],
)
def test_what_is_learned(encoder: Encoder, fields: dict, text: str) -> None:
    example = encoder.example(Record(1, fields))
    assert learned(encoder, example) == text
    assert len(example.arrays["mask"]) == len(example.arrays["tokens"]) == example.length


def test_the_prompt_that_is_learned_to_answer_is_the_prompt_that_is_served(encoder: Encoder) -> None:
    record = Record(1, {"messages": [USER, ASSISTANT, USER, {"role": "assistant", "content": "last"}]})
    question, example = encoder.question(record), encoder.example(record)
    served = encoder.tokenizer.apply_chat_template([USER, ASSISTANT, USER])
    assert list(question.prompt) == served == example.arrays["tokens"][: len(served)].tolist()
    assert question.answer == "last" and example.arrays["mask"][len(served)] == 1
    assert encoder.question(Record(1, {"prompt": "a ", "completion": "b"})).answer == "b"
    assert encoder.question(Record(1, {"text": "a"})) is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "no fields"),
        ({"prompt": "a"}, "has `prompt`; expected"),
        ({"text": ""}, "`text` is empty"),
        ({"text": 3}, "`text` is a int"),
        ({"prompt": "a", "completion": None}, "`completion` is missing"),
        ({"prompt": [USER], "completion": "b"}, "`prompt` is a list"),
        ({"messages": []}, "is empty"),
        ({"messages": "hi"}, "is a string"),
        ({"messages": [{"role": "user"}]}, "has no `content`"),
        ({"messages": [USER]}, "no message has the role `assistant`"),
        ({"messages": [ASSISTANT]}, "the first message is the assistant's"),
        ({"text": "\ud800"}, "surrogate"),
    ],
)
def test_a_bad_record_is_told_why(encoder: Encoder, fields: dict, reason: str) -> None:
    with pytest.raises(BadLine, match=reason):
        encoder.example(Record(1, fields))


def test_a_prompt_that_joins_its_completion_inside_a_token_is_refused(default_model: pathlib.Path) -> None:
    encoder = Encoder(Tokenizer.from_folder(default_model), 2, 64)
    with pytest.raises(BadLine, match="join inside a token"):
        encoder.example(Record(1, {"prompt": "the capi", "completion": "tal"}))
    assert encoder.example(Record(1, {"prompt": "the", "completion": " capital"})).arrays["mask"].tolist() == [0, 1, 1]


def test_a_template_without_generation_prompt_is_refused_where_the_answer_has_a_header(tmp_path: pathlib.Path) -> None:
    header = encoder_with(tiny.TEMPLATE.partition("{% if add_generation_prompt")[0], tmp_path / "header")
    with pytest.raises(BadLine, match=r"no generation prompt: the answer would begin with '<\|start\|>assistant\\n'"):
        header.example(Record(1, {"messages": [USER, ASSISTANT]}))
    turn = "{% if m.role == 'user' %}[{{ m.content }}]{% else %}{{ m.content }}<|end|>{% endif %}"
    bare = encoder_with("{% for m in messages %}" + turn + "{% endfor %}", tmp_path / "bare")
    assert learned(bare, bare.example(Record(1, {"messages": [USER, ASSISTANT]}))) == "yo<|end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: pathlib.Path) -> None:
    template = tiny.TEMPLATE.replace("message['content']", "message.content if loop.last or message.role == 'user' else 'cut'")
    encoder = encoder_with(template, tmp_path)
    assert learned(encoder, encoder.example(Record(1, {"messages": [USER, ASSISTANT]}))) == "yo<|end|>\n"
    with pytest.raises(BadLine, match="changes what is before message 1"):
        encoder.example(Record(1, {"messages": [USER, ASSISTANT, USER, ASSISTANT]}))


def test_too_long_is_told_from_bad(encoder: Encoder) -> None:
    with pytest.raises(TooLong, match=r"has 101 tokens, the limit is 64 \(--max-length\)"):
        encoder.example(Record(1, {"text": "x" * 100}))


def test_every_bad_line_of_a_file_is_reported_with_its_number(encoder: Encoder, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n{"text": \n[1]\n\xff\n{"txt": "x"}\n{"text": "' + b"y" * 100 + b'"}\n')
    with pytest.raises(SetupError) as raised:
        encode_all(path, encoder.example, skip_bad=False, say=print)
    message = str(raised.value)
    assert "4 bad lines" in message
    for line in ("line 3: is not JSON", "line 4: is a list", "line 5: is not UTF-8", "line 6: has `txt`"):
        assert line in message
    said: list[str] = []
    found = encode_all(path, encoder.example, skip_bad=True, say=said.append)
    assert [example.lines for example in found] == [(1,)]
    assert "left out as bad 4 of 6 lines: 3, 4, 5, 6" in said[0] and "left out as too long 1 of 6 lines: 7" in said[1]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert read(path) == ([Record(1, {"text": "a"}), Record(2, {"text": "b"})], {})


def test_a_file_with_nothing_to_train_on_is_refused(encoder: Encoder, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "d.jsonl"
    with pytest.raises(SetupError, match="can't be read"):
        read(path)
    path.write_text("\n \n")
    with pytest.raises(SetupError, match="is empty"):
        read(path)
    tiny.write_lines(path, [{"text": "x" * 100}] * 3)
    with pytest.raises(SetupError, match="no line is left to train on\n  line 1: has 101 tokens"):
        encode_all(path, encoder.example, skip_bad=False, say=print)


def test_long_lists_of_problems_are_cut(encoder: Encoder, tmp_path: pathlib.Path) -> None:
    path = tiny.write_lines(tmp_path / "d.jsonl", [{"txt": 1}] * 50)
    with pytest.raises(SetupError, match="50 bad lines") as raised:
        encode_all(path, encoder.example, skip_bad=False, say=print)
    assert str(raised.value).count("\n") == 21 and str(raised.value).endswith("and 30 more")


def test_masks_are_bytes_and_tokens_are_int32(encoder: Encoder) -> None:
    arrays = encoder.example(Record(1, {"text": "abc"})).arrays
    assert arrays["tokens"].dtype == np.int32 and arrays["mask"].dtype == np.uint8
