"""One module for each system, run as a process of its own; `DRIVERS` is the list of them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class System:
    """A system under test.

    `python` is the environment that its driver runs in, `needs` the file that shows that it is installed (both below the project's
    folder). `note` says how it is driven.
    """

    title: str
    module: str
    python: str
    needs: str
    ours: bool
    note: str


DRIVERS = {
    "engine": System(
        "engine alone", "bench.drivers.ours_engine", ".venv/bin/python", ".venv/bin/python", True, "this project's engine, in process"
    ),
    "triton": System(
        "through Triton", "bench.drivers.ours_triton", ".venv/bin/python", ".venv/bin/python", True,
        "this project's server: text to `llm` over gRPC, answers streamed",
    ),
    "llama": System(
        "llama-server", "bench.drivers.peer_llama", ".venv/bin/python", ".venv-bench-llama/bin/llama-server", False,
        "llama.cpp's server over HTTP, answers streamed; requests for different adapters take turns",
    ),
    "vllm": System(
        "vLLM", "bench.drivers.peer_vllm", ".venv/bin/python", ".venv-bench-vllm/bin/vllm", False,
        "vLLM's server, its build for CPUs, over HTTP, answers streamed",
    ),
    "peft": System(
        "Transformers + PEFT", "bench.drivers.peer_peft", ".venv-parity/bin/python", ".venv-parity/bin/python", False,
        "`generate`, with `adapter_names` where there are several adapters, in process; one fixed batch, whose rows all start and end together",
    ),
}
