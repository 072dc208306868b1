"""What every scenario gets: the model, prompts, options, and one of the systems when it asks for one."""

import argparse
import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from bench import adapters
from bench.session import Session
from bench.workloads import PRECISIONS, Prompts
from jaxlora.config import ModelConfig
from jaxlora.settings import Settings


class Skipped(Exception):
    """This scenario can't run here; `str()` says why."""


@dataclasses.dataclass(frozen=True)
class Context:
    """`cache` is a folder for what may be made once, `folder` one for logs; `options` are those of the command line."""

    cache: pathlib.Path
    folder: pathlib.Path
    model: pathlib.Path
    config: ModelConfig
    settings: Settings
    prompts: Prompts
    options: argparse.Namespace
    say: Callable[[str], None]

    @property
    def dtype(self) -> str:
        """The precision of all scenarios: the last one that was asked for."""
        return self.options.dtypes[-1]

    def settings_of(self, **changes: Any) -> Settings:
        return dataclasses.replace(self.settings, **PRECISIONS[self.dtype], **changes)

    @contextlib.contextmanager
    def systems(self, names: list[str], prepared: adapters.Prepared, settings: Settings) -> Iterator[Session]:
        """Systems of ours over a prepared store.

        Raises:
            Skipped: one of them does not start.
        """
        setup = {"model": str(self.model), "environment": settings.environment(), "repository": str(prepared.repository), "store": str(prepared.store)}
        with Session(setup, self.options.python, self.folder, self.say).systems(names) as session:
            if session.missing:
                raise Skipped("; ".join(f"{name}: {reason}" for name, reason in session.missing.items()))
            yield session
