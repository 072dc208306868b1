"""The `tokenizer` model in a real Triton: ids as the library gives them, and errors that name the field."""

import concurrent.futures
import json

import numpy as np
import pytest

from jaxlora.service.fields import FIELDS
from jaxlora.text import Tokenizer

from ..parity import checkpoints
from .harness import Grpc, Http, Refused, serving, write_byte_tokenizer

LIMIT = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_byte_tokenizer(checkpoints.write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", "llama"))


@pytest.fixture(scope="module")
def server(tmp_path_factory, model):
    with serving(tmp_path_factory.mktemp("tokenizer"), models=("tokenizer",), model=str(model), max_prompt_bytes=LIMIT) as started:
        yield started


@pytest.fixture(scope="module")
def tokenizer(model):
    return Tokenizer.from_folder(model)


@pytest.fixture
def ids(server):
    return lambda **fields: Http(server).generate("tokenizer", **fields).get("input_ids")


@pytest.mark.parametrize("text", ["hello", " two  spaces ", "größer 🙂\n", "x" * LIMIT, "\0\0"])
def test_text_becomes_the_ids_that_the_library_gives(ids, tokenizer, text):
    assert ids(text_input=text) == tokenizer.encode(text)


def test_an_empty_text_has_no_ids(ids):
    assert ids(text_input="") == []


def test_messages_go_through_the_chat_template_and_win_over_the_text(ids, tokenizer):
    messages = [{"role": "user", "content": "hi"}]
    assert ids(messages=json.dumps(messages), text_input="ignored") == tokenizer.apply_chat_template(messages)
    assert tokenizer.decode(ids(messages=json.dumps(messages))) == "<user>hi\n<assistant>"


def test_rows_of_one_request_are_padded_to_the_longest(server, tokenizer):
    response = Grpc(server).generate("tokenizer", text_input=[b"abc", b"", b"z"])
    assert np.reshape(response["input_ids"], (3, 3)).tolist() == [tokenizer.encode("abc"), [-1] * 3, [*tokenizer.encode("z"), -1, -1]]


def test_fields_may_be_parameters(ids, server, tokenizer):
    response = Grpc(server).generate("tokenizer", text_input=b"abc", parameters={"messages": '[{"role": "user", "content": "hi"}]'})
    assert response["input_ids"] == tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert ids(text_input="abc", no_field_of_ours="x") == tokenizer.encode("abc")


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"max_tokens": 1}, "text_input: is missing"),
        ({"text_input": "x" * (LIMIT + 1)}, f"text_input: has {LIMIT + 1} bytes, over the limit of {LIMIT} (MAX_PROMPT_BYTES)"),
        ({"text_input": "é" * (LIMIT // 2 + 1)}, f"text_input: has {LIMIT + 2} bytes"),
        ({"messages": "x" * (LIMIT + 1)}, f"messages: has {LIMIT + 1} bytes"),
        ({"messages": "[1, 2"}, "messages: is not valid JSON"),
        ({"messages": "[]"}, "messages: is empty"),
        ({"messages": '[{"role": "user"}]'}, "messages: [0]"),
        ({"text_input": "a", "sampling_parameters": "{"}, "sampling_parameters: is not valid JSON"),
        ({"text_input": "a", "temperature": -1.0, "top_p": 2.0, "max_tokens": 0}, "temperature: -1 is not between 0 and 100"),
        ({"text_input": "a", "temperature": -1.0, "top_p": 2.0, "max_tokens": 0}, "top_p: 2 is not over 0 and at most 1"),
        ({"text_input": "a", "temperature": -1.0, "top_p": 2.0, "max_tokens": 0}, "max_tokens: 0 is not between 1 and"),
    ],
)
def test_bad_fields_are_named_with_their_bounds(ids, fields, error):
    with pytest.raises(Refused) as refused:
        ids(**fields)
    assert error in str(refused.value) and refused.value.status == 400
    assert ids(text_input="still there") != []


@pytest.mark.parametrize("field", ["text_input", "messages", "sampling_parameters", "lora_name"])
def test_text_that_is_not_utf8_is_refused_by_name(server, field):
    body = json.dumps({"text_input": "a", field: "??"}).encode().replace(b"??", b"\xff\xfe")
    with pytest.raises(Refused, match=f"{field}: is not valid UTF-8"):
        Http(server).post_raw("/v2/models/tokenizer/generate", body)


def test_a_bad_request_among_others_does_not_touch_them(ids, tokenizer):
    def answer(text: str) -> list[int] | str:
        try:
            return ids(text_input=text)
        except Refused as refused:
            return str(refused)

    texts = [f"request {number}" if number % 3 else "x" * (LIMIT + 1) for number in range(48)]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(answer, texts))
    too_long = f"INVALID_ARG: text_input: has {LIMIT + 1} bytes, over the limit of {LIMIT} (MAX_PROMPT_BYTES)"
    assert answers == [tokenizer.encode(text) if len(text) <= LIMIT else too_long for text in texts]


def test_every_field_of_the_table_is_taken(server, tokenizer):
    values = {"TYPE_STRING": b"", "TYPE_BOOL": True, "TYPE_INT32": 1, "TYPE_FP32": 1.0, "TYPE_UINT64": 0}
    fields = {field.name: values[field.type] if field.dims == 1 else [b"a", b"b"] for field in FIELDS.values() if field.tensor}
    del fields["messages"]
    response = Grpc(server).generate("tokenizer", **(fields | {"text_input": b"abc"}))
    assert response["input_ids"] == tokenizer.encode("abc")
