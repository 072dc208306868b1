"""llama.cpp's own server, over HTTP. One GGUF file of the base model, one of each adapter, all of them loaded at start.

It starts with every adapter's scale at 1. A request without the field `lora` therefore gets all of them, or with
`--lora-init-without-apply` in some versions as well; so every request names its adapter, and base requests one with scale 0.
"""

import asyncio
import contextlib
import json
import os
import subprocess
from typing import Any

from bench.drivers import http_server
from bench.load import closed_loop, server_sent_events, stamped
from bench.worker import Answer, Request, Unsupported, serve
from server.preflight import free_ports

START_TIMEOUT_S = 300


class LlamaDriver:
    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._port = 0
        self._adapters: dict[str, int] = {}

    def start(self, setup: dict[str, Any]) -> dict[str, Any]:
        [self._port] = free_ports(1)
        if "no_gguf" in setup:
            raise Unsupported(setup["no_gguf"])
        binary, threads = setup["llama_server"], str(len(os.sched_getaffinity(0)))
        self._adapters = {name: index for index, name in enumerate(setup["gguf_adapters"])}
        command = [
            binary, "--model", setup["gguf_model"], "--host", "127.0.0.1", "--port", str(self._port), "--no-ui",
            "--threads", threads, "--threads-batch", threads,
            "--parallel", str(setup["slots"]), "--ctx-size", str(setup["slots"] * setup["max_seq_len"]), "--no-kv-unified",
            # The default type is float16, as small as bfloat16 and faster here.
            *(("--cache-type-k", "f32", "--cache-type-v", "f32") if setup["dtype"] == "float32" else ()),
            "--lora", ",".join(setup["gguf_adapters"].values()), "--lora-init-without-apply",
        ]  # fmt: skip
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2)
        http_server.wait_until_healthy(self._process, "llama-server", self._port, START_TIMEOUT_S)
        version = subprocess.run([binary, "--version"], capture_output=True, text=True)
        return {"pid": self._process.pid, "versions": {"llama.cpp": _version(version.stdout + version.stderr)}}

    def run(self, requests: list[Request], concurrency: int) -> list[Answer]:
        return asyncio.run(closed_loop(requests, concurrency, self._send))

    def stop(self) -> None:
        http_server.end(self._process, 10)

    async def _send(self, request: Request) -> Answer:
        lora = {"id": self._adapters[request.adapter], "scale": 1} if request.adapter else {"id": 0, "scale": 0}
        body = {
            "prompt": request.prompt, "n_predict": request.answer, "stream": True, "return_tokens": True, "ignore_eos": True,
            "cache_prompt": False, "lora": [lora], **request.sampling,
        }  # fmt: skip
        async with contextlib.aclosing(server_sent_events("127.0.0.1", self._port, "/completion", body)) as responses:
            sent, raw = await stamped(responses)
        return answer_of(sent, raw)


def answer_of(sent: float, raw: list[tuple[float, str]]) -> Answer:
    """From responses and when they came. While a character lacks bytes there are none, the next one has the newest token alone, and the last of all
    none; but each says how many there were so far."""
    events, ids, counted = [], [], 0
    for arrived, data in raw:
        response = json.loads(data)
        if "error" in response:
            raise RuntimeError(response["error"])
        so_far = response["tokens_predicted"]
        if so_far > counted:
            events.append((arrived, so_far - counted))
            ids.extend(response["tokens"])
        counted = so_far
    return Answer(sent, events, counted, ids if len(ids) == counted else [])


def _version(text: str) -> str:
    return next((line.removeprefix("version: ") for line in text.splitlines() if line.startswith("version:")), text.strip())


if __name__ == "__main__":
    serve(LlamaDriver())
