"""The last layer computes only what is asked for, and that comes out as if it had computed all."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import weights
from jaxlora.config import ModelConfig
from jaxlora.model import PlainElements, PlainLinears, attend_whole, forward, heads, rotation
from tests.parity import checkpoints


@pytest.mark.parametrize("wanted", [[13], [0, 25, 12], list(range(26))])
def test_hidden_states_of_some_tokens_are_those_of_all(tmp_path, wanted):
    folder = tmp_path / "base"
    checkpoints.write_checkpoint(folder, "llama")
    config = ModelConfig.from_folder(folder)
    loaded, linears = weights.load(folder, config, "float32"), PlainLinears(config, None)
    tokens = np.random.default_rng(0).integers(0, checkpoints.VOCABULARY, (2, 13))
    turned = tuple(part[:, None] for part in rotation(config.rope, config.head_dim, jnp.arange(13)))

    def attend(layer, cache, qkv, window):
        return attend_whole(*heads(config, layer, qkv, turned), window).reshape(2, 13, -1), cache

    computed = []

    class Counted(PlainLinears):
        def one(self, dense, own, name, x):
            computed.append((name, x.shape[:2]))
            return super().one(dense, own, name, x)

    every, _ = forward(config, loaded, tokens, attend, linears, PlainElements())
    some, _ = forward(config, loaded, tokens, attend, Counted(config, None), PlainElements(), wanted=jnp.int32(wanted))
    assert some.shape == (len(wanted), 1, config.hidden_size)
    np.testing.assert_allclose(some[:, 0], every.reshape(26, -1)[jnp.int32(wanted)], rtol=1e-5, atol=1e-5)
    assert computed[-1] == ("down_proj", (len(wanted), 1)) and computed[-7] == ("q_proj", (2, 13)), "of the last layer"
