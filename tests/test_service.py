"""From fields to what the engine runs, and from tokens to text, with the default model's tokenizer."""

import pytest

from jaxlora.adapters import AdapterName, AdapterVersion
from jaxlora.config import ModelConfig
from jaxlora.engine import Account, Bounds
from jaxlora.engine.requests import Result, Timings, Token
from jaxlora.errors import InvalidRequest
from jaxlora.service.accounts import account_of, limits_of
from jaxlora.service.answers import AnswerSink
from jaxlora.service.plan import plan
from jaxlora.settings import Settings
from jaxlora.text import Tokenizer

SETTINGS = Settings(max_seq_len=100, max_output_tokens=80, default_max_tokens=50)
TEXTS = ["Hello, world!", " leading", "naïve café", "日本語のテキスト", "👩‍👩‍👧‍👦 and 🎉", "a\n\n  b\tc", "1234567890", "עברית", "tab\tand\r\n"]


@pytest.fixture(scope="module")
def tokenizer(default_model):
    return Tokenizer.from_folder(default_model)


@pytest.fixture(scope="module")
def planned(default_model, tokenizer):
    config = ModelConfig.from_folder(default_model)

    def make(prompt=(1, 2, 3), **fields):
        return plan(fields, prompt, tokenizer, config, SETTINGS)

    return make


class Listener:
    def __init__(self):
        self.pieces, self.ending, self.error = [], None, None

    def piece(self, piece):
        self.pieces.append(piece)

    def end(self, ending):
        self.ending = ending

    def failed(self, error):
        self.error = error

    @property
    def text(self):
        return "".join(piece.text for piece in self.pieces) + self.ending.text


def answered(tokenizer, planned, ids, **fields):
    """What a listener hears of these tokens: the engine's side is played by hand."""
    listener = Listener()
    sink = AnswerSink(planned(**fields), None, tokenizer, listener, lambda: 0)
    count, stopped = 0, False
    for id in ids:
        count += 1
        stopped = sink.token(Token(id, -0.5, ((id, -0.5), (7, -1.0))))
        if stopped:
            break
    sink.finish(Result("stop" if stopped else "length", 3, count, 0, Timings(0.0, 1.0, 2.0, 4.0)))
    return listener


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_is_the_whole(tokenizer, planned, text):
    ids = tokenizer.encode(text)
    listener = answered(tokenizer, planned, ids)
    assert listener.text == tokenizer.decode(ids) == text
    assert len(listener.pieces) == len(ids), "one piece a token"
    assert all("�" not in piece.text for piece in listener.pieces)


@pytest.mark.parametrize("stop", ["END", "\n\n", "🎉", "dEN", "ENDE"])
def test_a_stop_string_ends_the_answer_and_no_part_of_it_shows(tokenizer, planned, stop):
    text = f"some EN text {stop} and more"
    listener = answered(tokenizer, planned, tokenizer.encode(text), stop_words=(stop,))
    assert listener.text == "some EN text " and listener.ending.finish_reason == "stop"


def test_the_beginning_of_a_stop_string_that_does_not_come_is_given_at_the_end(tokenizer, planned):
    listener = answered(tokenizer, planned, tokenizer.encode("this is EN"), stop_words=("END",))
    assert listener.text == "this is EN" and listener.ending.finish_reason == "length"


def test_stop_strings_wait_for_min_tokens(tokenizer, planned):
    ids = tokenizer.encode("one stop two stop three")
    listener = answered(tokenizer, planned, ids, stop_words=("stop",), min_tokens=4)
    assert listener.text == "one stop two "


def test_the_prompt_can_go_before_the_answer(tokenizer, planned):
    ids = tokenizer.encode(" answer")
    assert answered(tokenizer, planned, ids, text_input="Prompt", exclude_input_in_output=False).text == "Prompt answer"
    assert answered(tokenizer, planned, ids, text_input="Prompt").text == " answer"


def test_the_ending_tells_what_is_known(tokenizer, planned):
    ending = answered(tokenizer, planned, tokenizer.encode("one two three"), return_cumulative_logprob=True).ending
    assert (ending.adapter_name, ending.adapter_version, ending.num_input_tokens) == ("", 0, 3)
    assert ending.cumulative_logprob == pytest.approx(-0.5 * ending.num_output_tokens)
    metrics = ending.metrics
    assert (metrics["queue_ms"], metrics["prefill_ms"], metrics["ttft_ms"], metrics["decode_ms"]) == (1000, 1000, 2000, 2000)
    assert metrics["tokens_per_second"] == (ending.num_output_tokens - 1) / 2


def test_log_probabilities_have_the_form_of_the_vllm_backend(tokenizer, planned):
    [piece] = answered(tokenizer, planned, tokenizer.encode("Hi"), logprobs=2).pieces
    [entry] = piece.logprobs
    chosen = tokenizer.encode("Hi")[0]
    assert entry[str(chosen)] == {"logprob": -0.5, "rank": 1, "decoded_token": "Hi"} and entry["7"]["rank"] == 2
    assert not answered(tokenizer, planned, tokenizer.encode("Hi")).pieces[0].logprobs


def test_defaults_fill_the_room_there_is(planned):
    assert planned().params.max_tokens == 50
    assert planned(prompt=range(90)).params.max_tokens == 10
    assert planned(max_tokens=80).params.max_tokens == 80


def test_end_of_text_stops_unless_it_is_ignored(planned):
    assert planned().params.stop_token_ids == (2,)
    assert planned(ignore_eos=True).params.stop_token_ids == ()
    assert set(planned(stop_token_ids=(5,)).params.stop_token_ids) == {2, 5}


def test_a_stop_string_that_is_a_special_token_stops_on_its_id(planned):
    made = planned(stop_words=("<|im_start|>", "x"), ignore_eos=True)
    assert made.params.stop_token_ids == (1,) and made.stop_strings == ("x",)


def test_bad_words_are_banned_with_and_without_a_space_before(planned, tokenizer):
    words = planned(bad_words=("bad",)).params.bad_words
    assert set(words) == {tuple(tokenizer.encode("bad")), tuple(tokenizer.encode(" bad"))}


def test_a_line_break_is_banned_without_the_space_alone(planned, tokenizer):
    words = planned(bad_words=("\n", " x")).params.bad_words
    assert set(words) == {tuple(tokenizer.encode("\n")), tuple(tokenizer.encode(" x"))}


def test_the_priority_is_the_requests_own(planned):
    assert planned().priority == 0 and planned(priority=-3).priority == -3


def test_without_a_seed_draws_differ(planned):
    assert planned(temperature=1.0).params.seed != planned(temperature=1.0).params.seed
    assert planned(seed=5).params.seed == 5


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"prompt": ()}, "text_input", "the prompt is empty"),
        ({"prompt": (), "messages": "[]"}, "messages", "the prompt is empty"),
        ({"prompt": range(100)}, "text_input", "100 tokens, over the limit of 99"),
        ({"prompt": range(50), "max_tokens": 51}, "max_tokens", "51 with a prompt of 50 tokens is over the limit of 100"),
        ({"prompt": (1, 49152)}, "input_ids", "not between 0 and 49151"),
        ({"prompt": (1, -2)}, "input_ids", "not between 0 and 49151"),
        ({"min_tokens": 60}, "min_tokens", "60 is over max_tokens, 50"),
        ({"stop_token_ids": (49152,)}, "stop_token_ids", "not between 0 and 49151"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(planned, fields, field, words):
    with pytest.raises(InvalidRequest) as caught:
        planned(**fields)
    assert words in caught.value.problems[field]


def test_all_versions_of_an_adapter_count_for_one_account():
    versions = [AdapterVersion(AdapterName("alice", "sql", version), f"sha{version}", "", 8, 0, None, ()) for version in (1, 2)]
    assert {account_of(version) for version in versions} == {Account("alice/sql", "alice")}
    assert account_of(None) == Account()


def test_every_limit_is_a_setting():
    settings = Settings(max_running_per_adapter=1, max_queue_per_adapter=2, tokens_per_s_per_adapter=3.0, max_running_per_user=4, max_queue_per_user=5, tokens_per_s_per_user=6.0)
    limits = limits_of(settings)
    assert limits.adapter == Bounds(1, 2, 3.0) and limits.user == Bounds(4, 5, 6.0)
