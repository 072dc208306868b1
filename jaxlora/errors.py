"""The errors that reach a caller.

Each carries a `code`, the name of the Triton error code that the front door answers with, a `name`, which the text of that answer begins with (the code, but where
one of Triton's codes stands for two errors), and a `reason`, a word for metrics and logs. Messages name what is wrong and the
bound that it broke, and carry no path of the server.
"""


class ServingError(Exception):
    """Base of everything a request or a publish can be refused with."""

    code = "INTERNAL"
    reason = "internal"

    @property
    def name(self) -> str:
        return self.code


class InvalidRequest(ServingError):
    """A field of a request is malformed or over a limit. `fields` maps the name of each bad field to what is wrong with it."""

    code = "INVALID_ARG"
    reason = "invalid"

    def __init__(self, problems: dict[str, str]):
        self.problems = dict(problems)
        super().__init__("; ".join(f"{field}: {problem}" for field, problem in self.problems.items()))


class AdapterNotFound(ServingError):
    """The adapter or the version asked for is not in the catalogue, or is not being served."""

    code = "NOT_FOUND"
    reason = "adapter_not_found"


class AdapterInvalid(ServingError):
    """An adapter folder that can't be served. `problems` holds every reason, not only the first."""

    code = "INVALID_ARG"
    reason = "adapter_invalid"

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        super().__init__("; ".join(self.problems))


class Unavailable(ServingError):
    """Refused for now: a limit is reached or the server is shutting down. `retry_after_s` is a hint in seconds."""

    code = "UNAVAILABLE"
    reason = "unavailable"

    def __init__(self, message: str, retry_after_s: float | None = None, reason: str = reason):
        self.retry_after_s, self.reason = retry_after_s, reason
        super().__init__(message if retry_after_s is None else f"{message}; try again in {retry_after_s:g} s")


class RequestTimeout(Unavailable):
    """A request passed its time-out, in the queue or during generation. In the queue `retry_after_s` is how long it takes now."""

    name = "DEADLINE_EXCEEDED"

    def __init__(self, message: str, retry_after_s: float | None = None):
        super().__init__(message, retry_after_s, "timeout")


class Cancelled(ServingError):
    """The caller went away or asked to stop."""

    code = "CANCELLED"
    reason = "cancelled"


class EngineError(ServingError):
    """Generation failed inside the engine; the message names the cause."""

    code = "INTERNAL"
    reason = "engine"

    def __init__(self, message: str, reason: str = reason):
        self.reason = reason
        super().__init__(message)


class SetupError(Exception):
    """A wrong setting, checkpoint or machine, found before anything is loaded. `str()` is one clear line a problem."""
