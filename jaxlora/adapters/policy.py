"""`policy.json`: which version of an adapter answers to its name without a version.

`{"serve": "latest"}` (also where the file is missing), `{"serve": 2}`, or `{"serve": "none"}`: taken out of service.
"""

import os
import pathlib

from jaxlora.adapters.names import MAX_VERSION, AdapterName
from jaxlora.adapters.store import POLICY_FILE, Store
from jaxlora.errors import AdapterInvalid, AdapterNotFound
from jaxlora.files import replace
from jaxlora.peft.folder import read_json_file, to_json

LATEST = "latest"
NONE = "none"
Serve = str | int

RULE = '{"serve": "latest"}, {"serve": "none"} or {"serve": VERSION}'


def read_policy(folder: pathlib.Path) -> Serve:
    """What the policy of an adapter's folder says. Raises AdapterInvalid if the file is anything but a policy."""
    path = folder / POLICY_FILE
    if not os.path.lexists(path):
        return LATEST
    _, content = read_json_file(path)
    if not isinstance(content, dict) or set(content) != {"serve"} or not is_serve(content["serve"]):
        raise AdapterInvalid([f"{POLICY_FILE} is not one of {RULE}"])
    return content["serve"]


def write_policy(store_root: str | pathlib.Path, name: AdapterName, serve: Serve) -> None:
    """Sets the policy of an adapter; it takes effect when the `adapters` model is loaded.

    Raises:
        AdapterNotFound: the store has no such adapter.
        ValueError: `serve` is no policy.
    """
    if not is_serve(serve):
        raise ValueError(f"a policy is one of {RULE}")
    found = Store(store_root).look(name)
    if not found.versions:
        raise AdapterNotFound(f"{name.unpinned}: no such adapter in the store")
    replace(found.path / POLICY_FILE, to_json({"serve": serve}))


def is_serve(value: object) -> bool:
    """Whether a value may stand behind `serve`."""
    return value in (LATEST, NONE) if isinstance(value, str) else type(value) is int and 1 <= value <= MAX_VERSION
