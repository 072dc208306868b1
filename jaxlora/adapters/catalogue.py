"""The catalogue: which versions of which adapters can be served, as one JSON file that is replaced atomically.

`refresh` writes it, everyone else reads it. It lies outside the model repository, since Triton watches the folders of its models.
Knows nothing of base models or tensors.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from jaxlora.adapters.names import AdapterName
from jaxlora.adapters.policy import LATEST, NONE, Serve
from jaxlora.adapters.store import Fingerprint, version_path
from jaxlora.errors import AdapterNotFound, InvalidRequest

SCHEMA = 1
READY, REJECTED, REMOVED = "ready", "rejected", "removed"
_LISTED = 20


@dataclasses.dataclass(frozen=True)
class AdapterVersion:
    """One immutable version that can be served. Hashable: the key of the host cache and of the device slots."""

    name: AdapterName
    sha256: str
    config_sha256: str
    rank: int
    nbytes: int
    path: pathlib.Path = dataclasses.field(compare=False)
    target_modules: tuple[str, ...] = dataclasses.field(compare=False)

    @property
    def version(self) -> int:
        return self.name.version or 0

    def __str__(self) -> str:
        return str(self.name)


@dataclasses.dataclass(frozen=True)
class VersionRecord:
    """What is known of one version. A rejected or removed version that was served once keeps its hashes."""

    state: str
    fingerprint: Fingerprint | None = None
    sha256: str = ""
    config_sha256: str = ""
    rank: int = 0
    target_modules: tuple[str, ...] = ()
    num_modules: int = 0
    nbytes: int = 0
    published: float = 0.0
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    problems: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class AdapterRecord:
    """What is known of one adapter. `serve` is the policy in force, `policy_problem` what is wrong with the one in the store."""

    high_water: int = 0
    serve: Serve = LATEST
    policy_problem: str = ""
    versions: Mapping[int, VersionRecord] = dataclasses.field(default_factory=dict)

    def present(self) -> dict[int, VersionRecord]:
        """The versions that lie in the store, ascending."""
        return {number: record for number, record in sorted(self.versions.items()) if record.state != REMOVED}

    def ready(self) -> list[int]:
        """The versions that can be served, ascending."""
        return sorted(version for version, record in self.versions.items() if record.state == READY)

    def serving(self) -> int | None:
        """The version that answers to the name alone; None if none does."""
        ready = self.ready()
        if self.serve == LATEST:
            return ready[-1] if ready else None
        return self.serve if self.serve in ready else None


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """Everything about a store at one moment. `base` stands for the base model and limits that the versions were checked with,
    `servers` for the server processes that refreshed it last."""

    store: str = ""
    base: str = ""
    servers: tuple[str, ...] = ()
    adapters: Mapping[str, AdapterRecord] = dataclasses.field(default_factory=dict)

    def resolve(self, name: str | AdapterName) -> AdapterVersion:
        """The version that answers to a name.

        Raises:
            InvalidRequest: the name is malformed.
            AdapterNotFound: no such adapter or version, or it is not in service; names what exists for that user.
        """
        name = _parsed(name)
        record = self.adapters.get(name.unpinned)
        ready = record.ready() if record else []
        if record is None or not record.present():
            raise AdapterNotFound(f"{name.unpinned}: no such adapter; {self._of_user(name.user)}")
        if record.serve == NONE:
            raise AdapterNotFound(f"{name.unpinned} was taken out of service; {self._of_user(name.user)}")
        version = name.version or record.serving()
        if version not in ready:
            raise AdapterNotFound(self._why_not(name, record, ready))
        return self._version(name.at(version), record.versions[version])

    def high_water(self, name: AdapterName) -> int:
        """The largest version number that was ever seen of an adapter, 0 for none."""
        record = self.adapters.get(name.unpinned)
        return record.high_water if record else 0

    def describe(self, user: str | None = None, name: str | None = None) -> dict[str, Any]:
        """What the `adapters` model answers: `{"adapters": [...]}`, all of them, those of a user, or one of them.

        Raises:
            InvalidRequest: the name is malformed.
            AdapterNotFound: there is no adapter or version of that name, in whatever state.
        """
        wanted = _parsed(name) if name is not None else None
        keys = [wanted.unpinned] if wanted else sorted(self.adapters)
        listed = []
        for key in keys:
            record = self.adapters.get(key, AdapterRecord())
            versions = record.present()
            if wanted and (not versions or wanted.version not in (None, *versions)):
                self.resolve(wanted)
            if versions and user in (None, key.partition("/")[0]):
                shown = versions if wanted is None or wanted.version is None else {wanted.version: versions[wanted.version]}
                listed.append(_described(key, record, shown))
        return {"adapters": listed}

    def to_json(self) -> bytes:
        adapters = {
            name: {**vars(record), "versions": {number: vars(version) for number, version in record.versions.items()}}
            for name, record in sorted(self.adapters.items())
        }
        return json.dumps({"schema": SCHEMA, **vars(self), "adapters": adapters}, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Catalogue":
        """Raises ValueError for anything that `to_json` of this schema didn't write."""
        try:
            raw = json.loads(data)
            if raw.pop("schema") != SCHEMA:
                raise ValueError("another schema")
            adapters = {name: _adapter_record(record) for name, record in raw.pop("adapters").items()}
            return cls(**raw | {"servers": tuple(raw["servers"]), "adapters": adapters})
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a catalogue: {error}") from None

    def _version(self, name: AdapterName, record: VersionRecord) -> AdapterVersion:
        path = version_path(self.store, name)
        return AdapterVersion(name, record.sha256, record.config_sha256, record.rank, record.nbytes, path, record.target_modules)

    def _of_user(self, user: str) -> str:
        prefix = f"{user}/"
        found = sorted(
            name.removeprefix(prefix)
            for name, record in self.adapters.items()
            if name.startswith(prefix) and record.serve != NONE and record.ready()
        )
        return f"{user} has: {_bounded(found)}" if found else f"{user} has no adapters in service"

    def _why_not(self, name: AdapterName, record: AdapterRecord, ready: list[int]) -> str:
        exists = f"versions of {name.unpinned} that can be served: {_bounded(ready) or 'none'}"
        wanted = name.version or (record.serve if isinstance(record.serve, int) else max(record.present()))
        known = record.versions.get(wanted)
        if known is not None and known.state == REJECTED:
            return f"{name.unpinned}@{wanted} was refused ({'; '.join(known.problems)[:500]}); {exists}"
        if name.version is None:
            return f"{name.unpinned}: its policy serves version {wanted}, which does not exist; {exists}"
        return f"{name}: no such version; {exists}"


class CatalogueReader:
    """The newest catalogue at the cost of one `stat` a call. Any thread may call it."""

    def __init__(self, path: str | os.PathLike[str]):
        self._path = pathlib.Path(path)
        self._lock = threading.Lock()
        self._current: tuple[tuple[int, ...] | None, Catalogue] = (None, Catalogue())

    def current(self) -> Catalogue:
        """The catalogue on disk; the last good one while the file can't be read, an empty one before there is any."""
        key = self._stat()
        if key == self._current[0]:
            return self._current[1]
        with self._lock:
            key = self._stat()
            if key is not None and key != self._current[0]:
                try:
                    self._current = (key, Catalogue.from_json(self._path.read_bytes()))
                except (OSError, ValueError):
                    self._current = (key, self._current[1])
        return self._current[1]

    def _stat(self) -> tuple[int, ...] | None:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return (found.st_ino, found.st_mtime_ns, found.st_size)


def catalogue_path(cache_dir: str | os.PathLike[str], store_root: str | os.PathLike[str]) -> pathlib.Path:
    """Where the catalogue of a store lies: the same file for every process that names the same store."""
    digest = hashlib.sha256(os.path.realpath(store_root).encode()).hexdigest()
    return pathlib.Path(cache_dir) / "catalogues" / f"{digest[:16]}.json"


def _parsed(name: str | AdapterName) -> AdapterName:
    if isinstance(name, AdapterName):
        return name
    try:
        return AdapterName.parse(name)
    except ValueError as error:
        raise InvalidRequest({"lora_name": str(error)}) from None


def _adapter_record(raw: dict[str, Any]) -> AdapterRecord:
    versions = {int(number): _version_record(version) for number, version in raw.pop("versions").items()}
    return AdapterRecord(**raw, versions=versions)


def _version_record(raw: dict[str, Any]) -> VersionRecord:
    fingerprint = raw.pop("fingerprint")
    raw["fingerprint"] = None if fingerprint is None else tuple(tuple(part) for part in fingerprint)
    raw["target_modules"], raw["problems"] = tuple(raw["target_modules"]), tuple(raw["problems"])
    return VersionRecord(**raw)


def _described(name: str, record: AdapterRecord, versions: Mapping[int, VersionRecord]) -> dict[str, Any]:
    user, _, adapter = name.partition("/")
    described: dict[str, Any] = {
        "name": name,
        "user": user,
        "adapter": adapter,
        "serving": record.serving(),
        "policy": {"serve": record.serve},
    }
    if record.policy_problem:
        described["policy_problem"] = record.policy_problem
    described["versions"] = [
        {
            "version": number,
            **{key: value for key, value in vars(version).items() if key != "fingerprint" and value not in ((), "")},
        }
        for number, version in versions.items()
    ]
    return described


def _bounded(items: Iterable[Any]) -> str:
    items = [str(item) for item in items]
    shown = items[:_LISTED] if items and not items[0].isdigit() else items[-_LISTED:]
    return ", ".join(shown) + (f" and {len(items) - _LISTED} more" if len(items) > _LISTED else "")
