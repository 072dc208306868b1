"""What the engine takes and gives back: token ids and numbers, no text, no Triton."""

import dataclasses
import threading
from collections.abc import Callable, Hashable
from typing import Protocol

from jaxlora.engine.limits import Account
from jaxlora.errors import ServingError

MAX_BANNED = 320


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen. Neutral by default: greedy, no penalties.

    `temperature` 0 is greedy. `top_k` 0 or less, `top_p` 1 and `min_p` 0 are off. `stop_token_ids` end the answer and are not part of it.
    `bad_words` are token sequences that never appear. `logprobs` is the number of alternatives to report for each token (None: no
    log-probabilities at all). Penalties as in the OpenAI API (frequency, presence: over the answer) and CTRL (repetition: over prompt
    and answer, Keskar et al. 2019).
    """

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None

    @property
    def penalised(self) -> bool:
        """Whether the choice depends on which tokens came before."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Token:
    """One generated token. `logprob` is NaN and `top` empty where nobody asked. `top` holds (id, log-probability), best first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Timings:
    """When things happened to a request, in seconds of `time.monotonic`."""

    submitted: float
    started: float
    first_token: float
    finished: float


@dataclasses.dataclass(frozen=True)
class Result:
    """The end of an answer: `reason` is `stop` or `length`. `completion_tokens` counts a stop token too, though it isn't handed out;
    `cached_tokens` of the prompt did not have to be computed."""

    reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    timings: Timings


class Sink(Protocol):
    """Where an answer goes. Called from the engine's thread, so it must return at once and never raise."""

    def token(self, token: Token) -> bool:
        """One more token of the answer; True asks the engine to stop here, with reason `stop`."""

    def finish(self, result: Result) -> None:
        """The answer is complete. The last call."""

    def fail(self, error: ServingError) -> None:
        """There is no (complete) answer. The last call."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to continue.

    `adapter` is the key of an immutable adapter version (None: the base model). `timeout_s` bounds the whole request, queue included
    (None: only the queue's own limit holds). `started` is called, as the sink is, when the request gets its slot. `account` is whom it
    counts for, and of the requests of one account that wait, those with the lowest `priority` go first.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    sink: Sink
    adapter: Hashable | None = None
    timeout_s: float | None = None
    started: Callable[[], None] = lambda: None
    account: Account = Account()
    priority: int = 0


class Handle:
    """A submitted request, for cancelling it. `cancelled` is looked at in every step, the next of which `wake` brings about."""

    def __init__(self, cancelled: threading.Event, wake: Callable[[], None]):
        self._cancelled, self._wake = cancelled, wake

    def cancel(self) -> None:
        """Stops the request at the next step; its sink gets `Cancelled`. Without effect once it has ended."""
        self._cancelled.set()
        self._wake()
