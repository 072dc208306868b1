"""Publishing and policies by the command line: what is live afterwards, and what stays behind. The store and its refresh are
real, the server between them is played."""

import json
import pathlib
import shutil

import pytest

from client import adapters as command
from client import terminal
from client.errors import ServerUnreachable
from client.interface import LanguageModel
from jaxlora.adapters import CatalogueReader, publish, refresh
from jaxlora.adapters.query import answer
from jaxlora.errors import AdapterInvalid, EngineError

from .adapter_folders import BASE, LIMITS, folder


class PlayedServer(LanguageModel):
    """The `adapters` model of one server. `before_load` runs when a load begins; `fault` is raised instead of loading."""

    def __init__(self, store: pathlib.Path, catalogue: pathlib.Path):
        self.store, self._path = store, catalogue
        self._reader = CatalogueReader(catalogue)
        self.before_load, self.fault, self.loads = (lambda: None), None, 0
        self.reachable = True
        refresh(store, catalogue, BASE, LIMITS, "server")

    def load_adapters(self):
        self.loads += 1
        self.before_load()
        if self.fault:
            raise self.fault
        report = refresh(self.store, self._path, BASE, LIMITS, "server")
        if report.rejected:
            raise AdapterInvalid(report.problems())

    def _query(self, query):
        if not self.reachable:
            raise ServerUnreachable("no server answers at nowhere:1")
        return answer(self._reader.current(), query)

    def _start(self, fields, timeout_s):
        raise NotImplementedError

    def close(self):
        pass


@pytest.fixture
def store(tmp_path):
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


@pytest.fixture
def server(tmp_path, store, monkeypatch):
    played = PlayedServer(store, tmp_path / "catalogue.json")
    monkeypatch.setattr(terminal, "connect", lambda arguments: played)
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "cache"))
    return played


@pytest.fixture
def run(server, store, capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of a command line."""
        takes_store = arguments[0] in ("publish", "serve", "unload")
        code = command.main([*arguments, *(["--store", str(store)] if takes_store else [])])
        return code, *capsys.readouterr()

    return run


def bad(path: pathlib.Path, **config: object) -> pathlib.Path:
    folder(path)
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return path


def versions(store: pathlib.Path, name: str = "alice/sql") -> set[str]:
    user, _, adapter = name.partition("/")
    return {entry.name for entry in (store / "users" / user / "adapters" / adapter).iterdir()}


def test_a_published_folder_is_live(run, server, tmp_path, store):
    good = folder(tmp_path / "good")
    assert run("publish", str(good), "--name", "alice/sql") == (0, "alice/sql@1 is live\n", "")
    assert run("publish", str(good), "--name", "alice/sql")[1] == "alice/sql@2 is live\n"
    assert server.adapters(name="alice/sql")[0].serving == 2
    assert versions(store) == {"1", "2"}


def test_a_refused_folder_is_told_with_every_reason_and_is_no_version(run, server, tmp_path, store):
    run("publish", str(folder(tmp_path / "good")), "--name", "alice/sql")
    code, out, err = run("publish", str(bad(tmp_path / "bad", use_dora=True, bias="all")), "--name", "alice/sql")
    assert code == 1 and out == ""
    lines = err.splitlines()
    assert all(line.startswith("error: ") for line in lines) and "alice/sql@2 was refused" in lines[0]
    assert "use_dora" in err and "bias" in err and str(store) not in err
    (aside,) = versions(store) - {"1"}
    assert aside.startswith("2.refused-") and aside in err
    assert server.adapters(name="alice/sql")[0].serving == 1
    server.load_adapters()
    assert [version.version for version in server.adapters(name="alice/sql")[0].versions] == [1]


def test_a_number_that_was_refused_is_not_given_again(run, server, tmp_path, store, monkeypatch):
    monkeypatch.setattr(command, "catalogue_path", lambda cache, root: tmp_path / "catalogue.json")
    run("publish", str(bad(tmp_path / "bad", use_dora=True)), "--name", "alice/sql")
    assert run("publish", str(folder(tmp_path / "good")), "--name", "alice/sql")[1] == "alice/sql@2 is live\n"


def test_a_number_of_a_version_that_was_deleted_is_refused_once_and_not_again(run, server, tmp_path, store):
    good, other = folder(tmp_path / "good"), folder(tmp_path / "other", seed=1)
    run("publish", str(good), "--name", "alice/sql")
    shutil.rmtree(store / "users/alice/adapters/sql/1")
    code, _, err = run("publish", str(other), "--name", "alice/sql")  # it knows only what lies in the store
    assert code == 1 and "versions never change" in err
    assert run("publish", str(other), "--name", "alice/sql")[1] == "alice/sql@2 is live\n"


def test_somebody_elses_bad_folder_does_not_spoil_it(run, server, tmp_path, store):
    publish(bad(tmp_path / "bad", use_dora=True), "bob/poems", store)
    assert run("publish", str(folder(tmp_path / "good")), "--name", "alice/sql")[0] == 0
    assert versions(store, "bob/poems") == {"1"}


def test_a_load_that_fails_for_another_reason_is_no_success(run, server, tmp_path, store):
    server.fault = EngineError("load failed: out of memory")
    code, _, err = run("publish", str(folder(tmp_path / "good")), "--name", "alice/sql")
    assert code == 1 and "out of memory" in err
    assert not {"1"} & versions(store)


def test_a_store_that_the_server_does_not_see_is_told(run, server, tmp_path, store):
    server.store = tmp_path / "another"
    code, _, err = run("publish", str(folder(tmp_path / "good")), "--name", "alice/sql")
    assert code == 1 and "does the server serve the store" in err
    assert not {"1"} & versions(store)


def test_nothing_is_copied_for_a_server_that_is_not_there(run, server, tmp_path, store):
    server.reachable = False
    code, _, err = run("publish", str(folder(tmp_path / "good")), "--name", "alice/sql")
    assert (code, err) == (1, "error: no server answers at nowhere:1\n")
    assert list(store.iterdir()) == []


def test_a_server_that_dies_during_the_load_leaves_the_version_to_its_next_start(run, server, tmp_path, store):
    server.fault = ServerUnreachable("no server answers at nowhere:1")
    assert run("publish", str(folder(tmp_path / "good")), "--name", "alice/sql")[0] == 1
    assert versions(store) == {"1"}


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_that_is_no_adapter_is_not_copied(run, tmp_path, store, missing):
    path = folder(tmp_path / "half")
    (path / missing).unlink()
    code, _, err = run("publish", str(path), "--name", "alice/sql")
    assert code == 1 and f"{missing} is missing" in err and list(store.iterdir()) == []


def test_a_policy_decides_which_version_answers(run, server, tmp_path, store):
    good = folder(tmp_path / "good")
    for _ in range(2):
        run("publish", str(good), "--name", "alice/sql")
    assert run("serve", "alice/sql", "--version", "1") == (0, "version 1 answers to alice/sql\n", "")
    code, out, _ = run("publish", str(good), "--name", "alice/sql")
    assert code == 0 and "alice/sql@3 is live\nversion 1 answers to alice/sql" in out
    assert run("unload", "alice/sql")[0] == 0
    assert server.adapters(name="alice/sql")[0].serving is None
    assert "out of service" in run("list")[1]
    assert run("serve", "alice/sql", "--version", "latest")[1] == "version 3 answers to alice/sql\n"


def test_a_version_that_cannot_be_served_changes_no_policy(run, server, tmp_path, store):
    run("publish", str(folder(tmp_path / "good")), "--name", "alice/sql")
    loads = server.loads
    code, _, err = run("serve", "alice/sql", "--version", "7")
    assert code == 1 and "no version 7" in err and "there are: 1" in err
    assert run("serve", "alice/nothing", "--version", "latest")[0] == 1
    assert versions(store) == {"1"} and server.loads == loads


@pytest.mark.parametrize("before", [None, {"serve": 1}])
def test_a_policy_that_the_server_does_not_take_is_put_back(run, server, tmp_path, store, before):
    good = folder(tmp_path / "good")
    for _ in range(2):
        run("publish", str(good), "--name", "alice/sql")
    path = store / "users/alice/adapters/sql/policy.json"
    if before:
        run("serve", "alice/sql", "--version", "1")
    server.before_load = lambda: shutil.rmtree(path.parent / "2", ignore_errors=True)
    code, _, err = run("serve", "alice/sql", "--version", "2")
    assert code == 1 and "version 2" in err
    assert (json.loads(path.read_text()) if path.exists() else None) == before


def test_what_is_listed_and_shown(run, server, tmp_path, store):
    assert run("list") == (0, "no adapters\n", "")
    publish(folder(tmp_path / "good"), "alice/sql", store, provenance={"method": "sft", "note": "a\x1b[2Jb\n é"})
    publish(bad(tmp_path / "bad", use_dora=True), "alice/sql", store)
    publish(folder(tmp_path / "other", seed=1), "bob/poems", store)
    pytest.raises(AdapterInvalid, server.load_adapters)
    listed = run("list")[1].splitlines()
    assert [line.split()[0] for line in listed] == ["NAME", "alice/sql", "bob/poems"]
    assert "version 1" in listed[1] and "1, 2 (refused)" in listed[1]
    assert run("list", "--user", "bob")[1].count("\n") == 2
    shown = run("show", "alice/sql")[1]
    assert "version 1: ready" in shown and "version 2: rejected" in shown and "use_dora" in shown and "method: sft" in shown
    assert r"note: a\x1b[2Jb\n é" in shown
    assert "version 2" not in run("show", "alice/sql@1")[1]
    assert [adapter["name"] for adapter in json.loads(run("list", "--json")[1])] == ["alice/sql", "bob/poems"]
    assert json.loads(run("show", "bob/poems", "--json")[1])["versions"][0]["rank"] == 2
    code, out, err = run("show", "alice/nothing")
    assert (code, out) == (1, "") and "alice has: sql" in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["publish", "x"],
        ["publish", "x", "--name", "no-slash"],
        ["publish", "x", "--name", "../../etc"],
        ["publish", "x", "--name", "a/b@1"],
        ["serve", "a/b", "--version", "0"],
        ["serve", "a/b", "--version", "newest"],
        ["serve", "a/b"],
        ["show", "a/b@0"],
        ["unload", "a/b@1"],
    ],
)
def test_a_wrong_command_line_is_a_usage_error(server, arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2 and "usage:" in capsys.readouterr().err
