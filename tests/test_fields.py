"""The table of request fields: what wins over what, and what is refused with which words."""

import json
import math

import pytest

from jaxlora.errors import InvalidRequest
from jaxlora.service.fields import FIELDS, MAX_WORDS, merge_fields
from jaxlora.settings import Settings

SETTINGS = Settings(max_output_tokens=100, max_prompt_bytes=100_000)


def merged(tensors=None, parameters=None):
    return merge_fields(tensors or {}, parameters or {}, SETTINGS)


def test_a_tensor_wins_over_sampling_parameters_which_win_over_a_parameter():
    sampling = json.dumps({"temperature": 0.2, "top_k": 2})
    found = merged({"temperature": 0.1, "sampling_parameters": sampling.encode()}, {"temperature": 0.3, "top_k": 3, "top_p": 0.5})
    assert found == {"temperature": 0.1, "top_k": 2, "top_p": 0.5}


def test_sampling_parameters_may_be_a_request_parameter():
    assert merged({"max_tokens": 3}, {"sampling_parameters": '{"max_tokens": 5, "seed": "7"}'}) == {"max_tokens": 3, "seed": 7}


def test_numbers_may_come_as_strings():
    assert merged({}, {"max_tokens": "5", "temperature": "0.5", "stream": "true"}) == {"max_tokens": 5, "temperature": 0.5, "stream": True}


def test_aliases_reach_the_field_that_they_name():
    assert merged({"random_seed": 3, "min_length": 2}, {"stop": "END"}) == {"seed": 3, "min_tokens": 2, "stop_words": ("END",)}


def test_parameters_that_are_no_field_are_left_to_others():
    assert merged({}, {"triton_enable_empty_final_response": True}) == {}


def test_text_is_decoded():
    assert merged({"text_input": "héé 🎉".encode(), "stop_words": [b"a", b"", b"a"]}) == {"text_input": "héé 🎉", "stop_words": ("a",)}


def test_one_stop_string_is_taken_apart_where_it_is_a_list_of_strings_and_nowhere_else():
    for text, expected in (('["a", "b"]', ("a", "b")), ("[]", ("[]",)), ("[1]", ("[1]",)), ("[", ("[",)), ('"a"', ('"a"',)), ("1", ("1",))):
        assert merged({}, {"sampling_parameters": json.dumps({"stop": text})}) == {"stop_words": expected}


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("max_tokens", 0, "0 is not between 1 and 100"),
        ("max_tokens", -1, "-1 is not between 1 and 100"),
        ("max_tokens", 101, "101 is not between 1 and 100"),
        ("max_tokens", "many", "not a whole number"),
        ("max_tokens", 1.5, "not a whole number"),
        ("max_tokens", True, "not a whole number"),
        ("min_tokens", -1, "-1 is not between 0 and 100"),
        ("temperature", math.nan, "nan is not between 0 and 100"),
        ("temperature", math.inf, "inf is not between 0 and 100"),
        ("temperature", -0.1, "-0.1 is not between 0 and 100"),
        ("top_p", 0.0, "0 is not over 0 and at most 1"),
        ("top_p", 2, "2 is not over 0 and at most 1"),
        ("top_p", "x", "not a number"),
        ("min_p", 1.1, "between 0 and 1"),
        ("top_k", -2, "-2 is not between -1"),
        ("repetition_penalty", 0, "over 0"),
        ("frequency_penalty", 2.5, "between -2 and 2"),
        ("seed", -1, "-1 is not between 0 and 18446744073709551615"),
        ("seed", 1 << 64, "is not between 0 and"),
        ("stream", 2, "neither true nor false"),
        ("text_input", b"\xff\xfe", "not valid UTF-8"),
        ("text_input", "x" * 100_001, "100001 bytes, over the limit of 100000"),
        ("text_input", 5, "is not a string"),
        ("text_input", "\ud800", "half of a surrogate pair"),
        ("lora_name", b"\xff", "not valid UTF-8"),
        ("stop_words", [str(number) for number in range(MAX_WORDS + 1)], f"over the limit of {MAX_WORDS}"),
        ("bad_words", ["x" * 1025], "more than 1024 bytes"),
        ("bad_words", [1], "not a list of strings"),
        ("stop_token_ids", "[1, -1]", "not a list of token ids"),
        ("stop_token_ids", "[" * 20_000, "not a list of token ids"),
        ("stop_words", "[" * 20_000, "more than 1024 bytes"),
        ("temperature", 10**400, "no number of 64 bits"),
        ("logprobs", 21, "between 0 and 20"),
        ("beam_width", 4, "only 1"),
        ("lora_task_id", 7, "name the adapter in lora_name"),
        ("n", 2, "send the prompt n times"),
        ("sampling_parameters", b"{nonsense", "not valid JSON"),
        ("sampling_parameters", b"[1]", "not a JSON object"),
        ("sampling_parameters", b'{"temprature": 1}', "unknown fields 'temprature'; known are: text_input"),
        ("sampling_parameters", b"\xff", "not valid UTF-8"),
        ("sampling_parameters", b"[" * 60000, "sampling_parameters"),
        ("sampling_parameters", b" " * 70000, "over the limit of 65536"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(field, value, words):
    with pytest.raises(InvalidRequest) as caught:
        merged({field: value})
    assert list(caught.value.problems) == [field]
    assert words in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_every_problem_is_named_at_once():
    with pytest.raises(InvalidRequest) as caught:
        merged({"max_tokens": 0, "top_p": 2.0}, {"seed": "x"})
    assert set(caught.value.problems) == {"max_tokens", "top_p", "seed"}


@pytest.mark.parametrize("field", [field for field in FIELDS.values() if field.default is not None], ids=lambda field: field.name)
def test_a_default_is_within_its_own_bounds(field):
    assert field.parse(field.default, SETTINGS) == field.default
