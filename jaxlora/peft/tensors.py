"""The safetensors container, read strictly: a file that lies about itself is refused before its tensors are used.

Format: https://huggingface.co/docs/safetensors (8 bytes of little-endian header length, a JSON header, the data without holes).
Tensors are read into memory of their own rather than mapped: when somebody truncates a mapped file, the kernel kills the process
that touches it (SIGBUS) and with it every request; a read of it is an error that names the file. Knows nothing of LoRA.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from jaxlora.errors import AdapterInvalid

MAX_HEADER_BYTES = 8 << 20
MAX_DIMENSIONS = 8

DTYPES: dict[str, np.dtype] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
# The other types of the format: their sizes have to add up too, before a caller can say that it doesn't take them.
_ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | {
    "F64": 8, "C64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TensorAt:
    """One entry of the header: `begin` and `end` are byte offsets in the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """An open safetensors file whose header has been checked against its size. `tensors` is in the order of the data."""

    def __init__(self, path: pathlib.Path, max_bytes: int):
        """Opens and checks a file; nothing but its header is read.

        Raises:
            AdapterInvalid: it is missing, no regular file, larger than `max_bytes`, truncated, or its header is not consistent.
        """
        self._name = path.name
        self._fd = open_regular(path)
        try:
            self.size = os.fstat(self._fd).st_size
            if self.size > max_bytes:
                raise AdapterInvalid([f"{self._name} has {self.size} bytes, the limit is {max_bytes} (MAX_ADAPTER_FILE_BYTES)"])
            self._head, header = self._read_header()
            self.tensors = self._check(header)
        except BaseException:
            self.close()
            raise
        self.sha256 = ""

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def arrays(self) -> Iterator[tuple[str, np.ndarray | None]]:
        """Reads every tensor once, in the order of the data: (name, array), or (name, None) for a type not in `DTYPES`.

        When it is exhausted, `sha256` holds the hexadecimal hash of the bytes that were read, which are the whole file.
        """
        digest = hashlib.sha256(self._head)
        self.sha256 = ""
        for name, at in self.tensors.items():
            data = np.empty(at.end - at.begin, np.uint8)
            _read_into(self._fd, self._name, data, len(self._head) + at.begin)
            digest.update(data)
            yield name, data.view(DTYPES[at.dtype]).reshape(at.shape) if at.dtype in DTYPES else None
        self.sha256 = digest.hexdigest()

    def _read_header(self) -> tuple[bytes, Any]:
        if self.size < 8:
            raise AdapterInvalid([f"{self._name} is truncated: {self.size} bytes hold no header"])
        prefix = np.empty(8, np.uint8)
        _read_into(self._fd, self._name, prefix, 0)
        length = int.from_bytes(prefix.tobytes(), "little")
        if length > MAX_HEADER_BYTES:
            raise AdapterInvalid(
                [f"{self._name} is no safetensors file: its header would have {length} bytes, the limit is {MAX_HEADER_BYTES}"]
            )
        if 8 + length > self.size:
            raise AdapterInvalid([f"{self._name} is truncated: its header needs {8 + length} bytes, the file has {self.size}"])
        header = np.empty(length, np.uint8)
        _read_into(self._fd, self._name, header, 8)
        try:
            return prefix.tobytes() + header.tobytes(), strict_json(header.tobytes())
        except ValueError as error:
            raise AdapterInvalid([f"{self._name} is no safetensors file: its header is no valid JSON ({error})"]) from None

    def _check(self, header: Any) -> dict[str, TensorAt]:
        if not isinstance(header, dict):
            raise AdapterInvalid([f"{self._name} is no safetensors file: its header is no JSON object"])
        tensors, problems = {}, []
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            at = _entry(entry)
            if isinstance(at, TensorAt):
                tensors[name] = at
            else:
                problems.append(f"{self._name}: tensor {shorten(name)}: {at}")
        if problems:
            raise AdapterInvalid(problems[:20])
        tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
        offset = 0
        for name, at in tensors.items():
            if at.begin != offset:
                what = "overlaps the one before it" if at.begin < offset else "leaves a hole before it"
                raise AdapterInvalid([f"{self._name}: the data of tensor {shorten(name)} {what}"])
            offset = at.end
        held = self.size - len(self._head)
        if offset > held:
            raise AdapterInvalid(
                [f"{self._name} is truncated: its header promises {offset} bytes of tensors, the file holds {held}"]
            )
        if offset < held:
            raise AdapterInvalid([f"{self._name} holds {held - offset} bytes that no tensor accounts for"])
        return tensors


def read_known(path: pathlib.Path, size: int, sha256: str) -> dict[str, np.ndarray]:
    """The tensors of a file that `TensorFile` accepted before, read in one piece: arrays in the same memory, by name.

    Arguments:
        size, sha256: of that file. With the same hash it is that file, so nothing else is checked again.

    Raises:
        AdapterInvalid: it can't be read, or is another one now.
    """
    with open(open_regular(path), "rb", buffering=0) as file:
        as_long = os.fstat(file.fileno()).st_size == size
        data = np.empty(size if as_long else 0, np.uint8)
        _read_into(file.fileno(), path.name, data, 0)
    if not as_long or hashlib.sha256(data).hexdigest() != sha256:
        raise AdapterInvalid([f"{path.name} is not the one that was published"])
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            found[name] = data[start + begin : start + end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def _read_into(fd: int, name: str, data: np.ndarray, offset: int) -> None:
    """Fills `data` with what the file holds from `offset` on: one call of the system may give less."""
    view = memoryview(data)
    while view:
        count = os.preadv(fd, [view], offset)
        if count == 0:
            raise AdapterInvalid([f"{name} became shorter while it was read"])
        view, offset = view[count:], offset + count


def open_regular(path: pathlib.Path) -> int:
    """A file descriptor for reading a regular file: no symbolic link is followed, and no pipe or device blocks the caller.

    Raises:
        AdapterInvalid: it is something else, missing or unreadable; the message carries the file's name only.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise AdapterInvalid([f"{path.name} is missing"]) from None
    except OSError as error:
        reason = "is a symbolic link" if path.is_symlink() else f"can't be read ({error.strerror})"
        raise AdapterInvalid([f"{path.name} {reason}"]) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise AdapterInvalid([f"{path.name} is not a regular file"])
    return fd


def strict_json(data: bytes) -> Any:
    """JSON as the standard has it: UTF-8, no NaN or Infinity, no key twice. Raises ValueError."""

    def constant(text: str) -> None:
        raise ValueError(f"{text} is not allowed")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            raise ValueError("a key occurs twice")
        return found

    try:
        return json.loads(data.decode(), parse_constant=constant, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def shorten(text: str, limit: int = 100) -> str:
    """`text` as it may stand in a message: on one line, and not longer than `limit` characters."""
    shown = text if text.isprintable() else repr(text)
    return shown if len(shown) <= limit else f"{shown[:limit]}..."


def _entry(entry: Any) -> TensorAt | str:
    """A header entry, or what is wrong with it."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "its entry is not {dtype, shape, data_offsets}"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        return f"its dtype {shorten(str(dtype))} is unknown"
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        return "its shape is no list of whole numbers"
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return "its data_offsets are not [begin, end]"
    needed, given = math.prod(shape) * _ITEM_BYTES[dtype], offsets[1] - offsets[0]
    if needed != given:
        return f"shape {shape} of {dtype} needs {needed} bytes, its data_offsets give {given}"
    return TensorAt(dtype, tuple(shape), *offsets)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 48 for number in value)
