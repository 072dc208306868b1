"""Faults on purpose, so that an operator can rehearse them and a test can see what becomes of them. Knows a fault's words, no engine.

A fault is `place:kind`, then options: `decode:exception:seed=7`. Several are separated by commas.
"""

import dataclasses
import math
import re

PLACES = ("prefill", "decode", "adapter")
KINDS = ("slow", "exception", "out_of_memory", "state_lost", "not_finite", "broken")
_RULE = re.compile(rf"(?P<place>{'|'.join(PLACES)}):(?P<kind>{'|'.join(KINDS)})(?P<options>(:[a-z]+=[0-9.]+)*)")


@dataclasses.dataclass
class Fault:
    """What goes wrong, and when.

    `place`: a prefill step, a decode step, or placing an `adapter` on the device. `kind`: the step takes `seconds` longer (slow), raises, finds no
    memory, raises and takes the KV cache along, gives logits that are not finite, or raises as every step does from then on (broken).
    Of the steps only those with a row of the request's `seed` (None: any) and more than `rows` rows; the first `times` of them.
    """

    place: str
    kind: str
    seconds: float = 0.1
    seed: int | None = None
    rows: int = 0
    times: float = math.inf


def parse(text: str) -> tuple[Fault, ...]:
    """The faults that a text asks for.

    Raises:
        ValueError: it is not written as it should be.
    """
    return tuple(_fault(rule) for rule in text.split(",")) if text else ()


def _fault(rule: str) -> Fault:
    match = _RULE.fullmatch(rule.strip())
    if match is None:
        raise ValueError(f"{rule!r} is not PLACE:KIND:OPTION=NUMBER..., PLACE one of {', '.join(PLACES)}, KIND one of {', '.join(KINDS)}")
    kinds = {"seconds": float, "seed": int, "rows": int, "times": int}
    given = dict(option.split("=") for option in match["options"].split(":") if option)
    if unknown := given.keys() - kinds.keys():
        raise ValueError(f"{rule!r}: {', '.join(sorted(unknown))} is none of {', '.join(kinds)}")
    return Fault(match["place"], match["kind"], **{name: kinds[name](value) for name, value in given.items()})
