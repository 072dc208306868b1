"""How long a server takes to be ready: the first time, with nothing compiled, and the second."""

import shutil
from typing import Any

from bench import adapters
from bench.scenarios.context import Context

KEPT = ("checkpoints",)


def measure(context: Context) -> dict[str, Any]:
    cache = context.cache / "starts"
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True)
    for name in KEPT:  # the converted checkpoint is no part of a start
        if (context.settings.cache_dir / name).exists():
            (cache / name).symlink_to(context.settings.cache_dir / name)
    settings = context.settings_of(cache_dir=cache)
    prepared = adapters.prepare(cache, context.config, settings, adapters.sixteen())
    seconds = []
    for _ in range(2):
        with context.systems(["triton"], prepared, settings) as session:
            seconds.append(session.running["triton"].started["ready_s"])
    shutil.rmtree(cache, ignore_errors=True)
    return {
        "title": f"Start to ready, through Triton, {context.dtype}",
        "columns": ["", "seconds"],
        "rows": [["first start, nothing compiled", f"{seconds[0]:.1f}"], ["second start", f"{seconds[1]:.1f}"]],
        "seconds": seconds,
    }
