"""Names of adapters: `user_id/adapter_id`, or `user_id/adapter_id@version` to pin one version.

Only what went through `AdapterName.parse` may become part of a path: an id starts with a letter or a digit and holds no slash.
"""

import dataclasses
import re

ID_PATTERN = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
MAX_VERSION = (1 << 32) - 1  # `adapter_version` goes out as UINT32
MAX_NAME_LENGTH = 64 + 1 + 64 + 1 + len(str(MAX_VERSION))
RULE = f"an adapter is named user/adapter or user/adapter@version; both ids match {ID_PATTERN}, versions count from 1"

_ID = re.compile(ID_PATTERN)
_NAME = re.compile(rf"({ID_PATTERN})/({ID_PATTERN})(?:@([1-9][0-9]{{0,9}}))?")
_VERSION = re.compile("[1-9][0-9]{0,9}")


@dataclasses.dataclass(frozen=True, order=True)
class AdapterName:
    """A name that matches its pattern. `version` is None for "whatever is being served"."""

    user: str
    adapter: str
    version: int | None = None

    @classmethod
    def parse(cls, text: str) -> "AdapterName":
        """Raises ValueError with the rule; a long or strange name is not repeated in the message."""
        match = _NAME.fullmatch(text) if len(text) <= MAX_NAME_LENGTH else None
        version = int(match[3]) if match and match[3] else None
        if match is None or (version or 1) > MAX_VERSION:
            shown = (
                f"{text!r} is not a valid name"
                if text.isprintable() and len(text) <= 80
                else f"a name of {len(text)} characters is not valid"
            )
            raise ValueError(f"{shown}: {RULE}")
        return cls(match[1], match[2], version)

    @property
    def unpinned(self) -> str:
        """`user/adapter`, the key of the catalogue."""
        return f"{self.user}/{self.adapter}"

    def at(self, version: int) -> "AdapterName":
        return dataclasses.replace(self, version=version)

    def __str__(self) -> str:
        return self.unpinned if self.version is None else f"{self.unpinned}@{self.version}"


def is_id(text: str) -> bool:
    """Whether `text` may be a user id or an adapter id."""
    return _ID.fullmatch(text) is not None


def parse_version(text: str) -> int | None:
    """The version that a folder name stands for, else None."""
    if _VERSION.fullmatch(text) is None or int(text) > MAX_VERSION:
        return None
    return int(text)
