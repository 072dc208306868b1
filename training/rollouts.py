"""Answers sampled from the adapter in training, by the serving engine in the same process: continuous batching over its slots.

Knows token ids and the engine; knows no rewards and no text. The same seeds give the same answers, whatever else is sampled
beside them.
"""

import dataclasses
import pathlib
import queue
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future

import jax
import numpy as np

from jaxlora import backend, weights
from jaxlora.config import OUTPUT_LAYER, ModelConfig
from jaxlora.engine import Engine, Limits, Program, Request, Result, SamplingParams, Sizes, Token
from jaxlora.errors import ServingError
from jaxlora.lora import Adapter
from jaxlora.peft import LoraPair
from jaxlora.settings import Settings
from jaxlora.weights import Dense, PlainPacking, Weights

# Nobody else uses the engine, so a request that waits for a slot waits for its neighbours only.
_PATIENCE_S = 24 * 3600.0


@dataclasses.dataclass(frozen=True)
class Answer:
    """One sampled answer. `tokens` ends with the stop token where the model ended it itself; `finished` is False where the
    limit did."""

    tokens: tuple[int, ...]
    finished: bool


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are sampled. The policy that GRPO improves is the one that is sampled from, so there is nothing but a
    temperature."""

    max_prompt: int
    max_completion: int
    temperature: float = 1.0
    slots: int = 16
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Sampled:
    """The answers in the order of the requests, and what sampling them cost: seconds, and generated tokens a second."""

    answers: list[Answer]
    seconds: float
    tokens_per_second: float


class Sampler:
    """An engine for one adapter that changes between calls.

    Arguments:
        folder: the base model, a Hugging Face folder.
        base: its weights as training has them; the engine uses the same arrays where it can read them, else its own packed copy.
        like: an adapter to be ready for. For one with larger ranks, or with the output layer, the engine is made again.
        stop_token_ids: end an answer.
        native_dir: where native kernels are built and kept.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        config: ModelConfig,
        base: Weights,
        like: Adapter,
        sampling: Sampling,
        stop_token_ids: Sequence[int],
        native_dir: pathlib.Path,
        progress: Callable[[str], None] = lambda line: None,
    ):
        self._config, self._sampling, self._stop, self._progress = config, sampling, frozenset(stop_token_ids), progress
        self._backend, line = backend.choose(native_dir, progress)
        progress(f"sampling: {line}")
        self._weights = _weights(folder, config, base, self._backend, sampling.dtype)
        self._versions: dict[Hashable, _HostAdapter] = {}
        self._number = 0
        self._room = _HostAdapter.of(like).needs
        self._engine = self._started()

    def sample(self, adapter: Adapter | None, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Sampled:
        """One answer of the adapter to each prompt.

        Arguments:
            adapter: None is the base model.
            prompts: token ids, at least 1 and at most `max_prompt` of each; a prompt may occur many times.
            seeds: 64 bits for each prompt. An answer depends on its prompt, its seed and the adapter, on nothing else.

        Raises:
            ServingError: the engine failed, for example on logits that are not finite.
        """
        began = time.monotonic()
        key = self._placed(_HostAdapter.of(adapter)) if adapter is not None else None
        sinks = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            sinks.append(_Sink(self._stop))
            params = SamplingParams(self._sampling.max_completion, temperature=self._sampling.temperature, seed=int(seed))
            self._engine.submit(Request(tuple(int(token) for token in prompt), params, sinks[-1], key))
        answers = [sink.answer() for sink in sinks]
        seconds = time.monotonic() - began
        return Sampled(answers, seconds, sum(len(answer.tokens) for answer in answers) / max(seconds, 1e-9))

    def close(self) -> None:
        """Stops the engine."""
        self._engine.stop()

    def _placed(self, adapter: "_HostAdapter") -> int:
        """The key under which the engine finds the adapter: a new one, since what has a key never changes."""
        if any(needed > there for needed, there in zip(adapter.needs, self._room)):
            self._room = tuple(map(max, adapter.needs, self._room))
            self._engine.stop()
            self._engine = self._started()
        self._number += 1
        self._versions = {self._number: adapter}
        return self._number

    def _started(self) -> Engine:
        longest = self._sampling.max_prompt + self._sampling.max_completion
        rank, output_layer = self._room
        sizes = Sizes(
            slots=self._sampling.slots, max_seq_len=longest, prefill_chunk=min(Settings.prefill_chunk, longest), lora_slots=1,
            max_lora_rank=rank, output_layer=output_layer, decode_steps=Settings.decode_steps,
        )  # fmt: skip
        program = Program(self._config, self._weights, self._backend, sizes, self._sampling.dtype)
        program.warm_up(self._progress)
        return Engine(program, self._read, Limits(max_queue=1 << 30, queue_timeout_s=_PATIENCE_S))

    def _read(self, key: Hashable) -> "Future[_HostAdapter]":
        found: Future[_HostAdapter] = Future()
        found.set_result(self._versions[key])
        return found


def seeds(seed: int, rollout: int, count: int) -> np.ndarray:
    """uint64 `[count]`: a seed for each answer of a rollout, a function of the arguments only."""
    return np.random.SeedSequence([seed, rollout]).generate_state(count, np.uint64)


@dataclasses.dataclass(frozen=True)
class _HostAdapter:
    """What the engine places on the device."""

    modules: Mapping[str, LoraPair]
    rank: int

    @property
    def needs(self) -> tuple[int, bool]:
        """The rank that a bank has to have for it, and whether it has to have the output layer."""
        return self.rank, OUTPUT_LAYER in self.modules

    @classmethod
    def of(cls, adapter: Adapter) -> "_HostAdapter":
        a, b = jax.device_get((adapter.a, adapter.b))
        scales = dict(adapter.scales)
        pairs = {path: LoraPair(np.asarray(a[path]), np.asarray(b[path]), scales[path]) for path in a}
        return cls(pairs, max(pair.rank for pair in pairs.values()))


class _Sink:
    """Keeps an answer. It ends the answer itself, since the engine hands out no stop token, and the stop token is to be
    learned."""

    def __init__(self, stop: frozenset[int]):
        self._stop, self._tokens = stop, []
        self._end: queue.SimpleQueue[Result | ServingError] = queue.SimpleQueue()

    def token(self, token: Token) -> bool:
        self._tokens.append(token.id)
        return token.id in self._stop

    def finish(self, result: Result) -> None:
        self._end.put(result)

    def fail(self, error: ServingError) -> None:
        self._end.put(error)

    def answer(self) -> Answer:
        end = self._end.get()
        if isinstance(end, ServingError):
            raise end
        return Answer(tuple(self._tokens), end.reason == "stop")


def _weights(folder: pathlib.Path, config: ModelConfig, base: Weights, chosen: backend.Backend, dtype: str) -> Weights:
    # One device only: arrays that training has spread over a mesh can't be mixed with those of the engine.
    if isinstance(chosen.packing, PlainPacking) and isinstance(base.head, Dense) and base.embed.dtype == dtype and len(base.embed.devices()) == 1:
        return base
    return weights.load(folder, config, dtype, packing=chosen.packing)
