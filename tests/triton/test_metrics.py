"""What a real server shows in `/metrics` and writes to its request log, after requests of every kind."""

import contextlib
import json
import pathlib
import shutil
import threading
import time
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from client import top
from jaxlora.adapters import publish
from jaxlora.service.metrics import HISTOGRAM, METRICS

from .. import prometheus_files
from .conftest import ADMIN_KEY, SETTINGS, TOKENS_PER_S
from .harness import Grpc, Http, Refused

SECRET = "a prompt that is nobody's business"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(server) -> Samples:
    """All samples by name and labels."""
    with urllib.request.urlopen(server.metrics_url, timeout=30) as answer:
        text = answer.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(samples: Samples, name: str, **labels: str) -> float:
    """The sum of the series of a metric that have these labels."""
    return sum(value for (found, have), value in samples.items() if found == name and labels.items() <= dict(have).items())


def wait_for(server, condition) -> Samples:
    """The first scrape that is as it should be. A condition that asserts tells in the end what was not."""
    deadline = time.monotonic() + 30
    while True:
        samples = scrape(server)
        late = time.monotonic() > deadline
        try:
            if condition(samples):
                return samples
        except AssertionError:
            if late:
                raise
        assert not late, {f"{name}{dict(labels)}": value for (name, labels), value in samples.items() if "lora_" in name}
        time.sleep(0.1)


def adapters_in_info(samples: Samples) -> set[str]:
    """The adapters that the info for a gateway names, on the device or waited for."""
    infos = [dict(labels) for name, labels in samples if name == "lora_requests_info"]
    return {name for info in infos for state in ("running", "waiting") for name in info[f"{state}_lora_adapters"].split(",") if name}


def is_quiet(samples: Samples) -> bool:
    return total(samples, "lora_requests_running") == total(samples, "lora_requests_waiting") == 0


def check_busy(samples: Samples, max_seq_len: int) -> bool:
    """Two requests of the base model run and two wait, in every metric that tells it: values are shown one by one, so one scrape may mix two moments."""
    assert total(samples, "lora_requests_running") == total(samples, "lora_slots_used") == 2
    assert total(samples, "lora_requests_waiting") == 2
    assert total(samples, "lora_adapter_requests_running", adapter="base", version="0") == 2
    assert total(samples, "lora_load_ratio") == 2
    used, capacity = total(samples, "lora_kv_tokens_used"), total(samples, "lora_kv_tokens_capacity")
    assert 40 <= used <= capacity == 2 * max_seq_len
    assert total(samples, "lora_kv_cache_usage_ratio") == pytest.approx(used / capacity)
    assert adapters_in_info(samples) >= {"alice/attention", "alice/rslora"} and total(samples, "lora_requests_info", max_lora="1") > 0
    return True


def settled(server) -> Samples:
    """A scrape when all that has happened is in it: values are shown one by one, some times a second."""
    seen = [{}]

    def is_settled(samples: Samples) -> bool:
        counts = {key: value for key, value in samples.items() if key[0].startswith("lora_") and key[0].endswith(("_total", "_count"))}
        seen.append(counts)
        time.sleep(0.7)
        return is_quiet(samples) and counts == seen[-2]

    return wait_for(server, is_settled)


@pytest.fixture(scope="module")
def log(operated) -> pathlib.Path:
    return pathlib.Path(operated.settings.request_log)


@pytest.fixture(scope="module")
def before(operated) -> Samples:
    wait_for(operated, lambda samples: total(samples, "lora_slots"))
    return settled(operated)


@pytest.fixture(scope="module")
def busy(operated, before) -> Samples:
    """A scrape while two long answers run and two requests wait, one of which then passes its time-out, and a fifth is refused."""
    http, grpc = Http(operated), Grpc(operated)
    with contextlib.ExitStack() as stack:
        streams = [http.stream("jax_lora", text_input="x" * 20, max_tokens=SETTINGS["max_output_tokens"], stream=True, ignore_eos=True) for _ in range(2)]
        for stream in streams:
            stack.callback(stream.close)
            next(stream)
        waiting = [grpc.stream("jax_lora", text_input="hi", lora_name="alice/attention", timeout_us=1_500_000, stream=True)]
        waiting.append(grpc.stream("jax_lora", text_input="hi", lora_name="alice/rslora", max_tokens=3, stream=True))
        outcomes = []

        def read(stream):
            try:
                outcomes.append(sum(1 for _ in stream))
            except Refused as error:
                outcomes.append(str(error))

        readers = [threading.Thread(target=read, args=(stream,)) for stream in waiting]
        for reader in readers:
            reader.start()
        samples = wait_for(operated, lambda samples: check_busy(samples, operated.settings.max_seq_len))
        with pytest.raises(Refused, match="queue is full"):
            http.generate(text_input="hi", max_tokens=1)
        wait_for(operated, lambda now: total(now, "lora_requests_total", reason="queue_timeout") > 0)
    for reader in readers:
        reader.join()
    assert any("time-out" in str(outcome) for outcome in outcomes)
    return samples


@pytest.fixture(scope="module")
def after(operated, busy, adapters) -> Samples:
    """A scrape when all is quiet again, after requests for four adapters, bad ones, one over a rate, one that took too long, and a publish
    that is refused."""
    http, grpc = Http(operated), Grpc(operated)
    gone = http.stream("jax_lora", text_input="x", max_tokens=SETTINGS["max_output_tokens"], stream=True, ignore_eos=True)
    next(gone)
    gone.close()
    for number, name in enumerate(["alice/attention", "alice/every-linear", "bob/attention", "bob/patterns", "alice/attention", ""]):
        answer = http.generate(id=f"request-{number}", text_input=SECRET, max_tokens=4, lora_name=name, ignore_eos=True)
        assert answer["num_output_tokens"] == 4
    for bad in ({"temperature": -1}, {"lora_name": "alice/nothing"}):
        for model in ("llm", "jax_lora"):
            with pytest.raises(Refused):
                http.generate(model, text_input=SECRET, id="bad", **bad)
    long = {"text_input": b"hi", "max_tokens": SETTINGS["max_output_tokens"]}
    rate = rf"UNAVAILABLE: bob uses more than {TOKENS_PER_S} tokens a second \(TOKENS_PER_S_PER_USER\); try again in [0-9.]+ s"
    with pytest.raises(Refused, match=rate):
        grpc.generate(lora_name=b"bob/rslora", rows=3, **long)
    with pytest.raises(Refused, match=r"DEADLINE_EXCEEDED: the request's time-out of 0.3 s passed after \d+ tokens"):
        grpc.generate(timeout_us=300_000, sampling_parameters=b'{"ignore_eos": true}', **long)
    version = publish(adapters["alice/attention"], "frank/sql", operated.store)
    folder = operated.store / "users" / "frank" / "adapters" / "sql" / str(version)
    shutil.copy(folder / "adapter_config.json", folder / "adapter_model.safetensors")
    with pytest.raises(Refused, match="frank/sql@1"):
        Http(operated, {"admin-key": ADMIN_KEY}).load("adapters")
    return settled(operated)


def test_every_metric_is_there(after):
    for name, metric in METRICS.items():
        assert any(found == (f"{name}_bucket" if metric.kind == HISTOGRAM else name) for found, _ in after), name


@pytest.mark.parametrize("where", prometheus_files.expressions())
def test_the_dashboard_and_the_alert_rules_name_what_is_there(after, where):
    found = {name for name, _ in after}
    missing = prometheus_files.metrics_of(prometheus_files.expressions()[where]) - found - prometheus_files.OF_PROMETHEUS
    assert not missing


def test_while_it_is_busy(busy, operated):
    assert check_busy(busy, operated.settings.max_seq_len)


def test_what_was_accepted_has_ended(after):
    ended = total(after, "lora_requests_total") - total(after, "lora_requests_total", outcome="refused")
    assert total(after, "lora_requests_accepted_total") == ended > 0


def test_requests_are_counted_by_outcome_and_reason(before, after):
    def new(**labels):
        return total(after, "lora_requests_total", **labels) - total(before, "lora_requests_total", **labels)

    assert new(outcome="refused", reason="queue_full") == 1
    assert new(outcome="refused", reason="rate_limited") == 1, "the third of three rows"
    assert new(outcome="failed", reason="queue_timeout") == 1
    assert new(outcome="failed", reason="timeout") == 1
    assert new(outcome="refused", reason="invalid") == 2, "by the tokenizer and by the model"
    assert new(outcome="refused", reason="adapter_not_found") == 2
    assert new(outcome="cancelled") >= 1
    assert new(outcome="finished", reason="length") >= 6


def test_tokens_and_times_are_counted_of_every_request(before, after):
    def new(name, **labels):
        return total(after, name, **labels) - total(before, name, **labels)

    finished = new("lora_requests_total", outcome="finished")
    assert new("lora_request_duration_seconds_count") == finished
    waited_in_vain = new("lora_requests_accepted_total") - new("lora_queue_time_seconds_count") - new("lora_requests_total", reason="queue_timeout")
    assert 0 <= waited_in_vain <= 2, "rows whose request was refused for another row"
    assert new("lora_time_to_first_token_seconds_count") >= finished
    assert new("lora_generated_tokens_total") >= 6 * 4
    assert new("lora_prompt_tokens_total") >= 6 * len(SECRET), "one token a byte"
    for kind in ("count", "bucket"):
        labels = {} if kind == "count" else {"le": "+Inf"}
        assert total(after, f"lora_request_duration_seconds_{kind}", **labels) == total(after, "lora_requests_total", outcome="finished")


def test_the_number_of_label_values_is_bounded(after):
    adapters = {dict(labels)["adapter"] for name, labels in after if name.startswith("lora_") and "adapter" in dict(labels)}
    assert {"base", "unknown", "other"} <= adapters and len(adapters) == 3 + 2, "METRICS_ADAPTERS is 2"
    assert total(after, "lora_requests_total", adapter="other", outcome="finished") > 0


def test_adapters_come_and_go_on_every_tier(after):
    assert total(after, "lora_adapters_resident", tier="device") == 1
    assert total(after, "lora_adapters_resident", tier="disk") >= 8
    for tier in ("host", "device"):
        assert total(after, "lora_adapter_evictions_total", tier=tier) > 0
        loads = total(after, "lora_adapter_loads_total", tier=tier)
        assert loads == total(after, "lora_adapter_load_seconds_count", tier=tier) > 0
    assert 0 < total(after, "lora_adapter_host_bytes") <= 20_000


def test_publishes_are_counted_over_every_instance_of_the_model(before, after):
    assert total(after, "lora_publishes_total", outcome="accepted") >= 8
    assert total(after, "lora_publishes_total", outcome="refused") == total(before, "lora_publishes_total", outcome="refused") + 1


def test_memory_is_told(after):
    for now, peak in (("process_resident", "process_peak"), ("device", "device_peak")):
        assert 1 << 20 < total(after, f"lora_{now}_memory_bytes") <= total(after, f"lora_{peak}_memory_bytes")


def test_counters_never_fall(before, busy, after):
    counters = [key for key in before if key[0].endswith(("_total", "_count", "_sum", "_bucket")) and key[0].startswith("lora_")]
    assert counters
    for key in counters:
        assert before[key] <= busy[key] <= after[key], key


def test_each_request_has_its_line_and_no_prompt_is_in_it(after, log):
    text = log.read_text()
    assert SECRET not in text
    lines = [json.loads(line) for line in text.splitlines()]
    named = {line["request_id"]: line for line in lines if line["request_id"].startswith("request-")}
    assert set(named) == {f"request-{number}" for number in range(6)}
    first = named["request-0"]
    assert (first["adapter"], first["version"], first["outcome"], first["completion_tokens"]) == ("alice/attention", 1, "finished", 4)
    assert first["prompt_tokens"] == len(SECRET) and first["queue_ms"] <= first["ttft_ms"] <= first["total_ms"]
    assert [line["reason"] for line in lines if line["request_id"] == "bad"] == ["invalid", "invalid", "adapter_not_found", "adapter_not_found"]
    assert {"queue_full", "rate_limited", "queue_timeout", "timeout", "cancelled"} <= {line["reason"] for line in lines}


def test_the_live_view_shows_it(after, operated, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert top.main(["--url", operated.metrics_url, "--once", "--interval", "0.1"]) == 0
    text = capsys.readouterr().out
    assert "0 of 2 run, 0 wait" in text and "base" in text and "device 1 of 1" in text
