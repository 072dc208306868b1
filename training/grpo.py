"""Group-relative policy optimisation: `python -m training.grpo --data prompts.jsonl --name alice/sql --reward r.py:judge`.

Every rollout samples `--group` answers to each of some prompts from the adapter as it is, by the serving engine in this
process, judges them by the reward functions, see `training.rewards`, and `--updates` optimizer steps learn from it. Data:
`{"prompt"}`, a text or a list of messages, with any further fields that the reward functions want. Held-out prompts give
`eval_reward`, and minus that as `eval_loss`.
"""

from jaxlora import allocator

if __name__ == "__main__":
    allocator.restart()  # first, as what follows takes seconds

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
import sys
from collections.abc import Sequence

from training.answers import engine_dtype, open_sampler
from training.data import Encoder
from training.groups import Groups, HeldOutRewards, Judge, Plan, Prompt, length_buckets
from training.losses.grpo import NORMALISATIONS, SCALES, GrpoLoss
from training.method import Method
from training.options import Options, option
from training.records import BadLine, Record, TooLong
from training.rewards import Rewards
from training.rollouts import Sampling
from training.scores import Scorer
from training.script import run_script
from training.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoOptions(Options):
    """What group-relative policy optimisation adds. `batch_size` counts answers: `batch_size / group` prompts make a rollout."""

    reward: tuple[str, ...] = option((), "reward functions, file.py:function or module:function; their weighted sum counts")
    reward_weights: tuple[float, ...] = option((), "a weight for each of them; default: 1")
    group: int = option(8, "answers to each prompt; --batch-size is a multiple of it", low=2)
    max_completion: int = option(128, "longest answer, in tokens; prompts may take the rest of --max-length", low=1)
    temperature: float = option(1.0, "of sampling", low=0.01)
    updates: int = option(1, "optimizer steps that learn from a rollout", low=1)
    loss: str = option("grpo", f"how tokens are averaged: {', '.join(NORMALISATIONS)}")
    scale: str | None = option(None, f"what advantages are divided by: {', '.join(SCALES)}; default: group, and none for dr_grpo")
    clip: float = option(0.2, "ratios are clipped to 1 - clip and 1 + clip", low=0)
    clip_high: float | None = option(None, "or to 1 + clip_high above", low=0)
    kl: float = option(0.0, "weight of the divergence from the reference", low=0)
    reference: str = option("start", "what the divergence is from: `start`, the adapter of --init, or `base`")
    skip_cut: bool = option(False, "do not learn from answers that --max-completion cut off")
    rollout_dtype: str | None = option(None, "float32 or bfloat16 of the sampling engine; default: that of training")
    batch_size: int = option(64, "answers of an optimizer step", low=2)
    epochs: float = option(1.0, "times that the prompts are gone through", low=0)
    lr: float = option(1e-4, "largest learning rate", low=0)
    max_length: int = option(512, "longest prompt with an answer, in tokens", low=2)

    def problems(self) -> list[str]:
        found = super().problems()
        if not self.reward:
            found.append("--reward: name at least one function, as file.py:function")
        if self.batch_size % self.group:
            found.append(f"--batch-size: {self.batch_size} is no multiple of --group {self.group}")
        if self.max_completion >= self.max_length:
            found.append(f"--max-completion: {self.max_completion} leaves no room for a prompt in --max-length {self.max_length}")
        choices = {
            "loss": (self.loss, NORMALISATIONS),
            "scale": (self.scale or SCALES[0], SCALES),
            "reference": (self.reference, ("start", "base")),
            "rollout-dtype": (self.sampling_dtype, ("float32", "bfloat16")),
        }
        found += [
            f"--{name}: {value!r} is none of {', '.join(known)}"
            for name, (value, known) in choices.items()
            if value not in known
        ]
        if self.metric:
            found.append("--metric: held-out answers are judged by the reward functions, as eval_reward")
        return found

    @property
    def sampling_dtype(self) -> str:
        return self.rollout_dtype or engine_dtype(self.dtype)

    @property
    def advantage_scale(self) -> str:
        return self.scale or ("none" if self.loss == "dr_grpo" else "group")


def encode(encoder: Encoder, longest: int, record: Record) -> Prompt:
    """A prompt of at most `longest` tokens. Raises BadLine or TooLong."""
    if "prompt" not in record.fields:
        raise BadLine("has no `prompt`")
    ids = encoder.prompt(record.fields["prompt"])
    if len(ids) > longest:
        raise TooLong(f"has {len(ids)} tokens, the limit is {longest} (--max-length less --max-completion)")
    reserved = [name for name in ("prompts", "completions") if name in record.fields]
    if reserved:
        raise BadLine(f"has a field `{reserved[0]}`, which is an argument of reward functions")
    columns = {name: value for name, value in record.fields.items() if name != "prompt"}
    return Prompt(record.number, tuple(ids), record.fields["prompt"], columns)


def build(closing: contextlib.ExitStack, task: Task) -> Method:
    """The method for a task. Raises SetupError for data or reward functions that can't be used.

    Arguments:
        closing: stops the engine in the end.
    """
    options = task.options
    rewards = Rewards.load(options.reward, options.reward_weights or None)
    prompts, held_out = task.examples(functools.partial(encode, task.encoder, options.max_length - options.max_completion))
    longest = max(len(prompt.ids) for prompt in (*prompts, *held_out))
    slots = min(task.base.settings.max_slots, options.batch_size)
    sampling = Sampling(longest, options.max_completion, options.temperature, slots, options.sampling_dtype)
    plan = Plan(
        seed=options.seed,
        group=options.group,
        micro_batches=options.batch_size // options.micro_batch,
        micro_batch_size=options.micro_batch,
        buckets=length_buckets(longest + options.max_completion, options.buckets),
        updates=options.updates,
        scale=options.advantage_scale,
        temperature=options.temperature,
        skip_cut=options.skip_cut,
    )
    sampler = open_sampler(task, sampling, task.start)
    closing.callback(sampler.close)
    judge = Judge(sampler.sample, rewards, task.base.tokenizer.decode)
    scorer = Scorer(task.base.config, task.weights, task.base.machine)
    source = Groups(prompts, plan, judge, scorer, task.folder.path / "rollouts")
    held_out_rewards = HeldOutRewards(held_out, judge, options.seed) if held_out else None
    loss = GrpoLoss(
        options.loss,
        options.clip,
        options.clip if options.clip_high is None else options.clip_high,
        options.kl,
        options.max_completion,
        options.temperature,
    )
    return Method(
        "grpo",
        loss,
        source,
        held_out=held_out_rewards,
        scores=held_out_rewards,
        reference=options.reference,
        facts={"rewards_sha256": _hashes(options.reward)},
    )


def _hashes(specs: Sequence[str]) -> dict[str, str]:
    """Hashes of the files that reward functions are in: another reward is another run."""
    places = sorted({spec.rpartition(":")[0] for spec in specs})
    files = {place: pathlib.Path(place) for place in places if place.endswith(".py")}
    return {place: hashlib.sha256(file.read_bytes()).hexdigest() for place, file in files.items()}


def main(argv: Sequence[str] | None = None) -> int:
    with contextlib.ExitStack() as closing:
        return run_script("grpo", GrpoOptions, __doc__.splitlines()[0], functools.partial(build, closing), argv)


if __name__ == "__main__":
    sys.exit(main())
