"""Every setting of the project, in one table: name, default, bounds and meaning.

A value comes from the environment (`MAX_SLOTS`), else from a `parameters` entry of a Triton `config.pbtxt` (`max_slots`), else from
the default here. `python -m jaxlora.settings` prints the table as Markdown.
"""

import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxlora import faults
from jaxlora.errors import SetupError

MIB = 1 << 20
GIB = 1 << 30


def _default_cache_dir() -> str:
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "jaxlora")


def _port(text: str) -> int:
    return _whole(1, 65535)(text)


def _whole(low: int, high: float = math.inf) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text.replace("_", ""))
        except ValueError:
            raise ValueError(f"{text!r} is not a whole number") from None
        if not low <= value <= high:
            raise ValueError(f"{value} is not {_bounds(low, high)}")
        return value

    return parse


def _number(low: float, high: float = 10**9) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a number") from None
        if not low <= value <= high:
            raise ValueError(f"{value:g} is not {_bounds(low, high)}")
        return value

    return parse


def _bounds(low: float, high: float) -> str:
    return f"{low} or more" if high == math.inf else f"between {low} and {high}"


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text!r} is none of {', '.join(choices)}")
        return text

    return parse


def _text(text: str) -> str:
    if not text:
        raise ValueError("is empty")
    return text


def _path(text: str) -> pathlib.Path:
    try:
        return pathlib.Path(_text(text)).expanduser()
    except RuntimeError:  # ~user, and there is no such user
        raise ValueError(f"{text!r} names no home folder") from None


def _key(text: str) -> str:
    if re.fullmatch("[A-Za-z0-9_-]{16,128}", text) is None:
        raise ValueError("a key has 16 to 128 letters, digits, `-` or `_`")  # without the key: this goes into logs
    return text


def _faults(text: str) -> str:
    faults.parse(text)
    return text


def _setting(default: Any, parse: Callable[[str], Any], help: str) -> Any:
    return dataclasses.field(default=default, metadata={"parse": parse, "help": help})


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of one process. Field names in upper case are the names of the environment variables."""

    model: str = _setting("smollm2-135m-instruct", _text, "base model: `smollm2-135m-instruct`, a Hugging Face folder, or a hub id")
    cache_dir: pathlib.Path = dataclasses.field(
        default_factory=lambda: pathlib.Path(_default_cache_dir()),
        metadata={
            "parse": _path,
            "help": "converted checkpoints, compiled programs and the catalogue are kept here; what is compiled is run: nobody else may write to it",
        },
    )
    host: str = _setting("127.0.0.1", _text, "IPv4 address that the server listens on, or a name of one")
    http_port: int = _setting(8000, _port, "Triton HTTP port")
    grpc_port: int = _setting(8001, _port, "Triton gRPC port")
    metrics_port: int = _setting(8002, _port, "Prometheus port")
    dtype: str = _setting(
        "auto", _one_of("auto", "float32", "bfloat16"),
        "type of the weights and of the KV cache; `auto`: bfloat16 on GPUs, TPUs and CPUs with native kernels, where it is faster, else float32",
    )  # fmt: skip
    quantization: str = _setting(
        "none", _one_of("none", "int8"),
        "`int8`: the linear layers of the base model in 8 bits, half the memory of bfloat16; faster on CPUs with native kernels",
    )  # fmt: skip
    max_slots: int = _setting(16, _whole(1, 1024), "sequences that are generated at the same time, those in reserved slots aside")
    reserved_slots: int = _setting(2, _whole(0, 1024), "slots beside these, for adapters that hold less than an equal share of them; 0: none")
    max_seq_len: int = _setting(2048, _whole(16, 1 << 20), "prompt and answer together, in tokens")
    prefill_chunk: int = _setting(128, _whole(8, 8192), "prompt tokens that one step reads, of all prompts together; more reads prompts faster and makes others wait longer for their next token")
    prefix_cache: int = _setting(1, _whole(0, 1), "1: a prompt that begins as one in a slot does, with the same adapter, is not computed again")
    prompt_lookup_tokens: int = _setting(
        5, _whole(0, 15), "tokens of a greedy answer that a step guesses from the text so far, on CPUs with native kernels and while one or two "
        "requests are answered; the answers are the same; 0: none",
    )  # fmt: skip
    decode_steps: int = _setting(
        4, _whole(1, 64), "tokens of each answer that one call of the device may generate, as many as take 80 ms at most, where nobody waits for "
        "a slot that is free; the answers are the same",
    )  # fmt: skip
    max_lora_rank: int = _setting(64, _whole(1, 1024), "largest adapter rank")
    lora_slots: int = _setting(32, _whole(1, 4096), "adapters on the device at the same time")
    lora_quantization: str = _setting(
        "none", _one_of("none", "int8"), "`int8`: adapters in 8 bits on the device, half the memory of bfloat16; faster where many are mixed on CPUs with native kernels"
    )  # fmt: skip
    lora_output_layer: int = _setting(0, _whole(0, 1), "1: adapters may target `lm_head` too (costs device memory)")
    adapter_host_cache_bytes: int = _setting(2 * GIB, _whole(0), "host memory for adapters that are not on the device, in bytes")
    max_adapter_file_bytes: int = _setting(GIB, _whole(1), "largest `adapter_model.safetensors`, in bytes")
    max_queue: int = _setting(256, _whole(1), "requests that may wait for a slot")
    max_queue_per_adapter: int = _setting(128, _whole(0), "of these, for one adapter (the base model counts as one); 0: no bound")
    max_queue_per_user: int = _setting(192, _whole(0), "of these, for all adapters of one user; 0: no bound")
    queue_timeout_s: float = _setting(120.0, _number(0.001), "longest wait for a slot, in seconds")
    max_running_per_adapter: int = _setting(0, _whole(0), "slots that one adapter may hold; more of its requests wait; 0: no bound")
    max_running_per_user: int = _setting(0, _whole(0), "slots that all adapters of one user may hold; 0: no bound")
    tokens_per_s_per_adapter: float = _setting(0.0, _number(0), "prompt and generated tokens a second of one adapter; 0: no bound")
    tokens_per_s_per_user: float = _setting(0.0, _number(0), "prompt and generated tokens a second of all adapters of one user; 0: no bound")
    rate_burst_s: float = _setting(10.0, _number(0.1), "so many seconds' worth of these tokens may come at once")
    stream_responses_per_s: float = _setting(
        0.0, _number(0), "responses between the first and the last that all streams together get in a second; over it, one carries several tokens;"
        " 0: 100 for each CPU core",
    )  # fmt: skip
    grace_s: float = _setting(30.0, _number(0), "seconds that running answers have to finish when the server is told to stop")
    breaker_queue_s: float = _setting(0.0, _number(0), "mean wait for a slot over which new requests are refused for a time, in seconds; 0: none")
    breaker_token_s: float = _setting(0.0, _number(0), "the same for the mean time per output token, in seconds; 0: none")
    breaker_window_s: float = _setting(10.0, _number(0.1), "seconds over which those means are taken")
    breaker_open_s: float = _setting(5.0, _number(0.1), "seconds for which requests are then refused, before some pass as probes")
    breaker_adapter_failures: int = _setting(3, _whole(1), "failures in a row after which an adapter is refused for a time")
    breaker_adapter_s: float = _setting(30.0, _number(0.1), "seconds for which it is refused, before one request passes as a probe")
    breaker_memory_s: float = _setting(30.0, _number(0.1), "seconds after which one more slot is used again, where memory had run out")
    max_prompt_bytes: int = _setting(MIB, _whole(1), "longest prompt text or `messages`, in bytes")
    max_output_tokens: int = _setting(2048, _whole(1), "largest `max_tokens`")
    default_max_tokens: int = _setting(256, _whole(1), "`max_tokens` of a request that names none")
    admin_key: str = _setting("", _key, "key that model control, trace, log and shared-memory calls must carry; empty: they need none")
    request_log: str = _setting("stdout", _text, "one JSON line a request goes to: `stdout` (the server's log), `none`, or a file")
    log_prompts: int = _setting(0, _whole(0, 1), "1: those lines hold the text of the prompt")
    metrics_adapters: int = _setting(100, _whole(1, 10_000), "adapter versions with metrics of their own; the others share `other`")
    faults: str = _setting("", _faults, "faults on purpose, to rehearse them, as `decode:exception:seed=7`; see Operating")

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ, parameters: Mapping[str, str] | None = None) -> "Settings":
        """Settings from the environment, then a model's `config.pbtxt` parameters, then the defaults.

        Arguments:
            environ: variables by name in upper case; an empty value counts as absent.
            parameters: values by name in lower case, as Triton hands them to a model (`{"string_value": ...}` already unwrapped).

        Raises:
            SetupError: names every wrong value at once.
        """
        parameters = parameters or {}
        values, problems = {}, []
        for field in dataclasses.fields(cls):
            text = environ.get(field.name.upper()) or parameters.get(field.name) or ""
            if not text:
                continue
            try:
                values[field.name] = field.metadata["parse"](text)
            except ValueError as error:
                problems.append(f"{field.name.upper()}: {error}")
        if problems:
            raise SetupError("\n".join(problems))
        return cls(**values)

    def environment(self) -> dict[str, str]:
        """The variables from which `read` gives these settings again."""
        return {name.upper(): str(getattr(self, name)) for name in self.names()}


def markdown_table() -> str:
    """The table of settings for the README."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(Settings):
        default = "~/.cache/jaxlora" if field.name == "cache_dir" else f"{field.default}"
        rows.append(f"| `{field.name.upper()}` | `{default}` | {field.metadata['help']} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(markdown_table())
