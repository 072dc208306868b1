"""What is counted of requests, what is written to the request log, and how a registry gets into Triton's metrics. Starts no server."""

import collections
import itertools
import json
import pathlib
import re
import socket
import sys
import threading
import time
import types
import uuid
import weakref

import pytest

from jaxlora.adapters import AdapterName, AdapterVersion
from jaxlora.engine.requests import Result, Timings, Token
from jaxlora.errors import Cancelled, EngineError, InvalidRequest, RequestTimeout, SetupError, Unavailable
from jaxlora.service import request_log
from jaxlora.service.metrics import COUNTER, HISTOGRAM, METRICS, BoundedLabels, Registry
from jaxlora.service.observation import Observer
from jaxlora.service.request_log import RequestLog
from server.exporter import Exporter
from server.metrics_channel import REMEMBERED, Collector, Sender, from_json, to_json

SQL = AdapterVersion(AdapterName("alice", "sql", 2), "", "", 8, 100, pathlib.Path("x"), ())
SQL_LABELS = ("alice/sql", "2")


class TestTable:
    def test_names_follow_the_conventions(self):
        for metric in METRICS.values():
            assert re.fullmatch("lora_[a-z0-9]+(_[a-z0-9]+)*", metric.name)
            assert metric.name.endswith("_total") == (metric.kind == COUNTER), metric.name
            assert not re.search("_(ms|millis|minutes|mib|mb|percent)(_|$)", metric.name), "base units only"
            assert metric.help.endswith(".") and list(metric.buckets) == sorted(set(metric.buckets))
            assert bool(metric.buckets) == (metric.kind == HISTOGRAM)

    def test_a_series_has_all_labels_of_its_metric(self):
        registry = Registry()
        for call in (registry.add, lambda *labels: registry.set(*labels, value=1), lambda *labels: registry.only(*labels, value=1)):
            with pytest.raises(ValueError, match="lora_prompt_tokens_total has the labels"):
                call("lora_prompt_tokens_total", "alice/sql")
        with pytest.raises(ValueError, match="lora_queue_time_seconds has the labels"):
            registry.observe("lora_queue_time_seconds", value=1)


class TestRegistry:
    def test_nothing_is_lost_between_threads(self):
        registry = Registry()

        def work():
            for _ in range(2000):
                registry.add("lora_generated_tokens_total", *SQL_LABELS)
                registry.observe("lora_queue_time_seconds", *SQL_LABELS, value=0.5)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        values, distributions = registry.read()
        assert values["lora_generated_tokens_total"] == {SQL_LABELS: 8000}
        found = distributions["lora_queue_time_seconds"][SQL_LABELS]
        assert sum(found.counts) == 8000 and sum(found.sums) == 4000

    def test_what_was_read_does_not_change(self):
        registry = Registry()
        registry.observe("lora_queue_time_seconds", *SQL_LABELS, value=0.5)
        _, before = registry.read()
        registry.observe("lora_queue_time_seconds", *SQL_LABELS, value=0.5)
        assert sum(before["lora_queue_time_seconds"][SQL_LABELS].counts) == 1

    def test_changes_are_told_once(self):
        registry = Registry()
        registry.add("lora_engine_steps_total", amount=0)
        registry.set("lora_slots", value=4)
        registry.observe("lora_queue_time_seconds", *SQL_LABELS, value=0.5)
        assert registry.changes()[0] == {"lora_engine_steps_total": {(): 0}, "lora_slots": {(): 4}}
        registry.add("lora_engine_steps_total", amount=0)
        registry.set("lora_slots", value=4)
        assert registry.changes() == ({}, {}) and registry.read()[0]["lora_slots"] == {(): 4}
        registry.observe("lora_queue_time_seconds", *SQL_LABELS, value=0.5)
        ((labels, found),) = registry.changes()[1]["lora_queue_time_seconds"].items()
        assert labels == SQL_LABELS and sum(found.counts) == 2
        registry.only("lora_requests_info", "8", "a/b", "", value=1)
        registry.only("lora_requests_info", "8", "", "a/b", value=2)
        assert registry.changes() == ({"lora_requests_info": {("8", "", "a/b"): 2}}, {})

    def test_an_info_has_one_series(self):
        registry = Registry()
        registry.only("lora_requests_info", "8", "a/b", "", value=1)
        registry.only("lora_requests_info", "8", "", "a/b", value=2)
        assert registry.read()[0]["lora_requests_info"] == {("8", "", "a/b"): 2}

    def test_labels_past_the_bound_share_one(self):
        bounded = BoundedLabels(2, ("other", ""))
        names = [bounded((f"user/{number}", "1")) for number in (0, 1, 2, 3, 0, 1)]
        assert [name for name, _ in names] == ["user/0", "user/1", "other", "other", "user/0", "user/1"]


class Family:
    """Triton's MetricFamily: keeps every series until it goes itself."""

    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
    living: "weakref.WeakValueDictionary[str, Family]" = weakref.WeakValueDictionary()

    def __init__(self, name, description, kind):
        assert name not in Family.living and description
        self.kind, self.series = kind, {}
        Family.living[name] = self

    def Metric(self, labels, buckets=None):  # noqa: N802
        assert (buckets is not None) == (self.kind == Family.HISTOGRAM)
        series = types.SimpleNamespace(value=0.0, values=[], calls=0)
        self.series[tuple(labels.values())] = series

        def change(value):
            assert value >= 0
            series.calls, series.value = series.calls + 1, series.value + value

        def set(value):
            series.calls, series.value = series.calls + 1, value

        series.increment, series.set, series.observe = change, set, series.values.append
        return series


class TestExporter:
    @pytest.fixture(autouse=True)
    def triton(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "triton_python_backend_utils", types.SimpleNamespace(MetricFamily=Family))
        Family.living.clear()

    def test_counters_and_gauges_are_as_the_registry_has_them(self):
        registry = Registry()
        exporter = Exporter(pause_s=0)
        for total in (3, 4, 4, 10):
            registry.set("lora_engine_steps_total", value=total)
            registry.set("lora_requests_running", value=total)
            exporter.sync(registry.read())
            assert Family.living["lora_engine_steps_total"].series[()].value == total
            assert Family.living["lora_requests_running"].series[()].value == total
        assert Family.living["lora_engine_steps_total"].series[()].calls == 3, "what did not change costs nothing"

    def test_a_series_that_begins_at_zero_is_shown(self):
        registry = Registry()
        registry.add("lora_publishes_total", "refused", amount=0)
        exporter = Exporter(pause_s=0)
        exporter.sync(registry.read())
        assert Family.living["lora_publishes_total"].series[("refused",)].value == 0

    def test_histograms_have_every_value_in_its_bucket_and_the_same_sum(self):
        registry, name = Registry(), "lora_time_to_first_token_seconds"
        bounds = METRICS[name].buckets
        exporter, values = Exporter(pause_s=0), [0.0003, 0.1, 0.1, 0.1, 0.07, 0.25, 1e-9, 500.0, 1000.0, 0.1000001]
        for count in (4, 10):
            for value in values[count - 4 if count == 4 else 4 : count]:
                registry.observe(name, *SQL_LABELS, value=value)
            exporter.sync(registry.read())

        def buckets(values):
            return collections.Counter(next((bound for bound in bounds if value <= bound), "inf") for value in values)

        shown = Family.living[name].series[SQL_LABELS].values
        assert buckets(shown) == buckets(values) and sum(shown) == pytest.approx(sum(values))

    def test_histograms_that_fall_behind_catch_up_by_turns_and_hold_nothing_up(self):
        registry, name, other = Registry(), "lora_time_to_first_token_seconds", "lora_queue_time_seconds"
        exporter, values = Exporter(pause_s=0, round_s=0), [0.1, 0.2, 0.07, 0.0003, 0.1]
        for value in values:
            registry.observe(name, *SQL_LABELS, value=value)
            registry.observe(other, *SQL_LABELS, value=value)
        for steps in range(1, 2 * len(values) + 1):
            registry.set("lora_engine_steps_total", value=steps)
            exporter.sync(registry.read())
            assert Family.living["lora_engine_steps_total"].series[()].value == steps
            shown = [len(Family.living[each].series[SQL_LABELS].values) if each in Family.living else 0 for each in (name, other)]
            assert sum(shown) == steps and abs(shown[0] - shown[1]) <= 1
        for each in (name, other):
            assert sum(Family.living[each].series[SQL_LABELS].values) == pytest.approx(sum(values))

    def test_only_what_is_new_has_to_be_told(self):
        registry, exporter = Registry(), Exporter(pause_s=0)
        registry.add("lora_engine_steps_total", amount=2)
        registry.set("lora_slots", value=4)
        exporter.sync(registry.changes())
        registry.add("lora_engine_steps_total")
        exporter.sync(registry.changes())
        exporter.sync(registry.changes())
        steps, slots = (Family.living[name].series[()] for name in ("lora_engine_steps_total", "lora_slots"))
        assert (steps.value, steps.calls, slots.value, slots.calls) == (3, 2, 4, 1)

    def test_what_could_not_be_shown_is_shown_later(self, monkeypatch):
        registry, exporter = Registry(), Exporter(pause_s=0)
        registry.add("lora_engine_steps_total", amount=2)
        registry.set("lora_slots", value=4)
        registry.observe("lora_queue_time_seconds", *SQL_LABELS, value=1)
        with monkeypatch.context() as patch:
            patch.setattr(Family, "Metric", None)
            with pytest.raises(TypeError):
                exporter.sync(registry.changes())
        registry.add("lora_engine_steps_total")
        exporter.sync(registry.changes())
        assert [Family.living[name].series[()].value for name in ("lora_engine_steps_total", "lora_slots")] == [3, 4]
        assert Family.living["lora_queue_time_seconds"].series[SQL_LABELS].values == [1]

    def test_an_info_leaves_no_series_behind(self):
        registry = Registry()
        exporter = Exporter(pause_s=0)
        for number in range(5):
            registry.only("lora_requests_info", "8", f"user/{number}", "", value=number)
            exporter.sync(registry.read())
        assert list(Family.living["lora_requests_info"].series) == [("8", "user/4", "")]

    def test_at_its_end_it_takes_everything_back(self):
        registry = Registry()
        registry.add("lora_engine_steps_total")
        registry.observe("lora_queue_time_seconds", *SQL_LABELS, value=1)
        exporter = Exporter(pause_s=0)
        exporter.sync(registry.read())
        assert len(Family.living) == 2
        exporter.close()
        assert not Family.living


class TestChannel:
    @pytest.fixture
    def at(self, tmp_path):
        return str(tmp_path / "socket")

    @staticmethod
    def next(collector, condition):
        """The first changes that meet a condition."""
        deadline = time.monotonic() + 10
        while not condition(changes := collector.changes()):
            assert time.monotonic() < deadline, changes
            time.sleep(0.02)
        return changes

    def test_values_survive_the_way(self):
        registry = Registry()
        registry.add("lora_publishes_total", "refused", amount=3)
        registry.only("lora_requests_info", "8", "a/b,c/d", "", value=2.5)
        registry.observe("lora_queue_time_seconds", *SQL_LABELS, value=500)
        values, distributions = registry.read()
        assert from_json(to_json((values, distributions))) == tuple(
            {name: series for name, series in part.items() if series} for part in (values, distributions)
        )

    def test_a_sender_may_come_before_its_collector_and_tells_what_changes(self, at):
        registry = Registry()
        registry.add("lora_engine_steps_total", amount=7)
        registry.set("lora_slots", value=4)
        sender = Sender(registry, to=at)
        time.sleep(0.4)
        collector = Collector(at)
        assert self.next(collector, any) == ({"lora_engine_steps_total": {(): 7}, "lora_slots": {(): 4}}, {})
        registry.add("lora_engine_steps_total", amount=1)
        registry.set("lora_slots", value=4)
        assert self.next(collector, any) == ({"lora_engine_steps_total": {(): 8}}, {})
        registry.observe("lora_queue_time_seconds", *SQL_LABELS, value=0.5)
        _, distributions = self.next(collector, any)
        assert [(name, list(series)) for name, series in distributions.items()] == [("lora_queue_time_seconds", [SQL_LABELS])]
        sender.close()
        collector.close()

    def test_what_was_lost_on_the_way_is_told_to_the_next_collector(self, tmp_path):
        address = f"\0jaxlora-test-{uuid.uuid4().hex}"
        registry, first = Registry(), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        first.bind(address)
        first.listen()
        registry.add("lora_engine_steps_total")
        registry.add("lora_publishes_total", "accepted")
        sender = Sender(registry, to=address)
        connection, _ = first.accept()
        first.close()
        connection.close()  # whatever it had been sent is gone
        collector = Collector(address)
        values, _ = self.next(collector, lambda changes: registry.add("lora_engine_steps_total") or any(changes))
        assert values["lora_engine_steps_total"][()] > 1 and values["lora_publishes_total"] == {("accepted",): 1}
        sender.close()
        collector.close()

    def test_counts_add_up_and_outlive_their_senders_and_gauges_do_not(self, at):
        collector = Collector(at)
        living = Registry()
        living.add("lora_publishes_total", "accepted", amount=1)
        sender = Sender(living, to=at)
        self.next(collector, lambda changes: "lora_publishes_total" in changes[0])
        for _ in range(3):  # one after another, as instances of a model that is loaded again
            registry = Registry()
            registry.add("lora_publishes_total", "accepted", amount=2)
            registry.observe("lora_queue_time_seconds", *SQL_LABELS, value=0.5)
            registry.set("lora_slots", value=4)
            Sender(registry, to=at).close()
        values, distributions = self.next(collector, lambda changes: changes[0].get("lora_publishes_total") == {("accepted",): 7})
        found = distributions["lora_queue_time_seconds"][SQL_LABELS]
        assert sum(found.counts) == 3 and sum(found.sums) == 1.5
        own = itertools.count(10)

        def shows_its_own(changes):  # once the last of them has ended
            living.set("lora_slots", value=next(own))
            return changes[0].get("lora_slots", {}).get((), 0) >= 10

        self.next(collector, shows_its_own)
        sender.close()
        collector.close()

    def test_a_sender_that_connects_again_counts_once(self, at):
        collector, registry = Collector(at), Registry()
        registry.add("lora_engine_steps_total", amount=5)
        registry.observe("lora_queue_time_seconds", *SQL_LABELS, value=0.5)
        sender = Sender(registry, to=at)
        self.next(collector, any)
        for count in (6, 7):
            sender._socket.shutdown(socket.SHUT_RDWR)
            registry.add("lora_engine_steps_total")
            values, distributions = self.next(collector, lambda changes: "lora_engine_steps_total" in changes[0])
            assert values == {"lora_engine_steps_total": {(): count}}
        assert all(sum(found.counts) == 1 for series in distributions.values() for found in series.values())
        sender.close()
        for _ in range(2 * REMEMBERED):
            other = Registry()
            other.add("lora_engine_steps_total")
            Sender(other, to=at).close()
        self.next(collector, lambda changes: changes[0].get("lora_engine_steps_total") == {(): 7 + 2 * REMEMBERED})
        collector.close()

    def test_values_come_in_the_order_of_the_table(self, at):
        collector, registry = Collector(at), Registry()
        for name in ("lora_process_resident_memory_bytes", "lora_slots", "lora_process_peak_memory_bytes"):
            registry.set(name, value=1)
        registry.add("lora_engine_steps_total")
        Sender(registry, to=at).close()
        values, _ = self.next(collector, any)
        assert list(values) == sorted(values, key=list(METRICS).index), "a scrape in between shows no more memory than the most of it"
        collector.close()

    def test_a_closed_collector_leaves_its_address_to_another(self):
        address = f"\0jaxlora-test-{uuid.uuid4().hex}"
        collector, registry = Collector(address), Registry()
        registry.add("lora_engine_steps_total")
        Sender(registry, to=address).close()
        self.next(collector, any)  # so it waits for the next one
        collector.close()
        Collector(address).close()

    def test_what_is_no_message_ends_only_its_sender(self, at):
        collector = Collector(at)
        for rubbish in (b"\xff" * 100, b"\x00\x00\x00\x02{}", b"\x00\x00\x00\x05null ", b"\x00"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.connect(at)
                connection.sendall(rubbish)
        registry = Registry()
        registry.add("lora_engine_steps_total")
        Sender(registry, to=at).close()
        assert self.next(collector, any) == ({"lora_engine_steps_total": {(): 1}}, {})
        collector.close()


class Sink:
    def __init__(self):
        self.calls = []

    def token(self, token):
        self.calls.append(token.id)
        return token.id == 9

    def finish(self, result):
        self.calls.append(result.reason)

    def fail(self, error):
        self.calls.append(error)


class TestObserver:
    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "requests.jsonl"

    @pytest.fixture
    def observer(self, path):
        observer = Observer(Registry(), RequestLog(str(path)), 100)
        yield observer
        observer.log.close()

    def lines(self, observer, path):
        observer.log.close()
        return [json.loads(line) for line in path.read_text().splitlines()]

    def values(self, observer, name):
        values, distributions = observer.registry.read()
        return {labels: sum(found.counts) for labels, found in distributions[name].items()} if name in distributions else values[name]

    def test_a_request_that_finishes(self, observer, path):
        sink = Sink()
        observed = observer.observe(sink, (1, 2, 3), SQL, "id-1")
        observer.accepted(observed)
        assert observer.load()[SQL_LABELS] == (0, 1) and observer.waiting_adapters() == {"alice/sql"}
        observed.started()
        assert observer.load()[SQL_LABELS] == (1, 0) and observer.waiting_adapters() == set()
        assert [observed.token(Token(id, 0.0)) for id in (5, 9)] == [False, True], "the sink's own answer is passed on"
        begun = time.monotonic()
        observed.finish(Result("stop", 3, 3, 0, Timings(begun - 4, begun - 3, begun - 2, begun)))
        assert observer.load()[SQL_LABELS] == (0, 0)
        assert sink.calls == [5, 9, "stop"]
        assert self.values(observer, "lora_requests_total") == {(*SQL_LABELS, "finished", "stop"): 1}
        assert self.values(observer, "lora_requests_accepted_total")[SQL_LABELS] == 1
        assert self.values(observer, "lora_prompt_tokens_total")[SQL_LABELS] == 3
        assert self.values(observer, "lora_generated_tokens_total")[SQL_LABELS] == 3, "a stop token counts, though no sink sees it"
        for name in ("queue_time", "time_to_first_token", "time_per_output_token", "request_duration"):
            assert self.values(observer, f"lora_{name}_seconds") == {SQL_LABELS: 1}
        (distribution,) = observer.registry.read()[1]["lora_time_per_output_token_seconds"].values()
        assert sum(distribution.sums) == pytest.approx(1.0), "2 s for the 2 tokens after the first"
        (line,) = self.lines(observer, path)
        assert line["request_id"] == "id-1" and (line["adapter"], line["version"]) == ("alice/sql", 2)
        assert (line["outcome"], line["reason"], line["prompt_tokens"], line["completion_tokens"]) == ("finished", "stop", 3, 3)
        assert 0 <= line["queue_ms"] <= line["ttft_ms"] <= line["total_ms"] and "prompt" not in line

    def test_an_answer_of_only_a_stop_token_has_a_first_token(self, observer):
        observed = observer.observe(Sink(), (1,), None, "")
        observed.started()
        observed.finish(Result("stop", 1, 1, 0, Timings(0.0, 0.0, time.monotonic(), time.monotonic())))
        assert self.values(observer, "lora_time_to_first_token_seconds") == {("base", "0"): 1}
        assert self.values(observer, "lora_generated_tokens_total") == {("base", "0"): 1}
        assert self.values(observer, "lora_time_per_output_token_seconds") == {}

    @pytest.mark.parametrize(
        ("error", "started", "outcome", "reason"),
        [
            (Cancelled("x"), True, "cancelled", "cancelled"),
            (RequestTimeout("x"), True, "failed", "timeout"),
            (RequestTimeout("x"), False, "failed", "queue_timeout"),
            (EngineError("x"), True, "failed", "engine"),
            (Unavailable("x", reason="shutting_down"), False, "failed", "shutting_down"),
        ],
    )
    def test_a_request_that_fails(self, observer, path, error, started, outcome, reason):
        sink = Sink()
        observed = observer.observe(sink, (1, 2), None, "")
        observer.accepted(observed)
        if started:
            observed.started()
            observed.token(Token(5, 0.0))
        observed.fail(error)
        assert sink.calls[-1] is error and observer.load()["base", "0"] == (0, 0)
        assert self.values(observer, "lora_requests_total") == {("base", "0", outcome, reason): 1}
        assert self.values(observer, "lora_request_duration_seconds") == {}
        (line,) = self.lines(observer, path)
        assert (line["outcome"], line["reason"], line["error"], line["completion_tokens"]) == (outcome, reason, "x", int(started))
        assert ("ttft_ms" in line) == ("queue_ms" in line) == started

    def test_a_request_that_the_engine_refuses_is_not_accepted(self, observer, path):
        observer.observe(Sink(), (1,), SQL, "id").refused(Unavailable("full", 1, "queue_full"))
        assert self.values(observer, "lora_requests_total") == {(*SQL_LABELS, "refused", "queue_full"): 1}
        assert SQL_LABELS not in self.values(observer, "lora_requests_accepted_total")
        assert observer.waiting_adapters() == set() and self.lines(observer, path)[0]["outcome"] == "refused"

    def test_what_is_refused_early_is_counted_without_a_name_from_outside(self, observer, path):
        observer.refusals.record(InvalidRequest({"seed": "is bad"}), "id")
        observer.refusals.record(UnicodeDecodeError("utf-8", b"secret", 0, 1, "secret"), "id")
        assert self.values(observer, "lora_requests_total") == {
            ("unknown", "", "refused", "invalid"): 1,
            ("unknown", "", "refused", "internal"): 1,
        }
        first, second = self.lines(observer, path)
        assert first["error"] == "seed: is bad" and second["error"] == "UnicodeDecodeError"

    def test_the_prompt_is_in_the_log_only_where_that_is_asked_for(self, path):
        observer = Observer(Registry(), RequestLog(str(path)), 100, lambda ids: f"text of {ids}")
        observer.observe(Sink(), (1, 2), None, "").fail(Cancelled("x"))
        assert self.lines(observer, path)[0]["prompt"] == "text of (1, 2)"


class TestRequestLog:
    def test_lines_of_many_threads_stay_whole(self, tmp_path):
        path = tmp_path / "log"
        logs = [RequestLog(str(path)), RequestLog(str(path))]
        threads = [
            threading.Thread(target=lambda log=log: [log.write(lambda: {"text": "é" * 200}) for _ in range(200)]) for log in logs * 2
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for log in logs:
            log.close()
        assert [json.loads(line) for line in path.read_text().splitlines()] == [{"text": "é" * 200}] * 800

    def test_it_never_waits_for_a_writer_that_is_stuck(self, tmp_path, monkeypatch):
        monkeypatch.setattr(request_log, "MAX_WAITING_LINES", 10)
        log, stuck = RequestLog(str(tmp_path / "log")), threading.Event()
        log.write(lambda: stuck.wait() and {})
        started = time.monotonic()
        for _ in range(50):
            log.write(dict)
        assert time.monotonic() - started < 1 and log.dropped >= 39
        stuck.set()
        log.close()

    def test_a_line_that_cannot_be_made_costs_only_itself(self, tmp_path):
        log = RequestLog(str(tmp_path / "log"))
        log.write(lambda: {"bad": object()})
        log.write(lambda: {"good": 1})
        log.close()
        assert (tmp_path / "log").read_text() == '{"good": 1}\n' and log.dropped == 1

    def test_standard_output(self, capsys):
        log = RequestLog(request_log.STDOUT)
        log.write(lambda: {"a": 1})
        log.close()
        assert capsys.readouterr().out == '{"a": 1}\n'

    def test_a_file_that_cannot_be_opened_is_told_with_its_setting(self, tmp_path):
        with pytest.raises(SetupError, match="REQUEST_LOG: can't write .*no/log"):
            RequestLog(str(tmp_path / "no" / "log"))

    def test_a_closed_log_takes_no_more(self, tmp_path):
        log = RequestLog(str(tmp_path / "log"))
        log.close()
        log.write(dict)
        assert (tmp_path / "log").read_text() == ""
