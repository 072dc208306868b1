"""This project's engine alone, in this process: token ids in, tokens out. No text, no Triton."""

import pathlib
import threading
import time
from typing import Any

import jax

from bench import machine
from bench.worker import Answer, Request, serve
from jaxlora.engine import Request as EngineRequest
from jaxlora.engine import Result, SamplingParams, Token
from jaxlora.errors import ServingError
from jaxlora.int8 import quantize
from jaxlora.service.accounts import account_of
from jaxlora.service.service import LoraService
from jaxlora.settings import Settings


# Tokens that one step gave come one behind the other: no step is as short.
_AT_ONCE_S = 0.0002


class Collector:
    """Notes when tokens came, and how many at once; opens the gate at the end."""

    def __init__(self, gate: threading.Semaphore):
        self.sent = time.monotonic()
        self.events: list[tuple[float, int]] = []
        self.ids: list[int] = []
        self.error: ServingError | None = None
        self.done = threading.Event()
        self._gate = gate

    def token(self, token: Token) -> bool:
        now = time.monotonic()
        if self.events and now - self.events[-1][0] < _AT_ONCE_S:
            self.events[-1] = (now, self.events[-1][1] + 1)
        else:
            self.events.append((now, 1))
        self.ids.append(token.id)
        return False

    def finish(self, result: Result) -> None:
        self.done.set()
        self._gate.release()

    def fail(self, error: ServingError) -> None:
        self.error = error
        self.finish(None)


class EngineDriver:
    def __init__(self) -> None:
        self._service: LoraService | None = None

    def start(self, setup: dict[str, Any]) -> dict[str, Any]:
        settings = Settings.read(setup["environment"])
        self._service = LoraService(settings, pathlib.Path(setup["store"]), print)
        return {"versions": {"jax": jax.__version__, "backend": jax.default_backend()}}

    def run(self, requests: list[Request], concurrency: int) -> list[Answer]:
        gate, sinks = threading.Semaphore(concurrency), []
        for request in requests:
            gate.acquire()
            _, adapter = self._service.check({"lora_name": request.adapter}, request.prompt)
            sinks.append(Collector(gate))
            params = SamplingParams(max_tokens=request.answer, **request.sampling)
            self._service.engine.submit(EngineRequest(tuple(request.prompt), params, sinks[-1], adapter, account=account_of(adapter)))
        for sink in sinks:
            sink.done.wait()
            if sink.error is not None:
                raise sink.error
        return [Answer(sink.sent, sink.events, len(sink.ids), sink.ids) for sink in sinks]

    def load(self) -> dict[str, int]:
        """See `Engine.load`."""
        return self._service.engine.load()

    def limits(self) -> dict[str, float]:
        """Operations/s of large matrix products by this project's kernels, where there are any, by type."""
        kernels = load_kernels(self._service.settings)
        if kernels is None:
            return {}
        size, found = machine.GEMM_SIZE, {}
        x = jax.numpy.ones((size, size), jax.numpy.float32)
        product = jax.jit(kernels.linear)
        ones = jax.numpy.ones((size, size))
        for dtype, of_type in {"float32": ones, "bfloat16": ones.astype("bfloat16"), "int8": quantize(ones)}.items():
            w = kernels.pack_linear(of_type)
            found[dtype] = 2 * size**3 / machine.fastest(lambda: product(x, w).block_until_ready())
        return found

    def stop(self) -> None:
        if self._service is not None:
            self._service.close()


def load_kernels(settings: Settings) -> Any:
    """The CPU kernels; None where there is no compiler or the device is another one."""
    from jaxlora import native

    if jax.default_backend() != "cpu":
        return None
    kernels = native.load(settings.cache_dir / "native")
    return None if isinstance(kernels, str) else kernels


if __name__ == "__main__":
    serve(EngineDriver())
