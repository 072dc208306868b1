"""The command lines against a real Triton, as a person runs them."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from client import Client
from client import adapters as command
from jaxlora.errors import ServingError
from jaxlora.settings import Settings
from server import preflight, repository

from ..parity import checkpoints
from .harness import serving, write_byte_tokenizer

LENGTH = 16_384


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_byte_tokenizer(checkpoints.write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", "llama"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": LENGTH}))
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory, model):
    with serving(
        tmp_path_factory.mktemp("commands"),
        model=str(model),
        cache_dir=Settings.read().cache_dir,
        max_slots=1,
        max_seq_len=LENGTH,
        max_output_tokens=LENGTH,
        lora_slots=4,
        max_lora_rank=16,
    ) as started:
        yield started


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return checkpoints.write_adapter(tmp_path_factory.mktemp("good") / "adapter", "llama", "attention")


@pytest.fixture
def run(server, capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of `client.adapters`."""
        store = ["--store", str(server.store)] if arguments[0] in ("publish", "serve", "unload") else []
        code = command.main(["--url", server.grpc_url, *arguments, *store])
        return code, *capsys.readouterr()

    return run


def python(server, *arguments: str, text: str = "") -> subprocess.CompletedProcess:
    """Runs `python -m ...` against the server. Its output is not touched: `\\r` is a character of an answer as good as any."""
    command = [sys.executable, "-m", *arguments, "--url", server.grpc_url]
    done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=60, cwd=repository.PROJECT)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


def test_the_life_of_an_adapter(run, server, good, tmp_path):
    assert run("publish", str(good), "--name", "alice/sql") == (0, "alice/sql@1 is live\n", "")
    assert run("publish", str(good), "--name", "alice/sql")[1] == "alice/sql@2 is live\n"
    with Client(server.grpc_url) as client:
        assert client.generate("Hi", adapter="alice/sql", max_tokens=2).adapter == "alice/sql@2"
        assert run("serve", "alice/sql", "--version", "1")[0] == 0
        assert client.generate("Hi", adapter="alice/sql", max_tokens=2).adapter == "alice/sql@1"
        assert run("unload", "alice/sql")[0] == 0
        with pytest.raises(ServingError, match="out of service"):
            client.generate("Hi", adapter="alice/sql", max_tokens=2)
        assert run("serve", "alice/sql", "--version", "latest") == (0, "version 2 answers to alice/sql\n", "")
        assert client.generate("Hi", adapter="alice/sql", max_tokens=2).adapter == "alice/sql@2"
    assert "version 2: ready" in run("show", "alice/sql")[1] and "alice/sql" in run("list")[1]


def test_a_refused_folder_is_told_and_leaves_what_was_live(run, server, good, tmp_path):
    run("publish", str(good), "--name", "bob/poems")
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in good.iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    config = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True, "r": 3}))
    code, _, err = run("publish", str(bad), "--name", "bob/poems")
    assert code == 1 and "bob/poems@2 was refused" in err and "use_dora" in err and "model.py" not in err
    with Client(server.grpc_url) as client:
        assert client.generate("Hi", adapter="bob/poems", max_tokens=2).adapter == "bob/poems@1"
    # The number is not given again, and the next one is live although the refused one is still known.
    assert run("publish", str(good), "--name", "bob/poems")[0] == 0


def test_publishing_at_the_same_time_makes_everything_live(server, good, capsys):
    codes = []
    url, store = server.grpc_url, str(server.store)

    def one(number: int) -> None:
        codes.append(command.main(["publish", str(good), "--name", f"carol/a{number % 3}", "--url", url, "--store", store]))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0] * 9, capsys.readouterr().err
    with Client(url) as client:
        serving_now = {adapter.name: adapter.serving for adapter in client.adapters(user="carol")}
    assert serving_now == {f"carol/a{number}": 3 for number in range(3)}


def test_generate_and_a_piped_chat(server):
    done = python(server, "client.generate", "Hello", "--max-tokens", "5")
    with Client(server.grpc_url) as client:
        assert (done.returncode, done.stdout) == (0, client.generate("Hello", max_tokens=5).text + "\n")
        said = client.chat([{"role": "user", "content": "Hello"}], max_tokens=5).text
    done = python(server, "client.chat", "--max-tokens", "5", text="Hello\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, said + "\n", "")


@pytest.mark.parametrize("arguments", [("client.generate", "x"), ("client.chat",), ("client.adapters", "list")])
def test_no_server_is_one_line(arguments):
    port = preflight.free_ports(1)[0]
    done = subprocess.run(
        [sys.executable, "-m", *arguments, "--url", f"127.0.0.1:{port}"],
        input="Hi\n",
        capture_output=True,
        text=True,
        timeout=60,
        cwd=repository.PROJECT,
    )
    assert done.returncode == 1 and done.stdout.strip() == ""
    assert re.fullmatch(rf"error: no server answers at 127.0.0.1:{port}: .*[Rr]efused.* \(is it running\? `make serve`.*\n", done.stderr)


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *command: str):
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=repository.PROJECT,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(slave)
        self.shown = ""
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        try:
            while data := os.read(self._master, 4096):
                self.shown += data.decode(errors="replace")
        except OSError:
            pass  # the program has ended

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, pattern: str, timeout_s: float = 30) -> None:
        """Waits until `pattern` is shown after what earlier calls waited for."""
        deadline = time.monotonic() + timeout_s
        while not (match := re.search(pattern, self.shown)):
            assert time.monotonic() < deadline and self.process.poll() is None, self.shown[-2000:]
            time.sleep(0.02)
        self.shown = self.shown[match.end() :]

    def interrupt(self) -> None:
        """Sends what Ctrl-C does."""
        os.killpg(self.process.pid, signal.SIGINT)

    def interrupt_until(self, pattern: str) -> None:
        """Sends it until `pattern` is shown: `input` does not see one that comes after it has shown its prompt and before it waits."""
        for _ in range(20):
            self.interrupt()
            time.sleep(0.5)
            if re.search(pattern, self.shown):
                break
        self.wait_for(pattern)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def test_ctrl_c_cancels_the_answer_and_not_the_chat(server):
    terminal = Terminal(sys.executable, "-m", "client.chat", "--url", server.grpc_url, "--max-tokens", str(LENGTH - 200))
    try:
        terminal.wait_for("base> ")
        terminal.type("Hello\n")
        terminal.wait_for("Hello\r\n.")
        terminal.interrupt()
        terminal.wait_for(r"\[cancelled\]\r\nbase> ")
        # The only slot is free again at once.
        with Client(server.grpc_url) as client:
            client.generate("Hi", max_tokens=2, timeout_s=2)
        terminal.interrupt_until("Ctrl-D leaves(.|\n)*base> ")
        terminal.type("/adapter nobody/nothing\n")
        terminal.wait_for("error: nobody/nothing: no such adapter(.|\n)*base> ")
        terminal.type("/quit\n")
        assert terminal.process.wait(10) == 0
    finally:
        terminal.close()


def test_a_merged_checkpoint_answers_as_base_and_adapter_do(server, model, good, run, tmp_path, monkeypatch):
    run("publish", str(good), "--name", "dave/sql")
    monkeypatch.setenv("MODEL", str(model))
    monkeypatch.setenv("CACHE_DIR", str(server.settings.cache_dir))
    merged = tmp_path / "merged"
    assert command.main(["merge", "dave/sql", "--store", str(server.store), "--output", str(merged)]) == 0
    with Client(server.grpc_url) as client:
        expected = client.generate("Hello", adapter="dave/sql", max_tokens=12)
    cache = server.settings.cache_dir
    with serving(tmp_path, model=str(merged), cache_dir=cache, max_slots=1, max_seq_len=256, lora_slots=1) as other:
        with Client(other.grpc_url) as client:
            answer = client.generate("Hello", max_tokens=12)
    assert (answer.text, answer.usage, answer.adapter) == (expected.text, expected.usage, "")
