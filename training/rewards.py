"""Reward functions for GRPO, from a Python file or module.

A reward function is called as in TRL, with keyword arguments that each hold one entry for every answer:

    def reward(prompts, completions, **columns) -> list[float | None]

`prompts` are as in the data (a string, or a list of messages), `completions` are texts, and `columns` are the other fields of the
prompt's line. None means that an answer can't be judged: it then takes no part. Knows no model.
"""

import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlora.errors import SetupError
from training.functions import find_function

RewardFunction = Callable[..., Sequence[float | None]]


class RewardError(Exception):
    """A reward function raised, or answered with something that is no list of numbers. `str()` names the function and the
    fault."""


class Rewards:
    """The weighted sum of reward functions.

    Arguments:
        functions: by name, as the metrics show them.
        weights: one for each function; 1 each by default.
    """

    def __init__(self, functions: Mapping[str, RewardFunction], weights: Sequence[float] | None = None):
        if not functions:
            raise SetupError("--reward: name at least one function, as file.py:function")
        if weights is not None and len(weights) != len(functions):
            raise SetupError(f"--reward-weights: {len(weights)} weights for {len(functions)} reward functions")
        self._functions = dict(functions)
        self._weights = np.asarray(weights if weights is not None else [1.0] * len(functions), np.float64)
        self._fields = {name: _accepted(function) for name, function in functions.items()}

    @classmethod
    def load(cls, specs: Sequence[str], weights: Sequence[float] | None = None) -> "Rewards":
        """From `file.py:function` or `package.module:function`.

        Raises:
            SetupError: names every one that can't be had.
        """
        functions, problems = {}, []
        for spec in specs:
            try:
                function = find_function(spec, "--reward")
                name = spec.rpartition(":")[2]
                functions[name if name not in functions else spec] = function
            except SetupError as error:
                problems.append(str(error))
        if problems:
            raise SetupError("\n".join(problems))
        return cls(functions, weights)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._functions)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The rewards of N answers.

        Arguments:
            columns: the other fields of the prompts' lines; a function gets those that it names, or all if it takes `**columns`.

        Returns:
            The weighted sum float64 `[N]`, NaN where no function could judge, and what each function gave, `[N]`, by its name.

        Raises:
            RewardError: a function raised, or did not give one finite number or None for each answer.
        """
        given = {**columns, "prompts": list(prompts), "completions": list(completions)}
        each = {name: self._call(name, given, len(completions)) for name in self._functions}
        table = np.stack(list(each.values()))
        total = np.where(np.isnan(table), 0.0, table * self._weights[:, None]).sum(axis=0)
        return np.where(np.isnan(table).all(axis=0), np.nan, total), each

    def _call(self, name: str, given: Mapping[str, Sequence[Any]], count: int) -> np.ndarray:
        accepted = self._fields[name]
        arguments = {key: value for key, value in given.items() if accepted is None or key in accepted}
        try:
            answer = self._functions[name](**arguments)
        except Exception as error:
            raise RewardError(f"reward {name}: {type(error).__name__}: {error}") from error
        return _numbers(name, answer, count)


def _numbers(name: str, answer: Any, count: int) -> np.ndarray:
    if isinstance(answer, str) or not hasattr(answer, "__len__"):
        raise RewardError(f"reward {name} gave a {type(answer).__name__}; expected a list with one number for each answer")
    if len(answer) != count:
        raise RewardError(f"reward {name} gave {len(answer)} numbers for {count} answers")
    rewards = np.empty(count)
    for index, value in enumerate(answer):
        if value is None:
            rewards[index] = np.nan
            continue
        if not isinstance(value, numbers.Real | np.number | np.bool_) or not math.isfinite(value):
            raise RewardError(f"reward {name} gave {value!r} for answer {index}; expected a finite number or None")
        rewards[index] = float(value)
    return rewards


def _accepted(function: RewardFunction) -> frozenset[str] | None:
    """The keyword arguments that a function takes; None: any."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters)
