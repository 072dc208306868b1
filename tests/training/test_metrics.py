"""Task metrics and gates against values worked out by hand."""

import pathlib

import pytest

from jaxlora.errors import SetupError
from training.answers import find_metrics
from training.gates import Condition, refusal_unless_better
from training.metrics import bleu, exact_match, json_valid, scores, slot_f1


def test_exact_match_and_valid_json() -> None:
    assert exact_match(["a ", "b", "c"], ["a", "B", "c\n"]) == pytest.approx(2 / 3)
    assert json_valid(['{"a": 1}', "{", "3", "", '{"a": 1} x'], [""] * 5) == pytest.approx(2 / 5)


def test_slot_f1_counts_leaves_by_path_and_value() -> None:
    reference = '{"intent": "table", "slots": {"city": "Oslo", "people": 2}}'
    assert slot_f1([reference], [reference]) == 1
    # 2 of 3 right, 3 given, 3 wanted.
    assert slot_f1(['{"intent": "table", "slots": {"city": "Rome", "people": 2}}'], [reference]) == pytest.approx(4 / 6)
    # A value under another path is wrong; no JSON gives nothing.
    assert slot_f1(['{"intent": "table", "city": "Oslo"}', "no"], [reference, reference]) == pytest.approx(2 / 8)
    assert slot_f1(['["a", "a"]'], ['["a", "b"]']) == pytest.approx(2 / 4)
    assert slot_f1(['{"n": 2}'], ['{"n": "2"}']) == 0


def test_bleu_is_that_of_sacrebleu() -> None:
    assert bleu(["the cat sat on the mat"], ["the cat sat on the mat"]) == pytest.approx(100)
    # Precisions 5/6, 3/5, 2/4, 1/3 of one to four words, no penalty for length.
    expected = 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert bleu(["the cat sat on a mat"], ["the cat sat on the mat"]) == pytest.approx(expected, abs=1e-6)


def test_a_metric_of_ones_own_is_named_by_its_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def size(answers, references):\n    return len(answers)\n\ndef bad(answers, references):\n    return answers[9]\n")
    metrics = find_metrics(["exact_match", f"{path}:size"])
    assert scores(metrics, ["a"], ["a"]) == {"eval_exact_match": 1, "eval_size": 1}
    with pytest.raises(SetupError, match="--metric: bad failed: IndexError"):
        scores(find_metrics([f"{path}:bad"]), ["a"], ["a"])
    with pytest.raises(SetupError, match="has no function 'none'; it has: bad, size"):
        find_metrics([f"{path}:none"])


@pytest.mark.parametrize(
    ("text", "value", "refusal"),
    [
        ("eval_loss<1.2", 1.1, None),
        ("eval_loss < 1.2", 1.2, "eval_loss is 1.2, not < 1.2: it misses by 0"),
        ("eval_loss<=1.2", 1.2, None),
        ("eval_loss<1.2", 1.5, "eval_loss is 1.5, not < 1.2: it misses by 0.3"),
        ("eval_loss>=2", 1.5, "eval_loss is 1.5, not >= 2: it misses by 0.5"),
        ("eval_loss<1", float("nan"), "eval_loss is nan, not < 1: it misses by nan"),
    ],
)
def test_conditions(text: str, value: float, refusal: str | None) -> None:
    assert Condition.parse(text).refusal({"eval_loss": value}) == refusal


@pytest.mark.parametrize("text", ["eval_loss", "eval_loss=1", "<1", "eval_loss<x", "eval_loss<1<2", ""])
def test_what_is_no_condition(text: str) -> None:
    with pytest.raises(SetupError, match="is no condition such as"):
        Condition.parse(text)


def test_better_is_less_for_losses_and_more_for_everything_else() -> None:
    assert refusal_unless_better("eval_loss", {"eval_loss": 1.0}, {"eval_loss": 1.1}, "a/b@1") is None
    assert refusal_unless_better("eval_f1", {"eval_f1": 0.9}, {"eval_f1": 0.8}, "a/b@1") is None
    worse = refusal_unless_better("eval_f1", {"eval_f1": 0.7}, {"eval_f1": 0.8}, "a/b@1")
    assert worse == "eval_f1 is 0.7, that of a/b@1 is 0.8: worse by 0.1"
    assert "as that of a/b@1" in refusal_unless_better("eval_loss", {"eval_loss": 1.0}, {"eval_loss": 1.0}, "a/b@1")
    assert refusal_unless_better("eval_loss", {"eval_loss": float("nan")}, {"eval_loss": 1.0}, "a/b@1") is not None
