"""Records what PEFT and torch do with SFT: `python -m tests.training.record_sft` from the project's root, in the parity
environment.

A plain training loop: the adapter, the data, the schedule and AdamW of `preference_runs`, on prompts with their chosen answers.
Runs with torch; the tests compare with the file that this leaves in `tests/references/training`.
"""

import json
import pathlib
import tempfile
from typing import Any

import torch
from peft import PeftModel

from tests.parity import checkpoints
from tests.parity.record import load_base, settle

from . import preference_runs as runs

FILE = runs.FILE.with_name("sft.json")


def record() -> dict[str, Any]:
    """Loss and gradient norm before clipping of every step."""
    settle()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        base = checkpoints.write_checkpoint(folder / checkpoints.BASE, runs.ARCHITECTURE)
        adapter = checkpoints.write_adapter(folder / runs.ADAPTER, runs.ARCHITECTURE, runs.ADAPTER)
        prints = {path.name: checkpoints.fingerprint(path) for path in (base, adapter)}
        # In evaluation mode, so that the dropout of the adapter's config does nothing.
        model = PeftModel.from_pretrained(load_base(base, torch.float32), adapter, is_trainable=True).eval()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=0.0, weight_decay=0.0)
    found: dict[str, list[float]] = {"loss": [], "grad_norm": []}
    for step in range(runs.STEPS):
        rows = runs.pairs()[step * runs.BATCH : (step + 1) * runs.BATCH]
        losses = [_loss(model, row["prompt_ids"], row["chosen_ids"]) for row in rows]
        loss = sum(losses) / sum(len(row["chosen_ids"]) for row in rows)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(learned, runs.MAX_GRAD_NORM)
        optimizer.param_groups[0]["lr"] = runs.learning_rate(step)
        optimizer.step()
        found["loss"].append(loss.item())
        found["grad_norm"].append(norm.item())
    return {"fingerprints": prints, "data": runs.fingerprint(), "runs": {"sft": found}}


def _loss(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")


def main() -> None:
    FILE.write_text(json.dumps(record(), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
