"""The tensors of a Hugging Face folder, read by name once all of them are known to be right."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxlora.checkpoint.folder import WEIGHTS, weight_files
from jaxlora.errors import SetupError

FLOATING = ("F64", "F32", "F16", "BF16")


@contextlib.contextmanager
def opened(folder: pathlib.Path, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Callable[[str], np.ndarray]]:
    """What reads one of the tensors that `shapes` names from `model.safetensors`, or from the shards of its index. Any thread may call it.

    Raises:
        SetupError: names every tensor that is missing, of a wrong shape or of a type that is not floating point. Nothing is read before.
    """
    where: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    problems = []
    with contextlib.ExitStack() as files:
        try:
            for file in weight_files(folder):
                if file.parent != folder:
                    raise SetupError(f"the index names a file outside the model folder: {file.name!r}")
                # Mapped into memory, so that the host never holds a second copy of the model.
                shard = files.enter_context(safe_open(file, framework="numpy"))
                for name in shapes.keys() & set(shard.keys()):
                    header = shard.get_slice(name)
                    shape, dtype = header.get_shape(), header.get_dtype()
                    if tuple(shape) != shapes[name]:
                        wrong[name] = f"{name} has shape {shape}, the config asks for {list(shapes[name])}"
                    elif dtype not in FLOATING:
                        wrong[name] = f"{name} has type {dtype}; only {', '.join(FLOATING)} are supported"
                    where[name] = shard
        except FileNotFoundError as error:
            problems.append(f"{pathlib.Path(str(error.filename or WEIGHTS)).name} is missing from the model folder")
        except (SafetensorError, KeyError, ValueError) as error:
            problems.append(f"the checkpoint can't be read: {error}")
        problems += [wrong[name] for name in shapes if name in wrong]
        missing = [name for name in shapes if name not in where]
        if missing:
            shown = ", ".join(missing[:8])
            problems.append(f"the checkpoint lacks {len(missing)} tensors: {shown}{' ...' if len(missing) > 8 else ''}")
        if problems:
            raise SetupError("\n".join(problems))
        yield lambda name: where[name].get_tensor(name)
