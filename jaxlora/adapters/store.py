"""Where things lie in the adapter store: `users/<user_id>/adapters/<adapter_id>/<version>/`, `policy.json` beside the versions.

Every path is built from names that match their pattern, and nothing at or below `users` may be a symbolic link, so nothing that
is reached here lies outside the store. Knows names and files; knows nothing of what is in them.
"""

import dataclasses
import os
import pathlib
import re
import stat
from collections.abc import Iterator

from jaxlora.adapters.names import AdapterName, is_id, parse_version
from jaxlora.files import sync_folder
from jaxlora.peft import CONFIG_FILE, PROVENANCE_FILE, WEIGHTS_FILE

POLICY_FILE = "policy.json"

_INCOMING = re.compile(r"([1-9][0-9]{0,9})\.incoming-.+")
_REFUSED = re.compile(r"([1-9][0-9]{0,9})\.refused-.+")

Fingerprint = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class AdapterFolder:
    """One adapter as it lies in the store. `versions` holds the numbers that have an entry, `taken` those being written and those moved aside
    as they were refused; `ignored` names folders that are neither."""

    name: AdapterName
    path: pathlib.Path
    versions: tuple[int, ...]
    taken: tuple[int, ...]
    ignored: tuple[str, ...]

    @property
    def high_water(self) -> int:
        """The largest version number in use, 0 for none."""
        return max((*self.versions, *self.taken), default=0)


@dataclasses.dataclass(frozen=True)
class Skipped:
    """What was not looked at in the store. Where `unread` is true, adapters whose key starts with `prefix` may lie behind it."""

    text: str
    prefix: str = ""
    unread: bool = False


class Store:
    """A folder that holds `users/`."""

    def __init__(self, root: str | os.PathLike[str]):
        self.root = pathlib.Path(os.path.realpath(root))

    def adapter_path(self, name: AdapterName) -> pathlib.Path:
        """The folder of an adapter, there or not."""
        return pathlib.Path(self.root, "users", name.user, "adapters", name.adapter)

    def make_adapter_path(self, name: AdapterName) -> pathlib.Path:
        """The folder of an adapter, created if need be. Raises NotADirectoryError where a link or a file is in the way."""
        path = self.root
        for part in ("users", name.user, "adapters", name.adapter):
            path = path / part
            try:
                os.mkdir(path)
                sync_folder(path.parent)
            except FileExistsError:
                if not stat.S_ISDIR(os.lstat(path).st_mode):
                    raise NotADirectoryError(f"{part} in the store is not a folder") from None
        return path

    def scan(self) -> Iterator[AdapterFolder | Skipped]:
        """Every adapter in the store, and what is no part of the layout or can't be read."""
        users = self.root / "users"
        for user in _folders(users, "users", ""):
            if isinstance(user, Skipped):
                yield user
                continue
            for adapter in _folders(users / user.name / "adapters", f"users/{user.name}/adapters", f"{user.name}/"):
                if isinstance(adapter, Skipped):
                    yield adapter
                    continue
                name = AdapterName(user.name, adapter.name)
                try:
                    yield self.look(name)
                except OSError as error:
                    yield Skipped(f"{name} can't be read ({error.strerror})", str(name), unread=True)

    def look(self, name: AdapterName) -> AdapterFolder:
        """One adapter; it has no versions if its folder is not there. Raises OSError if the folder can't be read."""
        path = self.adapter_path(name)
        try:
            entries = {entry.name: entry.is_dir(follow_symlinks=False) for entry in os.scandir(path)}
        except (FileNotFoundError, NotADirectoryError):
            entries = {}
        versions, taken, ignored = [], [], []
        for entry, is_folder in entries.items():
            if (version := parse_version(entry)) is not None:
                versions.append(version)
            elif match := _INCOMING.fullmatch(entry) or _REFUSED.fullmatch(entry):
                taken.append(int(match[1]))
            elif is_folder and not entry.startswith("."):
                ignored.append(entry)
        return AdapterFolder(dataclasses.replace(name, version=None), path, *map(tuple, map(sorted, (versions, taken, ignored))))


def version_path(store: str | os.PathLike[str], name: AdapterName) -> pathlib.Path:
    """The folder of one version, there or not. `store` is the root of the store, `name` has a version."""
    return pathlib.Path(store, "users", name.user, "adapters", name.adapter, str(name.version))


def is_incoming(name: str) -> bool:
    """Whether a folder name is that of a version that is still being written."""
    return _INCOMING.fullmatch(name) is not None


def fingerprint(path: pathlib.Path) -> Fingerprint:
    """What changes when a version's files are changed, from their inodes alone. Empty for a path that is no real folder."""
    if not is_real_folder(path):
        return ()
    return tuple(_file_fingerprint(os.path.join(path, name)) for name in (CONFIG_FILE, WEIGHTS_FILE, PROVENANCE_FILE))


def _file_fingerprint(path: str) -> tuple[int, ...]:
    try:
        found = os.lstat(path)
    except OSError:
        return ()
    # The change time too: it can't be set by hand, unlike the modification time.
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def is_real_folder(path: pathlib.Path) -> bool:
    """Whether a path is a folder and not a link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def _folders(path: pathlib.Path, shown: str, prefix: str) -> Iterator[os.DirEntry[str] | Skipped]:
    if not is_real_folder(path):
        if path.is_symlink():
            yield Skipped(f"{shown} is a symbolic link and is left out")
        return
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as error:
        yield Skipped(f"{shown} can't be read ({error.strerror})", prefix, unread=True)
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_symlink():
            yield Skipped(f"{shown}: {entry.name[:80]!r} is a symbolic link and is left out")
        elif not is_id(entry.name):
            yield Skipped(f"{shown}: {entry.name[:80]!r} is no valid id and is left out")
        elif entry.is_dir(follow_symlinks=False):
            yield entry
