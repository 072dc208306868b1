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


def test_a_second_build_takes_the_libraries_that_are_there(kernels: native.Kernels, build_dir: pathlib.Path) -> None:
    there = {path: path.stat().st_mtime_ns for path in build_dir.iterdir() if path.suffix == ".so"}
    told: list[str] = []
    assert set(build.libraries(build_dir, build.known(), told.append).values()) == set(there) and not told
    assert {path: path.stat().st_mtime_ns for path in build_dir.iterdir() if path.suffix != ".checked"} == there


@pytest.mark.skipif("EMULATE_AVX512" in os.environ, reason="there every set is known")
def test_the_instruction_sets_of_this_cpu_are_known_and_no_others(kernels: native.Kernels) -> None:
    flags = pathlib.Path("/proc/cpuinfo").read_text().split()
    wanted = {
        "amxbf16": {"amx_bf16", "avx512_bf16"},
        "avx512fp16": {"avx512_fp16"},
        "avx512bf16": {"avx512_bf16"},
        "avx512": {"avx512f", "avx512dq"},
        "avx2": {"avx2", "fma"},
    }
    for isa, needs in wanted.items():
        compiles = subprocess.run([*build.compiler(), *build.ISA_FLAGS[isa], "-E", "-x", "c++", os.devnull], capture_output=True).returncode == 0
        assert (isa in build.known()) == (compiles and needs <= set(flags)), isa
    assert build.preferred() == [isa for isa in build.known() if isa != "avx512bf16" or "GenuineIntel" not in flags]


def test_a_start_compiles_one_set_only(tmp_path: pathlib.Path) -> None:
    program = f"""
import sys
from jaxlora import native
from tests.native import emulation
emulation.where_asked()
print(native.load({str(tmp_path)!r}, progress=print).isa)
"""
    environment = {name: value for name, value in os.environ.items() if name != "JAXLORA_NATIVE_ISA"}
    told = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert told[0].startswith("compiling the CPU kernels with ") and len(told) == 2
    assert {path.name.split("-")[2] for path in tmp_path.glob("*.so")} == {"core", told[1]}


def test_a_set_that_the_system_refuses_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch, kernels: native.Kernels, build_dir: pathlib.Path) -> None:
    monkeypatch.delenv("JAXLORA_NATIVE_ISA", raising=False)
    monkeypatch.setattr(build, "preferred", build.known)
    use = native.loading._use
    monkeypatch.setattr(native.loading, "_use", lambda isa, *rest: isa != build.known()[0] and use(isa, *rest))
    got = native.load(build_dir)
    if len(build.known()) == 1:
        assert got == "this system lets nobody use any of the instruction sets"
    else:
        assert got.isa == build.known()[1]
    assert native.load(build_dir, build.known()[0]) == f"this system lets nobody use {build.known()[0]}"


def test_a_cpu_without_any_of_them_is_told_from_a_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(native.loading, "_sets", {})
    monkeypatch.setattr(build, "ISA_FLAGS", {"avx2": ["-mno_such_set"]})
    assert native.load(tmp_path) == "this CPU has neither AVX-512 nor AVX2 with FMA" and not list(tmp_path.iterdir())


def test_a_library_that_computes_something_wrong_is_not_used(
    monkeypatch: pytest.MonkeyPatch, kernels: native.Kernels, build_dir: pathlib.Path
) -> None:
    kernels.path.with_suffix(".checked").unlink()
    monkeypatch.setattr(native.Kernels, "linear", staticmethod(lambda x, w, **around: jnp.zeros((len(x), w.n))))
    assert native.load(build_dir, kernels.isa) == f"the compiled library for {kernels.isa} gives wrong results: " + (
        "linear in float32, linear in bfloat16, lora in float32, lora in bfloat16, linear in int8, lora in int8, norm, gate and sum around linear"
    )
    monkeypatch.undo()
    assert native.load(build_dir, kernels.isa) == kernels


def test_a_kernel_that_fails_is_not_used(monkeypatch: pytest.MonkeyPatch, kernels: native.Kernels, build_dir: pathlib.Path) -> None:
    kernels.path.with_suffix(".checked").unlink()

    def fail(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no")

    monkeypatch.setattr(native.Kernels, "argmax_logsumexp", staticmethod(fail))
    assert native.load(build_dir, kernels.isa) == f"the compiled library for {kernels.isa} gives wrong results: argmax_logsumexp"
    monkeypatch.undo()
    assert native.load(build_dir, kernels.isa) == kernels


def test_a_folder_that_cannot_be_written_holds_kernels_for_all_that(
    monkeypatch: pytest.MonkeyPatch, kernels: native.Kernels, build_dir: pathlib.Path
) -> None:
    checked = kernels.path.with_suffix(".checked")
    checked.unlink()

    def touch(path: pathlib.Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(pathlib.Path, "touch", touch)
    assert native.load(build_dir, kernels.isa) == kernels and not checked.exists()
    monkeypatch.undo()
    assert native.load(build_dir, kernels.isa) == kernels and checked.exists()


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
    monkeypatch.setattr(native.loading, "_sets", {})
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    got = native.load(tmp_path)
    assert isinstance(got, str) and "\n" not in got
    assert re.search(reason, got)


def test_who_waits_for_a_build_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(native.loading, "_sets", {})
    monkeypatch.setenv("CXX", """sh -c 'case $0 in --version) ;; -march=native) echo __AVX2__ __FMA__ ;; *) exit 1 ;; esac'""")
    told: list[str] = []
    assert native.load(tmp_path, progress=told.append) == "sh failed: no message"
    assert told == ["compiling the CPU kernels with sh, once (half a minute)"]


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
