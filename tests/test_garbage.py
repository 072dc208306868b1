"""What Python's garbage collector does while a model is made, and afterwards."""

import subprocess
import sys

import pytest

PROGRAM = """
import gc
from server.garbage import kept_from_start
before = gc.get_freeze_count()
try:
    with kept_from_start():
        assert not gc.isenabled()
        kept = [[] for _ in range(100_000)]
        if {fails}:
            raise ValueError
except ValueError:
    pass
assert gc.isenabled() and gc.get_freeze_count() >= before + 100_000
cycle = []
cycle.append(cycle)
del cycle
assert gc.collect() == 1, "what comes later is collected"
"""


@pytest.mark.parametrize("fails", [False, True])
def test_objects_of_the_start_take_no_part_in_collections(fails):
    subprocess.run([sys.executable, "-c", PROGRAM.format(fails=fails)], check=True)
