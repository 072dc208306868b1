"""Records to preference examples, in the forms that TRL's users have.

    {"prompt", "chosen", "rejected"}    a better and a worse answer; three texts, or three lists of messages
    {"chosen", "rejected"}              two conversations that begin with the same messages, which are the prompt
    {"prompt", "completion", "label"}   one answer, good or bad (KTO); pairs do as well, as two answers each

Only what comes after the prompt is learned. Knows no models and no batches.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from training.data import Encoder
from training.method import Example, Question
from training.records import BadLine, Record, TooLong


def pair(encoder: Encoder, record: Record) -> Example:
    """`chosen`, `rejected` int32 `[T]` and their masks uint8 `[T]`, see `training.losses.preference`. Raises BadLine or
    TooLong."""
    fields = _with_prompt(record.fields)
    chosen, chosen_mask = _sequence(encoder, fields, "chosen")
    rejected, rejected_mask = _sequence(encoder, fields, "rejected")
    if np.array_equal(chosen, rejected):
        raise BadLine("`chosen` and `rejected` are the same")
    arrays = {"chosen": chosen, "chosen_mask": chosen_mask, "rejected": rejected, "rejected_mask": rejected_mask}
    return Example((record.number,), arrays)


def labelled(encoder: Encoder, record: Record) -> list[Example]:
    """`tokens`, `mask` and `desirable` of one answer, or of the two answers of a pair. Raises BadLine or TooLong."""
    fields = record.fields
    if "label" in fields:
        if not isinstance(fields["label"], bool):
            raise BadLine("`label` is neither true nor false")
        answers = [("completion", fields["label"])]
    else:
        fields = _with_prompt(fields)
        answers = [("chosen", True), ("rejected", False)]
    found = []
    for key, desirable in answers:
        tokens, mask = _sequence(encoder, fields, key)
        found.append(Example((record.number,), {"tokens": tokens, "mask": mask, "desirable": np.uint8(desirable)}))
    return found


def question(encoder: Encoder, record: Record) -> Question | None:
    """The prompt with the better answer, for task metrics; None where the only answer is a bad one. Raises BadLine."""
    fields = record.fields
    if "label" in fields:
        answer = fields["completion"] if fields["label"] else None
    else:
        fields = _with_prompt(fields)
        answer = fields["chosen"]
    if answer is None:
        return None
    answer = answer if isinstance(answer, str) else answer[-1]["content"]
    return Question(record.number, tuple(encoder.prompt(fields["prompt"])), answer)


def with_others(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Labelled examples with `other` and `other_mask`: the same prompt with the answer of the next example that has another
    prompt, cut at `max_length` tokens. That is what KTO estimates the divergence on; TRL takes the answers of the same batch in
    turn."""
    split = [_split(example) for example in examples]
    found = []
    for at, (example, (prompt, answer)) in enumerate(zip(examples, split)):
        following = (split[(at + step) % len(split)] for step in range(1, len(split)))
        other = next((theirs for other_prompt, theirs in following if not np.array_equal(other_prompt, prompt)), answer)
        tokens = np.concatenate([prompt, other])[:max_length]
        mask = (np.arange(len(tokens)) >= len(prompt)).astype(np.uint8)
        found.append(Example(example.lines, {**example.arrays, "other": tokens, "other_mask": mask}))
    return found


def _split(example: Example) -> tuple[np.ndarray, np.ndarray]:
    tokens, start = example.arrays["tokens"], int(np.argmax(example.arrays["mask"]))
    return tokens[:start], tokens[start:]


def _with_prompt(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    missing = [key for key in ("chosen", "rejected") if key not in fields]
    if missing:
        raise BadLine(f"has no `{'` and no `'.join(missing)}`; expected {{\"prompt\", \"chosen\", \"rejected\"}}")
    if "prompt" in fields:
        return fields
    chosen, rejected = fields["chosen"], fields["rejected"]
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise BadLine("has no `prompt`; only two lists of messages can do without")
    shared = sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(chosen, rejected)))
    if not 0 < shared < min(len(chosen), len(rejected)):
        raise BadLine("`chosen` and `rejected` do not begin with the same messages and then differ; give the `prompt`")
    return {**fields, "prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _sequence(encoder: Encoder, fields: Mapping[str, Any], key: str) -> tuple[np.ndarray, np.ndarray]:
    ids, start = encoder.completion(fields, key)
    if len(ids) > encoder.max_length:
        raise TooLong(f"has {len(ids)} tokens with `{key}`, the limit is {encoder.max_length} (--max-length)")
    mask = (np.arange(len(ids)) >= max(start, 1)).astype(np.uint8)
    if not mask.any():
        raise BadLine(f"`{key}` is empty")
    return np.array(ids, np.int32), mask
