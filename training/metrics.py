"""Task metrics: from answers and what they should be to a number between 0 and 1 (BLEU: 0 to 100), more being better.

A metric is a function of two lists of texts, answers and references, that returns a number, or numbers by name. One with a third
parameter `prompts` gets those as well. One of one's own is named `file.py:function` or `package.module:function`.
"""

import inspect
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxlora.errors import SetupError

Metric = Callable[..., float | Mapping[str, float]]


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers that are the reference, white space at the ends aside."""
    return _mean(answer.strip() == reference.strip() for answer, reference in zip(answers, references, strict=True))


def json_valid(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers that are one JSON value."""
    return _mean(_parsed(answer) is not None for answer in answers)


def slot_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """F1 over the leaves (path and value) of JSON answers, all answers together; an answer that is no JSON has none.

    Equal things in a list count as often as they occur; their order doesn't matter.
    """
    right = given = wanted = 0
    for answer, reference in zip(answers, references, strict=True):
        ours, theirs = (Counter(_leaves(_parsed(text))) for text in (answer, reference))
        right += sum((ours & theirs).values())
        given, wanted = given + ours.total(), wanted + theirs.total()
    return 2 * right / (given + wanted) if given + wanted else 1.0


def bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU (Papineni et al. 2002) as sacrebleu computes it, with one reference each."""
    import sacrebleu

    return float(sacrebleu.corpus_bleu(list(answers), [list(references)]).score)


METRICS: dict[str, Metric] = {metric.__name__: metric for metric in (exact_match, json_valid, slot_f1, bleu)}


def scores(
    metrics: Mapping[str, Metric], answers: Sequence[str], references: Sequence[str], prompts: Sequence[str] = ()
) -> dict[str, float]:
    """`eval_<name>` of every metric, `eval_<name>_<part>` where one gives several numbers.

    Raises:
        SetupError: a metric fails or gives something that is no number.
    """
    found: dict[str, float] = {}
    for name, metric in metrics.items():
        try:
            more = {"prompts": list(prompts)} if "prompts" in inspect.signature(metric).parameters else {}
            result = metric(list(answers), list(references), **more)
            parts = (
                {f"eval_{name}_{part}": float(value) for part, value in result.items()}
                if isinstance(result, Mapping)
                else {f"eval_{name}": float(result)}
            )
        # It is the user's program.
        except Exception as error:
            raise SetupError(f"--metric: {name} failed: {type(error).__name__}: {error}") from error
        found |= parts
    return found


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], str]]:
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in _leaves(inner, (*path, key))]
    if isinstance(value, list):
        return [leaf for inner in value for leaf in _leaves(inner, (*path, "[]"))]
    return [] if value is None and not path else [(path, json.dumps(value))]
