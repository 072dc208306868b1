"""From a finished adapter to a version that a server answers with.

A run publishes once: a version in the store that carries the run's mark and the same weights is that of this run, so a run that
was killed on the way finds it again.
"""

import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from client import Client, ServerUnreachable
from client.publishing import Publisher
from jaxlora import peft
from jaxlora.adapters import AdapterName, Catalogue, publish
from jaxlora.adapters.store import version_path
from jaxlora.errors import AdapterNotFound
from jaxlora.files import sha256, sync_folder
from server import access
from training import stored

RUN = "run"  # the key of the provenance file that carries the run's mark


def write_adapter(folder: pathlib.Path, adapter: peft.LoraAdapter, provenance: Mapping[str, Any]) -> None:
    """Writes a PEFT folder, whole or not at all; what was there is replaced."""
    incoming = folder.with_name(f"{folder.name}.incoming-{secrets.token_hex(4)}")
    incoming.mkdir(parents=True)
    try:
        peft.write(incoming, adapter, provenance)
        sync_folder(incoming)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(incoming, folder)
    except BaseException:
        shutil.rmtree(incoming, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def find_published(folder: pathlib.Path, name: AdapterName, store: pathlib.Path, run: str) -> AdapterName | None:
    """The version that this run has published from this folder already."""
    for version in reversed(stored.versions(store, name)):
        weights = version_path(store, version) / peft.WEIGHTS_FILE
        if (
            stored.provenance(store, version).get(RUN) == run
            and weights.is_file()
            and sha256(weights) == sha256(folder / peft.WEIGHTS_FILE)
        ):
            return version
    return None


def publish_and_verify(
    folder: pathlib.Path,
    name: AdapterName,
    store: pathlib.Path,
    url: str,
    run: str,
    say: Callable[[str], None],
    catalogue: Catalogue | None = None,
) -> AdapterName:
    """Puts the adapter of a folder into the store as the next version, makes the server at `url` load it, and sees that a request
    is answered by it. Without a server it says what to do. `catalogue` remembers version numbers whose folders are gone, where it can be had.

    Raises:
        AdapterInvalid: the server refused it, with its reasons; what it served before stays.
        ServingError: the server failed otherwise. The version stays in the store.
        OSError: the store can't be written.
    """
    with Client(url, headers=access.grpc_headers()) as client:
        version = find_published(folder, name, store, run)
        try:
            if version is None:
                published = Publisher(client, store, catalogue).publish(folder, name)
                version = name.at(published.version)
            else:
                client.load_adapters()
            _verify(client, version, say)
        except ServerUnreachable as error:
            version = version or find_published(folder, name, store, run) or name.at(publish(folder, name, store, catalogue=catalogue))
            say(f"{version} is in the store {store}, but no server loaded it ({error})")
            say(
                "`make serve` serves it; a server that runs elsewhere on this store takes it over with: curl -X POST http://HOST:8000/v2/repository/models/adapters/load"
            )
    return version


def _verify(client: Client, version: AdapterName, say: Callable[[str], None]) -> None:
    serving = client.adapters(name=version.unpinned)[0].serving
    asked = version.unpinned if serving == version.version else str(version)
    answer = client.generate("Hello", adapter=asked, max_tokens=1)
    if answer.adapter != str(version):
        raise AdapterNotFound(f"the server answered with {answer.adapter or 'the base model'}, not with {version}")
    say(f"{version} is live: {client.url} answers with it")
    if serving != version.version:
        command = f"python -m client.adapters serve {version.unpinned} --version {version.version}"
        say(f"its policy serves version {serving} under the name alone: {command} changes that")
