"""What a request is answered with: chunks of a stream and whole completions."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlora.errors import Cancelled, EngineError


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens of a request. `cached_tokens` of the prompt did not have to be computed; two are equal whatever was."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = dataclasses.field(default=0, compare=False)


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """The natural log-probability of one token in one place, before temperature. `rank` counts from 1, or is None."""

    id: int
    text: str
    logprob: float
    rank: int | None


Logprobs = tuple[tuple[TokenLogprob, ...], ...]
"""For each token of an answer: the chosen one, then the best others that were asked for."""


@dataclasses.dataclass(frozen=True)
class End:
    """What is known of an answer when it is complete.

    `finish_reason` is `stop` or `length`. `adapter` is the version that answered, such as `alice/sql@3`; empty for the base
    model. `metrics` has times in ms and more: `queue_ms`, `prefill_ms`, `ttft_ms`, `decode_ms`, `tokens_per_second`,
    `peak_memory_bytes`, `adapter_sha256`.
    """

    finish_reason: str
    adapter: str
    usage: Usage
    metrics: Mapping[str, Any] = dataclasses.field(compare=False)

    @classmethod
    def of(cls, finish_reason: str, adapter: str, version: int, metrics: Mapping[str, Any]) -> "End":
        """From what the last response says; an empty `adapter` is the base model."""
        usage = Usage(metrics["prompt_tokens"], metrics["completion_tokens"], metrics["cached_tokens"])
        return cls(finish_reason, f"{adapter}@{version}" if adapter else "", usage, metrics)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of an answer. Only the last one has an `end`."""

    text: str
    logprobs: Logprobs = ()
    end: End | None = None

    def __bool__(self) -> bool:
        """Whether it says anything: a token can be a part of a character only."""
        return bool(self.text or self.logprobs or self.end)

    @classmethod
    def of(cls, outputs: Mapping[str, Any]) -> "Chunk":
        """From the outputs of one response, by name."""
        end = None
        if outputs.get("metrics"):
            end = End.of(
                outputs["finish_reason"], outputs["adapter_name"], outputs["adapter_version"], json.loads(outputs["metrics"])
            )
        return cls(outputs["text_output"], logprobs_of(json.loads(outputs.get("logprobs") or "[]")), end)


@dataclasses.dataclass(frozen=True)
class Completion(End):
    """A whole answer. Two are equal when they say the same, however long they took."""

    text: str
    logprobs: Logprobs = ()


def logprobs_of(entries: Sequence[Mapping[str, Mapping[str, Any]]]) -> Logprobs:
    """From the form of Triton's vLLM backend: one object a token, which maps ids to what is known of them."""
    return tuple(
        tuple(TokenLogprob(int(id), known["decoded_token"], known["logprob"], known["rank"]) for id, known in entry.items())
        for entry in entries
    )


def check_ended(chunks: Sequence[Chunk]) -> None:
    """Raises EngineError if no more chunks come, but the last one is missing."""
    if not chunks or chunks[-1].end is None:
        raise EngineError("the answer broke off before its end")


def joined(chunks: Sequence[Chunk]) -> Completion:
    """The whole answer that chunks are.

    Raises:
        Cancelled: the last chunk is missing, since the stream was closed before.
    """
    end = chunks[-1].end if chunks else None
    if end is None:
        raise Cancelled("the stream was closed before the answer's end")
    text, logprobs = "".join(chunk.text for chunk in chunks), tuple(entry for chunk in chunks for entry in chunk.logprobs)
    return Completion(**vars(end), text=text, logprobs=logprobs)
