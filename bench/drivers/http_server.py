"""The server process of a peer: until it answers, and until it has ended."""

import subprocess
import time
import urllib.error
import urllib.request

POLL_S = 0.1


def wait_until_healthy(process: subprocess.Popen, name: str, port: int, timeout_s: float) -> None:
    """Returns when `/health` answers.

    Raises:
        RuntimeError: the process ended before, or it took longer than `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{name} ended with {process.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(POLL_S)
    raise RuntimeError(f"{name} was not ready after {timeout_s} s")


def end(process: subprocess.Popen | None, timeout_s: float) -> None:
    """Ends a process that may not have been started, by force after `timeout_s`."""
    if process is not None:
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
