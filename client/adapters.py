"""`python -m client.adapters`: what a server serves, and changing it.

`list` and `show` ask the server; `publish`, `serve` and `unload` also write into its adapter store, which must be on this
machine; `merge` needs the store only.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

from client import terminal
from client.catalogue import Adapter, Version
from client.merging import merge
from client.publishing import Publisher
from jaxlora import peft
from jaxlora.adapters import AdapterName, CatalogueReader, Store, catalogue_path
from jaxlora.adapters.policy import LATEST, NONE, Serve, read_policy
from jaxlora.adapters.store import version_path
from jaxlora.checkpoint import resolve
from jaxlora.config import ModelConfig
from jaxlora.errors import AdapterNotFound
from jaxlora.settings import Settings
from server import repository

DEFAULT_STORE = repository.REPOSITORY / repository.STORE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit code."""
    arguments = _parser().parse_args(argv)
    return terminal.run(lambda: arguments.command(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m client.adapters", description="Shows and changes the adapters of a server.")
    terminal.add_server(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Callable[[argparse.Namespace], None], help: str, store: bool = False) -> argparse.ArgumentParser:
        sub = commands.add_parser(function.__name__.strip("_"), help=help, description=help)
        sub.set_defaults(command=function)
        terminal.add_server(sub, default=argparse.SUPPRESS)
        if store:
            sub.add_argument(
                "--store", type=pathlib.Path, default=DEFAULT_STORE, metavar="DIR",
                help="the server's adapter store, the folder that holds users/ (default: the one of this project)",
            )  # fmt: skip
        return sub

    sub = command(_list, "list the adapters that the server knows")
    sub.add_argument("--user", help="only those of this user")
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub = command(_show, "show one adapter and its versions")
    sub.add_argument("name", metavar="USER/NAME[@VERSION]", type=_name)
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub = command(_publish, "publish a PEFT folder as the next version of an adapter", store=True)
    sub.add_argument("folder", metavar="DIR", type=pathlib.Path, help="holds adapter_config.json and adapter_model.safetensors")
    sub.add_argument("--name", metavar="USER/NAME", type=_unpinned, required=True)
    sub = command(_serve, "set which version answers to an adapter's name", store=True)
    sub.add_argument("name", metavar="USER/NAME", type=_unpinned)
    sub.add_argument("--version", metavar="N|latest", type=_version, required=True)
    sub = command(_unload, "take an adapter out of service; `serve` brings it back", store=True)
    sub.add_argument("name", metavar="USER/NAME", type=_unpinned)
    sub = command(_merge, "write a checkpoint of the base model (MODEL) with an adapter merged into it", store=True)
    sub.add_argument("name", metavar="USER/NAME[@VERSION]", type=_name)
    sub.add_argument("--output", metavar="DIR", type=pathlib.Path, required=True, help="a folder that does not exist yet")
    sub.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="type of the weights (default: that of the base model's)"
    )
    return parser


def _name(text: str) -> AdapterName:
    try:
        return AdapterName.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _unpinned(text: str) -> AdapterName:
    name = _name(text)
    if name.version is not None:
        raise argparse.ArgumentTypeError(f"{text} names a version; leave it out here")
    return name


def _version(text: str) -> Serve:
    if text == LATEST:
        return LATEST
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a version number nor `{LATEST}`")
    return int(text)


def _list(arguments: argparse.Namespace) -> None:
    with terminal.connect(arguments) as client:
        adapters = client.adapters(user=arguments.user)
    if arguments.json:
        _print_json(adapters)
        return
    if not adapters:
        print("no adapters")
        return
    rows = [("NAME", "ANSWERS WITH", "VERSIONS", "RANK", "SIZE", "PUBLISHED"), *map(_row, adapters)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _row(adapter: Adapter) -> tuple[str, ...]:
    shown = adapter.version(adapter.serving) if adapter.serving else None
    answers = f"version {adapter.serving}" if adapter.serving else "out of service" if adapter.policy == NONE else "nothing"
    versions = ", ".join(f"{version.version}{'' if version.is_ready else ' (refused)'}" for version in adapter.versions[-8:])
    more = "..., " if len(adapter.versions) > 8 else ""
    return (adapter.name, answers, more + versions, *((str(shown.rank), _size(shown), _date(shown)) if shown else ("", "", "")))


def _show(arguments: argparse.Namespace) -> None:
    with terminal.connect(arguments) as client:
        (adapter,) = client.adapters(name=str(arguments.name))
    if arguments.json:
        _print_json(adapter)
        return
    name, answers, *_ = _row(adapter)
    policy = adapter.policy if isinstance(adapter.policy, str) else f"version {adapter.policy}"
    print(f"{name}: {answers} answers to the name (policy: {policy})")
    if adapter.policy_problem:
        print(f"  {adapter.policy_problem}")
    for version in adapter.versions:
        print(f"version {version.version}: {version.state}")
        if version.is_ready:
            print(f"  rank {version.rank}, {version.num_modules} modules ({', '.join(version.target_modules)})")
            print(f"  {_size(version)}, published {_date(version)}, sha256 {version.sha256}")
        for key, value in version.provenance.items():
            print(f"  {_printable(key)}: {_printable(value)}")
        for problem in version.problems:
            print(f"  {problem}")


def _printable(value: object) -> str:
    """What a provenance file says, without control characters: they would act on the terminal."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(value))


def _publish(arguments: argparse.Namespace) -> None:
    with terminal.connect(arguments) as client:
        remembered = CatalogueReader(catalogue_path(_settings().cache_dir, arguments.store)).current()
        done = Publisher(client, arguments.store, remembered).publish(arguments.folder, arguments.name)
    print(f"{arguments.name}@{done.version} is live")
    if done.serving != done.version:
        answers = f"version {done.serving} answers" if done.serving else "nothing answers"
        print(
            f"{answers} to {arguments.name}, as its policy says; `serve {arguments.name} --version {done.version}` changes that"
        )


def _serve(arguments: argparse.Namespace) -> None:
    with terminal.connect(arguments) as client:
        serving = Publisher(client, arguments.store).serve(arguments.name, arguments.version)
    print(f"version {serving} answers to {arguments.name}")


def _unload(arguments: argparse.Namespace) -> None:
    with terminal.connect(arguments) as client:
        Publisher(client, arguments.store).serve(arguments.name, NONE)
    print(f"{arguments.name} is out of service; `serve {arguments.name} --version latest` brings it back")


def _merge(arguments: argparse.Namespace) -> None:
    settings = _settings()
    base = resolve(settings.model, settings.cache_dir, lambda line: print(line, file=sys.stderr, flush=True))
    name = _newest(arguments.name, arguments.store, settings)
    # Neither the bank's rank nor the size of a request bounds what can be merged.
    limits = peft.Limits(max_rank=1 << 30, max_file_bytes=1 << 62, output_layer=True)
    adapter = peft.read(version_path(arguments.store, name), ModelConfig.from_folder(base), limits)
    merge(base, adapter, arguments.output, arguments.dtype, {"base_model": settings.model, "adapter": str(name)})
    print(f"{arguments.output} holds {settings.model} with {name}; `MODEL={arguments.output} make serve` serves it")


def _newest(name: AdapterName, store: pathlib.Path, settings: Settings) -> AdapterName:
    """The version that answers to a name: as the server last said, or as the store says where no server has looked at it yet."""
    catalogue = CatalogueReader(catalogue_path(settings.cache_dir, store)).current()
    if name.unpinned in catalogue.adapters:
        return catalogue.resolve(name).name
    found = Store(store).look(name)
    if not found.versions or (name.version and name.version not in found.versions):
        there = ", ".join(map(str, found.versions)) or "none"
        raise AdapterNotFound(f"{name} is not in the store {store}; versions of {name.unpinned} there: {there}")
    policy = read_policy(found.path)
    return name.at(name.version or (policy if isinstance(policy, int) else found.versions[-1]))


def _settings() -> Settings:
    return Settings.read(parameters=repository.parameters(repository.REPOSITORY))


def _size(version: Version) -> str:
    return f"{version.nbytes / 1e6:.1f} MB"


def _date(version: Version) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(version.published))


def _print_json(value: object) -> None:
    print(json.dumps(value, default=dataclasses.asdict, indent=2))


if __name__ == "__main__":
    sys.exit(main())
