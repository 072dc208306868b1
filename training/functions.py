"""Functions of the user's own, which a command line names: rewards and metrics."""

import importlib
import importlib.util
import inspect
import pathlib
import sys
import zlib
from collections.abc import Callable
from typing import Any

from jaxlora.errors import SetupError


def find_function(spec: str, option: str) -> Callable[..., Any]:
    """The function that `file.py:function` or `package.module:function` names. Raises SetupError under the name of the option."""
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise SetupError(f"{option}: {spec!r} is not of the form file.py:function")
    module = _from_file(place, option) if place.endswith(".py") else _from_package(place, option)
    function = getattr(module, name, None)
    if not callable(function):
        here = sorted(key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_"))
        raise SetupError(f"{option}: {place} has no function {name!r}; it has: {', '.join(here) or 'none'}")
    return function


def _from_file(place: str, option: str) -> Any:
    path = pathlib.Path(place)
    if not path.is_file():
        raise SetupError(f"{option}: there is no file {place}")
    name = f"{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickles of the file look their module up by name.
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent.resolve()))  # what lies beside the file can be imported, as if it were run
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(name, None)
        if not isinstance(error, Exception):
            raise
        raise SetupError(f"{option}: {place} can't be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return module


def _from_package(place: str, option: str) -> Any:
    try:
        return importlib.import_module(place)
    except Exception as error:
        raise SetupError(f"{option}: module {place} can't be imported: {type(error).__name__}: {error}") from error
