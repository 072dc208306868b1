"""The data of a GRPO run: groups of sampled answers with their rewards, as windows for the trainer.

A rollout is a function of the seed, its number and the adapter. It is written to the run's folder before it is learned from,
for people to read, and for a run that is resumed between the updates that learn from it, when the adapter that sampled it is
gone.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlora.files import replace
from jaxlora.lora import Adapter
from training.batches import ALIGNMENT, collate
from training.losses.grpo import advantages
from training.method import Example, Window
from training.rewards import RewardError, Rewards
from training.rollouts import Sampled, seeds
from training.scores import Scorer
from training.trainer import TrainingStopped


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One line of the data: its token ids, the prompt as it stands there, and the other fields, for the reward functions."""

    line: int
    ids: tuple[int, ...]
    prompt: Any
    columns: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of a run: `micro_batches` x `micro_batch_size` answers in groups of `group` make a rollout, from which `updates`
    steps learn.

    Attributes:
        buckets: see `length_buckets`.
        scale: see `training.losses.grpo.advantages`.
        skip_cut: do not learn from answers that the length limit ended.
    """

    seed: int
    group: int
    micro_batches: int
    micro_batch_size: int
    buckets: tuple[int, ...]
    updates: int = 1
    scale: str = "group"
    temperature: float = 1.0
    skip_cut: bool = False

    @property
    def answers(self) -> int:
        return self.micro_batches * self.micro_batch_size

    @property
    def prompts(self) -> int:
        return self.answers // self.group


# sample(adapter, prompts, seeds): as `training.rollouts.Sampler.sample`.
Sample = Callable[[Adapter, Sequence[Sequence[int]], Sequence[int]], Sampled]
HELD_OUT = 1 << 31  # in the place of a rollout's number in the seeds of held-out answers


@dataclasses.dataclass(frozen=True)
class Judged:
    """Answers with their texts, their rewards `[N]` (NaN: none), and what each reward function gave."""

    sampled: Sampled
    texts: list[str]
    rewards: np.ndarray
    by_function: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Judge:
    """Samples answers and asks the reward functions. `decode`: token ids to the text that they judge."""

    sample: Sample
    rewards: Rewards
    decode: Callable[[Sequence[int]], str]

    def __call__(self, adapter: Adapter, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Judged:
        """One answer to each prompt. Raises RewardError."""
        sampled = self.sample(adapter, [prompt.ids for prompt in prompts], seeds)
        texts = [self.decode(answer.tokens) for answer in sampled.answers]
        fields = sorted({name for prompt in prompts for name in prompt.columns})
        columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in fields}
        return Judged(sampled, texts, *self.rewards([prompt.prompt for prompt in prompts], texts, columns))


class HeldOutRewards:
    """Rewards of held-out prompts, sampled with the same seeds every time: the `scores` of a method, and a `HeldOut` without
    windows."""

    def __init__(self, prompts: Sequence[Prompt], judge: Judge, seed: int):
        self._prompts, self._judge, self._seeds = prompts, judge, seeds(seed, HELD_OUT, len(prompts))

    def windows(self) -> Iterator[Window]:
        return iter(())

    def __call__(self, adapter: Adapter) -> dict[str, float]:
        """`eval_reward` and the mean of each function as `eval_reward_<name>`; `eval_loss` is minus the reward."""
        try:
            judged = self._judge(adapter, self._prompts, self._seeds)
        except RewardError as error:
            raise TrainingStopped(f"held-out prompts: {error}; the last checkpoint stays") from error
        reward = _mean(judged.rewards)
        found = {"eval_loss": -reward, "eval_reward": reward}
        if len(judged.by_function) > 1:
            found |= {f"eval_reward_{name}": _mean(values) for name, values in judged.by_function.items()}
        return found


class Groups:
    """A `training.method.Source`.

    Arguments:
        score: needed where a rollout is learned from more than once: log-probabilities under the policy that sampled come from
            the forward pass of training and not from the engine, whose rounding differs, so that ratios start at exactly what
            they mean.
        folder: where rollouts are written.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        plan: Plan,
        judge: Judge,
        score: Scorer,
        folder: pathlib.Path,
    ):
        self._prompts, self._plan, self._judge, self._score, self._folder = prompts, plan, judge, score, folder
        self._number, self._rollout, self._window = -1, {}, {}
        self.steps_per_epoch = len(prompts) * plan.updates / plan.prompts

    def window(self, step: int, adapter: Adapter) -> Window:
        number, update = divmod(step, self._plan.updates)
        if update == 0:
            self._take(number, self._made(number, adapter), adapter)
        elif number != self._number:
            self._take(number, self._read(number), None)
        return self._window

    def lines(self, step: int) -> list[int]:
        return sorted({prompt.line for prompt in self._of(step // self._plan.updates)})

    def start_metrics(self, step: int) -> Mapping[str, float]:
        if step // self._plan.updates != self._number:
            return {}
        computed = sum(len(answer["prompt"]) + len(answer["answer"]) for answer in self._rollout["answers"])
        return {**self._rollout["metrics"], "tokens": computed}

    def _of(self, number: int) -> list[Prompt]:
        """The prompts of a rollout: epoch after epoch, each in an order of its own."""
        first, count = number * self._plan.prompts, len(self._prompts)
        places = range(first, first + self._plan.prompts)
        orders = {
            epoch: np.random.Generator(np.random.PCG64([self._plan.seed, epoch])).permutation(count)
            for epoch in {place // count for place in places}
        }
        return [self._prompts[orders[place // count][place % count]] for place in places]

    def _made(self, number: int, adapter: Adapter) -> dict[str, Any]:
        each = [prompt for prompt in self._of(number) for _ in range(self._plan.group)]
        try:
            judged = self._judge(adapter, each, seeds(self._plan.seed, number, len(each)))
        except RewardError as error:
            raise TrainingStopped(f"rollout {number}: {error}; the last checkpoint stays") from error
        groups = judged.rewards.reshape(-1, self._plan.group)
        gains = advantages(groups, self._plan.scale).reshape(-1)
        answers = [
            {
                "line": prompt.line,
                "prompt": prompt.ids,
                "answer": answer.tokens,
                "text": text,
                "finished": answer.finished,
                "rewards": {name: _number(values[at]) for name, values in judged.by_function.items()},
                "advantage": float(gains[at]),
            }
            for at, (prompt, answer, text) in enumerate(zip(each, judged.sampled.answers, judged.texts))
        ]
        return {"rollout": number, "metrics": _metrics(groups, judged), "answers": answers}

    def _take(self, number: int, rollout: dict[str, Any], sampler: Adapter | None) -> None:
        """Makes the window of a rollout, and writes what is new: `sampler` is the adapter that a new one was sampled from."""
        answers = rollout["answers"]
        if sampler is not None and self._plan.updates > 1:
            window = self._collated([self._example(answer) for answer in answers])
            old = self._score(sampler, window["tokens"], window["mask"], self._plan.temperature)
            for answer, row in zip(answers, old.reshape(len(answers), -1)):
                answer["old_logps"] = row[len(answer["prompt"]) : len(answer["prompt"]) + len(answer["answer"])].tolist()
        if sampler is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            replace(self._path(number), (json.dumps(rollout) + "\n").encode())
        self._number, self._rollout = number, rollout
        self._window = self._collated([self._example(answer) for answer in answers])

    def _read(self, number: int) -> dict[str, Any]:
        path = self._path(number)
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            problem = f"{path} can't be read, and the adapter that sampled it is gone; start over (--restart)"
            raise TrainingStopped(problem) from None

    def _path(self, number: int) -> pathlib.Path:
        return self._folder / f"{number:06d}.json"

    def _example(self, answer: Mapping[str, Any]) -> Example:
        start, learned = len(answer["prompt"]), answer["finished"] or not self._plan.skip_cut
        tokens = np.array([*answer["prompt"], *answer["answer"]], np.int32)
        mask = ((np.arange(len(tokens)) >= start) & learned).astype(np.uint8)
        arrays = {"tokens": tokens, "mask": mask, "advantages": np.float32(answer["advantage"])}
        if "old_logps" in answer:
            arrays["old_logps"] = np.array([*[0.0] * start, *answer["old_logps"]], np.float32)
        return Example((answer["line"],), arrays)

    def _collated(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        longest = max(example.length for example in examples)
        length = next(bucket for bucket in self._plan.buckets if bucket >= longest)
        arrays = collate(examples, self._plan.answers, length, examples[0].arrays)
        shape = (self._plan.micro_batches, self._plan.micro_batch_size)
        return {name: array.reshape(*shape, *array.shape[1:]) for name, array in arrays.items()}


def length_buckets(longest: int, count: int) -> tuple[int, ...]:
    """At most `count` lengths, ascending and evenly spaced, the last one for sequences of `longest` tokens."""
    blocks = -(-longest // ALIGNMENT)
    return tuple(sorted({-(-blocks * part // count) * ALIGNMENT for part in range(1, count + 1)}))


def _metrics(groups: np.ndarray, judged: Judged) -> dict[str, float]:
    sampled = judged.sampled
    lengths = [len(answer.tokens) for answer in sampled.answers]
    spread = np.nan_to_num(np.nanmax(groups, axis=1, initial=-np.inf) - np.nanmin(groups, axis=1, initial=np.inf), neginf=0.0)
    known = groups[~np.isnan(groups)]
    found = {
        "reward": _mean(groups),
        "reward_std": float(known.std()) if known.size else 0.0,
        "groups_without_signal": float((spread <= 0).mean()),
        "answer_tokens": float(np.mean(lengths)),
        "answers_cut": float(np.mean([not answer.finished for answer in sampled.answers])),
        "sampling_seconds": sampled.seconds,
        "sampled_tokens_per_second": sampled.tokens_per_second,
    }
    if len(judged.by_function) > 1:
        found |= {f"reward_{name}": _mean(values) for name, values in judged.by_function.items()}
    return found


def _mean(rewards: np.ndarray) -> float:
    """Of the answers that have a reward; 0 where none has."""
    known = rewards[~np.isnan(rewards)]
    return float(known.mean()) if known.size else 0.0


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
