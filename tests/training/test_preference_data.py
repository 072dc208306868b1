"""Preference data: what is learned of each form, and what is wrong with a line."""

import pathlib

import numpy as np
import pytest

from jaxlora.text import Tokenizer
from training import pairs
from training.data import Encoder
from training.method import Example
from training.records import BadLine, Record, TooLong

USER = {"role": "user", "content": "2+2?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("four", "five!"))


@pytest.fixture(scope="module")
def encoder(tiny_model: pathlib.Path) -> Encoder:
    tokenizer = Tokenizer.from_folder(tiny_model)
    return Encoder(tokenizer, tokenizer.eos_token_ids[0], max_length=120)


def _texts(encoder: Encoder, example: Example, key: str, mask: str) -> tuple[str, str]:
    """What is given, and what is learned, special tokens too."""
    tokens, learned = example.arrays[key], example.arrays[mask].astype(bool)
    decode = lambda ids: encoder.tokenizer._tokenizer.decode(ids.tolist(), skip_special_tokens=False)  # noqa: E731
    return decode(tokens[~learned]), decode(tokens[learned])


def _sides(encoder: Encoder, fields: dict) -> list[tuple[str, str]]:
    example = pairs.pair(encoder, Record(7, fields))
    assert example.lines == (7,)
    return [_texts(encoder, example, side, f"{side}_mask") for side in ("chosen", "rejected")]


def test_texts_are_learned_to_their_end(encoder: Encoder) -> None:
    found = _sides(encoder, {"prompt": "2+2? ", "chosen": "four", "rejected": "five!"})
    assert found == [("2+2? ", "four<|end|>"), ("2+2? ", "five!<|end|>")]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_messages_are_learned_after_the_prompt_that_both_share(encoder: Encoder, fields: dict) -> None:
    start = "<|start|>user\n2+2?<|end|>\n<|start|>assistant\n"
    assert _sides(encoder, fields) == [(start, "four<|end|>\n"), (start, "five!<|end|>\n")]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"prompt": "a", "chosen": "b"}, "has no `rejected`"),
        ({"prompt": "a"}, "has no `chosen` and no `rejected`"),
        ({"chosen": "b", "rejected": "c"}, "has no `prompt`; only two lists of messages can do without"),
        ({"chosen": [USER, GOOD], "rejected": [GOOD, BAD]}, "do not begin with the same messages"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "do not begin with the same messages"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "`rejected` is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "`rejected` is a int"),
    ],
)
def test_what_is_wrong_with_a_pair_is_told(encoder: Encoder, fields: dict, problem: str) -> None:
    with pytest.raises(BadLine, match=problem):
        pairs.pair(encoder, Record(1, fields))


@pytest.mark.parametrize("long", ["chosen", "rejected"])
def test_a_pair_is_too_long_if_one_of_its_answers_is(encoder: Encoder, long: str) -> None:
    with pytest.raises(TooLong, match=f"with `{long}`, the limit is 120"):
        pairs.pair(encoder, Record(1, {"prompt": "a", "chosen": "b", "rejected": "c", long: "d" * 120}))


def test_judged_answers_are_one_example_and_pairs_are_two(encoder: Encoder) -> None:
    [one] = pairs.labelled(encoder, Record(1, {"prompt": "2+2? ", "completion": "four", "label": True}))
    two = pairs.labelled(encoder, Record(2, {"prompt": "2+2? ", "chosen": "four", "rejected": "five!"}))
    assert [int(example.arrays["desirable"]) for example in (one, *two)] == [1, 1, 0]
    assert _texts(encoder, one, "tokens", "mask") == _texts(encoder, two[0], "tokens", "mask") == ("2+2? ", "four<|end|>")
    with pytest.raises(BadLine, match="`label` is neither true nor false"):
        pairs.labelled(encoder, Record(1, {"prompt": "a", "completion": "b", "label": "good"}))


def test_other_answers_are_answers_to_other_prompts(encoder: Encoder) -> None:
    records = [{"prompt": f"{at}? ", "chosen": f"right {at}", "rejected": f"wrong {at}"} for at in range(3)]
    examples = [example for at, fields in enumerate(records) for example in pairs.labelled(encoder, Record(at, fields))]
    found = [_texts(encoder, example, "other", "other_mask") for example in pairs.with_others(examples, 120)]
    assert [prompt for prompt, _ in found] == ["0? ", "0? ", "1? ", "1? ", "2? ", "2? "]
    assert all(prompt[0] not in answer for prompt, answer in found)
    assert [answer for _, answer in found[:4]] == ["right 1<|end|>"] * 2 + ["right 2<|end|>"] * 2
    cut = pairs.with_others(examples, 5)[0].arrays
    assert len(cut["other"]) == 5 and cut["other_mask"].tolist() == [0, 0, 0, 1, 1]
    [alone] = pairs.with_others(examples[:1], 120)
    np.testing.assert_array_equal(alone.arrays["other"], alone.arrays["tokens"])
