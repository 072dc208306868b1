"""From checked fields to what the engine runs: sampling settings, stop strings, and the checks that need the model's sizes."""

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlora.config import ModelConfig
from jaxlora.engine.requests import SamplingParams
from jaxlora.errors import InvalidRequest
from jaxlora.service.fields import FIELDS, MAX_LOGPROBS
from jaxlora.settings import Settings
from jaxlora.text import Tokenizer


@dataclasses.dataclass(frozen=True)
class Plan:
    """One prompt to answer, with every choice made. `echo` is text that goes before the answer."""

    prompt: tuple[int, ...]
    params: SamplingParams
    stop_strings: tuple[str, ...]
    lora_name: str
    priority: int
    echo: str
    cumulative_logprob: bool
    logprobs: bool


def plan(fields: Mapping[str, Any], prompt: Sequence[int], tokenizer: Tokenizer, config: ModelConfig, settings: Settings) -> Plan:
    """Checks a request against the model and fills in the defaults.

    Arguments:
        fields: as `merge_fields` returns them.
        prompt: token ids of the prompt.

    Raises:
        InvalidRequest: names every field that is wrong, and its bound.
    """
    value = {name: fields.get(name, field.default) for name, field in FIELDS.items()}
    problems: dict[str, str] = {}
    source = "messages" if "messages" in fields else "text_input"
    room = settings.max_seq_len - len(prompt)
    if not prompt:
        problems[source] = "the prompt is empty; it must have at least 1 token"
    elif room < 1:
        problems[source] = f"the prompt has {len(prompt)} tokens, over the limit of {settings.max_seq_len - 1} (MAX_SEQ_LEN - 1)"
    if any(not 0 <= token < config.vocab_size for token in prompt):
        problems["input_ids"] = f"holds ids that are not between 0 and {config.vocab_size - 1}"
    max_tokens = value["max_tokens"] or min(settings.default_max_tokens, settings.max_output_tokens, max(room, 1))
    if value["max_tokens"] and 1 <= room < max_tokens:
        problems["max_tokens"] = f"{max_tokens} with a prompt of {len(prompt)} tokens is over the limit of {settings.max_seq_len} (MAX_SEQ_LEN)"
    if value["min_tokens"] > max_tokens:
        problems["min_tokens"] = f"{value['min_tokens']} is over max_tokens, {max_tokens}"
    if any(token >= config.vocab_size for token in value["stop_token_ids"]):
        problems["stop_token_ids"] = f"holds ids that are not between 0 and {config.vocab_size - 1}"
    if problems:
        raise InvalidRequest(problems)

    # Special tokens never show in the text, so a stop string that is one has to stop on its id.
    ids_of_words = {word: tokenizer.encode(word, add_special_tokens=False, field="stop_words") for word in value["stop_words"]}
    special = {word: ids[0] for word, ids in ids_of_words.items() if len(ids) == 1 and tokenizer.decode(ids) == ""}
    eos = () if value["ignore_eos"] else (*config.eos_token_ids, *tokenizer.eos_token_ids)
    stop_ids = dict.fromkeys((*eos, *value["stop_token_ids"], *special.values()))
    count = value["logprobs"]
    wants_each = bool(value["return_logprobs"]) or count is not None
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=value["min_tokens"],
        temperature=value["temperature"],
        top_k=min(value["top_k"], config.vocab_size),
        top_p=value["top_p"],
        min_p=value["min_p"],
        repetition_penalty=value["repetition_penalty"],
        frequency_penalty=value["frequency_penalty"],
        presence_penalty=value["presence_penalty"],
        seed=secrets.randbits(64) if value["seed"] is None else value["seed"],
        stop_token_ids=tuple(stop_ids),
        bad_words=_bad_words(value["bad_words"], tokenizer),
        logprobs=min(count or 0, MAX_LOGPROBS) if wants_each or value["return_cumulative_logprob"] else None,
    )
    return Plan(
        prompt=tuple(prompt),
        params=params,
        stop_strings=tuple(word for word in value["stop_words"] if word not in special),
        lora_name=value["lora_name"] or "",
        priority=value["priority"],
        echo="" if value["exclude_input_in_output"] else _echo(fields, prompt, tokenizer),
        cumulative_logprob=bool(value["return_cumulative_logprob"]),
        logprobs=wants_each,
    )


def _bad_words(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    # A word reads differently to the model at the start of a text and after a space; both are kept out. What is no word, a line break, is not.
    spellings = [spelling for word in words for spelling in dict.fromkeys((word, f" {word.lstrip()}" if word.strip() else word))]
    encoded = (tuple(tokenizer.encode(spelling, add_special_tokens=False, field="bad_words")) for spelling in spellings)
    return tuple(dict.fromkeys(ids for ids in encoded if ids))


def _echo(fields: Mapping[str, Any], prompt: Sequence[int], tokenizer: Tokenizer) -> str:
    return fields["text_input"] if "text_input" in fields and "messages" not in fields else tokenizer.decode(prompt)
