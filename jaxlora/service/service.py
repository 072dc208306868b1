"""The whole path of a request without Triton: fields -> checks -> adapter version -> engine -> text to a listener."""

import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import jax

from jaxlora import backend, weights
from jaxlora.adapters import AdapterVersion, CatalogueReader, HostCache, catalogue_path
from jaxlora.checkpoint import resolve
from jaxlora.compilation import keep_compiled_programs
from jaxlora.config import ModelConfig
from jaxlora.engine import Engine, FaultyProgram, Handle, Health, Program, Request, Sizes, Thresholds
from jaxlora.errors import AdapterInvalid, EngineError, ServingError, SetupError
from jaxlora.faults import parse
from jaxlora.peft import LoraAdapter, read_published
from jaxlora.service.accounts import account_of, limits_of
from jaxlora.service.answers import AnswerSink, Listener
from jaxlora.service.memory import check_length
from jaxlora.service.metrics import Registry
from jaxlora.service.observation import Observer
from jaxlora.service.plan import Plan, plan
from jaxlora.service.prompts import prompt_ids
from jaxlora.service.request_log import RequestLog
from jaxlora.service.state import StateRecorder, peak_memory_bytes
from jaxlora.settings import Settings
from jaxlora.text import Tokenizer


class LoraService:
    """One base model with its adapters. Any thread may submit.

    Arguments:
        settings: see `jaxlora.settings`.
        store: folder of the adapter store, whose catalogue `jaxlora.adapters.refresh` keeps.
        progress: told what is going on while the model loads and compiles, line by line.
        catalogue: another catalogue of the store than the one that its server keeps.
        log: where the line of each request goes; closed with the service.
        stopped: told why, once the engine has stopped by itself and every request has ended.
        folder: the base model's, where it is known; else it is looked for.

    Raises:
        SetupError: the base model can't be served with these settings.
    """

    def __init__(
        self,
        settings: Settings,
        store: str | pathlib.Path,
        progress: Callable[[str], None] = lambda line: None,
        catalogue: CatalogueReader | None = None,
        log: RequestLog | None = None,
        stopped: Callable[[EngineError], None] = lambda error: None,
        folder: pathlib.Path | None = None,
    ):
        self.settings = settings
        keep_compiled_programs(settings.cache_dir)
        folder = folder or resolve(settings.model, settings.cache_dir, progress)
        self.config = ModelConfig.from_folder(folder)
        check_length(settings, self.config)
        self.tokenizer = Tokenizer.from_folder(folder)
        if self.tokenizer.vocab_size > self.config.vocab_size:
            raise SetupError(
                f"MODEL: the tokenizer knows {self.tokenizer.vocab_size} ids, the model {self.config.vocab_size}; they don't belong together"
            )
        chosen, line = backend.choose(settings.cache_dir / "native", progress)
        progress(line)
        dtype = chosen.dtype if settings.dtype == "auto" else settings.dtype
        int8 = settings.quantization == "int8"
        progress(f"loading weights ({'int8, ' if int8 else ''}{dtype})")
        loaded = weights.load(folder, self.config, dtype, packing=chosen.packing, int8=int8)
        sizes = Sizes(
            slots=settings.max_slots + settings.reserved_slots,
            max_seq_len=settings.max_seq_len,
            prefill_chunk=min(settings.prefill_chunk, settings.max_seq_len),
            lora_slots=settings.lora_slots,
            max_lora_rank=settings.max_lora_rank,
            output_layer=bool(settings.lora_output_layer),
            guesses=settings.prompt_lookup_tokens,
            decode_steps=settings.decode_steps,
            int8_adapters=settings.lora_quantization == "int8",
        )
        # Not tried elsewhere, where compiling takes the time, which JAX's own cache spares.
        kept_in = settings.cache_dir / "steps" if jax.default_backend() == "cpu" else None
        program = Program(self.config, loaded, chosen, sizes, dtype, kept_in)
        program.warm_up(progress)
        if settings.faults:
            progress(f"FAULTS: {settings.faults}")
            program = FaultyProgram(program, parse(settings.faults))
        self._catalogue = catalogue or CatalogueReader(catalogue_path(settings.cache_dir, store))
        describe_prompt = self.tokenizer.decode if settings.log_prompts else None
        self.observer = Observer(Registry(), log or RequestLog(), settings.metrics_adapters, describe_prompt)
        self._host = HostCache(settings.adapter_host_cache_bytes, self._read)
        health = Health(_thresholds(settings), sizes.slots)
        self.engine = Engine(program, self._fetch, limits_of(settings), self._placed, health, self._host.clear, stopped)
        self.state = StateRecorder(settings, self.observer, self.engine, self._host, self._catalogue)

    def submit(
        self, fields: Mapping[str, Any], listener: Listener, input_ids: Sequence[int] | None = None, timeout_s: float | None = None
    ) -> Handle:
        """Starts one request.

        Arguments:
            fields: as `merge_fields` returns them.
            listener: hears of the answer, or of what went wrong after this call.
            input_ids: token ids of the prompt, where they are known already.

        Raises:
            InvalidRequest, AdapterNotFound, Unavailable: the request is refused; the listener hears nothing.
        """
        try:
            checked = self.check(fields, input_ids)
        except ServingError as error:
            self.observer.refusals.record(error)
            raise
        return self.start(checked, listener, timeout_s)

    def check(self, fields: Mapping[str, Any], input_ids: Sequence[int] | None = None) -> tuple[Plan, AdapterVersion | None]:
        """What `start` takes: the request checked completely, and its adapter resolved to one immutable version.

        Raises:
            InvalidRequest, AdapterNotFound: as `submit`.
        """
        prompt = prompt_ids(self.tokenizer, fields) if input_ids is None else input_ids
        made = plan(fields, prompt, self.tokenizer, self.config, self.settings)
        return made, self._catalogue.current().resolve(made.lora_name) if made.lora_name else None

    def start(
        self, checked: tuple[Plan, AdapterVersion | None], listener: Listener, timeout_s: float | None = None, request_id: str = ""
    ) -> Handle:
        """Queues a checked request; `request_id` names it in the request log. Raises Unavailable if a limit is reached."""
        made, adapter = checked
        sink = AnswerSink(made, adapter, self.tokenizer, listener, peak_memory_bytes)
        observed = self.observer.observe(sink, made.prompt, adapter, request_id)
        try:
            handle = self.engine.submit(
                Request(made.prompt, made.params, observed, adapter, timeout_s, observed.started, account_of(adapter), made.priority)
            )
        except ServingError as error:
            observed.refused(error)
            raise
        self.observer.accepted(observed)
        return handle

    def drain(self) -> None:
        """Takes no more requests; returns when those that there are have ended, at the latest after GRACE_S."""
        self.engine.stop(self.settings.grace_s)

    def close(self) -> None:
        """Stops the engine; requests that have not finished fail as `Unavailable`."""
        self.engine.stop()
        self._host.close()
        self.observer.log.close()

    def _fetch(self, key: Any) -> "Future[LoraAdapter]":
        return self._host.get(key)

    def _read(self, version: AdapterVersion) -> LoraAdapter:
        registry, started = self.observer.registry, time.monotonic()
        try:
            adapter = read_published(version.path, version.sha256, version.config_sha256, version.nbytes)
        except Exception as error:
            registry.add("lora_adapter_load_failures_total")
            if isinstance(error, AdapterInvalid):  # since it was accepted: whoever asks did nothing wrong
                raise EngineError(f"the adapter can't be loaded: {version}: {error}") from error
            raise
        registry.observe("lora_adapter_load_seconds", "host", value=time.monotonic() - started)
        registry.add("lora_adapter_loads_total", "host")
        return adapter

    def _placed(self, seconds: float) -> None:
        self.observer.registry.observe("lora_adapter_load_seconds", "device", value=seconds)


def _thresholds(settings: Settings) -> Thresholds:
    return Thresholds(
        queue_s=settings.breaker_queue_s,
        token_s=settings.breaker_token_s,
        window_s=settings.breaker_window_s,
        open_s=settings.breaker_open_s,
        adapter_failures=settings.breaker_adapter_failures,
        adapter_open_s=settings.breaker_adapter_s,
        memory_grow_s=settings.breaker_memory_s,
    )
