"""Transformers and PEFT, in this process: `generate` on one batch, with an adapter for each row by `adapter_names` where there are several; and training.

A batch is what it takes at a time: rows start together, and none joins or leaves. A list of more requests than the concurrency is
answered batch by batch. When each token comes is noted by a stopping criterion, which `generate` asks after every step.
"""

import time
from typing import Any

import peft
import torch
import transformers

from bench.machine import GEMM_SIZE, fastest
from bench.worker import Answer, Request, Unsupported, serve

# What `adapter_names` calls the base model.
BASE = "__base__"


class Clock(transformers.StoppingCriteria):
    """Notes when each step ended, and stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.times.append(time.monotonic())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class PeftDriver:
    def start(self, setup: dict[str, Any]) -> dict[str, Any]:
        torch.set_grad_enabled(False)
        if setup["dtype"] == "int8":
            raise Unsupported("int8 needs bitsandbytes, which is not installed")
        dtype = getattr(torch, setup["dtype"])
        model = transformers.AutoModelForCausalLM.from_pretrained(setup["model"], dtype=dtype)
        self._names = {name: f"adapter{index}" for index, name in enumerate(setup["adapters"])}
        for name, folder in setup["adapters"].items():
            # Else the adapters would be computed in float32 where the model is bfloat16.
            options = {"adapter_name": self._names[name], "autocast_adapter_dtype": False}
            if isinstance(model, peft.PeftModel):
                model.load_adapter(folder, **options)
            else:
                model = peft.PeftModel.from_pretrained(model, folder, **options)
        self._model = model.to(dtype).eval()
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
        return {"versions": versions}

    def run(self, requests: list[Request], concurrency: int) -> list[Answer]:
        batches = (requests[first : first + concurrency] for first in range(0, len(requests), concurrency))
        return [answer for batch in batches for answer in self._batch(batch)]

    def _batch(self, requests: list[Request]) -> list[Answer]:
        prompts = torch.tensor([request.prompt for request in requests])
        [answer] = {request.answer for request in requests}
        names = [self._names.get(request.adapter, BASE) for request in requests]
        clock = Clock()
        sent = time.monotonic()
        sampling = requests[0].sampling  # a batch has one of everything
        sampling = {"do_sample": True, **sampling} if sampling["temperature"] else {"do_sample": False}
        arguments = {
            "attention_mask": torch.ones_like(prompts), **sampling, "min_new_tokens": answer, "max_new_tokens": answer,
            "eos_token_id": None, "pad_token_id": 0, "stopping_criteria": transformers.StoppingCriteriaList([clock]),
        }  # fmt: skip
        if set(names) == {BASE}:
            with self._model.disable_adapter():
                output = self._model.generate(input_ids=prompts, **arguments)
        elif len(set(names)) == 1:
            self._model.set_adapter(names[0])
            output = self._model.generate(input_ids=prompts, **arguments)
        else:
            output = self._model.generate(input_ids=prompts, adapter_names=names, **arguments)
        ids = output[:, prompts.shape[1] :].tolist()
        return [Answer(sent, [(arrived, 1) for arrived in clock.times], len(row), row) for row in ids]

    def train(self, model: str, texts: list[str], dtype: str, batch: int, rank: int, lr: float, dropout: float) -> list[float]:
        """Seconds of each training step over the texts in order, `batch` of them at a time, all of one length."""
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
        learner = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config).train()
        optimizer = torch.optim.AdamW([weight for weight in learner.parameters() if weight.requires_grad], lr=lr, weight_decay=0.0)
        seconds = []
        for first in range(0, len(texts), batch):
            begin = time.monotonic()
            ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts[first : first + batch]])
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = learner(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.monotonic() - begin)
        return seconds

    def limits(self) -> dict[str, float]:
        """Operations/s of torch's large matrix products by type."""
        found = {}
        for dtype in ("float32", "bfloat16"):
            a = torch.ones(GEMM_SIZE, GEMM_SIZE, dtype=getattr(torch, dtype))
            found[dtype] = 2 * GEMM_SIZE**3 / fastest(lambda: a @ a)
        return found

    def stop(self) -> None:
        pass


if __name__ == "__main__":
    serve(PeftDriver())
