"""The compiled steps, and the device state that they update in place: KV cache, adapter bank, token history.

Every shape is fixed when a `Program` is made; `warm_up` compiles them all, and nothing compiles after it. Knows slots, not requests.
"""

import contextlib
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.stages import Compiled, Lowered

from jaxlora.backend import Backend
from jaxlora.compilation import quick_fusions
from jaxlora.config import ModelConfig
from jaxlora.engine import sampling
from jaxlora.engine.batch import Batch, Fields, idle_batch, idle_prefill_batch, in_step
from jaxlora.engine.device_state import State, empty_slot, is_usable, read_positions, record_prompt, write_positions
from jaxlora.engine.sampling import History, Sampled
from jaxlora.executables import Executables
from jaxlora.kv_cache import KVCache, Rows
from jaxlora.lora import Bank, BankLayout, Pair
from jaxlora.model import Linears, forward, project, rotation
from jaxlora.weights import Weights


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The bounds that fix every shape: serving slots, tokens of a sequence, prompt tokens of a step, adapters on the device, ranks;
    how many tokens of a greedy answer may be guessed for a step; how many decode steps one call may run; and whether adapters are in 8 bits."""

    slots: int
    max_seq_len: int
    prefill_chunk: int
    lora_slots: int
    max_lora_rank: int
    output_layer: bool = False
    guesses: int = 0
    decode_steps: int = 1
    int8_adapters: bool = False


# The rows that a step with guesses may have. With more of them arithmetic takes the time, and not the weights' way through memory.
MAX_GUESSED_ROWS = 2


class Program:
    """One model on one device, with its state. `warm_up` (or `allocate`, in a test) comes before all else. Not thread-safe: one thread
    calls it.

    Arguments:
        dtype: of the cache, and of adapters that are not in 8 bits.
        kept_in: the folder where `warm_up` keeps what it compiles, see `Executables`.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        backend: Backend,
        sizes: Sizes,
        dtype: str = "float32",
        kept_in: pathlib.Path | None = None,
    ):
        self.config, self.sizes, self.backend, self._kept_in = config, sizes, backend, kept_in
        self.layout = BankLayout.of(config, sizes.max_lora_rank, "int8" if sizes.int8_adapters else dtype, sizes.output_layer)
        self._weights, self._dtype = weights, dtype
        self.bank: Bank | None = None
        self.state: State | None = None
        # A table, since XLA on CPUs would compute the cosines and sines again for every head of every layer.
        self._rotation = rotation(config.rope, config.head_dim, jnp.arange(sizes.max_seq_len))
        self._step = jax.jit(self._trace, donate_argnames="state", static_argnames=("every_slot", "prefill"), compiler_options=quick_fusions())
        self._check = jax.jit(self._trace_guesses, donate_argnames="state", compiler_options=quick_fusions())
        self._steps: dict[tuple[Any, ...], Compiled] = {}
        # Two programs: in one, XLA would copy the whole cache, since what is read lies in what is written.
        self._read = jax.jit(read_positions, static_argnames="length")
        self._write = jax.jit(write_positions, donate_argnames="state")
        self._record = jax.jit(record_prompt, donate_argnames="state")
        self._clear = jax.jit(empty_slot, donate_argnames="state")
        # Each is one call, which leaves Python to other threads while memory is cleared.
        self._new_bank, self._new_state = jax.jit(self._empty_bank), jax.jit(self._empty_state)
        self._put = jax.jit(backend.place, donate_argnums=0)
        self.cut_invariant = backend.cut_invariant
        self.batch_sizes = backend.batch_sizes(sizes.slots)
        # A chunk of prompts, and a token of an answer in each of the other rows.
        self.prefill_rows = sizes.slots if backend.mixes else 1
        self.prefill_length = sizes.prefill_chunk + self.prefill_rows - 1
        # Elsewhere a token might come out otherwise beside guesses than alone.
        guesses = sizes.guesses and self.cut_invariant
        self.guess_sizes = tuple(size for size in self.batch_sizes if size <= MAX_GUESSED_ROWS) if guesses else ()

    def run(self, batch: Batch) -> Sampled:
        """Reads the rows' tokens, stores their keys and values, and samples a next token for every row (with guesses, at every position);
        then the same with these, as often as `batch.emit` says. Waits for the result."""
        shape = _shape(batch)
        if shape not in self._steps:  # only where `warm_up` was left out
            self._steps[shape] = self._lower(batch, self.bank, self.state).compile()
        self.state, sampled = self._steps[shape](*self._arguments(batch, self.bank, self.state))
        return sampling.unpack(np.asarray(sampled))

    def allocate(self) -> None:
        """Makes the adapter bank and the state, all that the program will ever need."""
        self.bank = self._new_bank()
        self.reset()

    def reset(self) -> None:
        """Begins with an empty state, as at the start."""
        self.state = None  # so that two of them never need memory at the same time
        self.state = self._new_state()

    def _empty_bank(self) -> Bank:
        return Bank.empty(self.layout, self.sizes.lora_slots)

    def _empty_state(self) -> State:
        config, sizes = self.config, self.sizes
        cache = KVCache.empty(config, sizes.slots, sizes.max_seq_len, sizes.prefill_chunk, self._dtype)
        return State(cache, History.empty(sizes.slots, config.vocab_size))

    def state_is_intact(self) -> bool:
        """Whether the state can still be used after a step that raised: it was neither given up nor computed by what failed."""
        return is_usable(self.state)

    def bank_is_intact(self) -> bool:
        """The same of the adapter bank, after `put_adapter` raised."""
        return is_usable(self.bank)

    def clear(self, slot: int) -> None:
        """Empties a slot whose keys and values may not be finite: what is masked out still takes part in sums, as NaN times zero."""
        self.state = self._clear(self.state, np.int32(slot))

    def pack(self, modules: Mapping[str, Pair], rank: int) -> np.ndarray:
        """An adapter of that rank as `put_adapter` takes it. Any thread may call it. Raises ValueError where the bank has no room for it."""
        ranks = self.backend.bank_ranks(self.layout, rank)
        return self.layout.pack(modules, ranks, self.backend.piece(self.layout), self.backend.write_adapter)

    def put_adapter(self, slot: int, vector: np.ndarray, rank: int) -> None:
        """Places an adapter of that rank, packed by `pack`, into a slot of the bank."""
        piece, ranks = self.backend.piece(self.layout), np.int32(self.backend.bank_ranks(self.layout, rank))
        for number, part in enumerate(vector.reshape(-1, piece)):
            self.bank = self._put(self.bank, part, np.int32(slot), ranks, np.int32(number))

    def reuse(self, source: int, slot: int, tokens: np.ndarray, record: bool) -> None:
        """Makes a slot's cache begin with what another one's (or its own) begins with: the keys and values of `tokens`, int32 `[n]`.

        Arguments:
            record: the penalties of the sequence need to know the tokens.
        """
        chunk = self.sizes.prefill_chunk
        for start in range(0, len(tokens), chunk):
            if source != slot:
                copied = self._read(self.state.cache, np.int32(source), np.int32(start), length=chunk)
                self.state = self._write(self.state, copied, np.int32(slot), np.int32(start))
            if record:
                part = np.zeros(chunk, np.int32)
                length = min(chunk, len(tokens) - start)
                part[:length] = tokens[start : start + length]
                self.state = self._record(self.state, np.int32([slot]), part, np.int32([start]), np.int32([length]))

    def warm_up(self, progress: Callable[[str], None] = lambda text: None) -> None:
        """Allocates, and compiles every step, or reads it where it is kept. Rows are idle, so the state stays empty.

        Arguments:
            progress: told of each step that has been compiled, by several threads.
        """
        vocab = self.config.vocab_size
        batches = {f"prefill x {self.prefill_length}": idle_prefill_batch(self.prefill_rows, self.prefill_length, vocab)}
        batches |= {f"decode x {rows}": idle_batch(rows, 1, vocab) for rows in self.batch_sizes}
        batches |= {f"guesses x {rows}": idle_batch(rows, 1 + self.sizes.guesses, vocab, guessed=True) for rows in self.guess_sizes}
        bank, state = jax.eval_shape(self._new_bank), jax.eval_shape(self._new_state)
        kept = Executables(self._kept_in, quick_fusions(), self._traced_from())
        # Memory is cleared, and XLA compiles or reads what it compiled before, in other threads while Python traces.
        with ThreadPoolExecutor(1) as allocator, ThreadPoolExecutor(os.cpu_count()) as workers:
            allocated = allocator.submit(self.allocate)
            steps = {name: workers.submit(kept.find, name, self._arguments(batch, bank, state), (state, 0)) for name, batch in batches.items()}
            allocated.result()
            self.put_adapter(0, self.pack({}, 1), 1)
            self.reuse(self.sizes.slots - 1, 0, np.zeros(1, np.int32), record=True)
            self.clear(0)
            missing = [name for name, step in steps.items() if step.result() is None]
            number = itertools.count(1)

            def compile_step(name: str, lowered: Lowered) -> Compiled:
                step = kept.compile(name, lowered)
                progress(f"compiled {name} ({next(number)}/{len(missing)})")
                return step

            with kept.compiling() if missing else contextlib.nullcontext():
                for name in missing:
                    steps[name] = workers.submit(compile_step, name, self._lower(batches[name], bank, state))
                self._steps = {_shape(batches[name]): step.result() for name, step in steps.items()}
        # The longer ones of a kind would show nothing new, and take most of the time; but what will be kept has run.
        shortest = {name.split()[0]: name for name in reversed(batches)}.values()
        for name, batch in batches.items():
            if name in shortest or name in kept.new:
                self.run(batch)
        if kept.new:
            kept.keep()

    def _traced_from(self) -> tuple[Any, ...]:
        """What the steps' traces depend on, in a form that has the same `repr` in another process."""
        leaves, tree = jax.tree.flatten((self._weights, self._rotation))
        return self.config, self.sizes, self._dtype, self.backend, tree, [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in leaves]

    def compiled(self) -> int:
        """How many programs have been compiled; constant after `warm_up`."""
        others = (self._read, self._write, self._record, self._clear, self._put)
        return len(self._steps) + sum(jitted._cache_size() for jitted in others)

    def _lower(self, batch: Batch, bank: Bank, state: State) -> Lowered:
        """The step for batches of that shape, to be compiled."""
        arguments = self._arguments(batch, bank, state)
        if batch.guessed:
            return self._check.lower(*arguments)
        every_slot = batch.tokens.shape == (self.sizes.slots, 1) and len(self.batch_sizes) == 1
        return self._step.lower(*arguments, every_slot=every_slot, prefill=batch.prefill)

    def _arguments(self, batch: Batch, bank: Bank, state: State) -> tuple[Any, ...]:
        return self._weights, self._rotation, bank, state, batch.packed

    def _trace(
        self, weights: Weights, rotations: tuple[Array, Array], bank: Bank, state: State, packed: Array, *, every_slot: bool, prefill: int
    ) -> tuple[State, Array]:
        batch = in_step(packed)
        if prefill:
            batch = dataclasses.replace(batch, tokens=batch.tokens.reshape(1, -1)[:, :prefill])

        def step(state: State, tokens: Array, starts: Array) -> tuple[State, Sampled]:
            now = dataclasses.replace(batch, tokens=tokens, starts=starts)
            return self._sample(weights, rotations, bank, state, now, every_slot)

        if batch.tokens.shape[1] > 1:
            state, sampled = step(state, batch.tokens, batch.starts)
            return state, sampling.pack(sampled)[:, None]

        def another(index: Array, carry: tuple[State, Array, Array, Array]) -> tuple[State, Array, Array, Array]:
            state, tokens, starts, out = carry
            state, sampled = step(state, tokens, starts)
            out = jax.lax.dynamic_update_slice(out, sampling.pack(sampled)[:, None], (0, index, 0))
            return state, sampled.tokens[:, None], starts + batch.lengths, out

        out = jnp.zeros((len(packed), self.sizes.decode_steps, sampling.WIDTH), jnp.int32)
        steps = jnp.clip(jnp.max(batch.emit), 1, self.sizes.decode_steps)
        state, _, _, out = jax.lax.fori_loop(0, steps, another, (state, batch.tokens, batch.starts, out))
        return state, out

    def _sample(
        self, weights: Weights, rotations: tuple[Array, Array], bank: Bank, state: State, batch: Fields, every_slot: bool
    ) -> tuple[State, Sampled]:
        """One token for each row."""
        slots, starts, lengths = batch.slots, batch.starts, batch.lengths
        reads = batch.tokens.shape[1] > 1
        last = batch.offsets + jnp.maximum(lengths - 1, 0) if reads else None
        hidden, cache, linears = self._forward(weights, rotations, bank, state, batch, every_slot, last)
        logits = project(weights, linears, hidden)[:, 0]
        history = state.history
        if reads:
            history = sampling.record_prompt(history, batch.reads.sum(), slots, batch.tokens.reshape(-1), starts, lengths, batch.offsets)
        sampled = sampling.sample(logits, batch.sampler, starts + lengths, history, slots, self.backend)
        return State(cache, sampling.record_answer(history, slots, sampled.tokens, batch.emit != 0)), sampled

    def _trace_guesses(
        self, weights: Weights, rotations: tuple[Array, Array], bank: Bank, state: State, packed: Array
    ) -> tuple[State, Array]:
        batch = in_step(packed)
        hidden, cache, linears = self._forward(weights, rotations, bank, state, batch)
        logits = project(weights, linears, hidden)
        best, total = self.backend.argmax_logsumexp(logits.reshape(-1, logits.shape[-1]))
        best, total = best.reshape(batch.tokens.shape), total.reshape(batch.tokens.shape)
        finite = jnp.isfinite(total) | (jnp.arange(total.shape[1]) >= batch.lengths[:, None])
        ok = jnp.broadcast_to(finite.all(axis=1, keepdims=True), best.shape)
        return State(cache, state.history), sampling.pack(Sampled(best, None, None, None, ok))

    def _forward(
        self,
        weights: Weights,
        rotations: tuple[Array, Array],
        bank: Bank,
        state: State,
        batch: Fields,
        every_slot: bool = False,
        wanted: Array | None = None,
    ) -> tuple[Array, KVCache, Linears]:
        """Hidden states, of all tokens or those `wanted` (see `model.forward`), the cache with the new keys and values, and the linear layers
        that computed them."""
        rows = Rows(batch.slots, batch.starts, batch.lengths, batch.offsets, every_slot)
        linears = self.backend.linears(self.config, self.layout, bank, batch.adapters, rows)
        attend = self.backend.attend(self.config, rotations, rows)
        caches = list(zip(state.cache.k, state.cache.v))
        hidden, caches = forward(self.config, weights, batch.tokens, attend, linears, self.backend, caches, wanted=wanted)
        return hidden, KVCache(*zip(*caches)), linears


def _shape(batch: Batch) -> tuple[Any, ...]:
    """What two batches share that one step is compiled for."""
    return batch.tokens.shape, batch.prefill, batch.guessed
