"""From generated tokens to text: detokenises, finds stop strings, and tells a listener what it may show.

An `AnswerSink` runs in the engine's thread; it only computes text and hands it on.
"""

import dataclasses
import json
from typing import Any, Protocol

from jaxlora.adapters import AdapterVersion
from jaxlora.engine.requests import Result, Token
from jaxlora.errors import ServingError
from jaxlora.service.plan import Plan
from jaxlora.text import Detokenizer, StopStrings, Tokenizer


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one token adds to an answer. `text` may be empty while a character or a possible stop string is incomplete."""

    text: str
    logprobs: tuple[dict[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Ending:
    """The end of an answer: the text that was held back, why it ended, and what is known of it as a whole."""

    text: str
    finish_reason: str
    num_input_tokens: int
    num_output_tokens: int
    adapter_name: str
    adapter_version: int
    metrics: dict[str, Any]
    cumulative_logprob: float | None = None


class Listener(Protocol):
    """Where the parts of an answer go. Called from the engine's thread: must return at once."""

    def piece(self, piece: Piece) -> None:
        """More of the answer."""

    def end(self, ending: Ending) -> None:
        """The answer is complete. The last call."""

    def failed(self, error: ServingError) -> None:
        """There is no (complete) answer. The last call."""


class AnswerSink:
    """The sink of one request: text by text to its listener."""

    def __init__(self, plan: Plan, adapter: AdapterVersion | None, tokenizer: Tokenizer, listener: Listener, peak_memory):
        self._plan, self._adapter, self._tokenizer, self._listener = plan, adapter, tokenizer, listener
        self._detokenizer = Detokenizer(tokenizer, plan.prompt)
        self._stops = StopStrings(plan.stop_strings) if plan.stop_strings else None
        self._peak_memory = peak_memory
        self._tokens = 0
        self._total_logprob = 0.0
        self._echo = plan.echo
        self._ended = False

    def token(self, token: Token) -> bool:
        self._tokens += 1
        text, stopped = self._detokenizer.push(token.id), False
        if self._stops is not None:
            # Before `min_tokens` a stop string is ordinary text.
            if self._tokens < self._plan.params.min_tokens:
                text = self._stops.flush() + text
            else:
                text, stopped = self._stops.push(text)
        if self._plan.params.logprobs is not None:
            self._total_logprob += token.logprob
        logprobs = (self._logprobs(token),) if self._plan.logprobs else ()
        self._listener.piece(Piece(self._take_echo() + text, logprobs))
        self._ended = stopped
        return stopped

    def finish(self, result: Result) -> None:
        self._listener.end(
            Ending(
                text=self._take_echo() + ("" if self._ended else self._rest()),
                finish_reason=result.reason if not self._ended else "stop",
                num_input_tokens=result.prompt_tokens,
                num_output_tokens=result.completion_tokens,
                adapter_name="" if self._adapter is None else self._adapter.name.unpinned,
                adapter_version=0 if self._adapter is None else self._adapter.version,
                metrics=self._metrics(result),
                cumulative_logprob=self._total_logprob if self._plan.cumulative_logprob else None,
            )
        )

    def fail(self, error: ServingError) -> None:
        self._listener.failed(error)

    def _rest(self) -> str:
        """What is left when the answer ends: an incomplete character, or the beginning of a stop string that did not come."""
        text = self._detokenizer.flush()
        if self._stops is None:
            return text
        text, stopped = self._stops.push(text)
        if stopped:
            self._ended = True
            return text
        return text + self._stops.flush()

    def _take_echo(self) -> str:
        echo, self._echo = self._echo, ""
        return echo

    def _logprobs(self, token: Token) -> dict[str, Any]:
        """In the form of Triton's vLLM backend: by token id, the chosen one first."""
        entries = {token.id: token.logprob, **dict(token.top)}
        ranks = {id: rank for rank, (id, _) in enumerate(token.top, 1)}
        return {
            str(id): {"logprob": logprob, "rank": ranks.get(id), "decoded_token": self._tokenizer.token_text(id)}
            for id, logprob in entries.items()
        }

    def _metrics(self, result: Result) -> dict[str, Any]:
        times = result.timings
        decode_s = times.finished - times.first_token
        decoded = result.completion_tokens - 1
        return {
            "queue_ms": _ms(times.started - times.submitted),
            "prefill_ms": _ms(times.first_token - times.started),
            "ttft_ms": _ms(times.first_token - times.submitted),
            "decode_ms": _ms(decode_s),
            "tokens_per_second": round(decoded / decode_s, 2) if decoded and decode_s > 0 else 0.0,
            "prompt_tokens": result.prompt_tokens,
            "completion_tokens": result.completion_tokens,
            "cached_tokens": result.cached_tokens,
            "peak_memory_bytes": self._peak_memory(),
            "adapter_sha256": "" if self._adapter is None else self._adapter.sha256,
        }


def logprobs_json(pieces: list[Piece]) -> str:
    """The `logprobs` output of some pieces: a JSON list with one object a token."""
    return json.dumps([entry for piece in pieces for entry in piece.logprobs])


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
