"""Names: what matches the pattern parses and prints back, and nothing else ever becomes part of a path."""

import pytest

from jaxlora.adapters import AdapterName
from jaxlora.adapters.names import MAX_VERSION, RULE

GOOD = ["alice/sql", "a/b", "A.b-c_d/0", "alice/sql@1", f"alice/sql@{MAX_VERSION}", f"{'u' * 64}/{'a' * 64}@{MAX_VERSION}"]
BAD = [
    "", "alice", "alice/", "/sql", "alice/sql/x", "../sql", "alice/..", "alice/../sql", "./sql", ".a/b", "-a/b", "_a/b",
    "alice/sql@", "alice/sql@0", "alice/sql@01", "alice/sql@-1", "alice/sql@1.0", "alice/sql@latest", "alice/sql@1@2",
    f"alice/sql@{MAX_VERSION + 1}", "alice/sql@99999999999", "alice/sql ", " alice/sql", "alice/sql\n", "alice\n/sql",
    "alice/s\0ql", "alice/sql\0", "\u00e4lice/sql", "alice/sql@\u0661", "alice\\sql", "alice/s%2e", "C:/x", f"{'u' * 65}/a",
    f"u/{'a' * 65}", "alice/" + "x" * 10_000, "../" * 3000,
]  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_valid_names_print_as_they_were_written(text):
    assert str(AdapterName.parse(text)) == text


@pytest.mark.parametrize("text", BAD, ids=lambda text: repr(text[:20]))
def test_other_names_are_refused_with_the_rule_in_a_short_message(text):
    with pytest.raises(ValueError, match="is not valid|is not a valid name") as caught:
        AdapterName.parse(text)
    assert RULE in str(caught.value) and len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


def test_parts_and_pins():
    name = AdapterName.parse("alice/sql@3")
    assert (name.user, name.adapter, name.version, name.unpinned) == ("alice", "sql", 3, "alice/sql")
    assert AdapterName.parse("alice/sql").at(3) == name
