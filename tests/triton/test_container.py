"""What the container runs, outside of one: its entry point and health check, over just the files that its Dockerfile copies."""

import os
import pathlib
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from server import preflight, repository

from ..test_docker import copied
from .harness import CACHE, START_TIMEOUT_S, Http, Refused, processes
from .test_launch import eventually


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> pathlib.Path:
    """The project as the image has it: only what is copied, and nothing can be written below a model's folder but the store."""
    root = tmp_path_factory.mktemp("image")
    for sources, destination in copied():
        for source in sources:
            path = repository.PROJECT / source
            if path.is_dir():
                shutil.copytree(path, root / destination, ignore=shutil.ignore_patterns("__pycache__", "users"))
            elif destination.endswith("/"):
                (root / destination).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, root / destination)
    (root / "model_repository" / "adapters" / "users").mkdir()
    return root


class Container:
    """The entry point in a process of its own, with the variables of the image that matter here."""

    def __init__(self, image: pathlib.Path, cache: pathlib.Path, model: pathlib.Path, **variables: str):
        ports = preflight.free_ports(3)
        self.http_url = f"http://127.0.0.1:{ports[0]}"
        # The image has its packages in a virtual environment whose `python3` is first on PATH, as here.
        environment = {
            "PATH": os.pathsep.join([str(pathlib.Path(sys.executable).parent), "/usr/bin", "/bin"]),
            "CACHE_DIR": str(cache), "HOST": "127.0.0.1", "MODEL": str(model), "MAX_SLOTS": "2", "MAX_SEQ_LEN": "256",
            "PREFILL_CHUNK": "32", "LORA_SLOTS": "2", "MAX_LORA_RANK": "16", "PYTHONDONTWRITEBYTECODE": "1",
            **{name.upper(): str(port) for name, port in zip(preflight.PORTS, ports)}, **variables,
        }  # fmt: skip
        self.environment, self.image = environment, image
        self.process = subprocess.Popen([image / "docker" / "entrypoint.sh"], env=environment, cwd="/", stdout=subprocess.PIPE, text=True)

    def health(self) -> int:
        """The exit code of the health check."""
        return subprocess.run([sys.executable, "docker/healthcheck.py"], cwd=self.image, env=self.environment, stdout=subprocess.DEVNULL).returncode

    def stop(self) -> str:
        """What `docker stop` does; gives what was printed."""
        self.process.terminate()
        output, _ = self.process.communicate(timeout=60)
        return output


@pytest.fixture
def cache(tmp_path) -> pathlib.Path:
    # What was compiled for other tests is there; all else is new.
    CACHE.mkdir(parents=True, exist_ok=True)
    (tmp_path / "cache").mkdir()
    for name in ("compiled", "steps", "native"):
        (CACHE / name).mkdir(exist_ok=True)
        (tmp_path / "cache" / name).symlink_to(CACHE / name)
    return tmp_path / "cache"


def test_it_serves_keeps_what_changes_it_behind_a_key_and_stops_in_order(image, cache, tiny_model):
    container = Container(image, cache, tiny_model)
    try:
        assert container.health() == 1, "it is starting"
        assert eventually(lambda: container.process.poll() is not None or container.health() == 0, START_TIMEOUT_S)
        assert container.process.poll() is None
        servers = [pid for pid, command in processes(parent=container.process.pid).items() if "tritonserver" in command]
        assert len(servers) == 1, "the script has become the launcher"
        key = (cache / "admin-key").read_text().strip()
        assert len(key) >= 32 and (cache / "admin-key").stat().st_mode & 0o077 == 0
        assert Http(container).generate(text_input="hi", max_tokens=2)["num_output_tokens"] == 2
        with pytest.raises(Refused, match="restricted"):
            Http(container).load("adapters")
        Http(container, {"admin-key": key}).load("adapters")
        for route in ("/ping", "/invocations", "/predict"):  # SageMaker's and Vertex AI's
            with pytest.raises(urllib.error.HTTPError):
                urllib.request.urlopen(container.http_url + route, timeout=10)
    finally:
        output = container.stop()
    assert container.process.returncode == 0 and container.health() == 1
    assert key not in output and f"the key for model control is in {cache}/admin-key" in output
    assert not processes(group=servers[0])


@pytest.mark.parametrize("how", ["ADMIN_KEY", "ADMIN_KEY_FILE"])
def test_a_key_that_is_given_is_taken(image, cache, tiny_model, tmp_path, how):
    key = "0123456789-given-key"
    (tmp_path / "secret").write_text(f"{key}\n")
    given = {how: key if how == "ADMIN_KEY" else str(tmp_path / "secret")}
    said = subprocess.run(
        ["bash", "-c", 'exec() { printf %s "$ADMIN_KEY"; }; . "$0"', str(image / "docker" / "entrypoint.sh")],
        env={"PATH": os.environ["PATH"], "CACHE_DIR": str(cache), **given}, cwd=image / "docker", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout == key and not (cache / "admin-key").exists()


def test_a_key_that_is_too_short_ends_the_start(image, cache, tiny_model):
    container = Container(image, cache, tiny_model, ADMIN_KEY="short")
    assert container.process.wait(timeout=60) == 1
    container.process.stdout.close()
