"""Answers of a real Triton: the same over every road, alone and in company, before and after a publish."""

import concurrent.futures
import json
import shutil
import threading
import time

import pytest

from jaxlora.adapters import AdapterName, publish
from jaxlora.adapters.store import version_path

from .conftest import ADAPTERS, SETTINGS
from .harness import CACHE, Grpc, Http, Refused, serving, text_of

PROMPT = "The quick brown fox"
LAST_FIELDS = {"text_output", "finish_reason", "num_input_tokens", "num_output_tokens", "adapter_name", "adapter_version", "metrics"}
METRICS = {
    "queue_ms", "prefill_ms", "ttft_ms", "decode_ms", "tokens_per_second", "prompt_tokens", "completion_tokens", "cached_tokens",
    "peak_memory_bytes", "adapter_sha256",
}  # fmt: skip


def outcome(http: Http, model: str = "llm", **fields) -> tuple:
    """What a request gives that does not depend on time: its text, its length, its log-probability, its adapter."""
    answer = http.generate(model, return_cumulative_logprob=True, **fields)
    names = ("text_output", "num_output_tokens", "finish_reason", "cumulative_logprob", "adapter_name", "adapter_version")
    return tuple(answer[name] for name in names)


class TestRoads:
    """One request, sent in every way."""

    @pytest.fixture(params=[{}, {"lora_name": "alice/every-linear"}, {"temperature": 0.8, "seed": 7, "top_k": 50}], ids=str)
    def fields(self, request):
        return {"text_input": PROMPT, "max_tokens": 24, **request.param}

    @pytest.fixture
    def expected(self, http, fields):
        answer = http.generate(**fields)
        assert answer["num_output_tokens"] == 24 and len(answer["text_output"]) > 5
        return answer["text_output"]

    @pytest.mark.parametrize("model", ["llm", "jax_lora"])
    def test_http_in_one_piece_and_streamed(self, http, fields, expected, model):
        assert http.generate(model, **fields)["text_output"] == expected
        assert text_of(http.stream(model, stream=True, **fields)) == expected

    @pytest.mark.parametrize("model", ["llm", "jax_lora"])
    def test_grpc_in_one_piece_and_streamed(self, grpc, fields, expected, model):
        fields = {name: value.encode() if isinstance(value, str) else value for name, value in fields.items()}
        assert grpc.generate(model, **fields)["text_output"] == [expected.encode()]
        pieces = [response["text_output"] for response in grpc.stream(model, stream=True, **fields)]
        assert len(pieces) > 1 and all(len(piece) == 1 for piece in pieces)
        assert b"".join(piece for (piece,) in pieces).decode() == expected

    def test_fields_may_be_parameters_or_sampling_parameters(self, grpc, http, fields, expected):
        rest = {name: value for name, value in fields.items() if name != "text_input"}
        prompt = PROMPT.encode()
        as_strings = {name: str(value) for name, value in rest.items()}
        assert grpc.generate(text_input=prompt, parameters=as_strings)["text_output"] == [expected.encode()]
        assert http.generate(text_input=PROMPT, sampling_parameters=json.dumps(rest))["text_output"] == expected
        assert http.generate(text_input=PROMPT, sampling_parameters=json.dumps(as_strings))["text_output"] == expected


def test_the_last_response_of_a_stream_tells_all_and_the_others_only_their_text(http):
    *others, last = http.stream(text_input=PROMPT, max_tokens=8, stream=True, lora_name="alice/rslora")
    assert last.keys() >= LAST_FIELDS and last["finish_reason"] == "length"
    assert (last["num_input_tokens"], last["num_output_tokens"]) == (len(PROMPT), 8)
    assert (last["adapter_name"], last["adapter_version"]) == ("alice/rslora", 1)
    metrics = json.loads(last["metrics"])
    assert metrics.keys() == METRICS and (metrics["prompt_tokens"], metrics["completion_tokens"]) == (len(PROMPT), 8)
    assert len(metrics["adapter_sha256"]) == 64 and metrics["ttft_ms"] > 0
    assert others and all("metrics" not in other and other["finish_reason"] == "" for other in others)


def test_the_base_model_answers_where_no_adapter_is_named(http):
    answer = http.generate(text_input=PROMPT)
    assert (answer["adapter_name"], answer["adapter_version"], answer["num_output_tokens"]) == ("", 0, SETTINGS["default_max_tokens"])
    assert json.loads(answer["metrics"])["adapter_sha256"] == ""


def test_each_adapter_answers_differently(http):
    answers = [http.generate(text_input=PROMPT, max_tokens=24, lora_name=name)["text_output"] for name in ("", *ADAPTERS)]
    assert len(set(answers)) == len(answers)


def test_a_tensor_wins_over_sampling_parameters_and_they_win_over_a_parameter(grpc):
    def length(parameter: int, **fields) -> int:
        return grpc.generate(text_input=b"x", parameters={"max_tokens": parameter}, **fields)["num_output_tokens"][0]

    assert length(3) == 3
    assert length(3, sampling_parameters=b'{"max_tokens": 4}') == 4
    assert length(3, sampling_parameters=b'{"max_tokens": 4}', max_tokens=5) == 5


def test_messages_are_rendered_by_the_chat_template_and_text_is_taken_as_it_is(http):
    messages = json.dumps([{"role": "user", "content": "hi"}])
    rendered = "<user>hi\n<assistant>"
    assert outcome(http, messages=messages, text_input="ignored") == outcome(http, text_input=rendered)
    assert outcome(http, "jax_lora", messages=messages) == outcome(http, text_input=rendered)
    assert outcome(http, text_input=messages) != outcome(http, text_input=rendered)


def test_the_prompt_comes_before_the_answer_only_where_it_is_asked_for(http):
    answer = http.generate(text_input=PROMPT)["text_output"]
    assert http.generate(text_input=PROMPT, exclude_input_in_output=True)["text_output"] == answer
    assert http.generate(text_input=PROMPT, exclude_input_in_output=False)["text_output"] == PROMPT + answer
    assert text_of(http.stream(text_input=PROMPT, exclude_input_in_output=False, stream=True)) == PROMPT + answer


def test_log_probabilities_come_where_they_are_asked_for(http):
    plain = http.generate(text_input=PROMPT, max_tokens=5)
    assert not {"logprobs", "cumulative_logprob"} & plain.keys()
    answer = http.generate(text_input=PROMPT, max_tokens=5, return_logprobs=True, return_cumulative_logprob=True)
    each = json.loads(answer["logprobs"])
    assert len(each) == 5
    assert sum(next(iter(token.values()))["logprob"] for token in each) == pytest.approx(answer["cumulative_logprob"], abs=1e-4)


def test_the_rows_of_a_request_are_answered_together_as_if_alone(grpc, http):
    prompts = ["one", "a second one, which is longer", "3"]
    seeds = [5, 6, 7]
    rows = grpc.generate(text_input=[prompt.encode() for prompt in prompts], seed=seeds, temperature=1.0, max_tokens=9, rows=3)
    alone = [http.generate(text_input=p, seed=s, temperature=1.0, max_tokens=9)["text_output"].encode() for p, s in zip(prompts, seeds)]
    assert rows["text_output"] == alone
    assert rows["num_input_tokens"] == [len(prompt) for prompt in prompts]


def test_a_seed_reproduces_and_another_one_does_not(http):
    def answer(seed: int) -> tuple:
        return outcome(http, text_input=PROMPT, temperature=1.0, seed=seed, max_tokens=24)

    assert answer(1) == answer(1) != answer(2)


def test_a_stop_string_ends_the_answer_and_is_not_in_it(http):
    whole = http.generate(text_input=PROMPT, max_tokens=64, temperature=1.0, seed=3, top_k=20)["text_output"]
    middle = len(whole) // 2
    stop = whole[middle : middle + 2]
    expected = whole[: whole.index(stop)]
    fields = {"text_input": PROMPT, "max_tokens": 64, "temperature": 1.0, "seed": 3, "top_k": 20, "stop_words": [stop]}
    answer = http.generate(**fields)
    assert (answer["text_output"], answer["finish_reason"]) == (expected, "stop")
    assert text_of(http.stream(stream=True, **fields)) == expected


def test_many_requests_for_many_adapters_at_once_give_what_they_give_alone(http):
    requests = [
        {
            "text_input": f"{number} {PROMPT}" * (1 + number % 5),
            "lora_name": ADAPTERS[number % len(ADAPTERS)] if number % 9 else "",
            "max_tokens": 8 + number % 7,
            "temperature": 1.0 if number % 2 else 0.0,
            "seed": number,
        }
        for number in range(32)
    ]
    alone = [outcome(http, **fields) for fields in requests]
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda fields: outcome(http, **fields), requests))
    assert together == alone
    assert http.is_ready()


def test_a_new_version_is_live_during_load_and_what_runs_finishes_on_the_old_one(http, grpc, server, adapters):
    """Publishes while requests run: none fails, versions never go back, each answer is its version's own."""
    name, kinds = "carol/live", ("alice/attention", "alice/rslora", "bob/rslora", "bob/attention")
    publish(adapters[kinds[0]], name, server.store)
    http.load("adapters")
    fields = {"text_input": PROMPT, "max_tokens": 12}
    stop, failures, answers = threading.Event(), [], []

    def keep_asking():
        own = []
        while not stop.is_set():
            try:
                own.append(http.generate(lora_name=name, **fields))
                assert http.is_ready()
            except Exception as error:
                failures.append(error)
        versions = [answer["adapter_version"] for answer in own]
        assert versions == sorted(versions)
        answers.extend(own)

    long = grpc.stream(text_input=PROMPT.encode(), lora_name=name.encode(), max_tokens=1500, stream=True)
    first = next(long)["text_output"]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(keep_asking) for _ in range(4)]
        try:
            for kind in kinds[1:]:
                publish(adapters[kind], name, server.store)
                http.load("adapters")
                assert http.generate(lora_name=name, **fields)["adapter_version"] == 1 + kinds.index(kind)
        finally:
            stop.set()
        for worker in asking:
            worker.result()
    assert not failures
    assert {answer["adapter_version"] for answer in answers} >= {1, 4}
    expected = {1 + number: http.generate(lora_name=kind, **fields)["text_output"] for number, kind in enumerate(kinds)}
    assert all(answer["text_output"] == expected[answer["adapter_version"]] for answer in answers)

    rest = list(long)
    assert rest[-1]["adapter_version"] == [1]
    pinned = http.generate(text_input=PROMPT, lora_name=f"{name}@1", max_tokens=1500)
    assert b"".join(first + [piece for response in rest for piece in response["text_output"]]).decode() == pinned["text_output"]


def test_a_bad_version_is_refused_and_changes_no_answer(http, server, adapters, tmp_path):
    publish(adapters["alice/patterns"], "carol/bad", server.store)
    http.load("adapters")
    before = outcome(http, text_input=PROMPT, lora_name="carol/bad")
    shutil.copytree(adapters["alice/patterns"], tmp_path / "bad")
    (tmp_path / "bad" / "adapter_model.safetensors").write_bytes(b"not a safetensors file at all")
    publish(tmp_path / "bad", "carol/bad", server.store)
    with pytest.raises(Refused, match="carol/bad@2"):
        http.load("adapters")
    assert http.is_ready() and outcome(http, text_input=PROMPT, lora_name="carol/bad") == before
    with pytest.raises(Refused, match="NOT_FOUND.*carol/bad"):
        http.generate(text_input=PROMPT, lora_name="carol/bad@2")


def test_a_version_whose_files_are_lost_is_not_the_fault_of_who_asks_for_it(http, server, adapters):
    publish(adapters["alice/attention"], "erin/lost", server.store)
    http.load("adapters")
    shutil.rmtree(version_path(server.store, AdapterName("erin", "lost", 1)))
    with pytest.raises(Refused, match="INTERNAL: the adapter can't be loaded: erin/lost@1: adapter_config.json is missing"):
        http.generate(text_input=PROMPT, lora_name="erin/lost", max_tokens=1)


@pytest.mark.parametrize("road", [Http, Grpc])
def test_a_client_that_leaves_a_direct_stream_frees_its_slot_within_a_second(server, http, road):
    long = {"max_tokens": 2000, "stream": True}
    client = road(server)
    text = PROMPT if road is Http else PROMPT.encode()
    streams, started = [], []
    for _ in range(SETTINGS["max_slots"]):
        streams.append(client.stream("jax_lora", text_input=text, **long))
        next(streams[-1])
        started.append(time.monotonic())
    streams[0].close()
    left = time.monotonic()
    http.generate(text_input="x", max_tokens=1)
    answered = time.monotonic()
    assert answered - left < 1

    def ended_by_itself(number: int) -> float:
        *_, last = streams[number]
        metrics = last["metrics"] if road is Http else last["metrics"][0]
        return started[number] + json.loads(metrics)["decode_ms"] / 1000

    # Else another stream could have made room.
    assert all(ended_by_itself(number) > answered for number in range(1, len(streams)))


def test_answers_are_the_same_after_a_restart(tmp_path_factory, tiny_model, adapters, http):
    requests = [{"text_input": PROMPT, "lora_name": name, "temperature": 1.0, "seed": 11} for name in ("", *ADAPTERS[:2])]
    before = [outcome(http, **fields) for fields in requests]
    with serving(tmp_path_factory.mktemp("restarted"), model=str(tiny_model), cache_dir=CACHE, **SETTINGS) as other:
        for name in ADAPTERS[:2]:
            publish(adapters[name], name, other.store)
        Http(other).load("adapters")
        assert [outcome(Http(other), **fields) for fields in requests] == before
