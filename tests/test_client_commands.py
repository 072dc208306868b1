"""`client.generate` and `client.chat` as a person or a pipe uses them, with a model that answers by rule."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import types

import pytest

from client import chat, generate, terminal
from client.answers import Chunk, End, Usage
from client.interface import LanguageModel
from client.interrupts import Interrupts
from jaxlora.errors import AdapterNotFound, InvalidRequest


class Played(LanguageModel):
    """Answers with the words that a test gave it; a word may be an exception to raise. Remembers what it was asked."""

    def __init__(self):
        self.words = ["Hello ", "there."]
        self.asked, self.cancelled, self.closed = [], 0, False

    def _start(self, fields, timeout_s):
        read = {name: value.decode() if isinstance(value, bytes) else value for name, value in fields.items()}
        for name in ("messages", "sampling_parameters"):
            if name in read:
                read[name] = json.loads(read[name])
        self.asked.append(read | ({} if timeout_s is None else {"timeout_s": timeout_s}))
        return PlayedAnswer(self, list(self.words))

    def _query(self, query):
        name = json.loads(query).get("name", "alice/sql")
        if name != "alice/sql":
            raise AdapterNotFound(f"{name}: no such adapter; alice has: sql")
        return json.dumps({"adapters": [{"name": name, "serving": 1, "policy": {"serve": "latest"}, "versions": []}]}).encode()

    def load_adapters(self):
        raise NotImplementedError

    def close(self):
        self.closed = True


class PlayedAnswer:
    def __init__(self, model, words):
        self.model, self.words, self.complete = model, words, False

    def __next__(self):
        if self.complete:
            raise StopIteration
        if not self.words:
            self.complete = True
            metrics = {"ttft_ms": 12.0, "tokens_per_second": 34.0}
            return Chunk("", end=End("stop", "", Usage(5, 2), metrics))
        word = self.words.pop(0)
        if isinstance(word, BaseException):
            raise word
        return Chunk(word)

    def close(self):
        if not self.complete:
            self.complete = True
            self.model.cancelled += 1


@pytest.fixture
def model(monkeypatch):
    played = Played()
    monkeypatch.setattr(terminal, "connect", lambda arguments: played)
    yield played
    assert played.closed or not played.asked


@pytest.fixture
def piped(monkeypatch, capsys, model):
    def run(command: types.ModuleType, text: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        return command.main(arguments), *capsys.readouterr()

    return run


def test_generate_prints_the_answer_and_nothing_else(piped, model):
    assert piped(
        generate, "", "Once", "--adapter", "alice/sql", "--max-tokens", "9", "--seed", "3", "--stop", "x", "--stop", "y"
    ) == (0, "Hello there.\n", "")
    assert model.asked == [
        {
            "text_input": "Once",
            "lora_name": "alice/sql",
            "stream": True,
            "sampling_parameters": {"max_tokens": 9, "seed": 3, "stop_words": ["x", "y"]},
        }
    ]  # fmt: skip


def test_generate_takes_its_prompt_from_a_pipe(piped, model):
    piped(generate, "line 1\nline 2\n")
    piped(generate, "other", "-", "--timeout", "2.5")
    assert [request["text_input"] for request in model.asked] == ["line 1\nline 2\n", "other"]
    assert model.asked[1]["timeout_s"] == 2.5


def test_generate_can_ask_as_a_chat(piped, model):
    piped(generate, "", "Hi", "--chat")
    piped(generate, "", "Hi", "--system", "Be brief.")
    user = {"role": "user", "content": "Hi"}
    assert [request["messages"] for request in model.asked] == [[user], [{"role": "system", "content": "Be brief."}, user]]


def test_generate_tells_counts_and_speed_on_request(piped, model):
    code, out, err = piped(generate, "", "x", "--stats")
    assert (code, out) == (0, "Hello there.\n") and "5 + 2 tokens" in err and "34.0 tokens/s" in err
    found = json.loads(piped(generate, "", "x", "--json")[1])
    assert found["text"] == "Hello there." and found["usage"]["completion_tokens"] == 2 and not model.asked[1]["stream"]


def test_an_error_is_one_line_a_problem_and_exit_code_1(piped, model):
    model.words = [InvalidRequest({"max_tokens": "0 is not between 1 and 2048", "top_p": "2 is too much"})]
    assert piped(generate, "", "x") == (1, "", "error: max_tokens: 0 is not between 1 and 2048\nerror: top_p: 2 is too much\n")


def test_ctrl_c_cancels_the_answer_and_ends_generate(piped, model):
    model.words = ["Hello ", KeyboardInterrupt()]
    assert piped(generate, "", "x")[0] == terminal.INTERRUPTED
    assert model.cancelled == 1


def test_a_reader_that_has_had_enough_ends_generate_quietly():
    script = (
        "import sys; from client import generate, terminal; from tests.test_client_commands import Played; played = Played()\n"
    )
    script += "played.words = ['word '] * 100_000; terminal.connect = lambda arguments: played; sys.exit(generate.main(['x']))"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(5)
        process.stdout.close()
        assert process.wait(30) == 1 and process.stderr.read() == b""


def test_a_piped_chat_is_a_conversation(piped, model):
    assert piped(chat, "Hi\n\nAnd you?\n", "--system", "Be brief.", "--temperature", "0.5") == (
        0,
        "Hello there.\nHello there.\n",
        "",
    )
    system, answer = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "Hello there."}
    assert [request["messages"] for request in model.asked] == [
        [system, {"role": "user", "content": "Hi"}],
        [system, {"role": "user", "content": "Hi"}, answer, {"role": "user", "content": "And you?"}],
    ]
    assert model.asked[0]["sampling_parameters"] == {"temperature": 0.5}


def test_a_chat_switches_adapters_and_forgets_on_command(piped, model):
    assert piped(chat, "/adapter alice/sql\nHi\n/adapter base\n/reset\nHi\n/quit\nnot read\n")[0] == 0
    assert [request.get("lora_name") for request in model.asked] == ["alice/sql", None]
    assert [len(request["messages"]) for request in model.asked] == [1, 1]


def test_a_chat_goes_on_after_an_error_and_ends_with_its_code(piped, model):
    code, out, err = piped(chat, "/adapter alice/nothing\n/nonsense\nHi\n")
    assert code == 1 and out == "Hello there.\n"
    assert "error: alice/nothing: no such adapter; alice has: sql" in err and "/nonsense" in err
    assert "lora_name" not in model.asked[0]


def test_what_was_refused_is_no_part_of_the_conversation(piped, model):
    conversation = chat.Conversation(model, None, None, {})
    model.words = [InvalidRequest({"messages": "too long"})]
    with pytest.raises(InvalidRequest):
        list(conversation.say("x" * 9))
    assert conversation.messages == []
    model.closed = True


def test_a_cancelled_answer_stays_as_far_as_it_came(piped, model):
    conversation = chat.Conversation(model, None, None, {})
    answer = conversation.say("Hi")
    assert next(answer) == "Hello "
    answer.close()
    assert model.cancelled == 1
    assert conversation.messages == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello "}]
    model.closed = True


def test_an_interrupt_stops_and_raises_nothing_and_ctrl_c_is_itself_again_afterwards():
    stopped = threading.Semaphore(0)
    before = signal.getsignal(signal.SIGINT)
    with Interrupts(stopped.release) as interrupts:
        assert not interrupts.seen
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            assert stopped.acquire(timeout=10) and interrupts.seen
    assert signal.getsignal(signal.SIGINT) is before


def test_an_unknown_adapter_at_the_start_ends_the_chat(piped, model):
    code, out, err = piped(chat, "Hi\n", "--adapter", "alice/nothing")
    assert (code, out) == (1, "") and err == "error: alice/nothing: no such adapter; alice has: sql\n"


@pytest.mark.parametrize("module", ["generate", "chat", "adapters"])
def test_every_command_explains_itself_without_a_server(module):
    done = subprocess.run([sys.executable, "-m", f"client.{module}", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--url" in done.stdout


def test_a_client_of_a_server_loads_no_jax():
    script = "import sys, client.adapters, client.chat, client.generate; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_the_server_is_looked_for_at_the_port_of_the_environment() -> None:
    code = "from client.wire import DEFAULT_URL; from client import top; from training.sft import SftOptions; print(DEFAULT_URL, top.DEFAULT_URL, SftOptions.parse(['--data', 'x', '--name', 'a/b'], '').url)"
    for ports, want in (({}, ("8001", "8002")), ({"GRPC_PORT": "9101", "METRICS_PORT": "9102"}, ("9101", "9102"))):
        environ = {name: value for name, value in os.environ.items() if name not in ("GRPC_PORT", "METRICS_PORT")} | ports
        told = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True).stdout.split()
        assert told == [f"localhost:{want[0]}", f"http://localhost:{want[1]}/metrics", f"localhost:{want[0]}"]
