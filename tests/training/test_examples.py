"""The example data sets: what becomes of their lines, and their metrics on answers that people judged."""

import json
import pathlib

import pytest

from training.examples import e2e, snips
from training.metrics import scores

REPRESENTATION = "name[Aromi], eatType[coffee shop], food[English], area[riverside], familyFriendly[no], near[Café Sicilia]"


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        ("Aromi is a coffee shop by the river near Café Sicilia. It serves English food and is not family-friendly.", 0),
        ("Aromi, an adults only café near Café Sicilia in riverside, has British food.", 0),
        ("Aromi is an English coffee shop near Café Sicilia in riverside that doesn't welcome children.", 0),
        ("Aromi is a family friendly English coffee shop near Café Sicilia in riverside.", 1),  # wrong
        ("Aromi is an English coffee shop in riverside, no kids.", 1),  # near is missing
        ("Aromi is a coffee shop.", 4),
        ("", 6),
    ],
)
def test_slot_errors(text: str, errors: int) -> None:
    assert e2e.slot_errors(text, REPRESENTATION) == (errors, 6)


def test_what_is_added_is_an_error_too_but_prices_and_ratings_are_not_judged() -> None:
    assert e2e.slot_errors("Aromi is a cheap Italian place with five stars.", "name[Aromi], priceRange[high]") == (1, 1)
    found = scores({"faults": e2e.faults}, ["Aromi in Rome", "Cotto"], ["one two", "three"], ["name[Aromi]\n", "name[Aromi]\n"])
    assert found == {"eval_faults_loss": 0.5, "eval_faults_words": 2.0, "eval_faults_words_of_people": 1.5}


def test_pairs_share_the_original_and_differ_in_faults(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text(
        'mr,ref,fixed,orig_mr\n"a[1]",good,0,"a[1]"\n"a[2]",bad,1,"a[1]"\n"a[3]",worse,1,"a[1]"\n"b[1]",alone,1,"b[2]"\n'
    )
    e2e.main([str(path), "--output", str(tmp_path / "out")])
    pairs = [json.loads(line) for line in (tmp_path / "out/pairs.jsonl").read_text().splitlines()]
    assert pairs == [{"prompt": "a[1]\n", "chosen": "good", "rejected": rejected} for rejected in ("bad", "worse")]
    assert [json.loads(line)["prompt"] for line in (tmp_path / "out/sft.jsonl").read_text().splitlines()][1] == "a[2]\n"


def test_snips_becomes_frames_without_validation_texts_that_were_trained_on(tmp_path: pathlib.Path) -> None:
    weather = {
        "data": [
            {"text": "weather in "},
            {"text": "Oslo ", "entity": "city"},
            {"text": " and "},
            {"text": "Bern", "entity": "city"},
        ]
    }
    play = {"data": [{"text": "play  something"}]}
    for split in ("train", "validate"):
        (tmp_path / f"{split}_GetWeather.json").write_text(
            json.dumps({"GetWeather": [weather] if split == "train" else [weather, play]})
        )
    (tmp_path / "train_PlayMusic.json").write_bytes(b'{"PlayMusic": [{"data": [{"text": "caf\xe9"}]}]}')
    snips.main([str(tmp_path), "--output", str(tmp_path / "out")])
    train, validate = (
        [json.loads(line) for line in (tmp_path / f"out/{name}.jsonl").read_text().splitlines()] for name in ("train", "validate")
    )
    assert train[0]["prompt"] == "weather in Oslo and Bern\n" and json.loads(train[0]["completion"])["slots"] == {
        "city": "Oslo, Bern"
    }
    assert [json.loads(row["completion"])["intent"] for row in train] == ["GetWeather", "PlayMusic"]
    assert [row["prompt"] for row in validate] == ["play something\n"]


def test_frames_are_judged_as_a_whole_and_by_part() -> None:
    reference = '{"intent": "A", "slots": {"x": "1", "y": "2"}}'
    answers = ['{"slots": {"y": "2", "x": "1"}, "intent": "A"}', '{"intent": "A", "slots": {"x": "1"}}', "{", '{"intent": "B"}']
    found = snips.frames(answers, [reference] * 4)
    assert found == {"json": 0.75, "intent": 0.5, "slot_f1": pytest.approx(2 * 3 / (3 + 8)), "exact": 0.25}
    assert snips.reward(completions=answers, completion=[reference] * 4) == [1, pytest.approx(0.8), 0, 0]
