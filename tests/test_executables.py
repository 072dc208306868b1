"""Steps that are read instead of traced and compiled: the same bits, in another process too, and whatever became of their files."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxlora import executables, weights
from jaxlora.backend import Backend, NativeBackend, XlaBackend
from jaxlora.config import ModelConfig
from jaxlora.engine import Program, Sizes
from jaxlora.engine.batch import Batch, idle_batch, idle_prefill_batch
from tests.kernels import kernels_here
from tests.parity import checkpoints

pytestmark = pytest.mark.usefixtures("quick_compilation")
SIZES = Sizes(slots=2, max_seq_len=32, prefill_chunk=2, lora_slots=2, max_lora_rank=4)  # few steps


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return checkpoints.write_checkpoint(tmp_path_factory.mktemp("executables") / "base", "llama")


@pytest.fixture(scope="module")
def kept_in(base: pathlib.Path, backend: Backend) -> pathlib.Path:
    """A folder with the steps of a program for `SIZES`."""
    folder = base.parent / backend.name
    assert len(warmed_up(base, backend, folder)[1]) == step_count(backend)
    return folder


def warmed_up(base: pathlib.Path, backend: Backend, folder: pathlib.Path | None, sizes: Sizes = SIZES) -> tuple[Program, list[str]]:
    """A program, and what it compiled."""
    config, told = ModelConfig.from_folder(base), []
    program = Program(config, weights.load(base, config, packing=backend.packing), backend, sizes, kept_in=folder)
    program.warm_up(told.append)
    return program, told


def step_count(backend: Backend, sizes: Sizes = SIZES) -> int:
    """That which reads prompts, and one for each number of answers."""
    return 1 + len(backend.batch_sizes(sizes.slots))


def reading(program: Program) -> Batch:
    """One full chunk."""
    chunk, vocab = program.sizes.prefill_chunk, program.config.vocab_size
    batch = idle_prefill_batch(program.prefill_rows, program.prefill_length, vocab)
    batch.tokens.flat[:chunk] = np.arange(chunk) + 3
    batch.lengths[0], batch.reads[0], batch.emit[0] = chunk, 1, 1
    return batch


def answering(program: Program, rows: int) -> Batch:
    batch = idle_batch(rows, 1, program.config.vocab_size)
    batch.tokens[:], batch.lengths[:], batch.emit[:] = 3, 1, 1
    return batch


def answers(program: Program) -> list[bytes]:
    """The state after a prompt and after decode steps of each size, and what came next."""
    sampled = [program.run(batch) for batch in (reading(program), *(answering(program, rows) for rows in program.batch_sizes))]
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((sampled, program.state))]


def files(folder: pathlib.Path, kind: str) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob(f"*.{kind}")}


def test_a_second_program_reads_what_the_first_compiled(base, backend, kept_in):
    plain, compiled = warmed_up(base, backend, None)
    program, told = warmed_up(base, backend, kept_in)
    assert len(compiled) == step_count(backend) and not told
    count, cache = program.compiled(), [array.unsafe_buffer_pointer() for array in (*program.state.cache.k, *program.state.cache.v)]
    assert answers(program) == answers(plain)
    program.reuse(0, 1, np.arange(5), record=True)
    program.clear(1)
    assert program.compiled() == count == plain.compiled()
    assert [array.unsafe_buffer_pointer() for array in (*program.state.cache.k, *program.state.cache.v)] == cache


def test_another_process_reads_them_too(base, backend, kept_in):
    before = files(kept_in, "executable"), files(kept_in, "json")
    kind = "native" if isinstance(backend, NativeBackend) else "xla"
    command, environment = [sys.executable, "-m", "tests.test_executables", base, kept_in, kind], os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["compiled", "0"], done.stderr
    assert (files(kept_in, "executable"), files(kept_in, "json")) == before


def test_damaged_files_are_made_anew(base, backend, kept_in):
    damages = (lambda data: data[:500] + b"?" + data[501:], lambda data: data[:-30], lambda data: b"")
    for number, path in enumerate(kept_in.glob("*.executable")):
        path.write_bytes(damages[number % 3](path.read_bytes()))
    program, told = warmed_up(base, backend, kept_in)
    assert len(told) == step_count(backend)
    again, told = warmed_up(base, backend, kept_in)
    assert not told and answers(again) == answers(program)


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"decode x 2": "nothing"}', '{"decode x 2": 3}'])
def test_a_damaged_index_is_made_anew(base, backend, kept_in, content):
    (index,) = kept_in.glob("*.json")
    whole = index.read_text()
    index.write_text(content)
    assert warmed_up(base, backend, kept_in)[1]
    assert json.loads(index.read_text()) == json.loads(whole)


def test_other_code_is_traced_but_what_it_leaves_as_it_was_is_not_compiled(base, backend, kept_in, monkeypatch):
    before = files(kept_in, "executable"), files(kept_in, "json")
    monkeypatch.setattr(executables, "_code", lambda: "another")
    assert len(warmed_up(base, backend, kept_in)[1]) == step_count(backend)
    assert files(kept_in, "executable") == before[0] and files(kept_in, "json").keys() > before[1].keys()
    assert not warmed_up(base, backend, kept_in)[1]
    (kept_in / (files(kept_in, "json").keys() - before[1].keys()).pop()).unlink()


@pytest.mark.parametrize("change", [{"max_seq_len": 48}, {"max_lora_rank": 8}])
def test_other_sizes_are_other_programs(base, backend, kept_in, change):
    sizes, before = dataclasses.replace(SIZES, **change), files(kept_in, "json")
    program, told = warmed_up(base, backend, kept_in, sizes)
    assert len(told) == step_count(backend, sizes)
    assert answers(program) == answers(warmed_up(base, backend, None, sizes)[0])
    for name in files(kept_in, "json").keys() - before.keys():
        (kept_in / name).unlink()


def test_a_folder_that_can_not_be_written_to_costs_a_warning_only(base, backend, tmp_path, caplog):
    (tmp_path / "file").touch()
    assert warmed_up(base, backend, tmp_path / "file" / "kept")[1]
    assert "can't be kept" in caplog.text


if __name__ == "__main__":
    folder, kept, kind = sys.argv[1:]
    chosen = NativeBackend(kernels_here()) if kind == "native" else XlaBackend()
    print("compiled", len(warmed_up(pathlib.Path(folder), chosen, pathlib.Path(kept))[1]))
