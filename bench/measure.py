"""From the times of answers to numbers, and from the numbers of repetitions to medians, spreads and ratios. Pure arithmetic.

Decode speed is that of the time in which every stream generates: from the moment the last stream has its first token to the moment the
first stream has its last. The tokens of one response are taken to come evenly since the one before it: else a system would lose those that
it holds back when the time ends, though it has made them. A system that never lets all streams generate together has no such time; it is
rated from the very first token to the very last, and `together` says so. Answers of one token have no speed of decoding: it is NaN.
"""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from bench.worker import Answer

# Less of the answers than this in the common time says little about the whole.
MIN_TOGETHER = 0.25


@dataclasses.dataclass(frozen=True)
class Spread:
    """The median of some repetitions, with the lowest and the highest. As text all three, each in the format that is asked for."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}} to {self.high:{spec}})"


@dataclasses.dataclass(frozen=True)
class Run:
    """One repetition. Speeds in tokens/s, times in seconds.

    `output` counts every token of the answers, over the time from the first request to the last token; `prefill` counts the tokens of the
    prompts until every stream has its first token, and only means something where few other tokens were made before.
    """

    decode: float
    together: bool
    output: float
    prefill: float
    ttft: list[float]
    tpot: list[float]


def run_of(answers: Sequence[Answer], prompt_tokens: int) -> Run:
    """The numbers of one repetition, whose prompts have so many tokens in all.

    Raises:
        ValueError: an answer is empty.
    """
    if not all(answer.events and answer.tokens for answer in answers):
        raise ValueError("an answer is empty")
    timelines = [timeline(answer) for answer in answers]
    begin = min(answer.sent for answer in answers)
    firsts, lasts = [times[0][0] for times in timelines], [times[-1][0] for times in timelines]
    total = sum(answer.tokens for answer in answers)
    start, end = max(firsts), min(lasts)
    inside = tokens_between(timelines, start, end)
    together = end > start and inside >= MIN_TOGETHER * total
    if not together:  # as answers of one token never do
        start, end = min(firsts), max(lasts)
        inside = tokens_between(timelines, start, end)
    return Run(
        decode=inside / (end - start) if any(len(times) > 1 for times in timelines) else float("nan"),
        together=together,
        output=total / (max(lasts) - begin),
        prefill=prompt_tokens / (max(firsts) - begin),
        ttft=[first - answer.sent for first, answer in zip(firsts, answers)],
        tpot=[gap for times in timelines for gap in token_times(times)],
    )


def timeline(answer: Answer) -> list[tuple[float, float]]:
    """(time, tokens) of each response that carries any."""
    return [(time, count) for time, count in answer.events if count]


def tokens_between(timelines: Iterable[list[tuple[float, float]]], start: float, end: float) -> float:
    """Tokens that come after `start` and until `end`. A first response comes at once, the tokens of the others since the one before."""
    found = 0.0
    for times in timelines:
        found += sum(count for time, count in times[:1] if start < time <= end)
        for (before, _), (now, count) in zip(times, times[1:]):
            if now > before:
                found += count * max(0.0, min(now, end) - max(before, start)) / (now - before)
            elif start < now <= end:
                found += count
    return found


def token_times(times: Sequence[tuple[float, float]]) -> list[float]:
    """Seconds from one token to the next; the tokens of one response share the time since the one before."""
    gaps = []
    for (before, _), (now, count) in zip(times, times[1:]):
        gaps.extend([(now - before) / max(count, 1)] * max(1, round(count)))
    return gaps


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation; NaN where there are none."""
    return float(np.percentile(values, percent)) if len(values) else float("nan")


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """The repetitions of one row as one JSON object: spreads of the speeds; times of all repetitions pooled, in ms."""
    ttft, tpot = ([value * 1e3 for run in runs for value in getattr(run, name)] for name in ("ttft", "tpot"))
    return {
        **{name: dataclasses.asdict(Spread.of(getattr(run, name) for run in runs)) for name in ("decode", "output", "prefill")},
        "together": all(run.together for run in runs),
        "ttft_ms": {"mean": statistics.fmean(ttft), "p95": percentile(ttft, 95)},
        "tpot_ms": {"p50": percentile(tpot, 50), "p99": percentile(tpot, 99)},
        "repetitions": len(runs),
    }


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Of repetitions that took turns: each of ours over theirs of the same turn."""
    return Spread.of(one / other for one, other in zip(ours, theirs, strict=True))


def agreement(answers: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> float:
    """Share of the answers' tokens that are the reference's, up to the first that differs in each answer."""
    same = total = 0
    for answer, expected in zip(answers, reference, strict=True):
        total += len(expected)
        same += next((index for index, pair in enumerate(zip(answer, expected)) if pair[0] != pair[1]), min(len(answer), len(expected)))
    return same / total
