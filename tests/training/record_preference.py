"""Records what TRL and PEFT do: `python -m tests.training.record_preference` from the project's root, in the parity environment.

Runs with torch; the tests compare with the file that this leaves in `tests/references/training`.
"""

import json
import pathlib
import tempfile
import types
from typing import Any

import tokenizers
import torch
import transformers
import trl
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import SequentialSampler
from trl.experimental.orpo import ORPOTrainer

from tests.parity import checkpoints
from tests.parity.record import load_base, settle

from . import preference_runs as runs


class _AsGiven:
    """For a trainer: the data are token ids already, and are taken in their order."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _get_train_sampler(self, dataset: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class _Dpo(_AsGiven, trl.DPOTrainer):
    pass


class _Kto(_AsGiven, trl.KTOTrainer):
    pass


def dpo(run: runs.Run, folder: pathlib.Path) -> dict[str, list[float]]:
    """The loss and the gradient norm before clipping of every step."""
    config = trl.DPOConfig(
        **_arguments(folder, run.micro_batch), beta=run.beta, loss_type=[run.trl_loss], label_smoothing=run.label_smoothing
    )
    return _train(_Dpo, config, runs.pairs(), folder)


def kto(folder: pathlib.Path) -> dict[str, list[float]]:
    """The same of KTO, whose estimate of the divergence is that of the whole batch."""
    config = trl.KTOConfig(
        **_arguments(folder, runs.BATCH),
        beta=runs.KTO_BETA,
        desirable_weight=runs.KTO_DESIRABLE,
        undesirable_weight=runs.KTO_UNDESIRABLE,
    )
    return _train(_Kto, config, runs.labelled(), folder)


def odds() -> dict[str, list[float]]:
    """ORPO's comparison of odds on a few pairs, and its gradients. TRL's likelihood term differs from the paper's, and so do
    whole runs."""
    means = torch.tensor(runs.MEAN_LOGPS, dtype=torch.float64)
    chosen, rejected = means[:, 0].float().requires_grad_(), means[:, 1].float().requires_grad_()
    trainer = types.SimpleNamespace(beta=1.0, accelerator=types.SimpleNamespace(device="cpu"))
    loss = -ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]
    loss.sum().backward()
    found = {"chosen": chosen, "rejected": rejected, "loss": loss}
    found |= {"chosen_gradient": chosen.grad, "rejected_gradient": rejected.grad}
    return {name: tensor.tolist() for name, tensor in found.items()}


def _arguments(folder: pathlib.Path, micro_batch: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": runs.BATCH // micro_batch,
        "max_steps": runs.STEPS,
        "learning_rate": runs.LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": runs.WARMUP_STEPS,
        "weight_decay": 0.0,
        "max_grad_norm": runs.MAX_GRAD_NORM,
        "max_length": None,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def _train(trainer_class: type, config: Any, rows: list[dict[str, Any]], folder: pathlib.Path) -> dict[str, list[float]]:
    base = load_base(folder / checkpoints.BASE, torch.float32)
    model = PeftModel.from_pretrained(base, folder / runs.ADAPTER, is_trainable=True)
    trainer = trainer_class(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=_tokenizer())
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return {name: [entry[name] for entry in logged] for name in ("loss", "grad_norm", "learning_rate")}


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    # The trainers ask for one, and take only the padding from it.
    vocabulary = {f"t{index}": index for index in range(checkpoints.VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", eos_token="t1")


def record() -> dict[str, Any]:
    """Every run."""
    settle()
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        base = checkpoints.write_checkpoint(folder / checkpoints.BASE, runs.ARCHITECTURE)
        adapter = checkpoints.write_adapter(folder / runs.ADAPTER, runs.ARCHITECTURE, runs.ADAPTER)
        results = {name: dpo(run, folder) for name, run in runs.RUNS.items()} | {"kto": kto(folder)}
        prints = {path.name: checkpoints.fingerprint(path) for path in (base, adapter)}
    versions = {"trl": trl.__version__, "torch": torch.__version__.partition("+")[0]}
    return {"versions": versions, "fingerprints": prints, "data": runs.fingerprint(), "runs": results, "odds": odds()}


def main() -> None:
    runs.FILE.parent.mkdir(parents=True, exist_ok=True)
    runs.FILE.write_text(json.dumps(record(), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
