"""Records what Transformers and PEFT answer: `python -m tests.parity.record` from the project's root, in the parity environment.

Runs with torch; `make test` compares with the files that this leaves in `tests/references/parity`.
"""

import argparse
import json
import logging
import pathlib
import tempfile
import warnings
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from . import checkpoints, recording
from .recording import Record, condense

# Greedy tokens say something only where the best token leads by more than the logits may differ.
_MARGIN = 2 * recording.TOLERANCE


def record(architecture: str, folder: pathlib.Path) -> Record:
    """Makes the checkpoint and the adapters of one architecture below `folder` and records the outputs for all of them."""
    base = checkpoints.write_checkpoint(folder / checkpoints.BASE, architecture)
    adapters = {name: checkpoints.write_adapter(folder / name, architecture, name) for name in checkpoints.ADAPTERS}
    model = with_adapters(load_base(base, torch.float32), adapters)
    tokens = torch.from_numpy(checkpoints.batch()).long()
    logits, continuations = [], []
    for variant in checkpoints.VARIANTS:
        with Variant(model, variant), torch.no_grad():
            logits.append(condense(model(input_ids=tokens).logits.numpy()))
            continuations.append([continuation(model, prompt, f"{architecture}, {variant}") for prompt in checkpoints.prompts(architecture, variant)])
    with torch.no_grad():
        names = ["__base__" if variant == checkpoints.BASE else variant for variant in checkpoints.VARIANTS]
        mixed = condense(model(input_ids=tokens, adapter_names=names).logits.numpy())
        bfloat16 = condense(load_base(base, torch.bfloat16)(input_ids=tokens).logits.float().numpy())
    resolved = json.loads(json.dumps(model.get_base_model().config.to_dict()))
    for key in ("_name_or_path", "transformers_version"):
        resolved.pop(key, None)
    prints = {path.name: checkpoints.fingerprint(path) for path in (base, *adapters.values())}
    return Record(
        logits=np.stack(logits),
        mixed=mixed,
        bfloat16=bfloat16,
        greedy=np.array([[tokens for tokens, _ in row] for row in continuations], np.int32),
        greedy_logprobs=np.array([[logprobs for _, logprobs in row] for row in continuations], np.float32),
        facts={"config": resolved, "fingerprints": prints},
    )


def load_base(folder: pathlib.Path, dtype: torch.dtype) -> Any:
    """The model of a folder as Transformers makes it, with the plain attention."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    faults = {kind: names for kind, names in report.items() if names}
    if faults:
        raise ValueError(f"Transformers reads {folder.name} only in part: {faults}")
    return model.eval()


def with_adapters(model: Any, adapters: dict[str, pathlib.Path]) -> PeftModel:
    """The model with every adapter loaded by PEFT, which must find a place for every tensor and have a tensor for every place."""
    wrapped = None
    for name, folder in adapters.items():
        if wrapped is None:
            wrapped = PeftModel.from_pretrained(model, folder, adapter_name=name)
        else:
            wrapped.load_adapter(folder, adapter_name=name)
        loaded = get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False)
        stored = load_file(folder / "adapter_model.safetensors")
        if loaded.keys() != stored.keys():
            raise ValueError(f"{name}: PEFT has other modules than the file: {sorted(loaded.keys() ^ stored.keys())}")
        unequal = [key for key in stored if not torch.equal(loaded[key], stored[key])]
        if unequal:
            raise ValueError(f"{name}: PEFT did not load {unequal}")
    return wrapped.eval()


class Variant:
    """While entered, the model answers with one adapter, or as the base model."""

    def __init__(self, model: PeftModel, variant: str):
        self._model, self._variant, self._disabled = model, variant, None

    def __enter__(self) -> None:
        if self._variant == checkpoints.BASE:
            self._disabled = self._model.disable_adapter()
            self._disabled.__enter__()
        else:
            self._model.set_adapter(self._variant)

    def __exit__(self, *failure: Any) -> None:
        if self._disabled is not None:
            self._disabled.__exit__(*failure)


def continuation(model: Any, prompt: list[int], what: str, count: int = checkpoints.NEW_TOKENS) -> tuple[list[int], list[float]]:
    """The greedy tokens after a prompt by `generate`, and their log-probabilities; a step that is nearly a tie is a ValueError."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[0, len(prompt) :].tolist()
    logits = torch.stack(out.logits)[:, 0].float()
    top = logits.topk(2).values
    margin = (top[:, 0] - top[:, 1]).min().item()
    if margin < _MARGIN:
        raise ValueError(f"{what}: a greedy token after the prompt of {len(prompt)} leads by {margin:.4f} only: take another draw of prompts")
    return tokens, logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()


def settle() -> None:
    """Keeps the libraries' hints about tied layers and adapter names out of the output, and the other cores free."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("peft").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # these models are too small to share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=recording.FOLDER, help="folder for the records")
    parser.add_argument("architectures", nargs="*", default=list(checkpoints.ARCHITECTURES))
    options = parser.parse_args()
    settle()
    options.output.mkdir(parents=True, exist_ok=True)
    for architecture in options.architectures:
        with tempfile.TemporaryDirectory() as folder:
            record(architecture, pathlib.Path(folder)).save(options.output, architecture)
        print(f"recorded {architecture}")


if __name__ == "__main__":
    main()
