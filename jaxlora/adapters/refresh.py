"""Brings the catalogue up to date with the store: what the `adapters` model does when Triton loads it.

A version is checked completely once, when it is first seen, and recognised by its inodes from then on. Valid versions go live
even if others that came with them are not; those are recorded as rejected, and what was served before goes on being served.
A version whose files change after it was accepted is withdrawn until they are as they were; the largest one that is still good
answers meanwhile.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import traceback
from typing import Any

from jaxlora import peft
from jaxlora.adapters.catalogue import READY, REJECTED, REMOVED, AdapterRecord, Catalogue, VersionRecord
from jaxlora.adapters.names import AdapterName
from jaxlora.adapters.policy import Serve, read_policy
from jaxlora.adapters.store import AdapterFolder, Fingerprint, Store, fingerprint, is_real_folder, version_path
from jaxlora.config import ModelConfig
from jaxlora.errors import AdapterInvalid
from jaxlora.files import locked, replace
from jaxlora.peft.check import some
from jaxlora.peft.folder import read_json_file

MAX_PROBLEMS = 20
MAX_PROVENANCE = 16
MAX_SERVERS = 16
CHANGED = "its files are not those that were published under this version; versions never change: publish a new one"


@dataclasses.dataclass
class Report:
    """What one refresh found. `rejected` maps what is newly refused (`user/adapter@version` or `user/adapter`) to the reasons.

    `first` is true for the first refresh of a server process: there the store is as it was left, and nobody waits for an answer.
    """

    first: bool
    added: list[str] = dataclasses.field(default_factory=list)
    removed: list[str] = dataclasses.field(default_factory=list)
    rejected: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)

    def problems(self) -> list[str]:
        """All that is newly refused, each with its reasons; bounded."""
        found = [f"{name}: {'; '.join(problems)}" for name, problems in self.rejected.items()]
        return found if len(found) <= MAX_PROBLEMS else [*found[:MAX_PROBLEMS], f"and {len(found) - MAX_PROBLEMS} more"]

    def lines(self) -> list[str]:
        """Everything, for a log."""
        lines = [f"refused {problem}" for problem in self.problems()]
        lines += [
            f"{len(names)} {what}: {some(names)}" for what, names in (("new", self.added), ("removed", self.removed)) if names
        ]
        return lines + self.warnings[:MAX_PROBLEMS]


def refresh(
    store_root: str | os.PathLike[str],
    catalogue_path: str | os.PathLike[str],
    model_config: ModelConfig,
    limits: peft.Limits,
    server: str = "",
) -> Report:
    """Checks what is new in a store and replaces its catalogue. Only one process at a time does that.

    Arguments:
        server: names the server process, the same for every refresh on its behalf; several may use one store.

    Raises:
        OSError: the store can't be read or the catalogue can't be written.
    """
    path = pathlib.Path(catalogue_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock"), create=True):
        old, warning = _last(path)
        report = Report(first=server not in old.servers, warnings=[warning] if warning else [])
        new = _Refresh(Store(store_root), old, model_config, limits, report).run(server)
        if new != old:
            replace(path, new.to_json())
    return report


class _Refresh:
    def __init__(self, store: Store, old: Catalogue, model_config: ModelConfig, limits: peft.Limits, report: Report):
        self._store, self._old, self._report = store, old, report
        self._model_config, self._limits = model_config, limits
        self._base = _base_of(model_config, limits)

    def run(self, server: str) -> Catalogue:
        others = [known for known in self._old.servers if known != server]
        servers = (*others[-MAX_SERVERS:], server) if server else self._old.servers
        adapters: dict[str, AdapterRecord] = {}
        unread: list[str] = []
        for found in self._store.scan():
            if isinstance(found, AdapterFolder):
                adapters[found.name.unpinned] = self._adapter(found)
                self._report.warnings += [f"{found.name}: {entry[:80]!r} is no version number and is left out" for entry in found.ignored]
                continue
            self._report.warnings.append(found.text)
            if found.unread:
                unread.append(found.prefix)
        for name, known in self._old.adapters.items():
            if name in adapters:
                continue
            # What can't be read now is not gone: it goes on being served.
            kept = known.versions if name.startswith(tuple(unread)) else self._without_folder(name, known, set())
            adapters[name] = dataclasses.replace(known, versions=kept)
        return Catalogue(str(self._store.root), self._base, servers, adapters)

    def _adapter(self, found: AdapterFolder) -> AdapterRecord:
        known = self._old.adapters.get(found.name.unpinned, AdapterRecord())
        versions = self._without_folder(found.name.unpinned, known, set(found.versions))
        for number in found.versions:
            name = found.name.at(number)
            before = known.versions.get(number)
            after = versions[number] = self._version(name, before)
            if after.state == REJECTED and after is not before and _is_news(before, after):
                self._report.rejected[str(name)] = list(after.problems)
            if after.state == READY and (before is None or before.state != READY):
                self._report.added.append(str(name))
        record = AdapterRecord(max(known.high_water, *found.versions, 0), known.serve, "", dict(sorted(versions.items())))
        serve, problem = self._policy(found, record)
        if problem and problem != known.policy_problem:
            self._report.rejected[found.name.unpinned] = [f"{problem}; the policy in force stays {json.dumps(serve)}"]
        return dataclasses.replace(record, serve=serve, policy_problem=problem)

    def _without_folder(self, name: str, known: AdapterRecord, present: set[int]) -> dict[int, VersionRecord]:
        """Records of versions whose folder is gone. What was served once keeps its hashes: nothing else may take its number."""
        gone = {}
        for number, record in known.versions.items():
            if number in present:
                continue
            if record.state == READY:
                self._report.removed.append(f"{name}@{number}")
            if record.sha256:
                gone[number] = dataclasses.replace(record, state=REMOVED, fingerprint=None, problems=())
        return gone

    def _version(self, name: AdapterName, known: VersionRecord | None) -> VersionRecord:
        path = version_path(self._store.root, name)
        seen: Fingerprint | None = fingerprint(path)
        same_files = known is not None and known.fingerprint == seen
        if known is not None and same_files and self._old.base == self._base:
            return known
        accepted, problems = None, []
        try:
            accepted = self._accept(path)
        except AdapterInvalid as error:
            problems = error.problems
        except Exception as error:
            # One folder must not stand in the way of all others. It is no verdict on the files: without a fingerprint they are
            # looked at again next time.
            traceback.print_exception(error)
            problems, seen = [f"it can't be checked ({_reason(error)})"], None
        before = known if known is not None and known.sha256 else None
        if before is not None and not same_files and (accepted is None or not _same_content(accepted, before)):
            problems = [CHANGED, *problems]
        if accepted is not None and not problems:
            return dataclasses.replace(accepted, fingerprint=seen)
        rejected = before or VersionRecord(REJECTED)
        return dataclasses.replace(rejected, state=REJECTED, fingerprint=seen, problems=tuple(problems[:MAX_PROBLEMS]))

    def _accept(self, path: pathlib.Path) -> VersionRecord:
        if not is_real_folder(path):
            raise AdapterInvalid(["it is a symbolic link or a file, not a folder"])
        info = peft.validate(path, self._model_config, self._limits)
        return VersionRecord(READY, published=os.stat(path).st_mtime, provenance=_provenance(path), **vars(info))

    def _policy(self, found: AdapterFolder, record: AdapterRecord) -> tuple[Serve, str]:
        """The policy in force, and what is wrong with the one in the store."""
        try:
            wanted = read_policy(found.path)
        except AdapterInvalid as error:
            return record.serve, str(error)
        except OSError as error:
            return record.serve, f"policy.json can't be read ({_reason(error)})"
        if isinstance(wanted, int) and wanted not in record.ready():
            ready = ", ".join(map(str, record.ready()[-MAX_PROBLEMS:])) or "none"
            return record.serve, f"policy.json serves version {wanted}, which can't be served; versions that can: {ready}"
        return wanted, ""


def _reason(error: Exception) -> str:
    """An error without the paths that its text may hold."""
    return error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__


def _same_content(one: VersionRecord, other: VersionRecord) -> bool:
    return (one.sha256, one.config_sha256) == (other.sha256, other.config_sha256)


def _is_news(before: VersionRecord | None, after: VersionRecord) -> bool:
    return before is None or before.problems != after.problems or after.fingerprint not in (None, before.fingerprint)


def _last(path: pathlib.Path) -> tuple[Catalogue, str]:
    try:
        return Catalogue.from_json(path.read_bytes()), ""
    except FileNotFoundError:
        return Catalogue(), ""
    except ValueError as error:
        return Catalogue(), f"the catalogue is built anew, the old one can't be used: {error}"


def _base_of(model_config: ModelConfig, limits: peft.Limits) -> str:
    """Changes when a version that was accepted may no longer be, or the other way round."""
    shapes = [(path, at.in_features, at.out_features) for path, at in model_config.linear_paths().items()]
    return hashlib.sha256(json.dumps([shapes, dataclasses.asdict(limits)]).encode()).hexdigest()[:16]


def _provenance(path: pathlib.Path) -> dict[str, Any]:
    """The plain values of `provenance.json`, a few of them and none of them long. Raises AdapterInvalid."""
    file = path / peft.PROVENANCE_FILE
    if not os.path.lexists(file):
        return {}
    _, content = read_json_file(file)
    if not isinstance(content, dict):
        raise AdapterInvalid([f"{peft.PROVENANCE_FILE} is no JSON object"])
    plain = {
        key[:64]: value[:200] if isinstance(value, str) else value
        for key, value in content.items()
        if isinstance(value, str | int | float)
    }
    return dict(sorted(plain.items())[:MAX_PROVENANCE])
