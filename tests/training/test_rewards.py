"""Reward functions: found by file or module, called with what they name, and held to one number or None for each answer."""

import pathlib

import numpy as np
import pytest

from jaxlora.errors import SetupError
from training.rewards import RewardError, Rewards

FILE = '''
from beside import half

def length(completions):
    return [len(text) for text in completions]

def wanted(prompts, completions, answer, **others):
    assert prompts == ["p", "q", "r"] and sorted(others) == ["extra"]
    return [None if right is None else half(text == right) for text, right in zip(completions, answer)]

def extra(completions, extra):
    return extra

def broken(completions):
    raise KeyError("frame")

NUMBER = 3
'''


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "beside.py").write_text("def half(right):\n    return right / 2\n")
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def _judge(rewards: Rewards, extra=(1, 2.5, np.float32(3))):
    return rewards(["p", "q", "r"], ["a", "bb", "ccc"], {"answer": ["a", None, "c"], "extra": list(extra)})


def test_functions_get_what_they_name_and_their_weighted_sum_counts(file: pathlib.Path) -> None:
    total, each = _judge(Rewards.load([f"{file}:length", f"{file}:wanted", f"{file}:extra"], [1, 10, -1]))
    np.testing.assert_array_equal(each["wanted"], [0.5, np.nan, 0.0])
    np.testing.assert_allclose(total, [1 + 5 - 1, 2 - 2.5, 3 + 0 - 3])


def test_an_answer_that_no_function_can_judge_has_no_reward(file: pathlib.Path) -> None:
    total, _ = _judge(Rewards.load([f"{file}:wanted"]))
    np.testing.assert_array_equal(np.isnan(total), [False, True, False])


def test_modules_can_be_named_too() -> None:
    total, _ = Rewards.load(["tests.training.rewards_for_tests:even"])(["p"], ["24x"], {})
    assert total[0] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0, 2.0], "gave 2 numbers for 3 answers"),
        ([1.0, float("nan"), 2.0], "gave nan for answer 1"),
        ([1.0, 2.0, "3"], "gave '3' for answer 2"),
        (1.0, "gave a float; expected a list"),
    ],
)
def test_an_answer_of_the_wrong_form_is_told(answer, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        _judge(Rewards({"mine": lambda completions: answer}))


def test_what_a_function_raises_is_told_with_its_name(file: pathlib.Path) -> None:
    with pytest.raises(RewardError, match="reward broken: KeyError: 'frame'"):
        _judge(Rewards.load([f"{file}:broken"]))


def test_everything_that_cannot_be_loaded_is_named_at_once(file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "wrong.py").write_text("import nothing_of_that_name\n")
    places = [f"{file}:missing", f"{file}:NUMBER", f"{tmp_path}/wrong.py:f", f"{tmp_path}/none.py:f"]
    specs = [*places, "no.such.module:f", "no_colon"]
    with pytest.raises(SetupError) as caught:
        Rewards.load(specs)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(specs)
    assert "has no function 'missing'; it has: broken, extra, half, length, wanted" in lines[0]
    assert "ModuleNotFoundError: No module named 'nothing_of_that_name'" in lines[2]
    assert "is not of the form file.py:function" in lines[5]


def test_weights_have_to_be_as_many_as_functions(file: pathlib.Path) -> None:
    with pytest.raises(SetupError, match="2 weights for 1 reward functions"):
        Rewards.load([f"{file}:length"], [1, 2])
