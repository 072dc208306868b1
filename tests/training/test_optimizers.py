"""Optimizers by name, with the learning rate in their state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlora.errors import SetupError
from training.optimizers import at_rate, make_optimizer, optimizer_names

RATES = [0.1, 0.03, 0.2]
PARAMS = {"a": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "b": jnp.linspace(0.5, 2.0, 6).reshape(2, 3)}
NO_SCHEDULE = ("optimistic_adam", "rprop", "sm3")  # optax gives these one rate


@pytest.mark.parametrize("name", optimizer_names())
def test_every_optimizer_takes_the_steps_that_optax_takes(name):
    rates = RATES[:1] * 3 if name in NO_SCHEDULE else RATES
    ours = make_optimizer(name, {}, rates[0])
    random = {"key": 0} if name == "noisy_sgd" else {}
    theirs = getattr(optax, name)(rates[0] if name in NO_SCHEDULE else lambda count: jnp.array(rates)[count], **random)
    our_params, our_state = PARAMS, ours.init(PARAMS)
    their_params, their_state = PARAMS, theirs.init(PARAMS)
    for rate in rates:
        our_params, our_state = _step(ours, at_rate(our_state, rate), our_params)
        their_params, their_state = _step(theirs, their_state, their_params)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), our_params, their_params)


def test_what_is_random_follows_the_seed_unless_a_key_is_given():
    def moved(seed, **arguments):
        optimizer = make_optimizer("noisy_sgd", arguments, 0.1, seed)
        return _step(optimizer, optimizer.init(PARAMS), PARAMS)[0]["a"].tolist()

    assert moved(1) == moved(1) == moved(2, key=1) != moved(2)


# With noisy_sgd modules have noise of their own, see test_step.py.
@pytest.mark.parametrize("name", [name for name in optimizer_names() if name != "noisy_sgd"])
def test_modules_may_be_updated_one_by_one(name):
    modules = {"one": PARAMS, "other": {"a": 3 * PARAMS["b"], "b": 1 - PARAMS["a"]}}
    optimizer = make_optimizer(name, {}, RATES[0])
    together, state = modules, optimizer.init(modules)
    apart, states = dict(modules), {path: optimizer.init(module) for path, module in modules.items()}
    for _ in range(2):
        together, state = _step(optimizer, state, together)
        for path in apart:
            apart[path], states[path] = _step(optimizer, states[path], apart[path])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), apart, together)


@pytest.mark.parametrize("name", optimizer_names())
def test_every_optimizer_can_do_without_weight_decay(name):
    make_optimizer(name, {"weight_decay": 0.0}, 0.1).init(PARAMS)


@pytest.mark.parametrize("name", optimizer_names())
def test_every_rate_has_the_same_program(name):
    programs = set()
    for rate in RATES:
        optimizer = make_optimizer(name, {}, rate)
        state = at_rate(optimizer.init(PARAMS), rate)
        programs.add(jax.jit(_step, static_argnums=0).lower(optimizer, state, PARAMS).as_text())
    assert len(programs) == 1


def _step(optimizer, state, params):
    slopes = jax.tree.map(jnp.cos, params)
    updates, state = optimizer.update(slopes, state, params)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("adamv", {}, "--optimizer: 'adamv' is no optimizer of optax that can be used here; there are: .*adamw"),
        ("lbfgs", {}, "--optimizer: 'lbfgs' is no optimizer of optax that can be used here"),
        ("adamw", {"beta": 0.9}, "--optimizer-args: .*'beta'"),
        ("adamw", {"learning_rate": 0.1}, "--optimizer-args: .*'learning_rate'"),
        ("sign_sgd", {"momentum": 0.9}, "--optimizer-args: .*'momentum'"),
        ("sgd", {"weight_decay": 0.1}, "--optimizer-args: .*'weight_decay'"),
    ],
)
def test_what_optax_does_not_take_is_refused(name, arguments, said):
    with pytest.raises(SetupError, match=said):
        make_optimizer(name, arguments, 0.1)
