"""The adapters that a server knows, as types, from the JSON that its `adapters` model answers."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Version:
    """One version of an adapter. `state` is `ready` or `rejected`; then `problems` says why. `published` is in Unix seconds."""

    version: int
    state: str
    sha256: str = ""
    config_sha256: str = ""
    rank: int = 0
    target_modules: tuple[str, ...] = ()
    num_modules: int = 0
    nbytes: int = 0
    published: float = 0.0
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def is_ready(self) -> bool:
        """Whether requests may name this version."""
        return self.state == "ready"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One adapter. `serving` is the version that answers to its name (None: none does), `policy` what decides that."""

    name: str
    serving: int | None
    policy: str | int
    versions: tuple[Version, ...]
    policy_problem: str = ""

    def version(self, number: int) -> Version | None:
        return next((version for version in self.versions if version.version == number), None)


def query(user: str | None, name: str | None) -> bytes:
    """What to ask the `adapters` model. A user and a name together are refused by it."""
    return json.dumps({key: value for key, value in (("user", user), ("name", name)) if value is not None}).encode()


def parse(result: bytes) -> list[Adapter]:
    """The adapters in an answer."""
    return [_adapter(described) for described in json.loads(result)["adapters"]]


def _adapter(raw: dict[str, Any]) -> Adapter:
    versions = tuple(_known(Version, version) for version in raw["versions"])
    return Adapter(raw["name"], raw["serving"], raw["policy"]["serve"], versions, raw.get("policy_problem", ""))


def _known(kind: type[Version], raw: dict[str, Any]) -> Version:
    # A newer server may tell more than this client knows.
    names = {field.name for field in dataclasses.fields(kind)}
    lists = {key: tuple(value) for key, value in raw.items() if isinstance(value, list)}
    return kind(**{key: value for key, value in (raw | lists).items() if key in names})
