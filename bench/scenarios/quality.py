"""What bfloat16 and int8 cost in quality: perplexity of text, and how often the likeliest token is that of float32.

The text is this project's own documentation, which no model has been trained on. It is scored by the serving backend, with its weights,
its key/value cache and its kernels, a chunk at a time. An adapter is trained here on every other chunk, and scored on those between.
"""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.scenarios.context import Context
from bench.scenarios.training import RANK, run_sft
from bench.workloads import PRECISIONS
from jaxlora import backend, peft, weights
from jaxlora.config import ModelConfig
from jaxlora.engine import Program, Sizes
from jaxlora.kv_cache import KVCache, Rows
from jaxlora.lora import Bank
from jaxlora.model import forward, project, rotation
from jaxlora.text import Tokenizer
from server.repository import PROJECT

CHUNK = 256
STEPS, MARGIN = 24, 8  # of training; tokens that a chunk may grow by where it is cut out of the text, and its end
TEXTS = ("README.md", "CONTRIBUTING.md", "jaxlora/native/README.md", "training/README.md", "bench/README.md")


def measure(context: Context) -> dict[str, Any]:
    tokenizer = Tokenizer.from_folder(context.model)
    ids = [token for name in TEXTS for token in tokenizer.encode((PROJECT / name).read_text())]
    chunks = np.array(ids[: len(ids) // CHUNK * CHUNK], np.int32).reshape(-1, CHUNK)
    native_dir = context.settings.cache_dir / "native"
    whole = {dtype: score(context.model, context.config, dtype, chunks, native_dir) for dtype in PRECISIONS}
    adapter, between = _trained(context, [tokenizer.decode(chunk[:-MARGIN].tolist()) for chunk in chunks[::2]]), chunks[1::2]
    adapted = {
        f"{dtype}, an adapter{' in 8 bits' if int8 else ''}": score(context.model, context.config, dtype, between, native_dir, adapter, int8)
        for int8 in (False, True)
        for dtype in PRECISIONS
    }
    rows, found = [], {}
    for scores in (whole, adapted):
        exact_losses, exact_best = next(iter(scores.values()))
        for name, (losses, best) in scores.items():
            perplexity, equal = float(np.exp(losses.mean())), float((best == exact_best).mean())
            found[name] = {"perplexity": perplexity, "greedy_tokens_equal": equal}
            rows.append([name, f"{perplexity:.3f}", f"{perplexity / np.exp(exact_losses.mean()):.4f}", f"{equal:.2%}"])
    return {
        "title": "Quality by precision",
        "columns": ["", "perplexity", "over float32", "likeliest tokens equal to float32"],
        "rows": rows,
        "note": f"{chunks.size} tokens of this project's documentation, in chunks of {CHUNK}. The adapter (rank {RANK}, all linear layers) made {STEPS}"
        " steps on every other chunk, and is scored on those between.",
        "scores": found,
    }


def _trained(context: Context, texts: list[str]) -> peft.LoraAdapter:
    data = context.folder / "quality.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    context.say(f"  training an adapter, {STEPS} steps")
    run = run_sft(context, "quality", data, STEPS, "bfloat16")
    return peft.read(run / "adapter", context.config, peft.Limits.of(context.settings))


def score(
    model: pathlib.Path,
    config: ModelConfig,
    dtype: str,
    chunks: np.ndarray,
    native_dir: pathlib.Path,
    adapter: peft.LoraAdapter | None = None,
    int8_adapter: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """For int32 chunks `[N, T]`: the negative log-likelihood in nats of each token after the first, and the likeliest token in its
    place, both `[N, T - 1]`."""
    chosen, _ = backend.choose(native_dir)
    int8 = dtype == "int8"
    dtype = PRECISIONS[dtype]["dtype"]
    loaded = weights.load(model, config, dtype, packing=chosen.packing, int8=int8)
    sizes = Sizes(1, CHUNK, CHUNK, lora_slots=1, max_lora_rank=adapter.rank if adapter else 1, int8_adapters=int8_adapter)
    program = Program(config, loaded, chosen, sizes, dtype)
    program.allocate()
    slot = -1
    if adapter:
        slot = 0
        program.put_adapter(slot, program.pack(adapter.modules, adapter.rank), adapter.rank)

    @jax.jit
    def scored(loaded: weights.Weights, bank: Bank, cache: KVCache, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        zero = jnp.zeros(1, jnp.int32)
        rows = Rows(zero, zero, jnp.full(1, CHUNK, jnp.int32), zero)
        attend = chosen.attend(config, rotation(config.rope, config.head_dim, jnp.arange(CHUNK)), rows)
        linears = chosen.linears(config, program.layout, bank, jnp.full(1, slot, jnp.int32), rows)
        caches = list(zip(cache.k, cache.v))
        hidden, _ = forward(config, loaded, tokens[None], attend, linears, chosen, caches)
        logits = project(loaded, linears, hidden)[0, :-1]
        losses = jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, tokens[1:, None], axis=1)[:, 0]
        return losses, jnp.argmax(logits, axis=1)

    found = [jax.device_get(scored(loaded, program.bank, program.state.cache, chunk)) for chunk in chunks]
    return np.stack([losses for losses, _ in found]), np.stack([best for _, best in found])
