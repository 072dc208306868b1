"""The query that the `adapters` model answers: `{}`, `{"user": ...}` or `{"name": ...}`, as JSON."""

import json

from jaxlora.adapters.catalogue import Catalogue
from jaxlora.adapters.names import ID_PATTERN, is_id
from jaxlora.errors import InvalidRequest

MAX_QUERY_BYTES = 4096
RULE = '{}, {"user": "USER"} or {"name": "USER/ADAPTER"}'


def answer(catalogue: Catalogue, query: bytes) -> bytes:
    """The part of a catalogue that is asked for, as JSON.

    Raises:
        InvalidRequest: the query is malformed.
        AdapterNotFound: a name that does not exist.
    """
    wanted = _parse(query)
    if "user" in wanted and not is_id(wanted["user"]):
        raise InvalidRequest({"query": f"`user` does not match {ID_PATTERN}"})
    return json.dumps(catalogue.describe(**wanted)).encode()


def _parse(query: bytes) -> dict[str, str]:
    if len(query) > MAX_QUERY_BYTES:
        raise InvalidRequest({"query": f"has {len(query)} bytes, the limit is {MAX_QUERY_BYTES}"})
    try:
        wanted = json.loads(query.decode())
    except (ValueError, RecursionError):
        raise InvalidRequest({"query": f"is no valid JSON in UTF-8; it has to be {RULE}"}) from None
    if not isinstance(wanted, dict) or not set(wanted) <= {"user", "name"} or len(wanted) > 1:
        raise InvalidRequest({"query": f"has to be {RULE}"})
    if not all(isinstance(value, str) for value in wanted.values()):
        raise InvalidRequest({"query": f"its value is no string; it has to be {RULE}"})
    return wanted
