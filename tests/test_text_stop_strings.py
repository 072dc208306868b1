"""Stop strings end a stream where a plain search over the whole text would, whatever the pieces, and never show."""

import random
import time

import pytest

from jaxlora.text import StopStrings


def run(stops, pieces) -> tuple[list[str], bool, str | None]:
    """The emitted pieces, whether it stopped, and on what."""
    watcher, out, stopped = StopStrings(stops), [], False
    for piece in pieces:
        emit, stopped = watcher.push(piece)
        out.append(emit)
        if stopped:
            break
    out.append(watcher.flush())
    return out, stopped, watcher.matched


def plain_search(stops, text) -> tuple[str, bool]:
    """Text before the stop string that ends first; of several that end there, the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


def cut(text, rng) -> list[str]:
    pieces = []
    while text:
        size = rng.randint(0, 4)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


@pytest.mark.parametrize(
    ("stops", "pieces", "text", "stopped"),
    [
        (["aab"], ["aa", "ab", "c"], "a", True),
        (["aab"], ["aa", "a", "a"], "aaaa", False),
        (["END"], ["the E", "N", "D of it"], "the ", True),
        (["END"], ["the E", "N", "d"], "the ENd", False),
        (["bc", "abcd"], ["xab", "cd"], "xa", True),
        (["abc", "c"], ["xab", "cd"], "x", True),
        (["\n\n", "User:"], ["hello\n", "\nUser:"], "hello", True),
        (["abab"], ["ab", "aab", "ab"], "aba", True),
        (["x"], ["x"], "", True),
        (["👩‍👧"], ["a👩", "\u200d", "👧b"], "a", True),
        (["aaa"], ["a", "a"], "aa", False),
        ([], ["a", "b"], "ab", False),
        (["stop", "stop"], ["no ", "st", "op"], "no ", True),
    ],
)
def test_examples(stops, pieces, text, stopped):
    out, did_stop, _ = run(stops, pieces)
    assert ("".join(out), did_stop) == (text, stopped)


def test_any_cutting_gives_what_a_plain_search_gives_and_nothing_of_a_stop_leaks():
    rng = random.Random(0)
    for _ in range(3000):
        stops = ["".join(rng.choice("ab") for _ in range(rng.randint(1, 6))) for _ in range(rng.randint(1, 3))]
        text = "".join(rng.choice("aabc") for _ in range(rng.randint(0, 30)))
        out, stopped, matched = run(stops, cut(text, rng))
        want, should_stop = plain_search(stops, text)
        assert ("".join(out), stopped) == (want, should_stop), (stops, text)
        # What a caller saw after each push is a part of the answer: nothing is ever taken back.
        assert not stopped or (matched in stops and text.startswith(want + matched))


def test_text_is_held_back_no_longer_than_needed():
    watcher = StopStrings(["</s>", "\n\n"])
    assert watcher.push("hello <") == ("hello ", False)
    assert watcher.push("/") == ("", False)
    assert watcher.push("b>\n") == ("</b>", False)
    assert watcher.push("x") == ("\nx", False)


def test_nothing_comes_out_after_a_stop():
    watcher = StopStrings(["b"])
    assert watcher.push("abc") == ("a", True)
    assert watcher.push("more") == ("", True)
    assert watcher.flush() == ""
    assert watcher.matched == "b"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])


def test_repetitive_stop_strings_take_linear_time():
    """A search that starts again at every character would take 2000 * 200,000 steps here."""
    watcher = StopStrings(["a" * 2000 + "b", "a" * 1999 + "c"])
    started = time.perf_counter()
    for _ in range(2000):
        watcher.push("a" * 100)
    assert time.perf_counter() - started < 2
    assert len(watcher.flush()) == 2000
