"""The variable that tells the C library how to give memory, and the restart with it."""

import platform
import subprocess
import sys

import pytest

from jaxlora import allocator


def test_other_tunables_stay_and_a_choice_that_was_made_holds():
    assert allocator.environment({})["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert allocator.environment({"GLIBC_TUNABLES": "glibc.malloc.check=3"})["GLIBC_TUNABLES"] == "glibc.malloc.check=3:glibc.malloc.hugetlb=1"
    off = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    assert allocator.environment(off) == off
    kept = allocator.environment(off, keep=True)["GLIBC_TUNABLES"].split(":")
    assert kept[0] == "glibc.malloc.hugetlb=0" and {tunable.split("=")[0] for tunable in kept[1:]} == {
        f"glibc.malloc.{name}" for name in ("arena_max", "mmap_max", "trim_threshold")
    }
    assert allocator.environment({"GLIBC_TUNABLES": ":".join(kept)}, keep=True)["GLIBC_TUNABLES"] == ":".join(kept)


def test_a_program_starts_again_once_with_its_arguments_as_the_same_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "print(os.getpid(), sys.argv[1:], os.environ.get('GLIBC_TUNABLES'), flush=True)\n"
        "from jaxlora import allocator\n"
        "allocator.restart()\n"
        "print('goes on')\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script), "a b", "--c"], stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": "."}
    )
    lines = process.communicate(timeout=60)[0].splitlines()
    told = f"{process.pid} ['a b', '--c'] "
    assert lines == [f"{told}None", f"{told}{allocator.environment({}, keep=True)['GLIBC_TUNABLES']}", "goes on"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tunables are glibc's")
def test_freed_memory_stays_where_it_is_asked_for():
    program = (
        "import resource, numpy\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    numpy.ones(64 << 20, numpy.uint8)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults()\n"
        "print(faults())\n"
    )
    without = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    given, kept = (
        int(subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True).stdout)
        for environ in (without, allocator.environment(without, keep=True))
    )
    assert kept < given / 10
