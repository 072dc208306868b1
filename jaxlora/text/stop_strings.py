"""Stop strings in streamed text."""

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first stop string, and holds back what could be the beginning of one.

    The first stop string is the one that ends first; of several that end at the same character, the longest. So the result
    does not depend on how the text was cut into pushes. An Aho-Corasick automaton over the stop strings: time is linear in
    the text, however many and however repetitive they are.

    Arguments:
        stops: none of them empty; none at all lets everything through.

    Attributes:
        matched: the stop string that was found, or None.

    Raises:
        ValueError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str]):
        if not all(stops):
            raise ValueError("a stop string is empty")
        self.matched: str | None = None
        self._held = ""
        self._node = 0
        # For each node: where a character leads, the node of its longest proper suffix, its length, the longest stop that ends
        # there.
        self._next: list[dict[str, int]] = [{}]
        self._suffix: list[int] = [0]
        self._depth: list[int] = [0]
        self._stop: list[str | None] = [None]
        for stop in stops:
            self._add(stop)
        self._link()

    def push(self, text: str) -> tuple[str, bool]:
        """Takes the next piece of text.

        Returns:
            (emit, stopped): text that certainly belongs to the answer, and whether a stop string was found; then `emit` ends
            where it began, and the text after it is dropped. After a stop nothing more comes out.
        """
        if self.matched is not None:
            return "", True
        if not self._next[0]:
            return text, False
        held = self._held + text
        for index, character in enumerate(text, len(self._held) + 1):
            self._node = self._step(self._node, character)
            if (stop := self._stop[self._node]) is not None:
                self.matched, self._held = stop, ""
                return held[: index - len(stop)], True
        certain = len(held) - self._depth[self._node]
        self._held = held[certain:]
        return held[:certain], False

    def flush(self) -> str:
        """What was held back, when no text follows; empty after a stop."""
        held, self._held, self._node = self._held, "", 0
        return held

    def _step(self, node: int, character: str) -> int:
        while (after := self._next[node].get(character)) is None:
            if node == 0:
                return 0
            node = self._suffix[node]
        return after

    def _add(self, stop: str) -> None:
        node = 0
        for character in stop:
            after = self._next[node].get(character)
            if after is None:
                after = self._next[node][character] = len(self._next)
                self._next.append({})
                self._suffix.append(0)
                self._depth.append(self._depth[node] + 1)
                self._stop.append(None)
            node = after
        self._stop[node] = stop

    def _link(self) -> None:
        """Breadth first, so that a node's suffix, which is shorter, is already linked."""
        queue = deque(self._next[0].values())
        while queue:
            node = queue.popleft()
            for character, after in self._next[node].items():
                self._suffix[after] = self._step(self._suffix[node], character)
                queue.append(after)
            if self._stop[node] is None:
                self._stop[node] = self._stop[self._suffix[node]]
