"""Changes what a server serves: writes into its adapter store, asks it to load, and looks in its catalogue what came of it.

The store has to be the folder that the server sees. Nothing that was refused stays behind as a version or a policy.
"""

import dataclasses
import os
import pathlib
import secrets

from client.catalogue import Adapter
from client.errors import ServerUnreachable
from client.interface import LanguageModel
from jaxlora.adapters import AdapterName, Catalogue, Store, publish, write_policy
from jaxlora.adapters.policy import Serve
from jaxlora.adapters.store import POLICY_FILE
from jaxlora.errors import AdapterInvalid, AdapterNotFound, ServingError
from jaxlora.files import replace, sync_folder


@dataclasses.dataclass(frozen=True)
class Published:
    """A version that is live. `serving` is the one that answers to the name alone, which a policy may hold at another version."""

    version: int
    serving: int | None


class Publisher:
    """Publishes into one store for one server.

    Arguments:
        client: of the server that serves the store, or a LocalClient over it.
        store: folder that holds `users/`.
        catalogue: remembers version numbers whose folders are gone, where it can be had.
    """

    def __init__(self, client: LanguageModel, store: str | os.PathLike[str], catalogue: Catalogue | None = None):
        self._client, self._store, self._catalogue = client, Store(store), catalogue

    def publish(self, folder: str | os.PathLike[str], name: AdapterName) -> Published:
        """Copies a PEFT folder into the store as the next version of `name` and makes it live.

        Raises:
            AdapterInvalid: it was refused, with every reason; its copy has been moved aside, and what was live stays live.
            ServerUnreachable: before anything was copied, or with the version in the store, to be looked at when the server loads
            next.
        """
        self._client.adapters(user=name.user)  # nothing is copied for a server that is not there
        version = publish(pathlib.Path(folder), name, self._store.root, catalogue=self._catalogue)
        refusal = self._load()
        adapter = self._look(name)
        published = adapter.version(version) if adapter else None
        if adapter is not None and published is not None and published.is_ready:
            return Published(version, adapter.serving)
        aside = self._move_aside(name, version)
        if published is not None:
            raise AdapterInvalid([f"{name}@{version} was refused (its copy is now {aside.name})", *published.problems])
        raise refusal or AdapterInvalid(
            [f"{name}@{version} is not in the server's catalogue: does the server serve the store {self._store.root}?"]
        )

    def serve(self, name: AdapterName, serve: Serve) -> int | None:
        """Sets which version answers to `name`: a number, `latest`, or `none` for taking it out of service. Gives that version.

        Raises:
            AdapterNotFound: there is no such version that could be served.
            AdapterInvalid: the server did not take the policy over; the old one is back.
        """
        adapter = self._look(name)
        ready = [version.version for version in adapter.versions if version.is_ready] if adapter else []
        if adapter is None or (isinstance(serve, int) and serve not in ready):
            raise AdapterNotFound(
                f"{name} has no version {serve} that can be served; there are: {', '.join(map(str, ready)) or 'none'}"
            )
        path = self._store.adapter_path(name) / POLICY_FILE
        old = path.read_bytes() if path.is_file() else None
        write_policy(self._store.root, name, serve)
        refusal = self._load()
        adapter = self._look(name)
        if adapter is not None and adapter.policy == serve and not adapter.policy_problem:
            return adapter.serving
        if old is None:
            path.unlink(missing_ok=True)
        else:
            replace(path, old)
        raise refusal or AdapterInvalid(
            [f"the server did not take the policy of {name} over: does it serve the store {self._store.root}?"]
        )

    def _load(self) -> ServingError | None:
        """Makes live what is new. What is refused may be somebody else's: the catalogue knows."""
        try:
            self._client.load_adapters()
        except ServerUnreachable:
            raise
        except ServingError as error:
            return error
        return None

    def _look(self, name: AdapterName) -> Adapter | None:
        try:
            return self._client.adapters(name=name.unpinned)[0]
        except AdapterNotFound:
            return None

    def _move_aside(self, name: AdapterName, version: int) -> pathlib.Path:
        folder = self._store.adapter_path(name)
        aside = folder / f"{version}.refused-{secrets.token_hex(4)}"
        os.rename(folder / str(version), aside)
        sync_folder(folder)
        return aside
