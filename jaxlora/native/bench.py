"""Times the kernels beside plain XLA at the sizes of SmolLM2-135M: `python -m jaxlora.native.bench [linear|step|...]`.

Weights are random and as many as the model's layers, so that each is read from memory and not from a cache. Times are medians of
repetitions that alternate between the variants, with the fastest and the slowest beside them.
"""

import argparse
import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import allocator, native
from jaxlora.config import Rope
from jaxlora.int8 import quantize
from jaxlora.int8_size import WEIGHT_BYTES
from jaxlora.model import Gated, rms_norm, rotation

LAYERS, HIDDEN, MLP, HEADS, KV, HEAD, VOCABULARY = 30, 576, 1536, 9, 3, 64, 49152
QKV = (HEADS + 2 * KV) * HEAD
SHAPES = {"qkv": (HIDDEN, QKV), "o": (HIDDEN, HIDDEN), "gate_up": (HIDDEN, 2 * MLP), "down": (MLP, HIDDEN)}
RANK, ADAPTERS = 16, 16


@dataclasses.dataclass
class Timing:
    median: float
    fastest: float
    slowest: float

    def __str__(self) -> str:
        return f"{self.median * 1e3:8.2f} ms ({self.fastest * 1e3:.2f} to {self.slowest * 1e3:.2f})"


def measure(variants: dict[str, Callable[[], object]], repeat: int) -> dict[str, Timing]:
    """Seconds a call of each variant, taken in turns after one call that compiles."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        jax.block_until_ready(call())
    for _ in range(repeat):
        for name, call in variants.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - begin)
    return {name: Timing(statistics.median(t), min(t), max(t)) for name, t in times.items()}


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(0.05)


def weights(kernels: native.Kernels, shape: tuple[int, int], dtype: str, count: int = LAYERS) -> list[native.Packed]:
    w = normal(*shape)
    packed = kernels.pack_linear(quantize(w) if dtype == "int8" else jnp.asarray(w, dtype))
    return [dataclasses.replace(packed, data=jnp.array(packed.data, copy=True)) for _ in range(count)]


def bench_linear(kernels: native.Kernels, repeat: int) -> None:
    each = lambda linear: jax.jit(lambda x, ws: [linear(x, w) for w in ws])
    for name, shape in {**SHAPES, "head": (HIDDEN, VOCABULARY)}.items():
        count = 1 if name == "head" else LAYERS
        plain = [jnp.array(normal(*shape)) for _ in range(count)]
        packed = {dtype: weights(kernels, shape, dtype, count) for dtype in ("float32", "bfloat16", "int8")}
        for rows in (1, 4, 16, 128, 512):
            x = normal(rows, shape[0])
            variants = {"XLA float32": functools.partial(each(native.twin_linear), x, plain)}
            for dtype, w in packed.items():
                variants[dtype] = functools.partial(each(kernels.linear), x, w)
            for variant, timing in measure(variants, repeat).items():
                size = {"bfloat16": 2, "int8": WEIGHT_BYTES}.get(variant, 4)
                values = count * shape[0] * shape[1]
                print(
                    f"{name:8} {rows:4} rows  {variant:12} {timing}  {values * size / timing.median / 1e9:6.1f} GB/s"
                    f"  {2 * rows * values / timing.median / 1e9:7.1f} GFLOP/s"
                )


def bench_attention(kernels: native.Kernels, repeat: int) -> None:
    for rows, chunk, length in ((1, 1, 128), (16, 1, 128), (16, 1, 1500), (1, 1, 1500), (1, 128, 0), (1, 512, 0), (1, 128, 1024)):
        size = length + chunk
        qkv, turned = normal(rows, chunk, QKV), rotation(Rope(10000.0), HEAD, jnp.arange(size))
        number = jnp.arange(rows, dtype=jnp.int32)
        where = jnp.full(rows, length, jnp.int32), jnp.full(rows, chunk, jnp.int32), number, chunk * number
        for dtype in ("float32", "bfloat16"):
            caches = [tuple(jnp.array(jnp.zeros((rows, KV, size, HEAD), dtype)) for _ in range(2)) for _ in range(LAYERS)]

            @functools.partial(jax.jit, donate_argnums=1)
            def step(qkv, caches):
                done = [kernels.attention(qkv, turned, None, *pair, *where, scale=HEAD**-0.5) for pair in caches]
                return [out for out, _, _ in done], [tuple(pair) for _, *pair in done]

            def call():
                nonlocal caches
                out, caches = step(qkv, caches)
                return out

            timing = measure({dtype: call}, repeat)[dtype]
            moved = LAYERS * rows * KV * size * HEAD * 2 * (4 if dtype == "float32" else 2)
            flops = LAYERS * rows * HEADS * HEAD * 4 * sum(length + t + 1 for t in range(chunk))
            print(
                f"attention {rows:2} rows of {chunk:3} at {length:4} {dtype:9} {timing}  {moved / timing.median / 1e9:6.1f} GB/s"
                f"  {flops / timing.median / 1e9:6.1f} GFLOP/s"
            )


def lora_modules(offset: int, k: int, widths: list[int]) -> tuple[tuple[native.LoraModule, ...], int]:
    modules, column = [], 0
    for width in widths:
        modules.append(native.LoraModule(offset, offset + k, column, width))
        offset, column = offset + k + width, column + width
    return tuple(modules), offset


def layer_modules() -> tuple[dict[str, tuple[native.LoraModule, ...]], int]:
    """The modules of one layer, and the values of a rank that it takes."""
    layer, offset = {}, 0
    for name, k, widths in (
        ("qkv", HIDDEN, [HEADS * HEAD, KV * HEAD, KV * HEAD]),
        ("o", HIDDEN, [HIDDEN]),
        ("gate_up", HIDDEN, [MLP, MLP]),
        ("down", MLP, [HIDDEN]),
    ):
        layer[name], offset = lora_modules(offset, k, widths)
    return layer, offset


def bench_lora(kernels: native.Kernels, repeat: int) -> None:
    """The linear layers of a model without adapters and with them."""
    modules, layer_size = layer_modules()
    size = RANK * LAYERS * layer_size
    rank = jnp.full(ADAPTERS, RANK, jnp.int32)
    for dtype in ("float32", "bfloat16"):
        bank = jnp.array(np.broadcast_to(normal(1, size), (ADAPTERS, size)), dtype)
        model = {name: weights(kernels, shape, dtype) for name, shape in SHAPES.items()}

        @functools.partial(jax.jit, static_argnames="adapted")
        def step(model, bank, x, wide, slots, adapted):
            out = []
            for index in range(LAYERS):
                for name, parts in modules.items():
                    adapters = native.LoraRows(bank, jnp.int32(index * layer_size), slots, rank, parts, RANK)
                    inputs = wide if name == "down" else x
                    out.append(kernels.linear(inputs, model[name][index], adapters=adapters if adapted else None)[0, 0])
            return out

        for name, slots in {
            "1 row": [0],
            "16 rows, 16 adapters": range(16),
            "16 rows, 1 adapter": [3] * 16,
            "128 rows, 1 adapter": [3] * 128,
        }.items():
            rows = jnp.array(list(slots), jnp.int32)
            call = functools.partial(step, model, bank, normal(len(rows), HIDDEN), normal(len(rows), MLP), rows)
            timings = measure({kind: functools.partial(call, kind == "adapted") for kind in ("base", "adapted")}, repeat)
            for kind, timing in timings.items():
                print(f"lora {name:22} {dtype:9} {kind:8} {timing}")
            moved, took = len(set(slots)) * size * bank.dtype.itemsize, timings["adapted"].median - timings["base"].median
            print(f"lora {name:22} {dtype:9} {'adapters':8} {took * 1e3:8.2f} ms  {moved / took / 1e9:6.1f} GB/s")


def bench_step(kernels: native.Kernels, repeat: int, length: int = 96) -> None:
    """A whole decode step of a model of these sizes: norms, rotation, caches, activation, output layer, argmax."""
    modules, layer_size = layer_modules()
    bank_size = RANK * LAYERS * layer_size
    rank = jnp.full(ADAPTERS, RANK, jnp.int32)
    for dtype in ("float32", "bfloat16"):
        model = {name: weights(kernels, shape, dtype) for name, shape in SHAPES.items()}
        head = weights(kernels, (HIDDEN, VOCABULARY), dtype, 1)[0]
        embed = jnp.array(normal(VOCABULARY, HIDDEN))
        bank = jnp.array(np.broadcast_to(normal(1, bank_size), (ADAPTERS, bank_size)), dtype)
        norm, turned = jnp.ones(HIDDEN), rotation(Rope(10000.0), HEAD, jnp.arange(2 * length))

        @functools.partial(jax.jit, donate_argnums=4, static_argnames="adapted")
        def step(model, head, bank, tokens, caches, starts, slots, adapted):
            rows = tokens.shape[0]

            def linear(index, name, x, **around):
                adapters = native.LoraRows(bank, jnp.int32(index * layer_size), slots, rank, modules[name], RANK)
                return kernels.linear(x, model[name][index], adapters=adapters if adapted else None, **around)

            live, places, out = jnp.ones(rows, jnp.int32), jnp.arange(rows, dtype=jnp.int32), []
            x = embed[tokens]
            for index in range(LAYERS):
                qkv = linear(index, "qkv", x, norm=(norm, 1e-5))[:, None]
                y, *pair = kernels.attention(qkv, turned, None, *caches[index], starts, live, places, places, scale=HEAD**-0.5)
                out.append(tuple(pair))
                x = linear(index, "o", y.reshape(rows, HIDDEN), onto=x)
                x = linear(index, "down", linear(index, "gate_up", x, norm=(norm, 1e-5)), gated=True, onto=x)
            return kernels.argmax_logsumexp(kernels.linear(x, head, norm=(norm, 1e-5)))[0], out

        for rows in (1, 4, 16):
            state = {
                "caches": [
                    tuple(jnp.array(jnp.zeros((rows, KV, 2 * length, HEAD), dtype)) for _ in range(2)) for _ in range(LAYERS)
                ]
            }

            def call(adapted):
                tokens = jnp.zeros(rows, jnp.int32)
                got, state["caches"] = step(
                    model,
                    head,
                    bank,
                    tokens,
                    state["caches"],
                    jnp.full(rows, length, jnp.int32),
                    jnp.arange(rows, dtype=jnp.int32),
                    adapted,
                )
                return got

            variants = {"base": functools.partial(call, False), f"{rows} adapters": functools.partial(call, True)}
            for name, timing in measure(variants, repeat).items():
                print(
                    f"step {dtype:9} {rows:2} rows {name:12} {timing}  {rows / timing.median:6.1f} tokens/s"
                    f" (best {rows / timing.fastest:.1f})"
                )


def bench_training(kernels: native.Kernels, repeat: int) -> None:
    """What a training step of 1,024 tokens computes beside its linear layers, with gradients: kernels, and XLA between the same products."""
    tokens = 1024
    head = jnp.asarray(normal(HIDDEN, VOCABULARY))
    packed = tuple(kernels.pack_linear(side) for side in (head, head.T))
    targets, one = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, tokens)), jnp.float32(1)
    scale, hidden, wide = jnp.ones(HIDDEN), jnp.asarray(normal(tokens, HIDDEN)), jnp.asarray(normal(tokens, MLP))

    def log_probs(x):
        parts = zip(jnp.split(x, 4), jnp.split(targets, 4))  # whose logits lie in memory at a time
        return jnp.concatenate(
            [jnp.take_along_axis(jax.nn.log_softmax(native.frozen_linear(part, *packed)), of[:, None], axis=1)[:, 0] for part, of in parts]
        )

    cases = {
        "log_probs": (lambda x: native.frozen_log_probs(x, *packed, None, targets, one), log_probs, [hidden]),
        "norm": (lambda x: native.frozen_norm(x, scale, 1e-5), lambda x: rms_norm(x, scale, 1e-5), [hidden]),
        "swiglu": (native.swiglu, lambda gate, up: Gated((gate, up)).values(), [wide, wide]),
    }
    for name, (ours, plain, inputs) in cases.items():
        variants = {}
        for variant, function in (("kernel", ours), ("XLA", plain)):
            result = jnp.ones_like(function(*inputs))
            both = jax.jit(lambda slope, *inputs, function=function: (lambda y, back: (y, back(slope)))(*jax.vjp(function, *inputs)))
            variants[variant] = functools.partial(both, result, *inputs)
        for variant, timing in measure(variants, repeat).items():
            print(f"training {name:10} {variant:7} {timing}")


def main() -> None:
    benches = {"linear": bench_linear, "attention": bench_attention, "lora": bench_lora, "step": bench_step, "training": bench_training}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[*benches, []], help="all by default")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--build-dir", default=tempfile.gettempdir() + "/jaxlora-native")
    arguments = parser.parse_args()
    kernels = native.load(arguments.build_dir)
    if isinstance(kernels, str):
        raise SystemExit(kernels)
    print(f"{kernels.isa}, {kernels.threads} threads, jax {jax.__version__}")
    for name in arguments.what or benches:
        benches[name](kernels, arguments.repeat)


if __name__ == "__main__":
    allocator.restart()
    main()
