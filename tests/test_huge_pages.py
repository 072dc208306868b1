"""The variable that asks the C library for huge pages, and the restart with it."""

import subprocess
import sys

from jaxlora import huge_pages


def test_other_tunables_stay_and_a_choice_that_was_made_holds():
    assert huge_pages.environment({})["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert huge_pages.environment({"GLIBC_TUNABLES": "glibc.malloc.check=3"})["GLIBC_TUNABLES"] == "glibc.malloc.check=3:glibc.malloc.hugetlb=1"
    off = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    assert huge_pages.environment(off) == off


def test_a_program_starts_again_once_with_its_arguments_as_the_same_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "print(os.getpid(), sys.argv[1:], os.environ.get('GLIBC_TUNABLES'), flush=True)\n"
        "from jaxlora import huge_pages\n"
        "huge_pages.restart()\n"
        "print('goes on')\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script), "a b", "--c"], stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": "."}
    )
    lines = process.communicate(timeout=60)[0].splitlines()
    told = f"{process.pid} ['a b', '--c'] "
    assert lines == [f"{told}None", f"{told}glibc.malloc.hugetlb=1", "goes on"]
