"""Optax optimizers and learning-rate schedules by name."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optax

from jaxlora.errors import SetupError

# Take a learning rate as well, but make a part of an optimizer, or one that has to call the loss.
_NO_OPTIMIZERS = {"scale_by_rprop", "lbfgs"}
Schedule = Callable[[Any], Any]


def optimizer_names() -> list[str]:
    """The names that `make_optimizer` knows."""
    return sorted(name for name, found in vars(optax).items() if _is_optimizer(name, found))


def make_optimizer(name: str, arguments: Mapping[str, Any], rate: float, seed: int = 0) -> optax.GradientTransformation:
    """`optax.<name>(rate, **arguments)`, whose state holds the learning rate, for `at_rate` to change: what has been compiled serves every
    rate and schedule. An optimizer that is random draws from `seed`, unless the arguments have a `key`; no weight decay may be asked of one
    that has none.

    Raises:
        SetupError: there is no such optimizer, or it doesn't take these arguments.
    """
    if name not in optimizer_names():
        raise SetupError(f"--optimizer: {name!r} is no optimizer of optax that can be used here; there are: {', '.join(optimizer_names())}")
    optimizer = getattr(optax, name)
    takes = inspect.signature(optimizer).parameters
    if "key" in takes:
        arguments = {"key": seed, **arguments}
    if "weight_decay" not in takes and arguments.get("weight_decay") == 0:
        arguments = {argument: value for argument, value in arguments.items() if argument != "weight_decay"}
    _call("--optimizer-args", functools.partial(optimizer, rate), arguments)  # with the rate in its state it would be made later
    others = [argument for argument in takes if argument != "learning_rate"]
    return optax.inject_hyperparams(optimizer, static_args=others)(rate, **arguments)


def at_rate(state: Any, rate: float) -> Any:
    """The state of an optimizer from `make_optimizer`, whose next step has this learning rate."""
    return state._replace(hyperparams={"learning_rate": np.float32(rate)})


def make_schedule(name: str, arguments: Mapping[str, Any], *, peak: float, warmup_steps: int, total_steps: int) -> Schedule:
    """The learning rate by optimizer step, from 0: a linear warm-up from 0 to `peak`, then `cosine` or `linear` down to 0 at the
    end, or `constant`; or any schedule of optax, as it is.

    Raises:
        SetupError: there is no such schedule, or it doesn't take these arguments.
    """
    falling = {
        "cosine": lambda steps: optax.cosine_decay_schedule(peak, steps, **arguments),
        "linear": lambda steps: optax.linear_schedule(peak, 0.0, steps, **arguments),
        "constant": lambda steps: optax.constant_schedule(peak, **arguments),
    }
    if name in falling:
        after = _call("--schedule-args", lambda: falling[name](max(total_steps - warmup_steps, 1)), {})
        # The first step has a rate above 0 already.
        warm_up = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps) if warmup_steps else None
        return optax.join_schedules([warm_up, after], [warmup_steps]) if warm_up else after
    found = getattr(optax, name, None)
    if not name.endswith("_schedule") or found is None:
        there = sorted(key for key in vars(optax) if key.endswith("_schedule"))
        raise SetupError(f"--schedule: {name!r} is none of {', '.join([*falling, *there])}")
    return _call("--schedule-args", found, arguments)


def _is_optimizer(name: str, found: Any) -> bool:
    if name.startswith("_") or name in _NO_OPTIMIZERS or not inspect.isfunction(found):
        return False
    parameters = list(inspect.signature(found).parameters)
    return parameters[:1] == ["learning_rate"]


def _call(option: str, make: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    try:
        return make(**arguments)
    except (TypeError, ValueError) as error:
        raise SetupError(f"{option}: {error}") from None
