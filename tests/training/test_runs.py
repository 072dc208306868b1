"""Whole runs of the script, in this process, on a tiny model: resuming, refusing, judging, publishing, and what goes wrong."""

import json
import os
import pathlib
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlora import peft
from jaxlora.adapters import publish
from tests.training import tiny
from training import sft, step, trainer
from training.checkpoints import Checkpoints
from training.run_folder import RunFolder

Run = Callable[..., int]
pytestmark = pytest.mark.usefixtures("quick_compilation")
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture
def run(tiny_model: pathlib.Path, cache_dir: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("--option", ...)`: the script's exit code. The data, the store and the run's folder lie in `tmp_path`."""
    monkeypatch.setenv("MODEL", str(tiny_model))
    monkeypatch.setenv("CACHE_DIR", str(cache_dir))
    tiny.write_lines(tmp_path / "data.jsonl", tiny.sums(24))
    (tmp_path / "store").mkdir()

    def script(*more: object, folder: str = "run", data: str = "data.jsonl") -> int:
        places = ["--data", tmp_path / data, "--run", tmp_path / folder, "--store", tmp_path / "store", "--url", "127.0.0.1:9"]
        settings = [
            "--name",
            "a/b",
            "--batch-size",
            8,
            "--lr",
            1e-2,
            "--buckets",
            1,
            "--rank",
            4,
            "--checkpoint-every",
            2,
            "--dropout",
            0.1,
        ]
        return sft.main([str(word) for word in [*places, *settings, *more]])

    return script


def metrics(folder: pathlib.Path) -> list[dict[str, Any]]:
    return RunFolder(folder).metrics()


def versions(tmp_path: pathlib.Path) -> list[str]:
    return sorted(entry.name for entry in (tmp_path / "store/users/a/adapters/b").glob("*"))


def test_a_run_trains_and_publishes_once(run: Run, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--epochs", 4, "--eval-share", 0.3) == 0
    log = metrics(tmp_path / "run")
    steps = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, len(steps) + 1))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert all({"grad_norm", "lr", "tokens_per_second"} <= set(entry) for entry in steps)
    scores = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert len(scores) == 4 and scores[-1] < scores[0]
    assert (tmp_path / "run/loss.png").read_bytes().startswith(b"\x89PNG")
    assert versions(tmp_path) == ["1"]
    provenance = json.loads((tmp_path / "store/users/a/adapters/b/1/provenance.json").read_text())
    assert provenance["scores"]["eval_loss"] == scores[-1] and provenance["steps"] == len(steps)
    said = capsys.readouterr().err
    assert "a/b@1 is in the store" in said and "`make serve` serves it" in said
    # The same command again finds its work done.
    assert run("--epochs", 4, "--eval-share", 0.3) == 0
    assert versions(tmp_path) == ["1"] and metrics(tmp_path / "run") == log


# The state of the second one holds random keys.
@pytest.mark.parametrize("optimizer", ["adamw", "noisy_sgd"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    run: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    arguments = ("--max-steps", 7, "--optimizer", optimizer)
    assert run(*arguments, folder="whole") == 0
    one_step = trainer.Trainer._one_step
    stops = {3: signal.SIGTERM, 4: signal.SIGINT}

    def stopped(self: trainer.Trainer, done: int, state: step.State) -> Any:
        if done in stops:
            os.kill(os.getpid(), stops.pop(done))
        return one_step(self, done, state)

    monkeypatch.setattr(trainer.Trainer, "_one_step", stopped)
    assert run(*arguments) == 128 + signal.SIGTERM
    assert run(*arguments) == 128 + signal.SIGINT
    assert run(*arguments) == 0
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    whole, parts = ([{**entry, "tokens_per_second": 0} for entry in metrics(tmp_path / name)] for name in ("whole", "run"))
    assert parts == whole


def test_a_corrupt_checkpoint_falls_back_to_the_one_before(
    run: Run, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("--max-steps", 6, folder="whole") == 0
    one_step = trainer.Trainer._one_step
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(trainer.Trainer, "_one_step", lambda self, done, state: one_step(self, done, state) if done < 5 else 1 / 0)
        run("--max-steps", 6)
    for name in ("state.safetensors", "state.json"):
        newest = tmp_path / "run/checkpoints/4" / name
        good = newest.read_bytes()
        newest.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
        found = Checkpoints(tmp_path / "run/checkpoints", warn=lambda line: None).load({})
        assert found is None or found.step == 2
        newest.write_bytes(good if name == "state.safetensors" else good[:-9])
    capsys.readouterr()
    assert run("--max-steps", 6) == 0
    said = capsys.readouterr().err
    assert "checkpoint 4 can't be used" in said and "going on from step 2 of 6" in said
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_a_changed_configuration_is_refused_by_its_differences(
    run: Run, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--max-steps", 1, "--no-publish") == 0
    assert run("--max-steps", 1, "--no-publish", "--checkpoint-every", 9) == 0
    capsys.readouterr()
    assert run("--max-steps", 1, "--no-publish", "--rank", 2, "--lr", 0.5) == 1
    said = capsys.readouterr().err
    assert "lr: 0.01 then, 0.5 now" in said and "rank: 4 then, 2 now" in said and "batch_size" not in said
    tiny.write_lines(tmp_path / "data.jsonl", tiny.sums(25))
    assert run("--max-steps", 1, "--no-publish") == 1
    assert "data_sha256" in capsys.readouterr().err
    assert run("--max-steps", 1, "--no-publish", "--rank", 2, "--restart") == 0
    assert len(list(tmp_path.glob("run.before-*"))) == 1


def test_gates(run: Run, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = ("--eval-share", 0.3, "--max-steps", 3)
    assert run(*held_out, "--publish-if", "eval_loss<0.01") == 3
    assert "not published: eval_loss is" in capsys.readouterr().err
    assert not (tmp_path / "store/users").exists()
    assert run(*held_out, "--publish-if", "eval_loss<100", "eval_loss>0", "--publish-if-better") == 0
    assert "no version of a/b yet" in capsys.readouterr().err
    assert run(*held_out, "--lr", 0, "--publish-if-better", folder="other") == 3
    assert "that of a/b@1 is" in capsys.readouterr().err
    assert versions(tmp_path) == ["1"]
    assert run("--init", "a/b@1", "--eval-share", 0.3, "--max-steps", 6, "--publish-if-better", folder="more") == 0
    assert versions(tmp_path) == ["1", "2"]
    assert run(*held_out, "--lr", 0, "--publish-if", "eval_los<1", folder="other") == 1
    assert "there is no score 'eval_los'; there are: eval_loss" in capsys.readouterr().err


def test_each_step_has_the_rate_of_its_schedule(run: Run, tmp_path: pathlib.Path) -> None:
    falling = json.dumps({"init_value": 1e-2, "end_value": 0.0, "transition_steps": 1})
    assert run("--max-steps", 1, "--schedule", "constant", "--warmup", 0) == 0
    assert run("--max-steps", 3, "--schedule", "linear_schedule", "--schedule-args", falling, folder="on") == 0
    assert [entry["lr"] for entry in metrics(tmp_path / "on")] == pytest.approx([1e-2, 0, 0])
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (tmp_path / "on" / WEIGHTS).read_bytes()


def test_a_run_from_an_adapter_starts_where_that_ended(run: Run, tmp_path: pathlib.Path) -> None:
    assert run("--max-steps", 6, "--eval-share", 0.3, "--rslora", "--target-modules", "q_proj,down_proj") == 0
    assert run("--init", "a/b", "--max-steps", 1, "--lr", 0, "--eval-share", 0.3, "--eval-first", folder="on") == 0
    ended, started = metrics(tmp_path / "run")[-1], metrics(tmp_path / "on")[0]
    np.testing.assert_allclose(started["eval_loss"], ended["eval_loss"], rtol=1e-6)
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("run", "on"))
    assert all((one[key] == other[key]).all() for key in one)
    assert json.loads((tmp_path / "on/adapter/adapter_config.json").read_text())["use_rslora"] is True


def test_early_stopping_ends_with_the_best_adapter(run: Run, tmp_path: pathlib.Path) -> None:
    # So high a rate that it gets worse soon.
    assert (
        run(
            "--max-steps",
            40,
            "--lr",
            0.3,
            "--schedule",
            "constant",
            "--warmup",
            0,
            "--eval-share",
            0.3,
            "--eval-every",
            1,
            "--early-stop",
            3,
        )
        == 0
    )
    scores = {entry["step"]: entry["eval_loss"] for entry in metrics(tmp_path / "run") if "eval_loss" in entry}
    best = min(scores, key=scores.get)
    assert len(scores) == best + 3 < 40
    provenance = json.loads((tmp_path / "run/adapter/provenance.json").read_text())
    assert provenance["steps"] == best and provenance["scores"]["eval_loss"] == scores[best]


def test_a_loss_that_is_no_number_stops_and_names_the_lines(
    run: Run, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = sft.sft

    def bad(policy: Any, reference: Any, batch: Any) -> Any:
        terms = good(policy, reference, batch)
        return terms._replace(total=terms.total / (batch["tokens"].min() > 300))

    assert run("--max-steps", 2, "--no-publish") == 0
    monkeypatch.setattr(sft, "sft", bad)
    assert run("--max-steps", 2, "--no-publish", folder="nan") == 1
    said = capsys.readouterr().err
    assert "step 1: the loss is inf" in said and "on lines " in said and "--lr" in said
    assert not (tmp_path / "nan/adapter").exists()


@pytest.mark.parametrize(
    ("records", "options", "reason"),
    [
        ([], (), "is empty"),
        ([{"text": "x" * 600}], (), "no line is left"),
        ([{"prompt": "a"}], (), "line 1: has `prompt`"),
        ([{"text": "one line"}], ("--eval-share", 0.5, "--publish-if", "eval_loss<1"), "compare scores on held-out data"),
        ([{"text": "abc"}], ("--metric", "exact_match"), "--metric judges answers to held-out prompts"),
        ([{"text": "abc"}], ("--name", "../x"), "is not a valid name"),
        ([{"text": "abc"}], ("--name", "a/b@2"), "names a version"),
        ([{"text": "abc"}], ("--init", "a/none"), "no such adapter"),
        ([{"text": "abc"}], ("--target-modules", "q_prj"), "names no linear layer; there are: down_proj"),
        ([{"text": "abc"}], ("--optimizer", "adamx"), "no optimizer of optax that can be used here; there are: "),
        ([{"text": "abc"}], ("--optimizer-args", '{"b9": 1}'), "--optimizer-args: "),
        ([{"text": "abc"}], ("--schedule", "cosinus"), "is none of cosine, linear, constant"),
        ([{"text": "abc"}], ("--batch-size", 8, "--micro-batch-size", 3), "no multiple of"),
        ([{"text": "abc"}], ("--rank", 99), "over the limit 64 of the server"),
        ([{"text": "abc"}], ("--max-length", 4096), "over the 512 positions"),
        ([{"text": "abc"}], ("--publish-if", "eval_loss"), "no condition such as"),
        ([{"text": "abc"}], ("--dropout", "nan"), "--dropout: nan is not between 0 and 0.99"),
        ([{"text": "abc"}], ("--run", "/proc/none"), "can't be used"),
        ([{"text": "abc"}], ("--store", "/none"), "is no folder that can be written"),
    ],
)
def test_what_is_wrong_is_said_before_training(
    run: Run, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], records: list, options: tuple, reason: str
) -> None:
    tiny.write_lines(tmp_path / "bad.jsonl", records)
    assert run("--max-steps", 1, *options, data="bad.jsonl") == 1
    said = capsys.readouterr().err
    assert reason in said and "Traceback" not in said
    assert not (tmp_path / "run/checkpoints").exists() and not (tmp_path / "store/users").exists()


def test_one_line_is_enough(run: Run, tmp_path: pathlib.Path) -> None:
    tiny.write_lines(tmp_path / "one.jsonl", [{"prompt": "a ", "completion": "b"}])
    assert run("--max-steps", 2, data="one.jsonl") == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_types_learn_too(run: Run, tmp_path: pathlib.Path, dtype: str) -> None:
    assert run("--dtype", dtype, "--epochs", 3, "--packing", "--max-length", 64, "--neftune", 1, "--no-publish") == 0
    losses = [entry["loss"] for entry in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0]
    assert {tensor.dtype for tensor in load_file(tmp_path / "run" / WEIGHTS).values()} == {np.dtype(np.float32)}


def test_task_metrics_judge_the_answers_of_the_engine(run: Run, tmp_path: pathlib.Path) -> None:
    tiny.write_lines(tmp_path / "easy.jsonl", [{"prompt": "say ", "completion": "7"}] * 20)
    hook = tmp_path / "hook.py"
    hook.write_text(
        "def both(answers, references):\n    return {'length': sum(map(len, answers)) / len(answers), 'sevens': answers.count('7')}\n"
    )
    options = ("--max-steps", 12, "--lr", 3e-2, "--eval-share", 0.3, "--eval-every", 12, "--eval-first", "--eval-max-tokens", 4)
    assert run(*options, "--metric", "exact_match", f"{hook}:both", data="easy.jsonl") == 0
    before, after = (entry for entry in metrics(tmp_path / "run") if "eval_loss" in entry)
    assert before["eval_exact_match"] == 0 and after["eval_exact_match"] == 1
    assert after["eval_both_length"] == 1 and after["eval_both_sevens"] == 6


@pytest.mark.parametrize("restart", [[], ["--restart"]])
def test_two_processes_cannot_train_in_one_folder(
    run: Run, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], restart: list[str]
) -> None:
    with RunFolder(tmp_path / "run").held({}, restart=False):
        assert run("--max-steps", 1, *restart) == 1
    assert "another process is training in" in capsys.readouterr().err
    assert list(tmp_path.glob("run.before-*")) == []


def test_a_folder_whose_config_cannot_be_read_is_told_and_can_be_started_over(
    run: Run, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    for content in ("", "[1]", "{"):
        (tmp_path / "run/run.json").write_text(content)
        assert run("--max-steps", 1, "--no-publish") == 1
        assert "run.json can't be read" in capsys.readouterr().err
    assert run("--max-steps", 1, "--no-publish", "--restart") == 0


def test_a_small_share_holds_out_one_line_at_least(run: Run, tmp_path: pathlib.Path) -> None:
    assert run("--max-steps", 1, "--no-publish", "--eval-share", 0.001) == 0
    assert "eval_loss" in metrics(tmp_path / "run")[-1]


@pytest.mark.parametrize("option", [("--alpha", "nan"), ("--epochs", "inf"), ("--lr", "inf")])
def test_a_number_that_is_none_is_told(run: Run, capsys: pytest.CaptureFixture[str], option: tuple[str, str]) -> None:
    assert run(*option) == 1
    assert f"error: {option[0]}: {option[1]} is no finite number" in capsys.readouterr().err


def test_asked_twice_to_stop_a_run_stops_at_once(
    run: Run, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one_step = trainer.Trainer._one_step

    def stopped(self: trainer.Trainer, done: int, state: step.State) -> Any:
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("it went on")
        return one_step(self, done, state)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_one_step", stopped)
        assert run("--max-steps", 6, "--no-publish", "--checkpoint-every", 2) == 128 + signal.SIGINT
    assert "stopping after this step" in capsys.readouterr().err
    assert run("--max-steps", 6, "--no-publish", "--checkpoint-every", 2) == 0
    assert "going on from step 2 of 6" in capsys.readouterr().err


def test_a_stop_that_could_not_save_says_where_the_run_goes_on(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save, one_step = Checkpoints.save, trainer.Trainer._one_step

    def stopped(self: trainer.Trainer, done: int, state: step.State) -> Any:
        if done == 3:
            monkeypatch.setattr(Checkpoints, "save", lambda self, *rest: False)
            os.kill(os.getpid(), signal.SIGTERM)
        return one_step(self, done, state)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_one_step", stopped)
        assert run("--max-steps", 6, "--no-publish", "--checkpoint-every", 2) == 128 + signal.SIGTERM
    monkeypatch.setattr(Checkpoints, "save", save)
    assert "after step 4; the same command goes on from step 2, the last that could be saved" in capsys.readouterr().err


def test_an_adapter_of_another_kind_can_be_compared_with(run: Run, tmp_path: pathlib.Path, tiny_model: pathlib.Path) -> None:
    """The version being served may have other modules and ranks than the one that was trained."""
    assert run("--max-steps", 2, "--target-modules", "v_proj", "--rank", 2, "--no-publish", folder="small") == 0
    assert publish(tmp_path / "small/adapter", "a/b", tmp_path / "store") == 1
    assert run("--max-steps", 6, "--eval-share", 0.3, "--publish-if-better", "--metric", "slot_f1", "--eval-max-tokens", 2) == 0
    assert peft.PROVENANCE_FILE in os.listdir(tmp_path / "store/users/a/adapters/b/2")
