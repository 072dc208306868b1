"""What bfloat16 and int8 cost in quality: perplexity of text, and how often the likeliest token is that of float32.

The text is this project's own documentation, which no model has been trained on. It is scored by the serving backend, with its weights,
its key/value cache and its kernels, a chunk at a time.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.scenarios.context import Context
from bench.workloads import PRECISIONS
from jaxlora import backend, weights
from jaxlora.config import ModelConfig
from jaxlora.kv_cache import KVCache, Rows
from jaxlora.lora import Bank, BankLayout
from jaxlora.model import forward, project, rotation
from jaxlora.text import Tokenizer
from server.repository import PROJECT

CHUNK = 256
TEXTS = ("README.md", "CONTRIBUTING.md", "training/README.md", "bench/README.md")


def measure(context: Context) -> dict[str, Any]:
    tokenizer = Tokenizer.from_folder(context.model)
    ids = [token for name in TEXTS for token in tokenizer.encode((PROJECT / name).read_text())]
    chunks = np.array(ids[: len(ids) // CHUNK * CHUNK], np.int32).reshape(-1, CHUNK)
    native_dir = context.settings.cache_dir / "native"
    scores = {dtype: score(context.model, context.config, dtype, chunks, native_dir) for dtype in PRECISIONS}
    exact = scores["float32"]
    rows, found = [], {}
    for dtype, (losses, best) in scores.items():
        perplexity, equal = float(np.exp(losses.mean())), float((best == exact[1]).mean())
        found[dtype] = {"perplexity": perplexity, "greedy_tokens_equal": equal}
        rows.append([dtype, f"{perplexity:.3f}", f"{perplexity / np.exp(exact[0].mean()):.4f}", f"{equal:.2%}"])
    return {
        "title": "Quality by precision",
        "columns": ["", "perplexity", "over float32", "likeliest tokens equal to float32"],
        "rows": rows,
        "note": f"{chunks.size} tokens of this project's documentation, in chunks of {CHUNK}.",
        "scores": found,
    }


def score(
    model: pathlib.Path, config: ModelConfig, dtype: str, chunks: np.ndarray, native_dir: pathlib.Path
) -> tuple[np.ndarray, np.ndarray]:
    """For int32 chunks `[N, T]`: the negative log-likelihood in nats of each token after the first, and the likeliest token in its
    place, both `[N, T - 1]`."""
    chosen, _ = backend.choose(native_dir)
    int8 = dtype == "int8"
    dtype = PRECISIONS[dtype]["dtype"]
    loaded = weights.load(model, config, dtype, packing=chosen.packing, int8=int8)
    layout = BankLayout.of(config, max_rank=1)
    bank = Bank.empty(layout, 1, dtype)
    cache = KVCache.empty(config, 1, CHUNK, CHUNK, dtype)

    @jax.jit
    def scored(loaded: weights.Weights, cache: KVCache, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        zero = jnp.zeros(1, jnp.int32)
        rows = Rows(zero, zero, jnp.full(1, CHUNK, jnp.int32), zero)
        attend = chosen.attend(config, rotation(config.rope, config.head_dim, jnp.arange(CHUNK)), rows)
        linears = chosen.linears(config, layout, bank, jnp.full(1, -1, jnp.int32), rows)
        caches = list(zip(cache.k, cache.v))
        hidden, _ = forward(config, loaded, tokens[None], attend, linears, chosen, caches)
        logits = project(loaded, linears, hidden)[0, :-1]
        losses = jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, tokens[1:, None], axis=1)[:, 0]
        return losses, jnp.argmax(logits, axis=1)

    found = [jax.device_get(scored(loaded, cache, chunk)) for chunk in chunks]
    return np.stack([losses for losses, _ in found]), np.stack([best for _, best in found])
