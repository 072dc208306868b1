"""A process that stops at any step of publishing, of setting a policy or of refreshing leaves the last good state."""

import pathlib
import subprocess
import sys

import pytest

from jaxlora.adapters import CatalogueReader, catalogue_path, publish, refresh
from tests.adapter_folders import BASE, LIMITS, adapter

# Every change on disk goes through one of these; the process ends in front of the n-th call.
STEPS = ("mkdir", "fsync", "rename", "replace")
CODE = """
import os, sys
from jaxlora.adapters import AdapterName, publish, refresh, write_policy
from tests.adapter_folders import BASE, LIMITS, adapter

action, root, catalogue, *steps = sys.argv[1:]
last, made, name = 0, adapter(7), AdapterName("alice", "sql")

def counted(call):
    def step(*arguments, **options):
        global last
        last -= 1
        if last < 0:
            os._exit(3)
        return call(*arguments, **options)
    return step

for step in steps:
    setattr(os, step, counted(getattr(os, step)))
for line in sys.stdin:
    last = int(line)
    child = os.fork()
    if child == 0:
        if action == "publish":
            publish(made, name, root)
        elif action == "policy":
            write_policy(root, name, 1)
        else:
            refresh(root, catalogue, BASE, LIMITS, "server")
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def stops_at_every_step(action, root, catalogue):
    """Does an action again and again, each time one step further, until it gets to its end; yields after each time."""
    command = [sys.executable, "-c", CODE, action, str(root), str(catalogue), *STEPS]
    where = pathlib.Path(__file__).parent.parent
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=where) as process:
        for last in range(30):
            print(last, file=process.stdin, flush=True)
            status = int(process.stdout.readline())
            assert status in (0, 3)
            yield last
            if status == 0:
                process.stdin.close()
                return
    raise AssertionError("it never got to its end")


@pytest.fixture
def store(tmp_path):
    root = tmp_path / "adapters"
    root.mkdir()
    for seed in range(2):
        publish(adapter(seed), "alice/sql", root)
    catalogue = catalogue_path(tmp_path / "cache", root)
    refresh(root, catalogue, BASE, LIMITS, "server")
    return root, catalogue


def test_publishing(store):
    root, catalogue = store
    seen = []
    for _ in stops_at_every_step("publish", root, catalogue):
        report = refresh(root, catalogue, BASE, LIMITS, "server")
        # A version that has its name is whole, whether or not the process lived to the end.
        assert report.rejected == {}
        seen.append(CatalogueReader(catalogue).current().resolve("alice/sql").version)
    assert len(seen) > 5
    assert seen == sorted(seen)
    assert seen[0] == 2 < seen[-1]


def test_setting_a_policy(store):
    root, catalogue = store
    seen = []
    for _ in stops_at_every_step("policy", root, catalogue):
        assert refresh(root, catalogue, BASE, LIMITS, "server").rejected == {}
        seen.append(CatalogueReader(catalogue).current().resolve("alice/sql").version)
    assert seen == sorted(seen, reverse=True)
    assert (seen[0], seen[-1]) == (2, 1)


def test_refreshing(store):
    root, catalogue = store
    publish(adapter(9), "alice/sql", root)
    seen = []
    for _ in stops_at_every_step("refresh", root, catalogue):
        seen.append(CatalogueReader(catalogue).current().resolve("alice/sql").version)
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (2, 3)
