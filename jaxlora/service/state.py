"""The state of a service at one moment, written into its registry: load, KV cache, tiers of adapters, memory."""

import resource
import time
from typing import Protocol

import jax

from jaxlora.adapters import Catalogue, HostCache
from jaxlora.engine import Engine
from jaxlora.service.metrics import Registry
from jaxlora.service.observation import Observer
from jaxlora.settings import Settings


class CurrentCatalogue(Protocol):
    """Tells the newest catalogue."""

    def current(self) -> Catalogue: ...


class StateRecorder:
    """Writes the gauges, and the counters that the engine and the tiers keep themselves. One thread calls it."""

    def __init__(self, settings: Settings, observer: Observer, engine: Engine, host: HostCache, catalogue: CurrentCatalogue):
        self._observer, self._registry = observer, observer.registry
        self._engine, self._host, self._catalogue = engine, host, catalogue
        self._counted: tuple[Catalogue | None, int] = (None, 0)
        set = self._registry.set
        self._slots = settings.max_slots
        set("lora_slots", value=self._slots)
        self._capacity = (settings.max_slots + settings.reserved_slots) * settings.max_seq_len
        set("lora_kv_tokens_capacity", value=self._capacity)
        set("lora_adapter_device_slots", value=settings.lora_slots)
        self._max_lora = str(settings.lora_slots)

    def record(self) -> None:
        """Brings everything up to date."""
        self._load()
        self._tiers()
        record_memory(self._registry)

    def _load(self) -> None:
        load, set = self._engine.load(), self._registry.set
        set("lora_requests_running", value=load["running"])
        set("lora_requests_waiting", value=load["waiting"])
        set("lora_slots_used", value=load["running"])
        set("lora_load_ratio", value=(load["running"] + load["waiting"]) / self._slots)
        set("lora_kv_tokens_used", value=load["kv_tokens"])
        set("lora_kv_cache_usage_ratio", value=load["kv_tokens"] / self._capacity)
        set("lora_engine_up", value=float(self._engine.healthy))
        set("lora_engine_steps_total", value=load["steps"])
        set("lora_prompt_tokens_reused_total", value=load["prompt_tokens_reused"])
        set("lora_guessed_tokens_total", value=load["guessed"])
        set("lora_guessed_tokens_right_total", value=load["guessed_right"])
        set("lora_slots_allowed", value=self._engine.health.allowed_rows())
        for breaker, state in self._engine.health.states().items():
            set("lora_breaker_state", breaker, value=state)
        for labels, count in self._engine.health.faults().items():
            set("lora_faults_total", *labels, value=count)
        set("lora_compiled_programs", value=load["compiled"])
        set("lora_adapters_resident", "device", value=load["adapters_resident"])
        set("lora_adapter_loads_total", "device", value=load["adapters_placed"])
        set("lora_adapter_evictions_total", "device", value=load["adapters_evicted"])
        for labels, (running, waiting) in self._observer.load().items():
            set("lora_adapter_requests_running", *labels, value=running)
            set("lora_adapter_requests_waiting", *labels, value=waiting)
        set("lora_request_log_dropped_total", value=self._observer.log.dropped)
        # Names as clients send them, so without versions.
        on_device = {key.name.unpinned for key in self._engine.adapters()}
        names = (",".join(sorted(on_device)), ",".join(sorted(self._observer.waiting_adapters() - on_device)))
        self._registry.only("lora_requests_info", self._max_lora, *names, value=time.time())

    def _tiers(self) -> None:
        host, set = self._host.stats(), self._registry.set
        set("lora_adapters_resident", "host", value=host["adapters"])
        set("lora_adapter_host_bytes", value=host["bytes"])
        set("lora_adapter_evictions_total", "host", value=host["evictions"])
        catalogue = self._catalogue.current()
        if catalogue is not self._counted[0]:
            self._counted = (catalogue, sum(len(record.ready()) for record in catalogue.adapters.values()))
        set("lora_adapters_resident", "disk", value=self._counted[1])


def record_memory(registry: Registry) -> None:
    """Memory of this process and of its devices, now and at its peak."""
    now, peak = process_memory_bytes()
    registry.set("lora_process_resident_memory_bytes", value=now)
    registry.set("lora_process_peak_memory_bytes", value=peak)
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        name = f"{device.platform}:{device.id}"
        registry.set("lora_device_memory_bytes", name, value=stats.get("bytes_in_use", now))
        registry.set("lora_device_peak_memory_bytes", name, value=stats.get("peak_bytes_in_use", peak))


def peak_memory_bytes() -> int:
    """The most memory that was in use so far: of the accelerator where it tells, else of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def process_memory_bytes() -> tuple[int, int]:
    """Resident memory of this process now and at its peak, in bytes."""
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[1]) * resource.getpagesize()
    return now, max(now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
