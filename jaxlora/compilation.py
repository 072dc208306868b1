"""How XLA compiles, and that what it compiled is kept on disk, so that a second start, and a second process, need not compile again."""

import functools
import pathlib

import jax
import jax.numpy as jnp


def keep_compiled_programs(cache_dir: pathlib.Path) -> None:
    """Lets JAX keep what it compiles from now on below `cache_dir`, the folder that `CACHE_DIR` names."""
    jax.config.update("jax_compilation_cache_dir", str(cache_dir / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@functools.cache
def quick_fusions() -> dict[str, bool]:
    """The compiler's options for programs with fusions that XLA takes seconds to compile on CPUs: the emitters of jaxlib 0.7 take one for a
    gather from the bank, and four for an update of a module by Adam. The gradient of a model compiles faster without these options."""
    if jax.default_backend() != "cpu":
        return {}
    options = {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options=options)()
    except Exception:  # whatever type a version refuses an option with that it doesn't know
        return {}
    return options
