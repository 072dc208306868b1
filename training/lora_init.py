"""A new adapter, as PEFT would start it, or one that exists, to go on from."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import peft
from jaxlora.config import ModelConfig
from jaxlora.errors import AdapterInvalid, SetupError
from jaxlora.lora import Adapter
from jaxlora.peft import AdapterConfig, LoraAdapter, LoraPair
from training import keys


def new_adapter(config: ModelConfig, raw: Mapping[str, Any], seed: int) -> Adapter:
    """A as PEFT draws it (`kaiming_uniform_(a=sqrt(5))`: uniform within 1 / sqrt(in)), B zero: the model starts as the base
    model.

    Arguments:
        raw: an `adapter_config.json`, for example of `jaxlora.peft.new_config`.

    Raises:
        SetupError: the config can't be applied, or its target modules name no linear layer.
    """
    try:
        lora = AdapterConfig.from_dict(raw)
    except AdapterInvalid as error:
        raise SetupError("\n".join(error.problems)) from None
    paths = config.linear_paths()
    missing = lora.targets_without_a_module(paths)
    chosen = {path: at for path, at in paths.items() if lora.selects(path)}
    if missing or not chosen:
        names = sorted({at.name for at in paths.values()})
        wrong = ", ".join(missing) or raw["target_modules"]
        raise SetupError(f"--target-modules: {wrong} names no linear layer; there are: {', '.join(names)}")
    key = jax.random.key(seed)
    a, b = {}, {}
    for path, at in chosen.items():
        bound = 1 / math.sqrt(at.in_features)
        shape = (lora.rank(path), at.in_features)
        a[path] = jax.random.uniform(keys.of_module(key, path), shape, jnp.float32, -bound, bound)
        b[path] = jnp.zeros((at.out_features, lora.rank(path)), jnp.float32)
    return Adapter(a, b, tuple((path, lora.scale(path)) for path in sorted(chosen)))


def to_peft(adapter: Adapter, raw: Mapping[str, Any]) -> LoraAdapter:
    """The adapter in host memory, as `jaxlora.peft.write` takes it. `raw` is its `adapter_config.json`."""
    scales = dict(adapter.scales)
    host = jax.device_get(adapter)
    return peft.LoraAdapter(
        {path: LoraPair(np.asarray(host.a[path]), np.asarray(host.b[path]), scales[path]) for path in sorted(scales)}, raw
    )
