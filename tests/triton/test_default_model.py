"""The default base model through a real Triton: it answers sensibly, over every part of the way."""

import json

import pytest

from jaxlora.settings import Settings

from .harness import Http, serving, text_of


@pytest.fixture(scope="module", params=["none", "int8"])
def http(request, tmp_path_factory, default_model):
    # The cache of `make serve`: the checkpoint is converted once on a machine.
    cache = Settings.read().cache_dir
    with serving(tmp_path_factory.mktemp("default"), cache_dir=cache, max_slots=2, lora_slots=1, max_seq_len=512, quantization=request.param) as server:
        yield Http(server)


def test_it_continues_a_text(http):
    assert http.generate(text_input="The capital of France is", max_tokens=2)["text_output"].startswith(" Paris")


def test_it_answers_a_message_and_stops_by_itself(http):
    messages = json.dumps([{"role": "user", "content": "What is the capital of France? Answer with one word."}])
    *pieces, last = http.stream(messages=messages, max_tokens=64, stream=True)
    assert "Paris" in text_of(pieces) + last["text_output"]
    assert last["finish_reason"] == "stop" and last["num_output_tokens"] < 64
    assert "<|im_end|>" not in text_of(pieces) + last["text_output"]


def test_a_stream_with_emoji_and_scripts_equals_the_whole(http):
    fields = {"text_input": "Smileys: 🙂🙃🎉👍🏽 你好 こんにちは Ünïcödé 🙂🙃🎉", "max_tokens": 48}
    whole = http.generate(**fields)["text_output"]
    assert text_of(http.stream(stream=True, **fields)) == whole
    assert "\N{REPLACEMENT CHARACTER}" not in whole.rstrip("\N{REPLACEMENT CHARACTER}")
