"""Building, checking and loading the library; threads."""

import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import native
from jaxlora.native import build

from .arrays import normal, same_bits


def test_a_second_build_takes_the_library_that_is_there(kernels: native.Kernels, build_dir: pathlib.Path) -> None:
    there = [path for path in build_dir.iterdir() if path.suffix == ".so"]
    before = [path.stat().st_mtime_ns for path in there]
    told: list[str] = []
    assert [build.library(build_dir, told.append)] == there and not told
    assert [path for path in build_dir.iterdir() if path.suffix != ".checked"] == there
    assert [path.stat().st_mtime_ns for path in there] == before


@pytest.mark.skipif("EMULATE_AVX512" in os.environ, reason="there every set is built")
def test_the_instruction_sets_of_this_cpu_are_built_and_no_others(kernels: native.Kernels, build_dir: pathlib.Path) -> None:
    library, flags = build.library(build_dir).read_bytes(), pathlib.Path("/proc/cpuinfo").read_text().split()
    wanted = {
        "amxbf16": {"amx_bf16", "avx512_bf16"},
        "avx512fp16": {"avx512_fp16"},
        "avx512bf16": {"avx512_bf16"},
        "avx512": {"avx512f", "avx512dq"},
        "avx2": {"avx2", "fma"},
    }
    for isa, needs in wanted.items():
        known = subprocess.run([*build.compiler(), *build.ISA_FLAGS[isa], "-E", "-x", "c++", os.devnull], capture_output=True).returncode == 0
        assert (isa.encode() + b"\0" in library) == (known and needs <= set(flags)), isa


def test_a_cpu_without_any_of_them_is_told_from_a_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(native.loading, "_loaded", [])
    monkeypatch.setitem(build.ISA_FLAGS, "avx2", ["-mno_such_set"])
    for isa in ("amxbf16", "avx512fp16", "avx512bf16", "avx512"):
        monkeypatch.delitem(build.ISA_FLAGS, isa)
    assert native.load(tmp_path) == "this CPU has neither AVX-512 nor AVX2 with FMA" and not list(tmp_path.iterdir())


def test_a_library_that_computes_something_wrong_is_not_used(
    monkeypatch: pytest.MonkeyPatch, kernels: native.Kernels, build_dir: pathlib.Path
) -> None:
    for path in kernels.path.parent.glob(f"{kernels.path.stem}.*.checked"):  # whichever folder this process has its library from
        path.unlink()
    monkeypatch.setattr(native.Kernels, "linear", staticmethod(lambda x, w, **around: jnp.zeros((len(x), w.n))))
    assert native.load(build_dir, kernels.isa) == f"the compiled library for {kernels.isa} gives wrong results: " + (
        "linear in float32, linear in bfloat16, lora in float32, lora in bfloat16, linear in int8, lora in int8, norm, gate and sum around linear"
    )
    monkeypatch.undo()
    assert native.load(build_dir, kernels.isa) == kernels


@pytest.mark.parametrize(
    "environment, reason",
    [
        ({"JAXLORA_NATIVE_ISA": "none"}, "switched off"),
        ({"CXX": "/no/such/compiler"}, "does not run"),
        ({"CXX": "false"}, "failed"),
        ({"PATH": "/nowhere"}, "no C\\+\\+ compiler"),
    ],
)
def test_without_a_compiler_there_is_a_reason_instead(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, environment: dict[str, str], reason: str
) -> None:
    monkeypatch.setattr(native.loading, "_loaded", [])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    got = native.load(tmp_path)
    assert isinstance(got, str) and "\n" not in got
    assert re.search(reason, got)


def test_who_waits_for_a_build_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(native.loading, "_loaded", [])
    monkeypatch.setenv("CXX", """sh -c 'case $0 in --version) ;; -march=native) echo __AVX2__ __FMA__ ;; *) exit 1 ;; esac'""")
    told: list[str] = []
    assert native.load(tmp_path, progress=told.append) == "sh failed: no message"
    assert told == ["compiling the CPU kernels with sh, once (about a minute)"]


def test_callers_in_several_threads_do_not_disturb_each_other(kernels: native.Kernels) -> None:
    inputs = [normal(i, 5, 200) for i in range(4)]
    w = kernels.pack_linear(jnp.asarray(normal(9, 200, 3000), jnp.bfloat16))
    step = jax.jit(kernels.linear)
    alone = [np.asarray(step(x, w)) for x in inputs]
    with concurrent.futures.ThreadPoolExecutor(len(inputs)) as pool:
        rounds = list(pool.map(lambda x: [np.asarray(step(x, w)) for _ in range(50)], inputs))
    assert all(same_bits(got, want) for gots, want in zip(rounds, alone) for got in gots)


def test_threads_do_not_change_a_bit(kernels: native.Kernels, build_dir: pathlib.Path) -> None:
    program = f"""
import sys, numpy as np, jax.numpy as jnp
from jaxlora import native
from tests.native import emulation
emulation.where_asked()
kernels = native.load({str(build_dir)!r}, {kernels.isa!r})
x, w = (np.random.default_rng(i).standard_normal(s, np.float32) for i, s in enumerate([(33, 100), (100, 2000)]))
print(kernels.threads, hash(np.asarray(kernels.linear(x, kernels.pack_linear(jnp.asarray(w, jnp.bfloat16)))).tobytes()))
"""

    def run(threads: int) -> list[str]:
        environment = os.environ | {"JAXLORA_NATIVE_THREADS": str(threads), "PYTHONHASHSEED": "0"}
        return subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        ).stdout.split()

    one, three = run(1), run(3)
    assert (one[0], three[0]) == ("1", "3") and one[1] == three[1]
