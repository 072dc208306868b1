"""Records requests that are refused before it is known which adapter they are for. Imports no JAX: the tokenizer uses it too."""

import datetime

from jaxlora.errors import ServingError
from jaxlora.service.metrics import UNKNOWN, Registry
from jaxlora.service.request_log import RequestLog

REFUSED = "refused"


class Refusals:
    """Counts each one by its reason, and writes its line into the request log. Any thread may call it."""

    def __init__(self, registry: Registry, log: RequestLog):
        self._registry, self._log = registry, log

    def record(self, error: Exception, request_id: str = "") -> None:
        # What is no ServingError may tell of the server in its text.
        known = isinstance(error, ServingError)
        reason, text = (error.reason, str(error)) if known else (ServingError.reason, type(error).__name__)
        self._registry.add("lora_requests_total", *UNKNOWN, REFUSED, reason)
        entry = {"time": now(), "request_id": request_id, "outcome": REFUSED, "reason": reason, "error": text}
        self._log.write(lambda: entry)


def now() -> str:
    """The time for a line of the log: UTC, to the millisecond."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
