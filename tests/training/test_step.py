"""Properties of one optimizer step, on a tiny model."""

import functools
import pathlib

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlora import lora, model, peft, weights
from jaxlora.config import ModelConfig
from jaxlora.lora import Adapter
from jaxlora.native import Dropout
from jaxlora.weights import Weights
from training import log_probs
from training.batches import Batches, pack
from training.lora_init import new_adapter
from training.losses.sft import sft
from training.method import Example
from training.optimizers import make_optimizer
from training.policy import Noise, Policy
from training.step import GROW_AFTER, State, StepOptions, make_evaluation, make_step, modules, new_state

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
LORA = peft.new_config(r=4, lora_alpha=8, target_modules="all-linear", rank_pattern={"down_proj": 2})


@pytest.fixture(scope="module")
def config(tiny_model: pathlib.Path) -> ModelConfig:
    return ModelConfig.from_folder(tiny_model)


@pytest.fixture(scope="module")
def base(tiny_model: pathlib.Path, config: ModelConfig) -> Weights:
    return weights.load(tiny_model, config)


@pytest.fixture(scope="module")
def adapter(config: ModelConfig) -> Adapter:
    """With B that is not zero, so that A has a gradient."""
    made = new_adapter(config, LORA, 0)
    return made.replace(
        b={path: 0.1 * jax.random.normal(jax.random.key(at), b.shape) for at, (path, b) in enumerate(made.b.items())}
    )


def examples(count: int = 8) -> list[Example]:
    random = np.random.Generator(np.random.PCG64(3))
    found = []
    for line in range(count):
        length = int(random.integers(5, 30))
        mask = (np.arange(length) >= length // 3).astype(np.uint8)
        found.append(Example((line,), {"tokens": random.integers(1, 250, length).astype(np.int32), "mask": mask}))
    return found


def window(rows: list[Example], micro_batches: int, size: int, length: int = 32) -> dict[str, np.ndarray]:
    source = Batches(rows, micro_batches=micro_batches, micro_batch_size=size, buckets=(length,), seed=None)
    return dict(source.window(0))


ADAMW = optax.adamw(1e-2)
compiled = functools.cache(make_step)


def stepped(
    config: ModelConfig, base: Weights, adapter: Adapter, data: dict[str, np.ndarray], options: StepOptions = StepOptions()
) -> tuple:
    state = new_state(jax.tree.map(jnp.copy, adapter), ADAMW)
    return compiled(config, sft, ADAMW, options)(state, base, None, data, KEY)


def distance(one: Adapter, other: Adapter) -> float:
    return max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_the_step_does_not_depend_on_how_the_batch_is_cut(config: ModelConfig, base: Weights, adapter: Adapter) -> None:
    whole, report = stepped(config, base, adapter, window(examples(), 1, 8))
    for cut in ((2, 4), (8, 1)):
        state, other = stepped(config, base, adapter, window(examples(), *cut))
        np.testing.assert_allclose(other.loss, report.loss, rtol=1e-6)
        np.testing.assert_allclose(other.grad_norm, report.grad_norm, rtol=1e-5)
        # Adam divides by the size of a gradient, so that one near 0 may come out with either sign.
        assert distance(state.adapter, whole.adapter) < 1e-2 * 0.2
    assert distance(whole.adapter, adapter) > 1e-3


def test_filling_and_padding_change_nothing(config: ModelConfig, base: Weights, adapter: Adapter) -> None:
    _, report = stepped(config, base, adapter, window(examples(), 1, 8))
    for data in (window(examples(), 1, 8, length=64), window(examples(), 3, 4)):
        _, other = stepped(config, base, adapter, data)
        np.testing.assert_allclose(other.loss, report.loss, rtol=1e-6)
        np.testing.assert_allclose(other.grad_norm, report.grad_norm, rtol=1e-5)
        assert other.count == report.count


def test_packed_examples_give_the_loss_that_they_give_apart(config: ModelConfig, base: Weights, adapter: Adapter) -> None:
    _, report = stepped(config, base, adapter, window(examples(), 1, 8))
    rows = pack(examples(), 64)
    assert len(rows) < 8
    _, packed = stepped(config, base, adapter, window(rows, 1, len(rows), length=64))
    np.testing.assert_allclose(packed.loss, report.loss, rtol=1e-6)
    np.testing.assert_allclose(packed.grad_norm, report.grad_norm, rtol=1e-5)


def test_a_batch_without_anything_to_learn_changes_nothing(config: ModelConfig, base: Weights, adapter: Adapter) -> None:
    data = window(examples(), 2, 4)
    data["mask"] = np.zeros_like(data["mask"])
    state, report = stepped(config, base, adapter, data)
    assert report.count == 0 and report.loss == 0 and report.finite
    assert distance(state.adapter, adapter) == 0
    assert {int(each[0].count) for each in state.optimizer.values()} == {0}
    assert state.step == 1


def test_a_step_that_is_not_finite_changes_nothing_but_the_loss_scale(
    config: ModelConfig, base: Weights, adapter: Adapter
) -> None:
    def broken(policy: object, reference: object, batch: dict) -> object:
        terms = sft(policy, reference, batch)
        return terms._replace(total=terms.total * jnp.inf)

    optimizer = optax.adamw(1e-2)
    state = new_state(jax.tree.map(jnp.copy, adapter), optimizer, scale=2.0**12)
    step = make_step(config, broken, optimizer, StepOptions(loss_scaling=True))
    for scale in (2.0**11, 2.0**10):
        state, report = step(state, base, None, window(examples(), 2, 4), KEY)
        assert not report.finite and state.scale == scale
    assert distance(state.adapter, adapter) == 0
    assert {int(each[0].count) for each in state.optimizer.values()} == {0}


def test_the_loss_scale_does_not_show_in_the_result_and_grows_within_its_bound(
    config: ModelConfig, base: Weights, adapter: Adapter
) -> None:
    plain, report = stepped(config, base, adapter, window(examples(), 2, 4))
    start = new_state(jax.tree.map(jnp.copy, adapter), ADAMW, scale=2.0**24)
    start = start.replace(good_steps=jnp.int32(GROW_AFTER - 1))
    step = compiled(config, sft, ADAMW, StepOptions(loss_scaling=True))
    state, scaled = step(start, base, None, window(examples(), 2, 4), KEY)
    np.testing.assert_allclose(scaled.grad_norm, report.grad_norm, rtol=1e-6)
    assert distance(state.adapter, plain.adapter) < 1e-6
    assert state.scale == 2.0**24 and state.good_steps == 0
    state, _ = step(
        state.replace(scale=jnp.float32(2.0**8), good_steps=jnp.int32(GROW_AFTER - 1)), base, None, window(examples(), 2, 4), KEY
    )
    assert state.scale == 2.0**9


def test_a_step_compiles_once_for_each_bucket(config: ModelConfig, base: Weights, adapter: Adapter) -> None:
    optimizer = optax.adamw(optax.linear_schedule(1e-2, 0.0, 10))
    state = new_state(jax.tree.map(jnp.copy, adapter), optimizer)
    step = make_step(config, sft, optimizer, StepOptions())
    source = Batches(examples(40), micro_batches=2, micro_batch_size=2, buckets=(16, 32), seed=1)
    shapes = set()
    for number in range(25):
        data = source.window(number)
        shapes.add(data["tokens"].shape)
        state, _ = step(state, base, None, data, KEY)
    assert shapes == {(2, 2, 16), (2, 2, 32)}
    assert step.gradient._cache_size() == 2
    assert step.update._cache_size() == len({(module["a"].shape, module["b"].shape) for module in modules(adapter).values()})


def test_the_frozen_base_is_never_differentiated(config: ModelConfig, base: Weights, adapter: Adapter) -> None:
    gradient = make_step(config, sft, ADAMW, StepOptions()).gradient
    traced = jax.make_jaxpr(gradient)(new_state(adapter, ADAMW), base, None, window(examples(), 2, 4), KEY)
    products = _products(traced.jaxpr)
    batch = {name: array[0] for name, array in window(examples(), 1, 8).items()}
    of_base = jax.make_jaxpr(jax.grad(lambda weights: jnp.sum(model.logits(config, weights, batch["tokens"]))))(base)
    kernels = {linears.kernel.shape for layer in base.layers for linears in layer.linears.values()} | {base.head.kernel.shape}
    assert {shape for shape in products if len(shape) == 2} & {array.shape for array in adapter.b.values()}
    kernels |= {shape[::-1] for shape in kernels}
    assert _products(of_base.jaxpr) & kernels  # what it would look like
    assert not products & kernels


def _products(jaxpr: jax.extend.core.Jaxpr) -> set[tuple[int, ...]]:
    """The shapes of all matrix products in a program, those inside loops included."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.add(equation.outvars[0].aval.shape)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found |= _products(inner)
    return found


def test_gradients_are_clipped_by_their_global_norm(config: ModelConfig, base: Weights, adapter: Adapter) -> None:
    optimizer, data = optax.sgd(1.0), window(examples(), 2, 4)

    def moved(max_norm: float) -> tuple[float, float]:
        step = make_step(config, sft, optimizer, StepOptions(max_norm=max_norm))
        state, report = step(new_state(jax.tree.map(jnp.copy, adapter), optimizer), base, None, data, KEY)
        return float(optax.tree.norm(jax.tree.map(jnp.subtract, state.adapter, adapter))), float(report.grad_norm)

    free, norm = moved(0)
    np.testing.assert_allclose(free, norm, rtol=1e-4)
    clipped, still = moved(norm / 3)
    np.testing.assert_allclose((clipped, still), (norm / 3, norm), rtol=1e-4)


def test_lora_plus_moves_b_by_its_ratio(config: ModelConfig, base: Weights, adapter: Adapter) -> None:
    data = window(examples(), 2, 4)
    plain, _ = stepped(config, base, adapter, data)
    plus, _ = stepped(config, base, adapter, data, StepOptions(b_rate=4.0))
    for path in adapter.a:
        np.testing.assert_allclose(plus.adapter.a[path], plain.adapter.a[path], atol=1e-7)
        np.testing.assert_allclose(
            plus.adapter.b[path] - adapter.b[path], 4 * (plain.adapter.b[path] - adapter.b[path]), atol=1e-6
        )


def test_every_module_has_noise_of_its_own_in_every_step(config: ModelConfig, base: Weights, adapter: Adapter) -> None:
    noisy = make_optimizer("noisy_sgd", {}, 1.0)
    step, state = make_step(config, sft, noisy, StepOptions(max_norm=1e-30)), new_state(jax.tree.map(jnp.copy, adapter), noisy)
    before, moves = adapter, []
    for _ in range(2):
        state, _ = step(state, base, None, window(examples(), 2, 4), KEY)
        moves += [np.ravel(now - then) for now, then in zip(jax.tree.leaves(state.adapter), jax.tree.leaves(before), strict=True)]
        before = jax.tree.map(jnp.copy, state.adapter)
    size = min(move.size for move in moves)
    together = np.corrcoef([move[:size] for move in moves]) - np.eye(len(moves))
    assert size >= 64 and np.abs(together).max() < 6 / size**0.5


def test_rematerialisation_changes_no_gradient(config: ModelConfig, base: Weights, adapter: Adapter) -> None:
    options = StepOptions(noise=Noise(dropout=0.3))
    plain, report = stepped(config, base, adapter, window(examples(), 2, 4), options)
    again, other = stepped(config, base, adapter, window(examples(), 2, 4), StepOptions(noise=Noise(dropout=0.3), remat=True))
    np.testing.assert_allclose(other.grad_norm, report.grad_norm, rtol=1e-5)
    assert distance(plain.adapter, again.adapter) < 2e-3


def test_what_dropout_keeps_is_as_good_as_random() -> None:
    """By share, by neighbours, and between modules, seeds and places: each within five standard deviations."""
    shape, seed = (512, 577), jnp.array([1, 2], jnp.uint32)
    draw = lambda seed, number, share: np.asarray(Dropout(seed, jnp.uint32(number), share).stays(shape), np.float64)
    for share in (0.1, 0.5, 0.95):
        deviation = (share * (1 - share)) ** 0.5
        first = draw(seed, 7, share)
        assert abs(first.mean() - share) < 5 * deviation / first.size**0.5
        for axis in (0, 1):
            assert np.ptp(first.mean(axis)) < 12 * deviation / shape[axis] ** 0.5
        others = [draw(seed, 8, share), draw(jnp.array([1, 3], jnp.uint32), 7, share), draw(jnp.array([2, 2], jnp.uint32), 7, share)]
        moved = [np.roll(first, by, axis) for by in (1, 2, 64, 256) for axis in (0, 1)]
        for other in others + moved:
            assert abs(((first - share) * (other - share)).mean()) < 5 * deviation**2 / first.size**0.5
    assert Dropout(seed, jnp.uint32(0), 1.0).stays((1000,)).sum() >= 999


def test_noise_is_a_function_of_the_step_and_gone_in_evaluation(config: ModelConfig, base: Weights, adapter: Adapter) -> None:
    data = window(examples(), 2, 4)
    losses = {}
    for noise in (Noise(), Noise(dropout=0.5), Noise(embeddings=5.0)):
        step = make_step(config, sft, optax.sgd(0.0), StepOptions(noise=noise))

        def loss(number: int) -> float:
            state = new_state(jax.tree.map(jnp.copy, adapter), optax.sgd(0.0)).replace(step=jnp.int32(number))
            return float(step(state, base, None, data, KEY)[1].loss)

        losses[noise] = (loss(0), loss(0), loss(1))
    assert len(set(losses[Noise()])) == 1
    for noise, (first, again, next_step) in losses.items():
        if noise != Noise():
            assert first == again != next_step and first != losses[Noise()][0]
    terms = make_evaluation(config, sft)(adapter, base, None, data)
    np.testing.assert_allclose(terms.total / terms.count, losses[Noise()][0], rtol=1e-6)


def test_log_probs_are_those_of_the_logits(
    config: ModelConfig, base: Weights, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_probs, "BLOCK", 16)
    data = {name: jnp.asarray(array[0]) for name, array in window(examples(), 1, 8).items()}
    tokens, wanted = data["tokens"], data["mask"]
    weight = jax.random.normal(KEY, tokens.shape)

    def ours(adapter: Adapter) -> jax.Array:
        return jnp.sum(weight * Policy(config, base, adapter)(tokens, temperature=0.7, wanted=wanted))

    def plain(adapter: Adapter) -> jax.Array:
        found = jax.nn.log_softmax(model.logits(config, base, tokens, adapter)[:, :-1] / 0.7)
        picked = jnp.take_along_axis(found, tokens[:, 1:, None], axis=2)[..., 0]
        return jnp.sum(weight[:, 1:] * wanted[:, 1:] * picked)

    (one, slope), (other, reference) = (jax.jit(jax.value_and_grad(loss))(adapter) for loss in (ours, plain))
    np.testing.assert_allclose(one, other, rtol=1e-5)
    assert distance(slope, reference) < 1e-4 * float(optax.tree.norm(reference))


def test_an_adapted_output_layer_gets_its_gradient(config: ModelConfig, base: Weights) -> None:
    made = new_adapter(config, peft.new_config(r=2, lora_alpha=4, target_modules=["lm_head", "q_proj"]), 0)
    state, report = stepped(config, base, made, window(examples(), 2, 4))
    assert float(jnp.abs(state.adapter.b["lm_head"]).max()) > 1e-3


def test_a_new_adapter_is_the_base_model_and_one_seed_gives_one_adapter(config: ModelConfig, base: Weights) -> None:
    made, tokens = new_adapter(config, LORA, 7), jnp.arange(20)[None]
    np.testing.assert_array_equal(model.logits(config, base, tokens, made), model.logits(config, base, tokens))
    assert distance(made, new_adapter(config, LORA, 7)) == 0
    assert distance(made, new_adapter(config, LORA, 8)) > 0
    assert made.a["model.layers.0.mlp.down_proj"].shape == (2, 48) and dict(made.scales)["model.layers.0.mlp.down_proj"] == 4
    assert isinstance(made, lora.Adapter) and isinstance(new_state(made, optax.adamw(1.0)), State)
