"""The store and its catalogue: publishing is atomic, versions never change, one bad folder spoils nothing else."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import pytest

from jaxlora import peft
from jaxlora.adapters import AdapterName, Catalogue, CatalogueReader, Store, catalogue_path, publish, refresh, write_policy
from jaxlora.adapters.publish import STALE_AFTER_S
from jaxlora.adapters.query import answer
from jaxlora.config import ModelConfig
from jaxlora.errors import AdapterInvalid, AdapterNotFound, InvalidRequest
from jaxlora.files import locked
from tests.adapter_folders import BASE, LIMITS, TINY, adapter, folder, tensors_of, write_raw


class Shop:
    """A store with its catalogue, and the calls that tests make on them."""

    def __init__(self, root: pathlib.Path):
        self.root = root / "adapters"
        self.root.mkdir()
        self.path = catalogue_path(root / "cache", self.root)
        self.reader = CatalogueReader(self.path)

    def publish(self, name, seed=0, source=None, **options):
        return publish(source or adapter(seed, **options), name, self.root, catalogue=self.reader.current())

    def publish_bad(self, name):
        bad = write_raw(
            self.root.parent / f"bad-{time.monotonic_ns()}", dict(adapter().config) | {"use_dora": True}, tensors_of(adapter())
        )
        return self.publish(name, source=bad)

    def refresh(self, server="here", base=BASE, limits=LIMITS):
        return refresh(self.root, self.path, base, limits, server)

    def folder(self, name, version=None):
        path = self.root / "users" / name.split("/")[0] / "adapters" / name.split("/")[1]
        return path if version is None else path / str(version)

    def resolve(self, name):
        return self.reader.current().resolve(name)

    def serving(self, name):
        return self.resolve(name).version


@pytest.fixture
def shop(tmp_path):
    return Shop(tmp_path)


def test_versions_count_up_and_the_latest_is_served(shop):
    assert [shop.publish("alice/sql", seed) for seed in range(3)] == [1, 2, 3]
    assert shop.publish("bob/sql") == 1
    report = shop.refresh()
    assert report.added == ["alice/sql@1", "alice/sql@2", "alice/sql@3", "bob/sql@1"] and not report.rejected
    assert shop.serving("alice/sql") == 3 and shop.serving("alice/sql@1") == 1
    version = shop.resolve("alice/sql@2")
    info = peft.validate(shop.folder("alice/sql", 2), BASE, LIMITS)
    assert (version.sha256, version.rank, version.nbytes, version.path) == (
        info.sha256,
        2,
        info.nbytes,
        shop.folder("alice/sql", 2),
    )
    assert peft.read_published(version.path, version.sha256, version.config_sha256, version.nbytes).rank == 2


def test_a_published_folder_is_copied_with_what_belongs_to_it_and_new_times(shop, tmp_path):
    source = folder(tmp_path / "peft")
    (source / "README.md").write_text("not copied")
    (source / "provenance.json").write_text('{"method": "sft", "steps": 10, "data": {"not": "plain"}}')
    for file in source.iterdir():
        os.utime(file, (1, 1))
    assert publish(str(source), AdapterName("alice", "sql"), shop.root) == 1
    files = {file.name: file for file in shop.folder("alice/sql", 1).iterdir()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "provenance.json"}
    assert all(file.stat().st_mtime > 1e9 for file in files.values())
    shop.refresh()
    described = shop.reader.current().describe(name="alice/sql")["adapters"][0]["versions"][0]
    assert described["provenance"] == {"method": "sft", "steps": 10}


def test_publishing_what_is_no_adapter_leaves_nothing_behind(shop, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(AdapterInvalid, match="adapter_model.bin: pickled.*adapter_config.json is missing"):
        shop.publish("alice/sql", source=tmp_path / "empty")
    for name in ("alice/sql@3", "../x", "alice/../../x"):
        with pytest.raises(ValueError, match="version|valid name"):
            shop.publish(name)
    assert list(shop.root.rglob("*")) == []


def test_an_error_while_writing_leaves_no_version(shop, monkeypatch):
    monkeypatch.setattr(peft, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        shop.publish("alice/sql")
    assert list(shop.folder("alice/sql").iterdir()) == []


def test_publishers_at_the_same_time_get_different_versions(shop):
    got, made = [], adapter()
    threads = [threading.Thread(target=lambda: got.append(publish(made, "alice/sql", shop.root))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == list(range(1, 9))
    assert len(shop.refresh().added) == 8


def test_a_publisher_that_is_killed_leaves_no_version_and_its_folder_is_removed_later(shop):
    code = f"""
import time
from jaxlora import peft
from jaxlora.adapters import publish
from tests.adapter_folders import adapter
write = peft.write
def slow(*arguments):
    write(*arguments)
    print("written", flush=True)
    time.sleep(60)
peft.write = slow
publish(adapter(), "alice/sql", {str(shop.root)!r})
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=pathlib.Path(__file__).parent.parent)
    assert process.stdout.readline() == b"written\n"
    (incoming,) = shop.folder("alice/sql").iterdir()
    os.utime(incoming, (time.time() - 2 * STALE_AFTER_S,) * 2)
    assert shop.publish("alice/sql") == 2  # its number is taken, and it is not stale: the writer lives
    assert incoming.exists()
    process.kill()
    process.communicate()
    assert shop.refresh().added == ["alice/sql@2"] and shop.serving("alice/sql") == 2
    assert shop.publish("alice/sql") == 3
    assert not incoming.exists()


def test_a_bad_version_is_refused_with_its_problems_and_the_one_before_stays(shop):
    shop.publish("alice/sql")
    shop.refresh()
    assert shop.publish_bad("alice/sql") == 2
    shop.publish("bob/sql")
    report = shop.refresh()
    assert report.added == ["bob/sql@1"] and list(report.rejected) == ["alice/sql@2"] and not report.first
    assert "use_dora" in report.problems()[0]
    assert shop.serving("alice/sql") == 1 and shop.serving("bob/sql") == 1
    with pytest.raises(
        AdapterNotFound, match=r"alice/sql@2 was refused \(.*use_dora.*\); versions of alice/sql that can be served: 1"
    ):
        shop.resolve("alice/sql@2")
    assert shop.refresh().rejected == {}  # told once: it doesn't stand in the way of other people's versions
    assert shop.publish("alice/sql") == 3
    assert shop.refresh().added == ["alice/sql@3"]


def test_a_refused_version_that_was_still_being_copied_is_looked_at_again(shop):
    shop.publish("alice/sql")
    weights = shop.folder("alice/sql", 1) / peft.WEIGHTS_FILE
    data = weights.read_bytes()
    weights.write_bytes(data[:-10])
    assert "alice/sql@1" in shop.refresh().rejected
    weights.write_bytes(data[:-9])
    assert "alice/sql@1" in shop.refresh().rejected
    weights.write_bytes(data)
    assert shop.refresh().added == ["alice/sql@1"]


def test_the_first_refresh_of_a_server_is_marked(shop):
    shop.publish_bad("alice/sql")
    assert [shop.refresh(server).first for server in ("one", "one", "two", "one", "two")] == [True, False, True, False, False]
    assert shop.refresh("three").rejected == {}
    assert shop.refresh("").first and shop.refresh("").first


@pytest.mark.parametrize("name", [peft.WEIGHTS_FILE, peft.CONFIG_FILE])
def test_a_version_whose_files_changed_is_withdrawn_until_they_are_back(shop, name):
    shop.publish("alice/sql", 1)
    shop.publish("alice/sql", 2)
    shop.refresh()
    file = shop.folder("alice/sql", 2) / name
    good = file.read_bytes()
    other = (folder(shop.root.parent / "other", seed=3, lora_alpha=99) / name).read_bytes()
    file.write_bytes(other)
    report = shop.refresh()
    assert "versions never change" in report.rejected["alice/sql@2"][0]
    assert shop.serving("alice/sql") == 1
    file.write_bytes(good)
    assert shop.refresh().added == ["alice/sql@2"] and shop.serving("alice/sql") == 2


def test_touching_files_changes_nothing(shop):
    shop.publish("alice/sql")
    shop.refresh()
    before = shop.resolve("alice/sql")
    for file in shop.folder("alice/sql", 1).iterdir():
        os.utime(file)
        file.chmod(0o600)
    report = shop.refresh()
    assert report.added == [] and report.rejected == {} and shop.resolve("alice/sql") == before


def test_deleted_versions_go_and_their_numbers_are_not_given_again(shop):
    for seed in range(3):
        shop.publish("alice/sql", seed)
    shop.refresh()
    shutil.move(shop.folder("alice/sql", 3), shop.root.parent / "kept")
    assert shop.refresh().removed == ["alice/sql@3"]
    assert shop.serving("alice/sql") == 2
    with pytest.raises(AdapterNotFound, match="alice/sql@3: no such version; .*: 1, 2"):
        shop.resolve("alice/sql@3")
    assert shop.publish("alice/sql") == 4
    shutil.copytree(shop.folder("alice/sql", 1), shop.folder("alice/sql", 3))
    assert "versions never change" in shop.refresh().rejected["alice/sql@3"][0]
    shutil.rmtree(shop.folder("alice/sql", 3))
    shutil.move(shop.root.parent / "kept", shop.folder("alice/sql", 3))
    assert shop.refresh().added == ["alice/sql@3"]
    shutil.rmtree(shop.folder("alice/sql"))
    shop.refresh()
    with pytest.raises(AdapterNotFound, match="alice/sql: no such adapter; alice has no adapters in service"):
        shop.resolve("alice/sql")
    assert shop.publish("alice/sql") == 5


def test_policies_choose_the_version(shop):
    name = AdapterName("alice", "sql")
    for seed in range(3):
        shop.publish("alice/sql", seed)
    shop.refresh()
    for serve, version in [(2, 2), ("latest", 3), (1, 1)]:
        write_policy(shop.root, name, serve)
        assert shop.refresh().rejected == {} and shop.serving("alice/sql") == version
    assert shop.serving("alice/sql@3") == 3
    shop.publish("alice/sql", 4)
    shop.refresh()
    assert shop.serving("alice/sql") == 1
    write_policy(shop.root, name, "none")
    shop.refresh()
    for wanted in ("alice/sql", "alice/sql@3"):
        with pytest.raises(AdapterNotFound, match="alice/sql was taken out of service"):
            shop.resolve(wanted)
    (shop.folder("alice/sql") / "policy.json").unlink()
    shop.refresh()
    assert shop.serving("alice/sql") == 4


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"serve": 0}',
        '{"serve": true}',
        '{"serve": 1.0}',
        '{"serve": "newest"}',
        '{"serve": 9}',
        '{"serve": 1, "x": 1}',
        "{}",
    ],
)
def test_a_bad_policy_is_refused_once_and_the_last_good_one_stays(shop, text):
    shop.publish("alice/sql", 1)
    shop.publish("alice/sql", 2)
    write_policy(shop.root, AdapterName("alice", "sql"), 1)
    shop.refresh()
    (shop.folder("alice/sql") / "policy.json").write_text(text)
    report = shop.refresh()
    assert list(report.rejected) == ["alice/sql"] and "the policy in force stays 1" in report.problems()[0]
    assert shop.serving("alice/sql") == 1
    assert shop.refresh().rejected == {}
    assert "policy_problem" in shop.reader.current().describe(name="alice/sql")["adapters"][0]


def test_a_policy_whose_version_was_deleted_serves_nothing_else(shop):
    shop.publish("alice/sql", 1)
    shop.publish("alice/sql", 2)
    write_policy(shop.root, AdapterName("alice", "sql"), 1)
    shop.refresh()
    shutil.rmtree(shop.folder("alice/sql", 1))
    assert "alice/sql" in shop.refresh().rejected
    with pytest.raises(AdapterNotFound, match="its policy serves version 1, which does not exist; .*: 2"):
        shop.resolve("alice/sql")
    assert shop.serving("alice/sql@2") == 2


def test_policies_are_not_written_where_there_is_no_adapter(shop):
    with pytest.raises(AdapterNotFound, match="alice/sql: no such adapter"):
        write_policy(shop.root, AdapterName("alice", "sql"), 1)
    shop.publish("alice/sql")
    with pytest.raises(ValueError, match="a policy is one of"):
        write_policy(shop.root, AdapterName("alice", "sql"), "newest")


@pytest.mark.parametrize(
    "level", ["users/alice", "users/alice/adapters", "users/alice/adapters/sql", "users/alice/adapters/sql/1"]
)
def test_symbolic_links_lead_nowhere(shop, tmp_path, level):
    shop.publish("alice/sql")
    outside = tmp_path / "outside"
    shutil.move(shop.root / level, outside)
    (shop.root / level).symlink_to(outside)
    report = shop.refresh()
    assert report.added == [] and "symbolic link" in " ".join([*report.warnings, *report.problems()])
    with pytest.raises(AdapterNotFound):
        shop.resolve("alice/sql")
    if not level.endswith("1"):
        with pytest.raises((NotADirectoryError, OSError)):
            shop.publish("alice/sql")
        assert not any("incoming" in str(path) or path.name == "2" for path in outside.rglob("*"))


def test_what_is_no_part_of_the_layout_is_left_out_with_a_warning(shop):
    shop.publish("alice/sql")
    (shop.root / "users" / "no name").mkdir()
    (shop.root / "users" / "file").write_text("")
    (shop.folder("alice/sql") / "notes").mkdir()
    (shop.folder("alice/sql") / "007").mkdir()
    (shop.folder("alice/sql") / ".hidden").mkdir()
    report = shop.refresh()
    assert report.added == ["alice/sql@1"]
    told = ["alice/sql: '007' is no version number and is left out", "alice/sql: 'notes' is no version number and is left out"]
    assert report.warnings[:2] == told and len(report.warnings) == 3 and "'no name'" in report.warnings[2]


def test_what_cannot_be_read_goes_on_being_served(shop, monkeypatch):
    for name in ("alice/sql", "alice/chat", "bob/sql"):
        shop.publish(name)
    shop.refresh()
    scandir = os.scandir
    for part in ("alice/adapters", "alice/adapters/sql", "users"):

        def failing(path, part=part):
            if str(path).endswith(part):
                raise OSError(5, "Input/output error")
            return scandir(path)

        monkeypatch.setattr(os, "scandir", failing)
        report = shop.refresh()
        assert report.removed == [] and "Input/output error" in report.warnings[0]
        assert [shop.serving(name) for name in ("alice/sql", "alice/chat", "bob/sql")] == [1, 1, 1]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error", "/secret/path"), TypeError("/secret/path")])
def test_a_version_that_cannot_be_checked_is_looked_at_again_and_holds_up_nobody(shop, monkeypatch, error):
    validate = peft.validate

    def failing(path, *arguments):
        if "alice" in str(path):
            raise error
        return validate(path, *arguments)

    for name in ("alice/sql", "bob/sql"):
        shop.publish(name)
    monkeypatch.setattr(peft, "validate", failing)
    report = shop.refresh()
    assert report.added == ["bob/sql@1"]
    assert "can't be checked" in report.problems()[0]
    assert "secret" not in report.problems()[0]
    assert shop.refresh().rejected == {}
    monkeypatch.undo()
    assert shop.refresh().added == ["alice/sql@1"]


def test_not_found_names_what_the_user_has_and_nothing_of_others(shop):
    for number in range(25):
        shop.publish(f"alice/a{number:02}")
    shop.publish("bob/secret")
    shop.publish("carol/out")
    write_policy(shop.root, AdapterName("carol", "out"), "none")
    shop.refresh()
    with pytest.raises(AdapterNotFound) as caught:
        shop.resolve("alice/sql")
    assert str(caught.value).startswith("alice/sql: no such adapter; alice has: a00, a01") and "and 5 more" in str(caught.value)
    assert "secret" not in str(caught.value)
    with pytest.raises(AdapterNotFound, match="nobody has no adapters in service"):
        shop.resolve("nobody/sql")
    with pytest.raises(AdapterNotFound, match="bob/secret@2: no such version; versions of bob/secret that can be served: 1"):
        shop.resolve("bob/secret@2")
    with pytest.raises(InvalidRequest, match="lora_name: '../x' is not a valid name"):
        shop.resolve("../x")


def test_another_base_model_is_another_verdict(shop):
    shop.publish("alice/sql")
    shop.refresh("one")
    wider = ModelConfig.from_dict({"architectures": ["LlamaForCausalLM"], **TINY, "hidden_size": 32})
    report = shop.refresh("two", base=wider)
    assert report.first and "do not fit this base model" in report.problems()[0]
    with pytest.raises(AdapterNotFound):
        shop.resolve("alice/sql")
    assert shop.refresh("three").added == ["alice/sql@1"]
    assert "MAX_LORA_RANK" in shop.refresh("four", limits=peft.Limits(1, 1 << 20)).problems()[0]


def test_the_catalogue_survives_a_round_trip_and_a_broken_file(shop):
    shop.publish("alice/sql")
    shop.publish_bad("alice/sql")
    shop.refresh()
    data = shop.path.read_bytes()
    assert Catalogue.from_json(data).to_json() == data
    last = shop.reader.current()
    for broken in (b"", b"{", b"[]", b'{"schema": 1}', data.replace(b'"schema":1', b'"schema":2')):
        shop.path.write_bytes(broken)
        assert shop.reader.current() == last
        assert "built anew" in shop.refresh().warnings[0]
        assert shop.serving("alice/sql") == 1


def test_the_reader_sees_every_new_catalogue_and_reads_none_twice(shop, monkeypatch):
    assert shop.reader.current() == Catalogue()
    shop.publish("alice/sql")
    shop.refresh()
    first = shop.reader.current()
    monkeypatch.setattr(Catalogue, "from_json", None)
    assert shop.reader.current() is first
    monkeypatch.undo()
    shop.publish("alice/sql")
    shop.refresh()
    assert shop.serving("alice/sql") == 2
    shop.path.unlink()
    assert shop.serving("alice/sql") == 2


def test_refreshing_is_one_at_a_time(shop):
    shop.publish("alice/sql")
    shop.path.parent.mkdir(parents=True)
    done = threading.Event()
    with locked(shop.path.with_suffix(".lock"), create=True):
        thread = threading.Thread(target=lambda: (shop.refresh(), done.set()))
        thread.start()
        assert not done.wait(0.2)
    assert done.wait(5)
    thread.join()


def test_known_versions_are_not_read_again(shop, monkeypatch):
    for number in range(20):
        shop.publish(f"alice/a{number}")
    shop.refresh()
    monkeypatch.setattr(peft, "validate", None)
    assert shop.refresh().added == []
    assert shop.serving("alice/a7") == 1


def test_queries_are_answered_from_the_catalogue(shop):
    for name in ("alice/sql", "alice/sql", "alice/chat", "bob/sql"):
        shop.publish(name)
    shop.publish_bad("alice/sql")
    shop.refresh()
    catalogue = shop.reader.current()

    def names(query):
        return [item["name"] for item in json.loads(answer(catalogue, query))["adapters"]]

    assert names(b"{}") == ["alice/chat", "alice/sql", "bob/sql"]
    assert names(b'{"user": "alice"}') == ["alice/chat", "alice/sql"]
    assert names(b'{"user": "nobody"}') == []
    (found,) = json.loads(answer(catalogue, b'{"name": "alice/sql"}'))["adapters"]
    assert (found["serving"], found["policy"]) == (2, {"serve": "latest"})
    assert [version["state"] for version in found["versions"]] == ["ready", "ready", "rejected"]
    assert "use_dora" in found["versions"][2]["problems"][0]
    assert found["versions"][0]["sha256"] == shop.resolve("alice/sql@1").sha256
    assert len(json.loads(answer(catalogue, b'{"name": "alice/sql@3"}'))["adapters"][0]["versions"]) == 1
    assert str(shop.root) not in answer(catalogue, b"{}").decode()
    with pytest.raises(AdapterNotFound):
        answer(catalogue, b'{"name": "alice/nothing"}')
    with pytest.raises(AdapterNotFound):
        answer(catalogue, b'{"name": "alice/sql@9"}')


@pytest.mark.parametrize(
    "query",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"users": "a"}',
        b'{"user": 1}',
        b'{"user": "a", "name": "a/b"}',
        b"\xff",
        b"[" * 4000,
        b" " * 5000,
        b'{"user": "../x"}',
    ],
    ids=lambda query: query[:12].decode(errors="replace"),
)
def test_malformed_queries_name_the_field_and_the_bound(query):
    with pytest.raises(InvalidRequest, match="^query: "):
        answer(Catalogue(), query)
    with pytest.raises(InvalidRequest, match="lora_name"):
        answer(Catalogue(), json.dumps({"name": "a" * 3000}).encode())


def test_the_store_path_and_the_catalogue_path_do_not_depend_on_how_they_are_named(shop, tmp_path, monkeypatch):
    link = tmp_path / "link"
    link.symlink_to(shop.root)
    monkeypatch.chdir(tmp_path)
    assert catalogue_path(tmp_path / "cache", link) == catalogue_path(tmp_path / "cache", "adapters") == shop.path
    assert Store(link).root == shop.root.resolve()
