"""One optimizer step: gradients of all micro-batches added up in one scan, clipped, and given to the optimizer module by module.

Knows no data, no files and no particular loss.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxlora.compilation import quick_fusions
from jaxlora.config import ModelConfig
from jaxlora.lora import Adapter
from jaxlora.weights import Weights
from training import keys
from training.losses import Batch, LogProbs, Loss, Terms
from training.machine import Machine, XlaMachine
from training.method import Window
from training.policy import Noise, Policy

AXIS = "data"
LARGEST_SCALE, GROW_AFTER = 2.0**24, 200


@struct.dataclass
class State:
    """All that a run changes. `optimizer` holds the optimizer's state for each module, by path. `scale` multiplies the loss before the
    backward pass (1 unless training in float16), `good_steps` counts the steps since it changed."""

    adapter: Adapter
    optimizer: dict[str, Any]
    step: Array
    scale: Array
    good_steps: Array


@struct.dataclass
class Report:
    """What a step tells. `loss` is total / count and `grad_norm` is before clipping, both NaN or infinite where the step was
    skipped for that; `metrics` are sum / denominator."""

    loss: Array
    count: Array
    grad_norm: Array
    finite: Array
    scale: Array
    metrics: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """`b_rate` is the ratio of LoRA+ (Hayou et al. 2024): how many times faster B learns than A. `max_norm` 0: no clipping."""

    max_norm: float = 1.0
    b_rate: float = 1.0
    noise: Noise = Noise()
    remat: bool = False
    loss_scaling: bool = False


@struct.dataclass
class Gradient:
    """What a window tells. `slopes` times `factor` are the gradient, clipped; `taken` is false where nothing is to be learned from it.
    `state` is the next one, but for adapter and optimizer."""

    slopes: Adapter
    factor: Array
    taken: Array
    state: State
    report: Report


@dataclasses.dataclass(frozen=True)
class Step:
    """One optimizer step, see `make_step`.

    The optimizer has a program of its own, for one module at a time: there are as few as there are shapes of modules, while one program for
    all modules would take as long to compile as the gradient, which is compiled anew for each shape of window.
    """

    gradient: Callable[..., Any]
    """`(state without the optimizer's, weights, reference, window, key)` -> `Gradient`."""
    update: Callable[..., Any]
    """`(module, the optimizer's state of it, its slopes, factor of the slopes, whether anything changes)` -> both after the step. They
    are given away."""

    def __call__(
        self, state: State, weights: Weights, reference: Adapter | None, window: Window, key: Array
    ) -> tuple[State, Report]:
        """The state is given away."""
        found = self.gradient(state.replace(optimizer={}), weights, reference, window, key)
        slopes = modules(found.slopes)
        after = {
            path: self.update(module, state.optimizer[path], slopes[path], found.factor, found.taken)
            for path, module in modules(state.adapter).items()
        }
        adapter = state.adapter.replace(
            a={path: module["a"] for path, (module, _) in after.items()}, b={path: module["b"] for path, (module, _) in after.items()}
        )
        return found.state.replace(adapter=adapter, optimizer={path: each for path, (_, each) in after.items()}), found.report


def modules(adapter: Adapter) -> dict[str, dict[str, Array]]:
    """A and B of each module, by path."""
    return {path: {"a": adapter.a[path], "b": adapter.b[path]} for path in adapter.a}


def new_state(adapter: Adapter, optimizer: optax.GradientTransformation, scale: float = 1.0) -> State:
    """The state before the first step. Random keys in the optimizer's (`noisy_sgd` has one) differ between modules."""
    states = {path: _with_own_keys(optimizer.init(module), path) for path, module in modules(adapter).items()}
    return State(adapter, states, jnp.int32(0), jnp.float32(scale), jnp.int32(0))


def make_step(
    config: ModelConfig,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    options: StepOptions,
    mesh: Mesh | None = None,
    machine: Machine = XlaMachine(),
) -> Step:
    """`step(state, weights, reference, window, key)` -> the next state and a report, compiled once for each shape of window.

    Arguments:
        mesh: with one axis, `data`: every device takes its share of the examples of each micro-batch.
        machine: what computes; `weights` are packed for it.
    """

    def slopes_of(window: Window, weights: Weights, reference: Adapter | None, adapter: Adapter, key: Array, scale: Array) -> Any:
        def scaled_total(adapter: Adapter, batch: Batch, key: Array) -> tuple[Array, Terms]:
            policy = Policy(config, weights, adapter, key, options.noise, options.remat, machine)
            terms = loss(policy, _frozen(Policy(config, weights, reference, machine=machine)), batch)
            return terms.total * scale, terms

        def of_batch(batch: Batch, number: Array) -> tuple[Adapter, Terms]:
            return jax.grad(scaled_total, has_aux=True)(adapter, batch, jax.random.fold_in(key, number))

        return _sum_over_batches(of_batch, window)

    slopes_of = _over_devices(slopes_of, mesh)

    @jax.jit
    def gradient(state: State, weights: Weights, reference: Adapter | None, window: Window, key: Array) -> Gradient:
        key = jax.random.fold_in(key, state.step)
        slopes, terms = slopes_of(window, weights, reference, state.adapter, key, state.scale)
        return _judged(options, state, slopes, terms)

    @functools.partial(jax.jit, donate_argnums=(0, 1), compiler_options=quick_fusions())
    def update(module: dict[str, Array], state: Any, slopes: dict[str, Array], factor: Array, taken: Array) -> tuple[Any, Any]:
        updates, after = optimizer.update(jax.tree.map(lambda slope: slope * factor, slopes), state, module)
        updates["b"] = options.b_rate * updates["b"]
        return jax.tree.map(
            lambda new, old: jnp.where(taken, new, old), (optax.apply_updates(module, updates), after), (module, state)
        )

    return Step(gradient, update)


def make_evaluation(
    config: ModelConfig, loss: Loss, mesh: Mesh | None = None, machine: Machine = XlaMachine()
) -> Callable[[Adapter | None, Weights, Adapter | None, Window], Terms]:
    """`evaluate(adapter, weights, reference, window)`: the terms of a window, without noise. Compiled once for each shape."""

    def terms_of(window: Window, weights: Weights, reference: Adapter | None, adapter: Adapter | None) -> Terms:
        policy, reference = (Policy(config, weights, of, machine=machine) for of in (adapter, reference))
        return _sum_over_batches(lambda batch, number: loss(policy, reference, batch), window)

    terms_of = _over_devices(terms_of, mesh)
    return jax.jit(lambda adapter, weights, reference, window: terms_of(window, weights, reference, adapter))


def _with_own_keys(state: Any, path: str) -> Any:
    return jax.tree.map(lambda leaf: keys.of_module(leaf, path) if keys.is_key(leaf) else leaf, state)


def _judged(options: StepOptions, state: State, slopes: Adapter, terms: Terms) -> Gradient:
    """What is to be done with the sums over a window."""
    divisor = _divisor(terms.count)
    factor = 1 / (state.scale * divisor)
    loss, norm = terms.total / divisor, _norm(slopes) * factor
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    if options.max_norm:
        factor *= jnp.minimum(1.0, options.max_norm / jnp.maximum(norm, 1e-30))
    scale, good_steps = (
        _next_scale(state.scale, state.good_steps, finite) if options.loss_scaling else (state.scale, state.good_steps)
    )
    metrics = {name: total / _divisor(count) for name, (total, count) in terms.metrics.items()}
    return Gradient(
        slopes, factor, finite & (terms.count > 0),
        state.replace(adapter=None, step=state.step + 1, scale=scale, good_steps=good_steps),
        Report(loss, terms.count, norm, finite, state.scale, metrics),
    )  # fmt: skip


def _norm(tree: Any) -> Array:
    """The norm of all arrays together. Of those of one shape the squares are added up first: XLA takes longer to compile the sum of an array
    than all else that a step does with it, and there are hundreds."""
    squares: dict[tuple[int, ...], Array] = {}
    for array in jax.tree.leaves(tree):
        squares[array.shape] = squares.get(array.shape, 0.0) + array * array
    return jnp.sqrt(sum(map(jnp.sum, squares.values())))


def _next_scale(scale: Array, good_steps: Array, finite: Array) -> tuple[Array, Array]:
    """Halved after an overflow, doubled after a while without one (Micikevicius et al. 2018)."""
    good_steps = jnp.where(finite, good_steps + 1, 0)
    grow = good_steps >= GROW_AFTER
    scale = jnp.where(finite, jnp.where(grow, jnp.minimum(2 * scale, LARGEST_SCALE), scale), jnp.maximum(scale / 2, 1.0))
    return scale, jnp.where(grow, 0, good_steps)


def _sum_over_batches(of_batch: Callable[[Batch, Array], Any], window: Window) -> Any:
    """The sum of `of_batch(batch, number)` over the first axis of a window, in float32."""
    of_batch = jax.jit(of_batch)  # which is traced once then, and used twice

    def add(total: Any, item: tuple[Batch, Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of_batch(*item)), None

    numbers = jnp.arange(jax.tree.leaves(window)[0].shape[0])
    first = jax.tree.map(lambda array: array[0], (window, numbers))
    zeros = jax.tree.map(lambda found: jnp.zeros(found.shape, jnp.float32), jax.eval_shape(of_batch, *first))
    return jax.lax.scan(add, zeros, (window, numbers))[0]


def _over_devices(summed: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """`summed(window, weights, reference, adapter, *others)` on each device's share of the window, added up."""
    if mesh is None:
        return summed

    def share(window: Window, weights: Weights, reference: Any, adapter: Any, *others: Any) -> Any:
        if others:
            key, *rest = others
            others = (jax.random.fold_in(key, jax.lax.axis_index(AXIS)), *rest)
        return jax.lax.psum(summed(window, weights, reference, adapter, *others), AXIS)

    def over_all(window: Window, *others: Any) -> Any:
        specs = (P(None, AXIS), *[P()] * len(others))
        return jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(window, *others)

    return over_all


def _frozen(model: Policy) -> LogProbs:
    return lambda *arguments, **named: jax.lax.stop_gradient(model(*arguments, **named))


def _divisor(count: Array) -> Array:
    return jnp.where(count == 0, 1.0, count)
