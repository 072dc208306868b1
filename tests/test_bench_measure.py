"""The benchmark's arithmetic: speeds, times and ratios of answers whose numbers are known."""

import math

import pytest

from bench import measure
from bench.drivers import ours_triton
from bench.worker import Answer

PROMPT = 10


def stream(sent: float, first: float, step: float, tokens: int) -> Answer:
    """An answer whose tokens come one by one at a steady pace."""
    return Answer(sent, [(first + index * step, 1) for index in range(tokens)], tokens)


def test_one_stream_decodes_at_its_pace():
    run = measure.run_of([stream(0.0, 0.5, 0.1, 11)], PROMPT)
    assert run.together
    assert run.decode == pytest.approx(10)
    assert run.output == pytest.approx(11 / 1.5)
    assert run.prefill == pytest.approx(PROMPT / 0.5)
    assert run.ttft == [0.5]
    assert run.tpot == pytest.approx([0.1] * 10)


def test_speed_is_that_of_the_time_in_which_all_streams_generate():
    # The first is alone until 1.0, the second after 2.0; between, both make 10 tokens/s.
    run = measure.run_of([stream(0.0, 0.0, 0.1, 21), stream(0.0, 1.0, 0.1, 21)], 2 * PROMPT)
    assert run.together
    assert run.decode == pytest.approx(20, rel=0.06)


def test_tokens_that_come_together_count_where_they_were_made():
    # Both make 10 tokens/s; one sends five at a time, and three of them after the other has ended.
    held = Answer(0.0, [(1.0, 1), (1.5, 5), (2.0, 5), (2.5, 5)], 16)
    run = measure.run_of([stream(0.0, 1.0, 0.1, 13), held], 2 * PROMPT)
    assert run.together
    assert run.decode == pytest.approx(20)
    assert measure.tokens_between([[(1.0, 1), (2.0, 4), (2.0, 3)]], 0.5, 1.5) == pytest.approx(3)
    assert measure.tokens_between([[(1.0, 1), (2.0, 4), (2.0, 3)]], 1.0, 2.0) == pytest.approx(7)


def test_streams_that_never_run_together_are_rated_from_the_first_token_to_the_last():
    run = measure.run_of([stream(0.0, 0.0, 0.1, 11), stream(0.0, 2.0, 0.1, 11)], 2 * PROMPT)
    assert not run.together
    assert run.decode == pytest.approx(21 / 3.0)
    assert run.ttft == [0.0, 2.0]


def test_a_short_time_together_does_not_count_as_one():
    run = measure.run_of([stream(0.0, 0.0, 0.1, 41), stream(0.0, 3.9, 0.1, 41)], 2 * PROMPT)
    assert not run.together


def test_the_tokens_of_one_response_share_its_time():
    answer = Answer(0.0, [(1.0, 1), (1.3, 3), (1.4, 1)], 5)
    assert measure.run_of([answer], PROMPT).tpot == pytest.approx([0.1] * 4)


def test_responses_that_do_not_tell_their_tokens_carry_them_evenly():
    answer = Answer(0.0, ours_triton.by_text([(1.0, 0), (1.2, 0), (1.4, 0)], 5), 5)
    run = measure.run_of([answer], PROMPT)
    assert measure.timeline(answer) == [(1.0, 1), (1.2, 2.0), (1.4, 2.0)]
    assert run.decode == pytest.approx(10)


def test_an_answer_in_one_piece_has_no_decode_speed_but_an_output_speed():
    run = measure.run_of([Answer(0.0, ours_triton.by_text([(2.0, 300)], 64), 64)], PROMPT)
    assert math.isnan(run.decode)
    assert run.output == pytest.approx(32)


def test_an_empty_answer_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        measure.run_of([Answer(0.0, [], 0)], PROMPT)


def test_ratios_compare_repetitions_of_the_same_turn():
    # The machine was twice as fast in the second turn; the ratio does not know.
    assert measure.ratio([10.0, 20.0, 30.0], [5.0, 10.0, 10.0]) == measure.Spread(2.0, 2.0, 3.0)
    with pytest.raises(ValueError):
        measure.ratio([1.0], [1.0, 2.0])


def test_a_summary_has_medians_and_pools_times():
    runs = [measure.run_of([stream(0.0, ttft, 0.1, 11)], PROMPT) for ttft in (0.1, 0.2, 0.9)]
    found = measure.summary(runs)
    assert found["ttft_ms"]["mean"] == pytest.approx(400)
    assert found["tpot_ms"]["p50"] == pytest.approx(100)
    assert found["prefill"] == pytest.approx({"median": PROMPT / 0.2, "low": PROMPT / 0.9, "high": PROMPT / 0.1})
    assert found["repetitions"] == 3 and found["together"]


@pytest.mark.parametrize(("answer", "share"), [([1, 2, 3, 4], 1.0), ([1, 2, 9, 4], 0.5), ([9, 2, 3, 4], 0.0), ([1, 2], 0.5)])
def test_agreement_ends_with_the_first_token_that_differs(answer, share):
    assert measure.agreement([answer], [[1, 2, 3, 4]]) == share


def test_responses_of_triton_have_tokens_by_the_length_of_their_text():
    assert ours_triton.by_text([(1.0, 5), (2.0, 3), (3.0, 9)], 9) == [(1.0, 1), (2.0, 2.0), (3.0, 6.0)]
    assert ours_triton.by_text([(1.0, 0), (2.0, 0), (3.0, 0)], 9) == [(1.0, 1), (2.0, 4.0), (3.0, 4.0)]
    assert ours_triton.by_text([(1.0, 20)], 9) == [(1.0, 9)]


def test_answers_of_one_token_have_a_speed_of_prompts_only():
    run = measure.run_of([Answer(0.0, [(0.5, 1)], 1, None), Answer(0.0, [(1.0, 1)], 1, None)], 128)
    assert math.isnan(run.decode) and run.prefill == 128 and run.tpot == []
    assert math.isnan(measure.summary([run])["tpot_ms"]["p50"])
