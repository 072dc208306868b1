"""What the live view computes from two readings of `/metrics`, and that it shows it."""

import http.server
import io
import math
import socket
import threading

import pytest
from rich.console import Console

from client import top
from client.errors import ServerUnreachable
from client.proxies import is_local
from client.scrape import Between, parse, read

OLD = """
lora_slots 16
lora_requests_running 3
lora_requests_waiting 2
lora_engine_up 1
lora_kv_tokens_used 100
lora_kv_tokens_capacity 1000
lora_requests_accepted_total{adapter="alice/sql",version="2"} 5
lora_generated_tokens_total{adapter="alice/sql",version="2"} 100
lora_generated_tokens_total{adapter="base",version="0"} 50
lora_time_to_first_token_seconds_bucket{adapter="alice/sql",version="2",le="0.1"} 10
lora_time_to_first_token_seconds_bucket{adapter="alice/sql",version="2",le="1"} 10
lora_time_to_first_token_seconds_bucket{adapter="alice/sql",version="2",le="+Inf"} 10
"""
NEW = """
lora_slots 16
lora_requests_running 4
lora_requests_waiting 0
lora_engine_up 1
lora_kv_tokens_used 200
lora_kv_tokens_capacity 1000
lora_requests_accepted_total{adapter="alice/sql",version="2"} 9
lora_requests_total{adapter="alice/sql",version="2",outcome="finished",reason="stop"} 7
lora_generated_tokens_total{adapter="alice/sql",version="2"} 300
lora_generated_tokens_total{adapter="base",version="0"} 20
lora_time_to_first_token_seconds_bucket{adapter="alice/sql",version="2",le="0.1"} 10
lora_time_to_first_token_seconds_bucket{adapter="alice/sql",version="2",le="1"} 18
lora_time_to_first_token_seconds_bucket{adapter="alice/sql",version="2",le="+Inf"} 20
"""
SQL = {"adapter": "alice/sql", "version": "2"}


@pytest.fixture
def between():
    return Between(parse(OLD, 10.0), parse(NEW, 14.0))


def test_rates_are_those_between_the_readings(between):
    assert between.rate("lora_generated_tokens_total", **SQL) == 50


def test_a_counter_that_started_anew_counts_from_zero(between):
    assert between.rate("lora_generated_tokens_total", adapter="base") == 5


def test_quantiles_are_those_of_the_new_values(between):
    quantile = lambda share: between.quantile(share, "lora_time_to_first_token_seconds", **SQL)  # noqa: E731
    assert quantile(0.4) == pytest.approx(0.1 + 0.9 / 2), "the 4th of 8 in the bucket from 0.1 to 1"
    assert quantile(0.95) == 1, "past the last bound, the last bound"
    assert math.isnan(between.quantile(0.5, "lora_time_to_first_token_seconds", adapter="nobody"))
    assert math.isnan(Between(between.new, between.new).quantile(0.5, "lora_time_to_first_token_seconds"))


def shown(between) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(top.view(between, "http://here"))
    return console.export_text()


def test_the_view_shows_load_and_adapters(between):
    text = shown(between)
    for part in ("4 of 16 run, 0 wait", "200 of 1,000 tokens", "alice/sql@2", "50.0", "engine up"):
        assert part in text, text


def test_the_view_tells_a_stopped_engine_and_a_server_without_the_model(between):
    stopped = parse(NEW.replace("lora_engine_up 1", "lora_engine_up 0"), 14.0)
    assert "ENGINE STOPPED" in shown(Between(between.old, stopped))
    assert "not loaded yet" in shown(Between(parse("", 1.0), parse("nv_cpu 1", 2.0)))


def test_the_view_tells_which_breaker_is_open(between):
    states = 'lora_breaker_state{breaker="latency"} 2\nlora_breaker_state{breaker="memory"} 1\nlora_breaker_state{breaker="adapter"} 0\n'
    text = shown(Between(between.old, parse(NEW + states, 14.0)))
    assert "latency breaker open" in text and "memory breaker half-open" in text and "adapter breaker" not in text


def test_an_address_where_nobody_answers_is_told(capsys):
    with pytest.raises(ServerUnreachable, match="no metrics at http://127.0.0.1:1/metrics"):
        read("http://127.0.0.1:1/metrics")
    assert top.main(["--url", "http://127.0.0.1:1/metrics"]) == 1
    assert capsys.readouterr().err.startswith("error: no metrics at")


def test_what_does_not_speak_http_is_told(capsys):
    def greet(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(b"220 mail ready\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=greet, args=(listening,), daemon=True).start()
        assert top.main(["--url", f"http://127.0.0.1:{listening.getsockname()[1]}/metrics"]) == 1
    assert capsys.readouterr().err.startswith("error: no metrics at")


@pytest.mark.parametrize("interval", ["-1", "nan", "x"])
def test_an_interval_that_is_none_is_told(interval, capsys):
    with pytest.raises(SystemExit):
        top.main(["--interval", interval])
    assert "--interval" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("localhost:8001", True), ("127.0.0.1:8001", True), ("[::1]:8001", True), ("http://localhost:8002/metrics", True), ("0.0.0.0:1", True),
        ("example.org:8001", False), ("http://192.0.2.1/metrics", False), ("localhost.example.org:8001", False), ("", False),
    ],
)  # fmt: skip
def test_what_is_this_machine_is_known(url, expected):
    assert is_local(url) is expected


def test_it_prints_one_view_of_a_server(capsys, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # not for this machine

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            self.send_response(200)
            self.end_headers()
            self.wfile.write(NEW.encode())

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert top.main(["--url", f"http://127.0.0.1:{server.server_port}/metrics", "--once", "--interval", "0.01"]) == 0
        server.shutdown()
    assert "4 of 16 run" in capsys.readouterr().out
