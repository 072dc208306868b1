"""Kernels for CPUs behind `jax.ffi`: products with packed weights, attention over a cache, LoRA by adapter, the choice of tokens; and for training
products with frozen weights, causal attention, log-probabilities of tokens, norms, gates and dropout, with their gradients.

Contract
- `load(build_dir)` gives `Kernels`, or one line that says why there are none: no compiler, another machine, a CPU without AVX2,
  a build that gives wrong results. Nothing else here compiles or loads anything. The twins do the same in plain JAX, everywhere.
- A row's result is the same bit for bit whatever the number of rows, its place among them, the other rows, the chunk a token came
  in, and the number of threads. It differs between instruction sets (but for products with int8 weights) and from the twins, within rounding.
- What is updated (caches, the bank, what a product is added to) is updated in place: donate it, or let it be a value that nothing else uses.
- Activations are float32; weights are float32, bfloat16 or int8, caches float32 or bfloat16, the bank of adapters any of these.
- `JAXLORA_NATIVE_THREADS` (default: the CPUs that the process may run on) and `JAXLORA_NATIVE_ISA` override what is found.

Knows nothing of models, adapters as files, or the engine.
"""

from jaxlora.native.dropout import Dropout
from jaxlora.native.gradients import adapted_linear, causal_attention, frozen_linear, frozen_log_probs, frozen_norm, swiglu
from jaxlora.native.kernels import Kernels
from jaxlora.native.loading import load
from jaxlora.native.operands import LoraModule, LoraRows, Packed, pack_linear, pack_lora
from jaxlora.native.twins import twin_argmax_logsumexp, twin_attention, twin_draw, twin_linear, twin_rms_norm

__all__ = [
    "Dropout",
    "Kernels",
    "LoraModule",
    "LoraRows",
    "Packed",
    "adapted_linear",
    "causal_attention",
    "frozen_linear",
    "frozen_log_probs",
    "frozen_norm",
    "load",
    "pack_linear",
    "pack_lora",
    "swiglu",
    "twin_argmax_logsumexp",
    "twin_attention",
    "twin_draw",
    "twin_linear",
    "twin_rms_norm",
]
