"""Compiled programs are kept on disk, so that a second start, and a second process, need not compile again."""

import pathlib

import jax


def keep_compiled_programs(cache_dir: pathlib.Path) -> None:
    """Lets JAX keep what it compiles from now on below `cache_dir`, the folder that `CACHE_DIR` names."""
    jax.config.update("jax_compilation_cache_dir", str(cache_dir / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
