"""Puts an adapter into the store as its next version: whole, or not at all.

Written to `<version>.incoming-*`, synced, renamed. A version number is claimed under the lock of the adapter's folder and is
never given twice. Whether the content can be served is for `refresh` to decide, which knows the base model.
"""

import fcntl
import os
import pathlib
import secrets
import shutil
import time
from collections.abc import Mapping
from typing import Any

from jaxlora import peft
from jaxlora.adapters.catalogue import Catalogue
from jaxlora.adapters.names import MAX_VERSION, AdapterName
from jaxlora.adapters.store import Store, is_incoming
from jaxlora.files import is_locked, locked, sync_folder, write_synced
from jaxlora.peft.folder import to_json

# Writers of this project hold the lock of their incoming folder; others get this long before it counts as left behind.
STALE_AFTER_S = 3600.0


def publish(
    source: str | pathlib.Path | peft.LoraAdapter,
    name: AdapterName | str,
    store_root: str | pathlib.Path,
    provenance: Mapping[str, Any] | None = None,
    catalogue: Catalogue | None = None,
) -> int:
    """Publishes a PEFT folder or an adapter in memory, and gives the version that it got.

    Arguments:
        source: of a folder only the config, the weights and the provenance are taken.
        name: `user/adapter`; a version can't be chosen.
        provenance: where the adapter comes from, for `provenance.json`; replaces that of a source folder.
        catalogue: remembers the numbers of versions that were deleted; without it only what lies in the store counts.

    Raises:
        AdapterInvalid: the source folder is no adapter (a file is missing, or it holds pickles).
        ValueError: the name is not valid.
        OSError: the store can't be written.
    """
    name = AdapterName.parse(name) if isinstance(name, str) else name
    if name.version is not None:
        raise ValueError(f"{name}: publish without a version; it gets the next one")
    if not isinstance(source, peft.LoraAdapter):
        source = pathlib.Path(source)
        peft.check_files(source)
    store = Store(store_root)
    folder = store.make_adapter_path(name)
    with locked(folder):
        _remove_stale(folder)
        version = _next_version(store, name, catalogue)
        incoming = folder / f"{version}.incoming-{os.getpid()}-{secrets.token_hex(4)}"
        os.mkdir(incoming)
        lock = os.open(incoming, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        _fill(incoming, source, provenance)
        sync_folder(incoming)
        with locked(folder):
            # Only someone who writes into the store by hand can have taken the number in the meantime.
            if os.path.lexists(folder / str(version)):
                version = _next_version(store, name, catalogue)
            os.rename(incoming, folder / str(version))
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(incoming, ignore_errors=True)
        raise
    finally:
        os.close(lock)
    return version


def _next_version(store: Store, name: AdapterName, catalogue: Catalogue | None) -> int:
    used = max(store.look(name).high_water, catalogue.high_water(name) if catalogue else 0)
    if used >= MAX_VERSION:
        raise ValueError(f"{name} has no version numbers left: the last one is {MAX_VERSION}")
    return used + 1


def _fill(incoming: pathlib.Path, source: pathlib.Path | peft.LoraAdapter, provenance: Mapping[str, Any] | None) -> None:
    if isinstance(source, peft.LoraAdapter):
        peft.write(incoming, source, provenance)
        return
    for name in (peft.CONFIG_FILE, peft.WEIGHTS_FILE, peft.PROVENANCE_FILE):
        if name != peft.PROVENANCE_FILE or (provenance is None and (source / name).is_file()):
            _copy(source / name, incoming / name)
    if provenance is not None:
        write_synced(incoming / peft.PROVENANCE_FILE, to_json(provenance))


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    # Not `copy2`: Triton reloads a model when a file below it is newer, so the copy must not keep an old time.
    with open(source, "rb") as reader, open(target, "xb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
        writer.flush()
        os.fsync(writer.fileno())


def _remove_stale(folder: pathlib.Path) -> None:
    for entry in list(os.scandir(folder)):
        if not is_incoming(entry.name) or not entry.is_dir(follow_symlinks=False):
            continue
        if time.time() - entry.stat(follow_symlinks=False).st_mtime > STALE_AFTER_S and not is_locked(pathlib.Path(entry.path)):
            shutil.rmtree(entry.path, ignore_errors=True)
