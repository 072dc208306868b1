"""What a Hugging Face folder must hold before anything is loaded from it."""

import json
import pathlib

import safetensors

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"


def problems(folder: pathlib.Path) -> list[str]:
    """Everything that is missing or broken in `folder`, one line each; empty when it can be loaded.

    Reads the small JSON files and the headers of the weights, not the weights.
    """
    if not folder.is_dir():
        return ["the folder does not exist"]
    return [*_json_problems(folder, "config.json"), *_weights_problems(folder), *_tokenizer_problems(folder)]


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of `folder`, whether or not they exist: one, or the shards that its index names, sorted."""
    if (folder / WEIGHTS_INDEX).is_file() and not (folder / WEIGHTS).is_file():
        shards = json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / shard for shard in sorted(set(shards))]
    return [folder / WEIGHTS]


def _json_problems(folder: pathlib.Path, name: str) -> list[str]:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [f"{name} is missing"]
    except (OSError, ValueError, RecursionError) as error:
        return [f"{name} can't be read: {type(error).__name__}"]
    return [] if isinstance(content, dict) else [f"{name} is not a JSON object"]


def _weights_problems(folder: pathlib.Path) -> list[str]:
    try:
        files = weight_files(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{WEIGHTS_INDEX} can't be read: {type(error).__name__}"]
    found = []
    for file in files:
        if file.parent != folder:
            found.append(f"{WEIGHTS_INDEX} names {file.name!r} outside the folder")
        elif not file.is_file():
            found.append(f"{file.name} is missing{_pickle_hint(folder) if file.name == WEIGHTS else ''}")
        else:
            try:
                with safetensors.safe_open(file, framework="numpy"):
                    pass
            except (OSError, safetensors.SafetensorError) as error:
                found.append(f"{file.name} is damaged: {error}")
    return found


def _pickle_hint(folder: pathlib.Path) -> str:
    pickles = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in sorted(folder.glob(pattern))]
    return f" ({pickles[0]} is there, but only safetensors are read)" if pickles else ""


def _tokenizer_problems(folder: pathlib.Path) -> list[str]:
    found = _json_problems(folder, "tokenizer.json")
    if found and (folder / "tokenizer.model").is_file():
        return [
            f"{found[0]}; tokenizer.model alone is not enough: save the tokenizer once with Transformers' "
            "`AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`"
        ]
    return found
