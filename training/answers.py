"""Scores of an adapter's own answers to held-out prompts: the serving engine answers, task metrics judge."""

from collections.abc import Mapping, Sequence

from jaxlora.lora import Adapter
from training.method import Question
from training.metrics import METRICS, Metric, scores
from training.rewards import find_function
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
        self._sampler: tuple[object, Sampler] | None = None

    def __call__(self, adapter: Adapter) -> dict[str, float]:
        """`eval_<metric>` by name."""
        found = self._sampler_for(adapter).sample(
            adapter, [question.prompt for question in self._questions], [0] * len(self._questions)
        )
        decode = self._task.base.tokenizer.decode
        answers, prompts = [decode(answer.tokens) for answer in found.answers], [decode(asked.prompt) for asked in self._questions]
        return scores(self._metrics, answers, [question.answer for question in self._questions], prompts)

    def close(self) -> None:
        """Stops the engine."""
        if self._sampler:
            self._sampler[1].close()
            self._sampler = None

    def _sampler_for(self, adapter: Adapter) -> Sampler:
        # An engine is made for one set of modules and ranks; the version being served may have another.
        shapes = {path: a.shape for path, a in adapter.a.items()}
        if self._sampler is None or self._sampler[0] != shapes:
            self.close()
            base = self._task.base
            sampling = Sampling(
                max_prompt=max(len(question.prompt) for question in self._questions),
                max_completion=self._task.options.eval_max_tokens,
                temperature=0.0,
                slots=min(SLOTS, len(self._questions)),
                # The engine has no float16.
                dtype="float32" if base.dtype == "float16" else base.dtype,
            )
            stop = {base.eos, *base.config.eos_token_ids}
            made = Sampler(
                base.folder,
                base.config,
                self._task.weights,
                adapter,
                sampling,
                sorted(stop),
                base.settings.cache_dir / "native",
                say,
            )
            self._sampler = (shapes, made)
        return self._sampler[1]
