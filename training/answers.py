"""Scores of an adapter's own answers to held-out prompts: the serving engine answers, task metrics judge."""

from collections.abc import Mapping, Sequence

from jaxlora.lora import Adapter
from training.method import Question
from training.metrics import METRICS, Metric, scores
from training.functions import find_function
from training.rollouts import Sampler, Sampling
from training.task import Task, say

SLOTS = 16


def find_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """Metrics by the names of `--metric`. Raises SetupError."""
    return {name.rpartition(":")[2]: METRICS.get(name) or find_function(name, "--metric") for name in names}


class TaskScores:
    """Answers some questions greedily with an adapter, and scores the answers.

    Arguments:
        questions: the first `--eval-samples` of them are asked.
    """

    def __init__(self, task: Task, questions: Sequence[Question], metrics: Mapping[str, Metric]):
        self._task, self._metrics = task, metrics
        self._questions = list(questions)[: task.options.eval_samples]
        self._sampler: Sampler | None = None

    def __call__(self, adapter: Adapter) -> dict[str, float]:
        """`eval_<metric>` by name."""
        found = self._opened(adapter).sample(
            adapter, [question.prompt for question in self._questions], [0] * len(self._questions)
        )
        decode = self._task.base.tokenizer.decode
        answers, prompts = [decode(answer.tokens) for answer in found.answers], [decode(asked.prompt) for asked in self._questions]
        return scores(self._metrics, answers, [question.answer for question in self._questions], prompts)

    def close(self) -> None:
        """Stops the engine."""
        if self._sampler:
            self._sampler.close()
            self._sampler = None

    def _opened(self, adapter: Adapter) -> Sampler:
        if self._sampler is None:
            sampling = Sampling(
                max_prompt=max(len(question.prompt) for question in self._questions),
                max_completion=self._task.options.eval_max_tokens,
                temperature=0.0,
                slots=min(SLOTS, len(self._questions)),
                dtype=engine_dtype(self._task.base.dtype),
            )
            self._sampler = open_sampler(self._task, sampling, adapter)
        return self._sampler


def open_sampler(task: Task, sampling: Sampling, like: Adapter) -> Sampler:
    """An engine on the task's base model, ready for adapters such as `like`. Answers end with the tokens that end a text."""
    base = task.base
    stop = sorted({base.eos, *base.config.eos_token_ids})
    return Sampler(base.folder, base.config, task.weights, like, sampling, stop, base.settings.cache_dir / "native", say)


def engine_dtype(dtype: str) -> str:
    """The type that the engine computes in for a training type: it has no float16."""
    return "float32" if dtype == "float16" else dtype
