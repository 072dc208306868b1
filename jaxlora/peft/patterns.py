"""How `adapter_config.json` picks modules by name: lists of suffixes, regular expressions, keys of rank and alpha patterns.

Semantics: peft 0.21, `check_target_module_exists` and `get_pattern_key`. The expressions come from whoever publishes an adapter,
so they run with a time limit (Python's `re` has none; `regex` agrees with it on the syntax that `check` lets through).
"""

import re
import time
from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

import regex

MAX_PATTERN_LENGTH = 4096
MAX_NESTING = 8
MAX_REPEATS = 10_000
TIME_LIMIT_S = 1.0

T = TypeVar("T")

_PLAIN = re.compile(r"[A-Za-z0-9_.]+")
_COUNTED = re.compile(r"\{(\d*)(,?)(\d*)\}")


class PatternTimeoutError(ValueError):
    """The expressions of one adapter took longer than `TIME_LIMIT_S` together."""


class KeyTable(Generic[T]):
    """`rank_pattern` or `alpha_pattern`: the value of the first key that matches a name."""

    def __init__(self, table: Mapping[str, T], matcher: "Matcher"):
        # EVA writes one plain key for each module, so the common miss has to be cheap.
        self._keys = [(key, _PLAIN.fullmatch(key) is not None, value) for key, value in table.items()]
        self._matcher = matcher
        self._found: dict[str, T | None] = {}

    def get(self, name: str, default: T) -> T:
        """The value for a module, or `default`."""
        if name not in self._found:
            self._found[name] = next((value for key, plain, value in self._keys if self._matches(key, plain, name)), None)
        found = self._found[name]
        return default if found is None else found

    def _matches(self, key: str, plain: bool, name: str) -> bool:
        return _ends_with(name, key) if plain else self._matcher.key(key, name)


class Matcher:
    """Matches the patterns of one adapter, within one time limit for all of them."""

    def __init__(self, time_limit_s: float = TIME_LIMIT_S):
        self._left_s = time_limit_s
        self._compiled: dict[str, regex.Pattern] = {}
        self._known: dict[tuple[str, str], bool] = {}

    def full(self, pattern: str, name: str) -> bool:
        """`target_modules` and `exclude_modules` as a string: the expression matches the whole name."""
        if _PLAIN.fullmatch(pattern):
            return len(pattern) == len(name) and _same(pattern, name)
        return self._fullmatch(pattern, name)

    def key(self, key: str, name: str) -> bool:
        r"""A key of `rank_pattern` or `alpha_pattern`: `(.*\.)?(KEY)$` matches the name."""
        if _PLAIN.fullmatch(key):
            return _ends_with(name, key)
        return self._fullmatch(_expression(key), name)

    def _fullmatch(self, pattern: str, name: str) -> bool:
        if (pattern, name) not in self._known:
            self._known[pattern, name] = self._run(pattern, name)
        return self._known[pattern, name]

    def _run(self, pattern: str, name: str) -> bool:
        if self._left_s <= 0:
            raise PatternTimeoutError
        started = time.monotonic()
        try:
            compiled = self._compiled.get(pattern)
            if compiled is None:
                compiled = self._compiled[pattern] = regex.compile(pattern, regex.V0)
            return compiled.fullmatch(name, timeout=self._left_s) is not None
        except TimeoutError:
            self._left_s = 0
            raise PatternTimeoutError from None
        finally:
            self._left_s -= time.monotonic() - started


def check(pattern: str) -> str | None:
    """What is wrong with a regular expression, else None. What passes compiles to a program of bounded size."""
    if _PLAIN.fullmatch(pattern) and len(pattern) <= MAX_PATTERN_LENGTH:
        return None
    if len(pattern) > MAX_PATTERN_LENGTH:
        return f"is {len(pattern)} characters long, the limit is {MAX_PATTERN_LENGTH}"
    if _nesting(pattern) > MAX_NESTING:
        return f"nests groups more than {MAX_NESTING} deep"
    repeats = 1
    for low, _, high in _COUNTED.findall(pattern):
        repeats *= max(int(low or 0), int(high or 0), 1) if len(low) < 6 and len(high) < 6 else MAX_REPEATS + 1
    if repeats > MAX_REPEATS:
        return f"repeats more than {MAX_REPEATS} times"
    # `regex` reads these as something of its own where `re` takes them as they are.
    if "[[" in pattern or "{" in _COUNTED.sub("", pattern).replace(r"\{", ""):
        return "uses `[[` or a `{` that is no repeat count"
    try:
        re.compile(pattern)
        regex.compile(pattern, regex.V0)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        return f"is no valid regular expression ({error})"
    return None


def check_key(key: str) -> str | None:
    """The same for a key of a pattern table."""
    return check(key if _PLAIN.fullmatch(key) else _expression(key))


def in_list(names: Iterable[str], name: str) -> bool:
    """`target_modules` and `exclude_modules` as a list: the name itself, or its last parts."""
    return any(name == item or name.endswith(f".{item}") for item in names)


def layer_of(name: str, layers_pattern: list[str], matcher: Matcher) -> int | None:
    """The layer number that `layers_to_transform` compares with: of the first numbered part, or of the one behind a pattern."""
    if not layers_pattern:
        match = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", name)
        return int(match["index"]) if match else None
    parts = name.split(".")
    for pattern in layers_pattern:
        for at in range(1, len(parts) - 1):
            if parts[at].isdecimal() and matcher.key(pattern, ".".join(parts[:at])):
                return int(parts[at])
    return None


def _expression(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _ends_with(name: str, key: str) -> bool:
    """Whether the last parts of a name match a key without any operator but `.`."""
    start = len(name) - len(key)
    return (start == 0 or (start > 0 and name[start - 1] == ".")) and _same(key, name[start:])


def _same(pattern: str, text: str) -> bool:
    """Whether a pattern without any operator but `.` matches a text of its own length."""
    return pattern == text or all(p in (".", t) for p, t in zip(pattern, text, strict=True))


def _nesting(pattern: str) -> int:
    depth = deepest = 0
    skip = in_class = False
    for at, char in enumerate(pattern):
        if skip:
            skip = False
        elif char == "\\":
            skip = True
        elif in_class:
            # A `]` that comes first in a class stands for itself.
            in_class = not (char == "]" and pattern[:at].rstrip("^")[-1:] != "[")
        elif char == "[":
            in_class = True
        elif char == "(":
            depth += 1
            deepest = max(deepest, depth)
        elif char == ")":
            depth -= 1
    return deepest
