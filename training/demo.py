"""A first training run without any data of one's own: `make train`.

Makes a small task, sentences to JSON frames, fine-tunes on it for a few minutes, publishes, and shows what changed in the answer
to a sentence that was not in the data.
"""

from jaxlora import allocator

if __name__ == "__main__":
    allocator.restart()  # first, as what follows takes seconds

import itertools
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence

from client import Client, ServerUnreachable
from jaxlora.errors import ServingError
from jaxlora.files import replace
from training import sft
from training.task import say

NAME = "demo/frames"
FOLDER = pathlib.Path("runs/demo")
EXAMPLES = 240
OPTIONS = (
    "--max-steps",
    "12",
    "--batch-size",
    "8",
    "--rank",
    "8",
    "--lr",
    "2e-3",
    "--schedule",
    "linear",
    "--buckets",
    "1",
    "--eval-share",
    "0.05",
)
QUESTION = "Please get me a table for nine people in Lisbon on Sunday"

_NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight")
_CITIES = ("Paris", "Oslo", "Rome", "Madrid", "Vienna", "Prague", "Boston", "Cairo")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
_TABLES = (
    "Book a table for {number} in {city} on {day}",
    "I need a restaurant in {city} for {number} people on {day}",
    "Can you find a place to eat in {city} on {day}, we are {number}?",
    "Reserve dinner for {number} on {day} in {city}, please",
)
_WEATHER = ("What is the weather in {city} on {day}?", "Will it rain in {city} on {day}?", "How warm will {city} be on {day}?")


def examples() -> Iterator[dict]:
    """The data, always the same."""
    combinations = itertools.product(_NUMBERS, _CITIES, _DAYS)
    # A stride that shares no factor with the number of combinations mixes them.
    order = [
        combination for _, combination in sorted(((at * 101) % 336, combination) for at, combination in enumerate(combinations))
    ]
    for at, (number, city, day) in enumerate(order[:EXAMPLES]):
        if at % 3:
            text, frame = (
                _TABLES[at % 4].format(number=number, city=city, day=day),
                {"intent": "table", "people": number, "city": city, "day": day},
            )
        else:
            text, frame = _WEATHER[at // 3 % 3].format(city=city, day=day), {"intent": "weather", "city": city, "day": day}
        yield {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": json.dumps(frame)}]}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demonstration; further options are those of `training.sft`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    FOLDER.mkdir(parents=True, exist_ok=True)
    data = FOLDER / "frames.jsonl"
    replace(data, "".join(json.dumps(example) + "\n" for example in examples()).encode())
    say(f"a small task to learn: {data}, {EXAMPLES} sentences with the JSON frame that answers them")
    code = sft.main(["--data", str(data), "--name", NAME, "--run", str(FOLDER / "run"), *OPTIONS, *argv])
    if code == 0:
        _show(sft.SftOptions.parse(["--data", str(data), "--name", NAME, *argv], "").url)
    return code


def _show(url: str) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    say(f"\n{QUESTION}")
    try:
        with Client(url) as client:
            for adapter in (None, NAME):
                answer = client.chat(messages, adapter=adapter, max_tokens=48)
                say(f"  {answer.adapter or 'base model'}: {answer.text.strip()}")
    except ServerUnreachable:
        say("  once `make serve` runs, ask it with and without the adapter:")
        say(f"  .venv/bin/python -m client.chat --adapter {NAME}")
    except ServingError as error:
        say(f"  the server did not answer: {error}")


if __name__ == "__main__":
    sys.exit(main())
