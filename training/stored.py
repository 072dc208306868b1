"""Adapters that lie in the store already: which version a name stands for, its weights, what is known of where it came from."""

import pathlib
from typing import Any

from jaxlora import peft
from jaxlora.adapters import AdapterName, Store
from jaxlora.adapters.policy import NONE, read_policy
from jaxlora.adapters.store import version_path
from jaxlora.config import ModelConfig
from jaxlora.errors import AdapterInvalid, AdapterNotFound
from jaxlora.peft.folder import read_json_file
from jaxlora.settings import Settings


def find(store: pathlib.Path, name: AdapterName) -> AdapterName:
    """The name with a version: its own, the one that the policy serves, or the latest.

    Raises:
        AdapterNotFound: there is no such adapter or version in the store.
    """
    found = Store(store).look(name)
    if not found.versions:
        raise AdapterNotFound(f"{name.unpinned}: no such adapter in {store}")
    policy = read_policy(found.path)
    version = name.version or (policy if isinstance(policy, int) else found.versions[-1])
    if policy == NONE and name.version is None:
        raise AdapterNotFound(f"{name.unpinned} was taken out of service; name a version: {', '.join(map(str, found.versions))}")
    if version not in found.versions:
        raise AdapterNotFound(f"{name.unpinned} has no version {version}; there are: {', '.join(map(str, found.versions))}")
    return name.at(version)


def read(store: pathlib.Path, name: AdapterName, config: ModelConfig, settings: Settings) -> peft.LoraAdapter:
    """The adapter of a name with a version. Raises AdapterInvalid where it doesn't fit the base model."""
    return peft.read(version_path(store, name), config, peft.Limits.of(settings))


def provenance(store: pathlib.Path, name: AdapterName) -> dict[str, Any]:
    """What its `provenance.json` says; empty where there is none that can be read."""
    try:
        content = read_json_file(version_path(store, name) / peft.PROVENANCE_FILE)[1]
    except AdapterInvalid:
        return {}
    return content if isinstance(content, dict) else {}


def versions(store: pathlib.Path, name: AdapterName) -> list[AdapterName]:
    """Every version of an adapter in the store, ascending."""
    return [name.at(version) for version in Store(store).look(name).versions]
