"""vLLM's own server, its build for CPUs, over its OpenAI endpoint. LoRA on, all adapters known from the start."""

import asyncio
import contextlib
import json
import os
import pathlib
import subprocess
import urllib.request
from typing import Any

from bench.drivers import http_server
from bench.load import closed_loop, server_sent_events, stamped
from bench.worker import Answer, Request, Unsupported, serve
from server.preflight import free_ports

START_TIMEOUT_S = 600
BASE = "base"
KV_CACHE_GIB = 2


class VllmDriver:
    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._port = 0

    def start(self, setup: dict[str, Any]) -> dict[str, Any]:
        if setup["dtype"] == "int8":
            raise Unsupported("it needs a checkpoint made for int8")
        [self._port] = free_ports(1)
        command = [
            # `vllm serve` looks for a package named vllm to tell its version, and this build has another name.
            str(pathlib.Path(setup["vllm"]).parent / "python"), "-m", "vllm.entrypoints.openai.api_server",
            "--model", setup["model"], "--served-model-name", BASE, "--host", "127.0.0.1", "--port", str(self._port),
            "--dtype", setup["dtype"], "--max-model-len", str(setup["max_seq_len"]), "--max-num-seqs", str(setup["slots"]),
            "--enable-lora", "--max-loras", str(len(setup["adapters"])), "--max-lora-rank", str(setup["max_rank"]),
            # Every prompt is another one; this only spares the hashing.
            "--no-enable-prefix-caching",
            "--lora-modules", *(f"{name}={folder}" for name, folder in setup["adapters"].items()),
        ]  # fmt: skip
        environ = {
            **os.environ,
            "PATH": f"{pathlib.Path(setup['vllm']).parent}{os.pathsep}{os.environ['PATH']}",
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        # As its documentation advises for CPUs.
        openmp = pathlib.Path(setup["vllm"]).parent.parent / "lib" / "libiomp5.so"
        if openmp.exists():
            environ["LD_PRELOAD"] = str(openmp)
        self._process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=2)
        http_server.wait_until_healthy(self._process, "vllm serve", self._port, START_TIMEOUT_S)
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/version", timeout=5) as answer:
            return {"pid": self._process.pid, "versions": {"vllm": json.load(answer)["version"]}}

    def run(self, requests: list[Request], concurrency: int) -> list[Answer]:
        return asyncio.run(closed_loop(requests, concurrency, self._send))

    def stop(self) -> None:
        http_server.end(self._process, 20)

    async def _send(self, request: Request) -> Answer:
        body = {
            "model": request.adapter or BASE, "prompt": request.prompt, "max_tokens": request.answer, "stream": True,
            "ignore_eos": True, "return_token_ids": True, **request.sampling,
        }  # fmt: skip
        async with contextlib.aclosing(server_sent_events("127.0.0.1", self._port, "/v1/completions", body)) as responses:
            sent, raw = await stamped(responses)
        events, ids = [], []
        for arrived, data in raw:
            if data == b"[DONE]":
                continue
            response = json.loads(data)
            if "error" in response:
                raise RuntimeError(response["error"])
            for choice in response["choices"]:
                tokens = choice.get("token_ids") or []
                if tokens:
                    ids.extend(tokens)
                    events.append((arrived, len(tokens)))
        return Answer(sent, events, len(ids), ids)


if __name__ == "__main__":
    serve(VllmDriver())
