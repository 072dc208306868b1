"""SNIPS (Coucke et al. 2018, arXiv:1805.10190): an utterance is answered with a JSON frame of its intent and slots.

    python -m training.examples.snips FOLDER --output runs/snips

reads `train_<Intent>.json` and `validate_<Intent>.json` of github.com/sonos/nlu-benchmark (2017-06-custom-intent-engines) and
writes `train.jsonl` and `validate.jsonl`, without the validation texts that are in the training set too. `frames` is for
`--metric`, `reward` for `--reward` of GRPO, both named `training.examples.snips:...`.
"""

import argparse
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxlora.files import replace
from training.metrics import exact_match, json_valid, slot_f1


def examples(folder: pathlib.Path, split: str) -> Iterator[dict[str, str]]:
    """`prompt` and `completion` of one split, `train` or `validate`, the intents in turn."""
    by_intent = []
    for path in sorted(folder.glob(f"{split}_*.json")):
        # Some of the files are not UTF-8.
        [(intent, utterances)] = json.loads(path.read_bytes().decode(errors="replace")).items()
        by_intent.append([_example(intent, utterance["data"]) for utterance in utterances])
    for row in range(max(map(len, by_intent), default=0)):
        yield from (rows[row] for rows in by_intent if row < len(rows))


def frames(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Shares of valid JSON, of right intents and of frames that are right as a whole, and the F1 of slots over all answers."""
    pairs = [(_frame(answer), _frame(reference)) for answer, reference in zip(answers, references, strict=True)]
    slots = [[json.dumps(frame.get("slots", {})) for frame in side] for side in zip(*pairs)]
    return {
        "json": json_valid(answers, references),
        "intent": sum(ours.get("intent") == theirs["intent"] for ours, theirs in pairs) / len(pairs),
        "slot_f1": slot_f1(*slots),
        "exact": exact_match(*([json.dumps(frame, sort_keys=True) for frame in side] for side in zip(*pairs))),
    }


def reward(completions: Sequence[str], completion: Sequence[str], **_: Any) -> list[float]:
    """How much of its frame each answer gets right: F1 of intent and slots together, from 0 to 1."""
    return [slot_f1([ours], [theirs]) for ours, theirs in zip(completions, completion, strict=True)]


def _example(intent: str, parts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    text = " ".join("".join(part["text"] for part in parts).split())
    slots: dict[str, str] = {}
    for part in parts:
        if "entity" in part:
            before = f"{slots[part['entity']]}, " if part["entity"] in slots else ""
            slots[part["entity"]] = before + part["text"].strip()
    return {"prompt": f"{text}\n", "completion": json.dumps({"intent": intent, "slots": slots}, ensure_ascii=False)}


def _frame(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="folder with train_*.json and validate_*.json")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/snips"), help="folder for the JSONL files")
    options = parser.parse_args(argv)
    train = list(examples(options.folder, "train"))
    seen = {example["prompt"] for example in train}
    validate = [example for example in examples(options.folder, "validate") if example["prompt"] not in seen]
    options.output.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("validate", validate)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        replace(options.output / f"{name}.jsonl", lines.encode())
        print(f"{options.output / name}.jsonl: {len(rows)} examples")


if __name__ == "__main__":
    main()
