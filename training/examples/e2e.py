"""Cleaned E2E (Dusek, Howcroft, Rieser 2019): a meaning representation is answered with a sentence about a restaurant.

    python -m training.examples.e2e FILE.csv --output runs/e2e

reads a file of github.com/tuetschek/e2e-cleaning (columns mr, ref, orig_mr) and writes `sft.jsonl`, each text with what it really
says, and `pairs.jsonl` for DPO: of the texts that people wrote for one original representation, one that says just that, and one
that leaves out, adds or changes something. `faults` is for `--metric`, named `training.examples.e2e:faults`.
"""

import argparse
import collections
import csv
import itertools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

from jaxlora.files import replace

_SLOT = re.compile(r"(\w[\w ]*)\[([^\]]*)\]")
_FAMILY = r"(?:famil|kid|child)"
_NOT = r"(?:\bnot?\b|n[’']t\b|\bnon\b|\bun|\bisnt\b|adult)"
# What tells that a text speaks of a value. Prices and ratings are left out: they are paraphrased in too many ways.
_SAYS = {
    "area": {
        "riverside": r"river|thames",
        "city centre": r"(?:city|town)[ -]?cent|cent(?:re|er) of|down ?town",
    },
    "eatType": {"coffee shop": r"coffee|\bcaf[eé]", "pub": r"\bpubs?\b", "restaurant": r"\brestaurants?\b"},
    "familyFriendly": {
        "no": rf"{_NOT}[^.,;]{{0,40}}{_FAMILY}|{_FAMILY}[^.,;]{{0,20}}(?:\bnot\b|n[’']t\b)|adults? only",
        "yes": _FAMILY,
    },
    "food": {food: rf"\b{food}\b" for food in ("Chinese", "Japanese", "French", "Indian", "Italian", "Fast food")}
    | {"English": r"\b(?:English|British)\b"},
}


def slots(representation: str) -> dict[str, str]:
    """`name[Aromi], area[riverside]` as a table."""
    return dict(_SLOT.findall(representation))


def said(text: str, about: Mapping[str, str]) -> dict[str, str]:
    """The slots that a text speaks of, names aside: only that of `about` can be told from other words."""
    found = {}
    for slot in ("name", "near"):
        if slot in about and about[slot].lower() in text.lower():
            found[slot] = about[slot]
    for name in (about.get("name"), about.get("near")):
        text = re.sub(re.escape(name), " ", text, flags=re.IGNORECASE) if name else text
    for slot, values in _SAYS.items():
        spoken = [value for value, pattern in values.items() if re.search(pattern, text, re.IGNORECASE)]
        if spoken:
            # "A coffee shop, a nice restaurant": what was asked for counts. But "not for families" speaks of families, too.
            found[slot] = about[slot] if slot != "familyFriendly" and about.get(slot) in spoken else spoken[0]
    return found


def slot_errors(text: str, representation: str) -> tuple[int, int]:
    """How many of the slots are missing, wrong or added in a text, and how many there are. Prices and ratings are not counted."""
    wanted = {slot: value for slot, value in slots(representation).items() if slot in (*_SAYS, "name", "near")}
    found = said(text, wanted)
    return sum(wanted.get(slot) != found.get(slot) for slot in {*wanted, *found}), len(wanted)


def faults(answers: Sequence[str], references: Sequence[str], prompts: Sequence[str]) -> dict[str, float]:
    """Slot errors per slot (less is better), and words per answer and per reference."""
    counts = [slot_errors(answer, prompt) for answer, prompt in zip(answers, prompts, strict=True)]
    return {
        "loss": sum(errors for errors, _ in counts) / max(sum(count for _, count in counts), 1),
        "words": sum(len(answer.split()) for answer in answers) / len(answers),
        "words_of_people": sum(len(reference.split()) for reference in references) / len(references),
    }


def texts(rows: Sequence[Mapping[str, str]]) -> Iterator[dict[str, str]]:
    """`prompt` and `completion` for SFT: each text with the representation of what it says."""
    yield from ({"prompt": f"{row['mr']}\n", "completion": row["ref"]} for row in rows)


def pairs(rows: Sequence[Mapping[str, str]]) -> Iterator[dict[str, str]]:
    """`prompt`, `chosen`, `rejected` for DPO: one pair for each faulty text whose original has a faultless one too."""
    by_original = collections.defaultdict(lambda: ([], []))
    for row in rows:
        by_original[row["orig_mr"]][row["mr"] != row["orig_mr"]].append(row["ref"])
    for original, (good, faulty) in by_original.items():
        for chosen, rejected in zip(itertools.cycle(good), faulty):
            if chosen != rejected:
                yield {"prompt": f"{original}\n", "chosen": chosen, "rejected": rejected}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=pathlib.Path, help="CSV file with the columns mr, ref, orig_mr")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/e2e"), help="folder for the JSONL files")
    options = parser.parse_args(argv)
    with open(options.file, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    options.output.mkdir(parents=True, exist_ok=True)
    for name, found in (("sft", list(texts(rows))), ("pairs", list(pairs(rows)))):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        replace(options.output / f"{name}.jsonl", lines.encode())
        print(f"{options.output / name}.jsonl: {len(found)} lines")


if __name__ == "__main__":
    main()
