"""Prompts that begin alike: where a new one goes, and how much of it is computed again."""

import pytest

from jaxlora.engine.prefixes import Place, Prefixes
from jaxlora.engine.requests import Request, SamplingParams
from jaxlora.engine.slots import Sequence

LONG = tuple(range(100, 140))


def held(prefixes, slot, prompt, answer=(), adapter=None):
    sequence = Sequence(Request(prompt, SamplingParams(), None, adapter), 0.0)
    sequence.slot, sequence.answer, sequence.written = slot, list(answer), len(prompt) + len(answer)
    prefixes.hold(sequence)


def test_an_empty_slot_comes_first_then_the_one_not_used_for_longest():
    prefixes = Prefixes(3)
    held(prefixes, 0, (1, 2))
    held(prefixes, 1, (3, 4))
    assert prefixes.place(None, LONG, [0, 1, 2]) == Place(2, 2, 0)
    assert prefixes.place(None, LONG, [0, 1]) == Place(0, 0, 0)
    assert prefixes.place(None, LONG, [1]) == Place(1, 1, 0)


def test_the_last_token_is_always_computed():
    prefixes = Prefixes(2)
    held(prefixes, 1, LONG)
    assert prefixes.place(None, LONG, [0, 1]) == Place(1, 1, len(LONG) - 1)


def test_a_conversation_goes_on_in_its_own_slot_with_its_answer():
    prefixes = Prefixes(2)
    held(prefixes, 1, LONG, answer=(7, 8, 9))
    assert prefixes.place(None, (*LONG, 7, 8, 9, 10), [0, 1]) == Place(1, 1, len(LONG) + 3)


def test_a_prefix_is_copied_where_its_slot_is_in_use_or_holds_much_more():
    prefixes = Prefixes(3)
    held(prefixes, 1, LONG)
    assert prefixes.place(None, (*LONG[:30], 5), [0, 2]) == Place(0, 1, 30)
    held(prefixes, 1, LONG * 3)
    assert prefixes.place(None, (*LONG[:30], 5), [0, 1, 2]) == Place(0, 1, 30)
    assert prefixes.place(None, (*LONG[:30], 5), [1]) == Place(1, 1, 30), "no other slot is free"


def test_another_adapter_shares_nothing():
    prefixes = Prefixes(2)
    held(prefixes, 1, LONG, adapter="a")
    assert prefixes.place("b", LONG, [0, 1]) == Place(0, 0, 0)
    assert prefixes.place("a", LONG, [0, 1]).length == len(LONG) - 1


def test_a_few_tokens_are_not_worth_a_copy():
    prefixes = Prefixes(2)
    held(prefixes, 1, LONG[:15])
    assert prefixes.place(None, LONG, [0, 1]).length == 0


def test_what_is_forgotten_is_not_reused():
    prefixes = Prefixes(2)
    held(prefixes, 1, LONG)
    prefixes.forget(1)
    assert prefixes.place(None, LONG, [0, 1]).length == 0


@pytest.mark.parametrize(("unit", "length"), [(16, 32), (32, 32), (64, 0)])
def test_reuse_in_whole_units_and_without_answers(unit, length):
    prefixes = Prefixes(2, unit, answers=False)
    held(prefixes, 1, LONG, answer=(1, 2))
    assert prefixes.place(None, (*LONG, 1, 2, 3), [0, 1]).length == length
