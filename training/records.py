"""Lines of a JSONL file, read and checked before anything is trained. Knows JSON and line numbers, no tokens."""

import codecs
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from jaxlora.errors import SetupError

SHOWN = 20  # bad lines that a message names
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Record:
    """One line. `number` counts from 1, empty lines included."""

    number: int
    fields: Mapping[str, Any]


class BadLine(ValueError):
    """What is wrong with one line."""


class TooLong(BadLine):
    """The line has more tokens than the limit."""


def read(path: pathlib.Path) -> tuple[list[Record], dict[int, str]]:
    """The lines of a JSONL file that are JSON objects, and what is wrong with the others, by line number. Empty lines are left
    out, and so is a byte order mark.

    Raises:
        SetupError: the file can't be read, or there is nothing in it.
    """
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise SetupError(f"{path}: can't be read: {error.strerror}") from None
    records, problems = [], {}
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line.decode())
        except UnicodeDecodeError as error:
            problems[number] = f"is not UTF-8 (byte {error.start})"
        except (ValueError, RecursionError) as error:
            problems[number] = f"is not JSON ({error})"
        else:
            if isinstance(fields, dict):
                records.append(Record(number, fields))
            else:
                problems[number] = f"is a {type(fields).__name__}, not a JSON object"
    if not records and not problems:
        raise SetupError(f"{path}: is empty; it needs one JSON object a line")
    return records, problems


def encode_all(path: pathlib.Path, encode: Callable[[Record], T], *, skip_bad: bool, say: Callable[[str], None]) -> list[T]:
    """Every line of a file through `encode`, which raises BadLine. Lines over the length limit are left out and counted.

    Arguments:
        skip_bad: leave out bad lines as well.
        say: told what was left out.

    Raises:
        SetupError: names the bad lines with their reasons, or says that nothing is left.
    """
    records, problems = read(path)
    lines = len(records) + len(problems)
    found, too_long = [], {}
    for record in records:
        try:
            found.append(encode(record))
        except TooLong as problem:
            too_long[record.number] = str(problem)
        except BadLine as problem:
            problems[record.number] = str(problem)
    if problems and not skip_bad:
        raise SetupError(f"{path}: {len(problems)} bad lines (--skip-bad-lines leaves them out)\n{_listed(problems)}")
    if not found:
        reasons = {**problems, **too_long}
        raise SetupError(f"{path}: no line is left to train on\n{_listed(reasons)}")
    for what, left_out in (("bad", problems), ("too long", too_long)):
        if left_out:
            say(f"{path}: left out as {what} {len(left_out)} of {lines} lines: {_numbers(left_out)}")
    return found


def text_of(fields: Mapping[str, Any], key: str) -> str:
    """A field that has to be a string with something in it. Raises BadLine."""
    value = fields.get(key)
    if not isinstance(value, str) or not value:
        raise BadLine(f"`{key}` is {_kind(value)}; expected text")
    return value


def _kind(value: Any) -> str:
    return "missing" if value is None else "empty" if value in ("", []) else f"a {type(value).__name__}"


def _listed(problems: Mapping[int, str]) -> str:
    lines = [f"  line {number}: {problems[number]}" for number in sorted(problems)[:SHOWN]]
    return "\n".join([*lines, f"  and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else lines)


def _numbers(numbers: Iterable[int]) -> str:
    numbers = sorted(numbers)
    return ", ".join(map(str, numbers[:SHOWN])) + (" ..." if len(numbers) > SHOWN else "")
