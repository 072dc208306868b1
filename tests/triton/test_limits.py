"""Bounds on what one adapter or user may take, and who goes first, on a real server with one slot and one that is reserved."""

import concurrent.futures
import contextlib
import json
import pathlib

import pytest

from jaxlora.adapters import publish

from .conftest import SETTINGS
from .harness import CACHE, Grpc, Http, Refused, serving
from .test_metrics import total, wait_for

LITTLE = {"max_slots": 1, "reserved_slots": 1, "max_queue_per_adapter": 2, "max_running_per_user": 1}


@pytest.fixture(scope="module")
def limited(tmp_path_factory, tiny_model, adapters):
    folder = tmp_path_factory.mktemp("limited")
    log = str(folder / "requests.jsonl")
    with serving(folder, model=str(tiny_model), cache_dir=CACHE, request_log=log, **SETTINGS | LITTLE) as started:
        for name in ("alice/attention", "alice/rslora", "bob/attention"):
            publish(adapters[name], name, started.store)
        Http(started).load("adapters")
        yield started


@contextlib.contextmanager
def running(server, **fields):
    """Somebody's long answer, which has begun, and is cancelled in the end."""
    long = {"max_tokens": SETTINGS["max_output_tokens"], "ignore_eos": True, "stream": True}
    stream = Http(server).stream("jax_lora", text_input="x", **long, **fields)
    next(stream)
    yield
    stream.close()


@pytest.fixture
def clients():
    with concurrent.futures.ThreadPoolExecutor() as pool:
        yield pool


def ask(server, **fields):
    return Http(server).generate("jax_lora", text_input="hi", max_tokens=3, ignore_eos=True, **fields)


def wait_until_waiting(server, count: int) -> None:
    wait_for(server, lambda samples: total(samples, "lora_requests_waiting") == count)


def test_another_adapter_need_not_wait_for_an_answer_to_end(limited):
    with running(limited):
        assert ask(limited, lora_name="bob/attention")["num_output_tokens"] == 3
    wait_for(limited, lambda samples: total(samples, "lora_requests_total", adapter="base", outcome="cancelled") == 1)


def test_an_adapter_that_fills_its_part_of_the_queue_is_refused_alone(limited, clients):
    with running(limited):
        waiting = [clients.submit(ask, limited) for _ in range(2)]
        wait_until_waiting(limited, 2)
        words = r"UNAVAILABLE: 2 requests of the base model wait for a slot \(MAX_QUEUE_PER_ADAPTER\); try again in \d+ s"
        with pytest.raises(Refused, match=words):
            ask(limited)
        assert ask(limited, lora_name="bob/attention")["num_output_tokens"] == 3
    assert [each.result()["num_output_tokens"] for each in waiting] == [3, 3]
    wait_for(limited, lambda samples: total(samples, "lora_requests_total", adapter="base", outcome="refused", reason="queue_share_full") == 1)


def test_a_user_at_the_bound_waits_and_is_told_for_how_long(limited):
    with running(limited, lora_name="alice/attention"):
        words = r"DEADLINE_EXCEEDED: the request's time-out of 0.3 s passed in the queue; try again in \d+ s"
        with pytest.raises(Refused, match=words):
            Grpc(limited).generate(text_input=b"hi", lora_name=b"alice/rslora", timeout_us=300_000)
        assert ask(limited, lora_name="bob/attention")["num_output_tokens"] == 3
    assert ask(limited, lora_name="alice/rslora")["num_output_tokens"] == 3


def test_the_lowest_priority_value_goes_first(limited, clients):
    with running(limited):
        waiting = [clients.submit(ask, limited, id="patient", priority=5)]
        wait_until_waiting(limited, 1)
        waiting.append(clients.submit(ask, limited, id="urgent", priority=-5))
        wait_until_waiting(limited, 2)
    concurrent.futures.wait(waiting)
    ids = [json.loads(line)["request_id"] for line in pathlib.Path(limited.settings.request_log).read_text().splitlines()]
    assert ids.index("urgent") < ids.index("patient")
