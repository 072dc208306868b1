"""Conditions on scores that a new version has to meet before it is published."""

import dataclasses
import operator
import re
from collections.abc import Mapping

from jaxlora.errors import SetupError

_CONDITION = re.compile(r"\s*([A-Za-z_]\w*)\s*(<=|>=|<|>)\s*([-+0-9.eE]+)\s*")
_HOLDS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@dataclasses.dataclass(frozen=True)
class Condition:
    """A bound on one score, such as `eval_loss<1.2`."""

    score: str
    sign: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Raises SetupError."""
        match = _CONDITION.fullmatch(text)
        try:
            return cls(match[1], match[2], float(match[3]))
        except (TypeError, ValueError):
            raise SetupError(f"--publish-if: {text!r} is no condition such as eval_loss<1.2") from None

    def refusal(self, scores: Mapping[str, float]) -> str | None:
        """Why these scores don't meet it, and by how much; None if they do."""
        value = _value(scores, self.score)
        if _HOLDS[self.sign](value, self.bound):
            return None
        return f"{self.score} is {value:.4g}, not {self.sign} {self.bound:g}: it misses by {abs(value - self.bound):.4g}"


def refusal_unless_better(score: str, scores: Mapping[str, float], served: Mapping[str, float], served_name: str) -> str | None:
    """Why these scores are not better than those of the version being served, and by how much; None if they are."""
    value, other = _value(scores, score), _value(served, score)
    gain = other - value if is_loss(score) else value - other
    if gain > 0:
        return None
    return (
        f"{score} is {value:.4g}, that of {served_name} is {other:.4g}: worse by {-gain:.4g}"
        if gain < 0
        else f"{score} is {value:.4g}, as that of {served_name}"
    )


def is_loss(score: str) -> bool:
    """Whether less of a score is better."""
    return score.endswith("loss")


def _value(scores: Mapping[str, float], name: str) -> float:
    if name not in scores:
        raise SetupError(
            f"--publish-if: there is no score {name!r}; there are: {', '.join(scores) or 'none, as nothing is held out'}"
        )
    return scores[name]
