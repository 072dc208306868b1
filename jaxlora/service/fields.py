"""The fields of a request, in one table: name, Triton type, bounds. The front door, the in-process client and the configs follow it.

Values arrive as tensors, inside the JSON of `sampling_parameters`, or as request parameters; numbers may come as strings.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxlora.errors import InvalidRequest
from jaxlora.settings import Settings

MAX_SAMPLING_PARAMETERS_BYTES = 1 << 16
MAX_WORDS = 64
MAX_WORD_BYTES = 1024
MAX_LOGPROBS = 20
MAX_PRIORITY = 1000

Parse = Callable[[Any, Settings], Any]


@dataclasses.dataclass(frozen=True)
class Field:
    """One field. `dims` is 1 or -1 (a list); `alias` names the field that it is another word for; `tensor` says if it may be a tensor."""

    name: str
    type: str
    parse: Parse
    default: Any = None
    dims: int = 1
    alias: str | None = None
    tensor: bool = True


def _decoded(value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"is not valid UTF-8 (byte {error.start})") from None
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _whole(low: int, high: int | Callable[[Settings], int], limit: str = "") -> Parse:
    def parse(value: Any, settings: Settings) -> int:
        try:
            number = int(value) if not isinstance(value, float) else int(value) if value.is_integer() else None
        except (TypeError, ValueError):
            number = None
        if number is None or isinstance(value, bool):
            raise ValueError(f"{_shown(value)} is not a whole number")
        top = high(settings) if callable(high) else high
        if not low <= number <= top:
            raise ValueError(f"{number} is not between {low} and {top}{limit}")
        return number

    return parse


def _number(low: float, high: float, open_low: bool = False) -> Parse:
    def parse(value: Any, settings: Settings) -> float:
        try:
            number = float(value) if not isinstance(value, bool) else math.nan
        except OverflowError:
            raise ValueError(f"{_shown(value)} is no number of 64 bits") from None
        except (TypeError, ValueError):
            raise ValueError(f"{_shown(value)} is not a number") from None
        if math.isnan(number) or not low <= number <= high or (open_low and number == low):
            raise ValueError(f"{number:g} is not {'over' if open_low else 'between'} {low:g} and {'at most ' if open_low else ''}{high:g}")
        return number

    return parse


def _flag(value: Any, settings: Settings) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false", "1", "0"):
        return value.lower() in ("true", "1")
    if isinstance(value, (bool, int)) and value in (0, 1):
        return bool(value)
    raise ValueError(f"{_shown(value)} is neither true nor false")


def _text(value: Any, settings: Settings) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{_shown(value)} is not a string")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is not valid Unicode") from None
    if size > settings.max_prompt_bytes:
        raise ValueError(f"has {size} bytes, over the limit of {settings.max_prompt_bytes} (MAX_PROMPT_BYTES)")
    return value


def _listed(text: str) -> list[Any] | None:
    """The JSON list that a text is, or None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _words(value: Any, settings: Settings) -> tuple[str, ...]:
    if isinstance(value, str) and (listed := _listed(value)) and all(isinstance(word, str) for word in listed):
        value = listed
    words = [_decoded(word) for word in ([value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value])]
    if not all(isinstance(word, str) for word in words):
        raise ValueError("is not a list of strings")
    words = [word for word in words if word]
    if len(words) > MAX_WORDS:
        raise ValueError(f"holds {len(words)} strings, over the limit of {MAX_WORDS}")
    if any(len(word.encode("utf-8", "surrogatepass")) > MAX_WORD_BYTES for word in words):
        raise ValueError(f"holds a string of more than {MAX_WORD_BYTES} bytes")
    return tuple(dict.fromkeys(words))


def _ids(value: Any, settings: Settings) -> tuple[int, ...]:
    if isinstance(value, str):
        value = _listed(value)
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value):
        raise ValueError("is not a list of token ids")
    if len(value) > MAX_WORDS:
        raise ValueError(f"holds {len(value)} token ids, over the limit of {MAX_WORDS}")
    return tuple(value)


def _only(neutral: Any, instead: str) -> Parse:
    def parse(value: Any, settings: Settings) -> Any:
        if value not in (neutral, str(neutral)):
            raise ValueError(f"{_shown(value)} is not supported, only {neutral}; {instead}")
        return neutral

    return parse


_SEED = _whole(0, (1 << 64) - 1)
_MAX_TOKENS = _whole(1, lambda settings: settings.max_output_tokens, " (MAX_OUTPUT_TOKENS)")
_MIN_TOKENS = _whole(0, lambda settings: settings.max_output_tokens, " (MAX_OUTPUT_TOKENS)")
_PENALTY = _number(-2, 2)

_TABLE = (
    Field("text_input", "TYPE_STRING", _text),
    Field("messages", "TYPE_STRING", _text),
    Field("stream", "TYPE_BOOL", _flag, False),
    Field("sampling_parameters", "TYPE_STRING", _text),
    Field("exclude_input_in_output", "TYPE_BOOL", _flag, True),
    Field("lora_name", "TYPE_STRING", _text, ""),
    Field("lora_task_id", "TYPE_UINT64", _only(0, "name the adapter in lora_name"), 0),
    Field("max_tokens", "TYPE_INT32", _MAX_TOKENS),
    Field("min_tokens", "TYPE_INT32", _MIN_TOKENS, 0),
    Field("min_length", "TYPE_INT32", _MIN_TOKENS, alias="min_tokens"),
    Field("temperature", "TYPE_FP32", _number(0, 100), 0.0),
    Field("top_k", "TYPE_INT32", _whole(-1, (1 << 31) - 1), 0),
    Field("top_p", "TYPE_FP32", _number(0, 1, open_low=True), 1.0),
    Field("min_p", "TYPE_FP32", _number(0, 1), 0.0),
    Field("repetition_penalty", "TYPE_FP32", _number(0, 100, open_low=True), 1.0),
    Field("frequency_penalty", "TYPE_FP32", _PENALTY, 0.0),
    Field("presence_penalty", "TYPE_FP32", _PENALTY, 0.0),
    # Taken since other servers' clients send it; it matters to beam search alone.
    Field("length_penalty", "TYPE_FP32", _number(-100, 100), 1.0),
    Field("beam_width", "TYPE_INT32", _only(1, "beam search is not offered"), 1),
    Field("seed", "TYPE_UINT64", _SEED),
    Field("random_seed", "TYPE_UINT64", _SEED, alias="seed"),
    Field("priority", "TYPE_INT32", _whole(-MAX_PRIORITY, MAX_PRIORITY), 0),
    Field("stop_words", "TYPE_STRING", _words, (), dims=-1),
    Field("bad_words", "TYPE_STRING", _words, (), dims=-1),
    # Taken for the same reason; all three are always returned.
    Field("return_num_input_tokens", "TYPE_BOOL", _flag, False),
    Field("return_num_output_tokens", "TYPE_BOOL", _flag, False),
    Field("return_finish_reason", "TYPE_BOOL", _flag, False),
    Field("return_cumulative_logprob", "TYPE_BOOL", _flag, False),
    Field("return_logprobs", "TYPE_BOOL", _flag, False),
    Field("return_log_probs", "TYPE_BOOL", _flag, alias="return_logprobs"),
    Field("logprobs", "TYPE_INT32", _whole(0, MAX_LOGPROBS), tensor=False),
    Field("stop", "TYPE_STRING", _words, alias="stop_words", dims=-1, tensor=False),
    Field("stop_token_ids", "TYPE_INT32", _ids, (), dims=-1, tensor=False),
    Field("ignore_eos", "TYPE_BOOL", _flag, False, tensor=False),
    Field("n", "TYPE_INT32", _only(1, "send the prompt n times"), 1, tensor=False),
    Field("best_of", "TYPE_INT32", _only(1, "send the prompt n times"), 1, tensor=False),
    Field("use_beam_search", "TYPE_BOOL", _only(False, "beam search is not offered"), False, tensor=False),
)
FIELDS: dict[str, Field] = {field.name: field for field in _TABLE}
# The prompt as token ids: what the tokenizer model hands on, padded with -1 where one request holds rows of several lengths.
INPUT_IDS = Field("input_ids", "TYPE_INT32", _ids, dims=-1)

OUTPUTS: dict[str, str] = {
    "text_output": "TYPE_STRING",
    "finish_reason": "TYPE_STRING",
    "num_input_tokens": "TYPE_UINT32",
    "num_output_tokens": "TYPE_UINT32",
    "cumulative_logprob": "TYPE_FP32",
    "logprobs": "TYPE_STRING",
    "adapter_name": "TYPE_STRING",
    "adapter_version": "TYPE_UINT32",
    "metrics": "TYPE_STRING",
}


def merge_fields(tensors: Mapping[str, Any], parameters: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """One value for each field: a tensor wins over `sampling_parameters`, which wins over a request parameter.

    Arguments:
        tensors: values of the tensors that were sent: bytes, numbers, or lists of them where `dims` is -1.
        parameters: the request's parameters; names that are no field belong to others and are ignored.

    Returns:
        Checked values by field name, aliases resolved, without the fields that nobody sent.

    Raises:
        InvalidRequest: names every bad field and its bound.
    """
    problems: dict[str, str] = {}
    own_parameters = {name: value for name, value in parameters.items() if name in FIELDS}
    sampling = _sampling_parameters(tensors, own_parameters, settings, problems)
    merged: dict[str, Any] = {}
    for source in (own_parameters, sampling, tensors):
        for name, value in source.items():
            field = FIELDS[name]
            try:
                parsed = field.parse(_decoded(value), settings)
            except ValueError as error:
                problems[name] = str(error)
                continue
            merged[field.alias or name] = parsed
    merged.pop("sampling_parameters", None)
    if problems:
        raise InvalidRequest(problems)
    return merged


def _sampling_parameters(
    tensors: Mapping[str, Any], parameters: Mapping[str, Any], settings: Settings, problems: dict[str, str]
) -> dict[str, Any]:
    text = tensors.get("sampling_parameters", parameters.get("sampling_parameters"))
    if not text:
        return {}
    name = "sampling_parameters"
    try:
        text = _decoded(text)
        if len(text) > MAX_SAMPLING_PARAMETERS_BYTES:
            raise ValueError(f"has {len(text)} characters, over the limit of {MAX_SAMPLING_PARAMETERS_BYTES}")
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("is not a JSON object")
    except (ValueError, TypeError, RecursionError) as error:
        problems[name] = str(error) if not isinstance(error, json.JSONDecodeError) else f"is not valid JSON: {error}"
        return {}
    unknown = [key for key in values if key not in FIELDS or key == name]
    if unknown:
        known = ", ".join(key for key in FIELDS if key != name)
        problems[name] = f"holds unknown fields {', '.join(_shown(key) for key in unknown[:8])}; known are: {known}"
    return {key: value for key, value in values.items() if key not in unknown and value is not None}
