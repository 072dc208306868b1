"""Rollouts: what is sampled depends on prompt, seed and adapter only, and a window says exactly what was sampled."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import peft
from jaxlora.config import ModelConfig
from jaxlora.lora import Adapter
from jaxlora.model import logits
from jaxlora.settings import Settings
from jaxlora.weights import Weights, load
from training.groups import HELD_OUT, Groups, HeldOutRewards, Judge, Plan, Prompt, length_buckets
from training.lora_init import new_adapter
from training.losses.grpo import advantages
from training.rewards import RewardFunction, Rewards
from training.rollouts import Answer, Sampled, Sampler, Sampling, seeds
from training.scores import Scorer
from training.trainer import TrainingStopped

pytestmark = pytest.mark.usefixtures("quick_compilation")
EOS = 257
NATIVE = Settings.read().cache_dir / "native"  # built once on a machine
PROMPTS = [[10, 20, 30], [40], [50, 60, 70, 80, 90, 100, 110]]


class Model:
    """The tiny model with an adapter whose B is not zero, so that it matters."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.config = folder, ModelConfig.from_folder(folder)
        self.weights: Weights = load(folder, self.config)
        started = new_adapter(self.config, peft.new_config(r=4, lora_alpha=8, target_modules="all-linear"), seed=1)
        keys = iter(jax.random.split(jax.random.key(2), len(started.b)))
        self.adapter: Adapter = started.replace(b={path: jax.random.normal(next(keys), b.shape) for path, b in started.b.items()})


@pytest.fixture(scope="module")
def model(tiny_model: pathlib.Path) -> Model:
    return Model(tiny_model)


@pytest.fixture(scope="module")
def sampler(model: Model) -> Iterator[Sampler]:
    made = Sampler(model.folder, model.config, model.weights, model.adapter, Sampling(16, 24, slots=4), [EOS], NATIVE)
    yield made
    made.close()


def test_an_answer_depends_on_its_prompt_and_seed_and_not_on_its_neighbours(model: Model, sampler: Sampler) -> None:
    prompts, some_seeds = PROMPTS * 4, seeds(7, 0, 12)
    together = sampler.sample(model.adapter, prompts, some_seeds).answers
    alone = [sampler.sample(model.adapter, [prompt], [seed]).answers[0] for prompt, seed in zip(prompts, some_seeds)]
    assert together == alone
    assert len({answer.tokens for answer in together}) == len(together)


def test_seeds_are_a_function_of_seed_and_rollout() -> None:
    assert (seeds(1, 2, 50) == seeds(1, 2, 50)).all()
    everything = np.concatenate([seeds(seed, rollout, 50) for seed in (0, 1) for rollout in (0, 1, 2)])
    assert len(set(everything.tolist())) == 300


def test_answers_come_from_the_adapter_as_it_is(model: Model) -> None:
    """Nearly greedy answers are the best tokens of the forward pass that training has, for one adapter after the other."""
    cold = Sampling(16, 24, temperature=1e-4, slots=3)
    sampler = Sampler(model.folder, model.config, model.weights, model.adapter, cold, [EOS], NATIVE)
    other = model.adapter.replace(b=jax.tree.map(jnp.negative, model.adapter.b))
    try:
        found = {}
        for name, adapter in (("first", model.adapter), ("other", other), ("first again", model.adapter)):
            found[name] = sampler.sample(adapter, PROMPTS, [1, 2, 3]).answers
            for prompt, answer in zip(PROMPTS, found[name]):
                assert _lead(model, adapter, prompt, answer) > -1e-3
    finally:
        sampler.close()
    assert found["first"] == found["first again"] != found["other"]


def test_an_adapter_of_a_larger_rank_and_the_base_model_find_room(model: Model, sampler: Sampler) -> None:
    twice = model.adapter.replace(
        a=jax.tree.map(lambda a: jnp.concatenate([a, a]), model.adapter.a),
        b=jax.tree.map(lambda b: jnp.concatenate([b, b], axis=1) / 2, model.adapter.b),
    )
    before, larger, base, after = (
        sampler.sample(adapter, PROMPTS, [1, 2, 3]).answers for adapter in (model.adapter, twice, None, model.adapter)
    )
    assert before == larger == after != base


def _lead(model: Model, adapter: Adapter, prompt: list[int], answer: Answer) -> float:
    """How far the tokens of an answer are before the best of the others, at the least."""
    whole = jnp.array([[*prompt, *answer.tokens]], jnp.int32)
    found = np.array(logits(model.config, model.weights, whole, adapter))[0, len(prompt) - 1 : -1]
    chosen = found[np.arange(len(found)), answer.tokens].copy()
    found[np.arange(len(found)), answer.tokens] = -np.inf
    return float((chosen - found.max(axis=1)).min())


def test_a_stop_token_is_part_of_the_answer_that_it_ends(model: Model, sampler: Sampler) -> None:
    answers = sampler.sample(model.adapter, PROMPTS * 30, seeds(3, 0, 90)).answers
    ended = [answer for answer in answers if answer.finished]
    assert ended and all(answer.tokens[-1] == EOS and EOS not in answer.tokens[:-1] for answer in ended)
    cut = [answer for answer in answers if not answer.finished]
    assert cut and all(len(answer.tokens) == 24 and EOS not in answer.tokens for answer in cut)


def test_sampling_follows_the_probabilities_of_training(model: Model, sampler: Sampler) -> None:
    """The mean log-probability of many first tokens is the entropy, up to chance: engine and training agree on the policy."""
    count = 500
    answers = sampler.sample(model.adapter, [PROMPTS[0]] * count, seeds(5, 0, count)).answers
    found = logits(model.config, model.weights, jnp.array([PROMPTS[0]]), model.adapter)[0, -1]
    log_probs = np.array(jax.nn.log_softmax(found), np.float64)
    drawn = log_probs[[answer.tokens[0] for answer in answers]]
    entropy, spread = -(np.exp(log_probs) * log_probs).sum(), drawn.std() / count**0.5
    assert abs(-drawn.mean() - entropy) < 4 * spread


PLAN = Plan(seed=3, group=4, micro_batches=2, micro_batch_size=4, buckets=(16, 32), updates=2)
LINES = [Prompt(line, tuple(range(1, 3 + line)), f"prompt {line}", {"n": line}) for line in range(1, 6)]


def _sample(adapter: object, prompts: list, some_seeds: np.ndarray) -> Sampled:
    answers = []
    for prompt, seed in zip(prompts, some_seeds):
        tokens = tuple(int(token) for token in np.random.default_rng(int(seed)).integers(0, 250, 1 + int(seed) % 7))
        answers.append(Answer(tokens, finished=int(seed) % 3 > 0))
    return Sampled(answers, 1.0, 10.0)


def _score(adapter: object, tokens: np.ndarray, mask: np.ndarray, temperature: float) -> np.ndarray:
    return (-tokens / 7 * mask).astype(np.float32)


def _length_times_line(completions: list[str], n: list[int]) -> list[float]:
    return [len(text) * line for text, line in zip(completions, n)]


def _groups(folder: pathlib.Path, plan: Plan = PLAN, judge: RewardFunction = _length_times_line) -> Groups:
    return Groups(LINES, plan, Judge(_sample, Rewards({"judge": judge}), lambda tokens: "x" * len(tokens)), _score, folder)


def test_a_window_holds_the_prompts_with_their_answers_and_advantages(tmp_path: pathlib.Path) -> None:
    groups = _groups(tmp_path)
    window = groups.window(0, object())
    written = json.loads((tmp_path / "000000.json").read_text())["answers"]
    tokens, mask = (window[name].reshape(8, -1) for name in ("tokens", "mask"))
    rewards = []
    for row, answer in enumerate(written):
        prompt, line = answer["prompt"], answer["line"]
        assert prompt == list(LINES[line - 1].ids)
        length = len(prompt) + len(answer["answer"])
        assert tokens[row, :length].tolist() == [*prompt, *answer["answer"]] and not tokens[row, length:].any()
        assert mask[row].tolist() == [int(len(prompt) <= at < length) for at in range(len(mask[row]))]
        rewards.append(len(answer["answer"]) * line)
    np.testing.assert_array_equal(window["advantages"].reshape(-1), advantages(np.reshape(rewards, (2, 4))).reshape(-1))
    np.testing.assert_array_equal(window["old_logps"].reshape(8, -1), _score(None, tokens, mask, 1.0))
    assert [row["line"] for row in written[:4]] == [written[0]["line"]] * 4
    assert set(groups.lines(0)) == {answer["line"] for answer in written}
    assert groups.start_metrics(0)["reward"] == pytest.approx(np.mean(rewards))


def test_one_update_for_a_rollout_needs_no_old_log_probabilities(tmp_path: pathlib.Path) -> None:
    assert "old_logps" not in _groups(tmp_path, dataclasses.replace(PLAN, updates=1)).window(0, object())


def test_answers_that_were_cut_are_left_out_where_asked_for(tmp_path: pathlib.Path) -> None:
    window = _groups(tmp_path, dataclasses.replace(PLAN, skip_cut=True)).window(0, object())
    finished = [answer["finished"] for answer in json.loads((tmp_path / "000000.json").read_text())["answers"]]
    assert window["mask"].any(axis=-1).reshape(-1).tolist() == finished and not all(finished) and any(finished)


def test_a_run_that_goes_on_between_updates_learns_from_the_same_window(tmp_path: pathlib.Path) -> None:
    before, after = _groups(tmp_path), _groups(tmp_path)
    first = before.window(4, object())
    second = after.window(5, object())  # the second update of rollout 2, without having sampled it
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
        assert first[name].dtype == second[name].dtype


@pytest.mark.parametrize("content", [None, '{"rollout": 2, "answ'])
def test_a_lost_rollout_is_told(tmp_path: pathlib.Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "000002.json").write_text(content)
    with pytest.raises(TrainingStopped, match="000002.json can't be read"):
        _groups(tmp_path).window(5, object())


def test_prompts_come_in_an_order_of_each_epoch_and_all_of_them(tmp_path: pathlib.Path) -> None:
    groups = _groups(tmp_path)
    taken = [prompt.line for number in range(5) for prompt in groups._of(number)]
    assert sorted(taken[:5]) == sorted(taken[5:]) == [1, 2, 3, 4, 5] and taken[:5] != taken[5:]
    assert groups.steps_per_epoch == 5 * 2 / 2


def test_answers_that_nobody_can_judge_teach_nothing(tmp_path: pathlib.Path) -> None:
    groups = _groups(tmp_path, judge=lambda completions, n: [None] * len(completions))
    assert not groups.window(0, object())["advantages"].any()
    assert groups.start_metrics(0)["groups_without_signal"] == 1


def test_a_reward_that_fails_stops_the_run_before_anything_is_written(tmp_path: pathlib.Path) -> None:
    with pytest.raises(TrainingStopped, match="rollout 0: reward judge gave 0 numbers for 8 answers"):
        _groups(tmp_path, judge=lambda completions, n: []).window(0, object())
    assert not list(tmp_path.iterdir())


def test_held_out_rewards_are_of_the_same_draws_every_time() -> None:
    judges = {"long": lambda completions: list(map(len, completions)), "none": lambda completions: [None] * len(completions)}
    rewards = Rewards(judges)
    held_out = HeldOutRewards(LINES, Judge(_sample, rewards, lambda tokens: "x" * len(tokens)), seed=3)
    scores = held_out(object())
    assert scores == held_out(object()) and not list(held_out.windows())
    mean = np.mean([len(answer.tokens) for answer in _sample(None, LINES, seeds(3, HELD_OUT, 5)).answers])
    assert scores == {"eval_loss": -mean, "eval_reward": mean, "eval_reward_long": mean, "eval_reward_none": 0.0}


def test_length_buckets_are_few_and_fit_the_longest() -> None:
    assert length_buckets(100, 3) == (48, 80, 112)
    assert length_buckets(10, 3) == (16,)
    assert length_buckets(33, 2) == (32, 48)


def test_the_scorer_gives_log_probabilities_of_the_answers_only(model: Model) -> None:
    tokens = np.random.default_rng(0).integers(0, 250, (2, 3, 16)).astype(np.int32)
    mask = np.zeros((2, 3, 16), np.uint8)
    mask[..., 5:11] = 1
    found = Scorer(model.config, model.weights)(model.adapter, tokens, mask, temperature=0.5)
    flat = tokens.reshape(6, 16)
    log_probs = jax.nn.log_softmax(2 * logits(model.config, model.weights, jnp.array(flat), model.adapter)[:, :-1])
    of_tokens = np.take_along_axis(np.array(log_probs), flat[:, 1:, None], 2)[..., 0]
    expected = np.pad(of_tokens, ((0, 0), (1, 0))) * mask.reshape(6, 16)
    np.testing.assert_allclose(found.reshape(6, 16), expected, atol=2e-5)
