"""The Triton model repository on disk: where it is, which models it starts, what their `config.pbtxt` say."""

import compileall
import pathlib
import shutil

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig as TritonConfig

from jaxlora.errors import SetupError

PROJECT = pathlib.Path(__file__).resolve().parent.parent
REPOSITORY = PROJECT / "model_repository"
MODELS = ("metrics", "adapters", "tokenizer", "jax_lora", "llm")
STORE = "adapters"
"""The model whose folder holds the published adapters, in `users/`."""


def config(repository: pathlib.Path, model: str) -> TritonConfig:
    """The `config.pbtxt` of a model. Raises SetupError if it is not there or is malformed."""
    path = repository / model / "config.pbtxt"
    try:
        return text_format.Parse(path.read_text(), TritonConfig())
    except OSError as error:
        raise SetupError(f"{path}: {error.strerror}") from None
    except text_format.ParseError as error:
        raise SetupError(f"{path}: {error}") from None


def parameters(repository: pathlib.Path, models: tuple[str, ...] = MODELS) -> dict[str, str]:
    """The `parameters` of all models, by name.

    Raises:
        SetupError: two models give one parameter different values.
    """
    found: dict[str, str] = {}
    owner: dict[str, str] = {}
    for model in models:
        for name, value in config(repository, model).parameters.items():
            if found.setdefault(name, value.string_value) != value.string_value:
                raise SetupError(
                    f"{name}: {owner[name]}/config.pbtxt says {found[name]!r} and {model}/config.pbtxt {value.string_value!r}"
                )
            owner.setdefault(name, model)
    return found


def compile_models(repository: pathlib.Path, models: tuple[str, ...]) -> None:
    """Writes the byte code of the models' Python files, where that is possible.

    Python would write it when Triton imports a model, and then it counts as a change: the next call to `load` starts the model anew.
    """
    for model in models:
        for version in (repository / model).glob("[0-9]*/"):
            compileall.compile_dir(version, quiet=2, maxlevels=0)


def copy(destination: pathlib.Path, source: pathlib.Path = REPOSITORY) -> pathlib.Path:
    """Copies the models of `source`, without the adapters in its store, and returns `destination`."""

    def ignored(folder: str, names: list[str]) -> list[str]:
        store = pathlib.Path(folder) == source / STORE
        return [name for name in names if name == "__pycache__" or (store and name == "users")]

    return shutil.copytree(source, destination, ignore=ignored)
