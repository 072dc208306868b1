"""Writes a safetensors file tensor by tensor, so that a checkpoint never has to be in memory as a whole.

The library's own writer wants every tensor at once. Format: https://huggingface.co/docs/safetensors (8 bytes of header
length, little endian; a JSON header padded with spaces to a multiple of 8; the tensors' bytes one after the other).
"""

import json
import math
import pathlib
from collections.abc import Iterable, Mapping

import numpy as np

_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SIZES = {"F32": 4, "F16": 2, "BF16": 2}


def write(
    path: pathlib.Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, np.ndarray]],
    dtype: str = "float32",
) -> None:
    """Writes `tensors` to `path`.

    Arguments:
        shapes: name to shape of every tensor, in the order in which they will come.
        tensors: (name, array) in that order; only one array needs to exist at a time.
        dtype: type of all tensors: "float32", "float16" or "bfloat16" (arrays of `ml_dtypes.bfloat16`).

    Raises:
        ValueError: a tensor differs from what `shapes` and `dtype` announced, or tensors are missing.
    """
    name_of_dtype = _NAMES[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * _SIZES[name_of_dtype]
        header[name] = {"dtype": name_of_dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    left = dict(shapes)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, array in tensors:
            expected = next(iter(left), None)
            if name != expected or array.shape != tuple(left[name]) or array.dtype.name != dtype:
                raise ValueError(f"{name} {array.shape} {array.dtype.name} came where {expected} was announced")
            del left[name]
            # A view as bytes, for bfloat16 has no buffer protocol.
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    if left:
        raise ValueError(f"tensors were announced but did not come: {', '.join(left)}")
