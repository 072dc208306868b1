"""The key that protects what changes a server: model control, trace and log settings, shared memory.

Triton compares a header of each call to those APIs with the key that it was started with (its `--http-restricted-api` and
`--grpc-restricted-protocol`). Knows the names that both sides use, for the launcher and for clients.
"""

import os
from collections.abc import Mapping

from jaxlora.settings import Settings

RESTRICTED = ("model-repository", "trace", "logging", "shared-memory")
HTTP_HEADER = "admin-key"
GRPC_HEADER = f"triton-grpc-protocol-{HTTP_HEADER}"


def arguments(key: str) -> list[str]:
    """What `tritonserver` is started with; nothing without a key."""
    rule = f"{','.join(RESTRICTED)}:{HTTP_HEADER}={key}"
    return [f"--http-restricted-api={rule}", f"--grpc-restricted-protocol={rule}"] if key else []


def grpc_headers(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The metadata of a client's calls: the key that `ADMIN_KEY` holds, if it does. Raises SetupError for what can't be a key."""
    key = Settings.read({"ADMIN_KEY": environ.get("ADMIN_KEY", "")}).admin_key
    return {GRPC_HEADER: key} if key else {}
