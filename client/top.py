"""`python -m client.top`: what a server is doing, live in the terminal, from its `/metrics`. Ctrl-C ends it.

Rates and latencies are those of the last seconds.
"""

import argparse
import collections
import math
import os
import sys
import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from client import terminal
from client.errors import ServerUnreachable
from client.scrape import Between, Reading, read

DEFAULT_URL = f"http://localhost:{os.environ.get('METRICS_PORT') or 8002}/metrics"
WINDOW_S = 10.0
MAX_ROWS = 30


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit code."""
    parser = argparse.ArgumentParser("python -m client.top", description="Shows what a server is doing.")
    parser.add_argument("--url", default=DEFAULT_URL, help=f"the server's metrics (default: {DEFAULT_URL})")
    parser.add_argument("--interval", type=_seconds, default=1.0, metavar="S", help="seconds between two looks (default: 1)")
    parser.add_argument("--once", action="store_true", help="print one view, of one interval, and end")
    arguments = parser.parse_args(argv)
    return terminal.run(lambda: _once(arguments) if arguments.once else _live(arguments))


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0.01 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.01 and 86400 seconds")
    return seconds


def _once(arguments: argparse.Namespace) -> None:
    first = read(arguments.url)
    time.sleep(arguments.interval)
    Console().print(view(Between(first, read(arguments.url)), arguments.url))


def _live(arguments: argparse.Namespace) -> None:
    readings: collections.deque[Reading] = collections.deque([read(arguments.url)])
    with Live(screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(arguments.interval)
            try:
                readings.append(read(arguments.url))
            except ServerUnreachable as error:
                live.update(Panel(str(error), title="waiting for the server", border_style="red"), refresh=True)
                continue
            while len(readings) > 2 and readings[-1].time - readings[1].time >= WINDOW_S:
                readings.popleft()
            live.update(view(Between(readings[0], readings[-1]), arguments.url), refresh=True)


def view(between: Between, url: str) -> RenderableType:
    """Everything, for what happened between two readings."""
    if "lora_slots" not in between.new.samples:
        return Panel("the server's model is not loaded yet", title=url, border_style="yellow")
    return Group(_summary(between, url), _adapters(between), _tiers(between))


def _summary(between: Between, url: str) -> RenderableType:
    now = between.new
    slots, running, waiting = (now.total(f"lora_{name}") for name in ("slots", "requests_running", "requests_waiting"))
    used, capacity = now.total("lora_kv_tokens_used"), now.total("lora_kv_tokens_capacity")
    bars = Table.grid(padding=(0, 1))
    bars.add_row("slots", _bar(running, slots), f"{running:.0f} of {slots:.0f} run, {waiting:.0f} wait")
    bars.add_row("KV cache", _bar(used, capacity), f"{used:,.0f} of {capacity:,.0f} tokens")
    numbers = Table.grid(padding=(0, 2))
    numbers.add_row(
        f"[bold]{between.rate('lora_generated_tokens_total'):,.1f}[/] tokens/s",
        f"{between.rate('lora_prompt_tokens_total'):,.1f} prompt tokens/s",
        f"{between.rate('lora_requests_total', outcome='finished'):.2f} finished/s",
        _bad(between.rate("lora_requests_total", outcome="refused"), "refused/s"),
        _bad(between.rate("lora_requests_total", outcome="failed"), "failed/s"),
    )
    numbers.add_row(
        f"TTFT {_quantiles(between, 'lora_time_to_first_token_seconds')}",
        f"queue {_quantiles(between, 'lora_queue_time_seconds')}",
        f"TPOT {_quantiles(between, 'lora_time_per_output_token_seconds')}",
        f"process {_bytes(now.total('lora_process_resident_memory_bytes'))}",
        f"device {_bytes(now.total('lora_device_memory_bytes'))}",
    )
    return Panel(Group(bars, numbers), title=Text.assemble(url, "  ", *_state(now)), title_align="left")


def _state(now: Reading) -> list[Text]:
    """Whether the engine runs, and which breakers are not closed."""
    if not now.total("lora_engine_up"):
        return [Text("ENGINE STOPPED", "bold red")]
    states = {name: now.total("lora_breaker_state", breaker=name) for (name,) in now.values("lora_breaker_state", "breaker")}
    words = [f"  {name} breaker {'open' if state == 2 else 'half-open'}" for name, state in sorted(states.items()) if state]
    return [Text("engine up", "green"), *(Text(text, "bold red") for text in words)]


def _adapters(between: Between) -> RenderableType:
    table = Table(expand=True, box=None, header_style="bold")
    table.add_column("ADAPTER", ratio=1, no_wrap=True)
    for name in ("RUN", "WAIT", "TOKENS/S", "TTFT p50/p95", "TPOT p50/p95", "FINISHED", "FAILED", "REFUSED"):
        table.add_column(name, justify="right")
    now = between.new
    rows = []
    for adapter, version in now.values("lora_requests_accepted_total", "adapter", "version"):
        labels = {"adapter": adapter, "version": version}
        running, waiting = (now.total(f"lora_adapter_requests_{state}", **labels) for state in ("running", "waiting"))
        tokens = between.rate("lora_generated_tokens_total", **labels)
        ended = [now.total("lora_requests_total", outcome=outcome, **labels) for outcome in ("finished", "failed", "refused")]
        rows.append(((-running - waiting, -tokens, -ended[0], adapter), labels, running, waiting, tokens, ended))
    for _, labels, running, waiting, tokens, ended in sorted(rows, key=lambda row: row[0])[:MAX_ROWS]:
        name = labels["adapter"] if labels["version"] in ("", "0") else f"{labels['adapter']}@{labels['version']}"
        table.add_row(
            Text(name, "" if running or waiting else "dim"), f"{running:.0f}", f"{waiting:.0f}", f"{tokens:.1f}",
            _quantiles(between, "lora_time_to_first_token_seconds", **labels),
            _quantiles(between, "lora_time_per_output_token_seconds", **labels),
            *(f"{count:.0f}" for count in ended),
        )  # fmt: skip
    return table


def _tiers(between: Between) -> RenderableType:
    now = between.new
    parts = [f"on disk {now.total('lora_adapters_resident', tier='disk'):.0f}"]
    for tier, most in (("host", ""), ("device", f" of {now.total('lora_adapter_device_slots'):.0f}")):
        loads, gone = (now.total(f"lora_adapter_{what}_total", tier=tier) for what in ("loads", "evictions"))
        resident = now.total("lora_adapters_resident", tier=tier)
        parts.append(f"{tier} {resident:.0f}{most} ({loads:.0f} loaded, {gone:.0f} evicted)")
    accepted, refused = (now.total("lora_publishes_total", outcome=outcome) for outcome in ("accepted", "refused"))
    return Text(f"adapters: {', '.join(parts)}; published {accepted:.0f}, refused {refused:.0f}", "dim")


def _bar(part: float, whole: float) -> ProgressBar:
    return ProgressBar(total=max(whole, 1), completed=part, width=40)


def _bad(rate: float, what: str) -> Text:
    return Text(f"{rate:.2f} {what}", "red" if rate else "")


def _quantiles(between: Between, name: str, **labels: str) -> str:
    half, most = (between.quantile(share, name, **labels) for share in (0.5, 0.95))
    return "-" if math.isnan(half) else f"{_time(half)} / {_time(most)}"


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _bytes(count: float) -> str:
    return f"{count / (1 << 30):.2f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.0f} MiB"


if __name__ == "__main__":
    sys.exit(main())
