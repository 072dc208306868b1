"""`training.grpo` as a person runs it: rewards rise, the same seed gives the same bytes, and a run that was stopped ends as if
it had not been."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from jaxlora.settings import Settings
from tests.training import tiny
from training import grpo

pytestmark = pytest.mark.usefixtures("quick_compilation")
REWARD = "tests.training.rewards_for_tests"


@pytest.fixture
def place(tmp_path: pathlib.Path, tiny_model: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    cache = Settings.read().cache_dir
    monkeypatch.setenv("MODEL", str(tiny_model))
    monkeypatch.setenv("CACHE_DIR", str(cache))  # native kernels are built once on a machine
    monkeypatch.setenv("MAX_SLOTS", "2")  # few shapes to compile
    records = [{"prompt": f"{at} then ", "stop_at": str(tmp_path / "stop")} for at in range(10)]
    records += [{"prompt": [{"role": "user", "content": f"after {at}?"}], "stop_at": str(tmp_path / "stop")} for at in range(6)]
    tiny.write_lines(tmp_path / "prompts.jsonl", records)
    return tmp_path


def _run(place: pathlib.Path, run: str, *more: Any, reward: str = "even", steps: int = 4, publish: bool = False) -> int:
    options = {
        "data": place / "prompts.jsonl", "name": "alice/even", "reward": f"{REWARD}:{reward}", "run": place / run,
        "max-steps": steps,
        "batch-size": 32, "group": 8, "max-completion": 10, "max-length": 64, "buckets": 1, "rank": 4, "alpha": 8, "lr": 2e-2,
        "schedule": "constant", "checkpoint-every": 1000, "store": place / "store",
    }  # fmt: skip
    argv = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return grpo.main([*argv, *([] if publish else ["--no-publish"]), *map(str, more)])


def _entries(run: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]



def _adapter(run: pathlib.Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def _timeless(run: pathlib.Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if "second" not in name} for entry in _entries(run)]


def test_rewards_rise(place: pathlib.Path) -> None:
    assert _run(place, "run", steps=20) == 0
    rewards = [entry["reward"] for entry in _entries(place / "run")]
    assert len(rewards) == 20 and np.mean(rewards[-4:]) > 3 * np.mean(rewards[:4])
    assert any(array.any() for name, array in load(_adapter(place / "run")).items() if "lora_B" in name)


@pytest.mark.parametrize("updates", [1, 3])
def test_a_stopped_run_ends_with_the_bytes_of_one_that_was_not(place: pathlib.Path, updates: int) -> None:
    more = ["--updates", updates, "--kl", 0.05, "--dropout", 0.1]
    assert _run(place, "whole", *more, reward="even_until_stopped", steps=5) == 0
    (place / "stop").write_text("2")  # in the second rollout: with several updates the run then goes on in the middle of one
    assert _run(place, "stopped", *more, reward="even_until_stopped", steps=5) == 143
    assert _run(place, "stopped", *more, reward="even_until_stopped", steps=5) == 0
    assert _adapter(place / "whole") == _adapter(place / "stopped")
    assert _timeless(place / "whole") == _timeless(place / "stopped")


def test_updates_of_one_rollout_start_at_a_ratio_of_one_and_move_on(place: pathlib.Path) -> None:
    assert _run(place, "run", "--updates", 3, "--clip", 0.001, "--lr", 0.1, steps=6) == 0
    clipped = [entry["clip/low"] + entry["clip/high"] for entry in _entries(place / "run")]
    assert clipped[0] == clipped[3] == 0 and min(clipped[1], clipped[2], clipped[4], clipped[5]) > 0


def test_dr_grpo_divides_by_constants(place: pathlib.Path) -> None:
    assert _run(place, "run", "--loss", "dr_grpo", steps=1) == 0
    assert _entries(place / "run")[0]["count"] == 32 * 10
    answers = json.loads((place / "run" / "rollouts" / "000000.json").read_text())["answers"]
    rewards = np.array([answer["rewards"]["even"] for answer in answers]).reshape(-1, 8)
    np.testing.assert_allclose(
        [answer["advantage"] for answer in answers], (rewards - rewards.mean(axis=1, keepdims=True)).reshape(-1), atol=1e-6
    )


def test_held_out_rewards_decide_on_publishing(place: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--eval-share", 0.25, "--eval-every", 2, "--publish-if", "eval_reward>0.9"]
    (place / "store").mkdir()
    assert _run(place, "run", *more, publish=True) == 3
    assert "eval_reward is" in capsys.readouterr().err
    scores = [entry for entry in _entries(place / "run") if "eval_reward" in entry]
    assert [entry["step"] for entry in scores] == [2, 4] and all(entry["eval_loss"] == -entry["eval_reward"] for entry in scores)


def test_a_failing_reward_is_told_and_loses_nothing(place: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(place, "run", reward="broken_at_last") == 1
    assert "rollout 0: reward broken_at_last: RuntimeError: no judge today" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--reward", f"{REWARD}:odd"], "has no function 'odd'; it has: broken_at_last, even, even_until_stopped"),
        (["--group", 5], "--batch-size: 32 is no multiple of --group 5"),
        (["--max-completion", 64], "leaves no room for a prompt"),
        (["--loss", "ppo"], "--loss: 'ppo' is none of grpo, dapo, dr_grpo"),
        (["--metric", "exact_match"], "held-out answers are judged by the reward functions"),
    ],
)
def test_wrong_options_are_told(place: pathlib.Path, more: list, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(place, "run", *more) == 1
    assert message in capsys.readouterr().err


def test_wrong_lines_are_told_with_their_numbers(place: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_lines(place / "prompts.jsonl", [{"prompt": "a"}, {"text": "b"}, {"prompt": ""}, {"prompt": "c", "completions": 1}])
    assert _run(place, "run") == 1
    told = capsys.readouterr().err
    for problem in ("line 2: has no `prompt`", "line 3: `prompt` is empty", "line 4: has a field `completions`"):
        assert problem in told
