"""What a client sends is what the table of fields knows."""

import json

import pytest

from client.requests import Sampling, fields_of
from client.wire import infer_request
from jaxlora.errors import InvalidRequest
from jaxlora.service.fields import FIELDS, merge_fields
from jaxlora.settings import Settings

# The prompt itself, what the client has arguments of its own for, what it gets without asking, and what is only there for other
# clients.
OTHER = {
    "text_input",
    "messages",
    "stream",
    "sampling_parameters",
    "lora_name",
    "lora_task_id",
    "length_penalty",
    "beam_width",
    "n",
    "best_of",
    "use_beam_search",
    "return_num_input_tokens",
    "return_num_output_tokens",
    "return_finish_reason",
    "return_cumulative_logprob",
    "return_logprobs",
}


def test_every_setting_of_a_request_is_offered_under_its_name():
    assert {field.name for field in FIELDS.values() if field.alias is None} - OTHER == set(Sampling.__annotations__)


def test_the_server_reads_what_was_meant():
    sampling = {
        "temperature": 0.7,
        "seed": 2**64 - 1,
        "stop_words": ["\n\n", "日本"],
        "stop_token_ids": [3],
        "logprobs": 2,
        "ignore_eos": True,
    }
    fields = merge_fields(fields_of("naïve 🙂", "alice/sql@2", True, sampling), {}, Settings())
    assert fields == sampling | {
        "text_input": "naïve 🙂",
        "lora_name": "alice/sql@2",
        "stream": True,
        "stop_words": ("\n\n", "日本"),
        "stop_token_ids": (3,),
    }


def test_messages_go_as_messages():
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
    fields = merge_fields(fields_of(messages, None, False, {}), {}, Settings())
    assert json.loads(fields["messages"]) == list(messages) and "text_input" not in fields and "lora_name" not in fields


@pytest.mark.parametrize("field", ["text_input", "lora_name", "sampling_parameters"])
def test_text_that_cannot_be_encoded_is_refused_by_its_field(field):
    bad = "a\ud800"
    arguments = {
        "text_input": (bad, None, {}),
        "lora_name": ("x", bad, {}),
        "sampling_parameters": ("x", None, {"stop_words": [bad]}),
    }
    prompt, adapter, sampling = arguments[field]
    with pytest.raises(InvalidRequest) as caught:
        fields_of(prompt, adapter, False, sampling)
    assert set(caught.value.problems) == {field}


def test_the_tensors_have_the_shape_of_one_row():
    request = infer_request("jax_lora", fields_of("Hi", "alice/sql", True, {"max_tokens": 3}), timeout_s=1.5)
    assert {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in request.inputs} == {
        "text_input": ("BYTES", [1, 1]),
        "lora_name": ("BYTES", [1, 1]),
        "stream": ("BOOL", [1, 1]),
        "sampling_parameters": ("BYTES", [1, 1]),
    }
    assert request.parameters["timeout"].int64_param == 1_500_000
