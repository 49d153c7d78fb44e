"""Stop strings, found across the borders of tokens."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text on until a stop string is complete; `matched` is that string, or None.

    The longest end of the text that may yet become a stop string is held back. The stop string itself, and
    what follows it, are never returned.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` holds no empty string."""
        self._stops = tuple(stops)
        self._first_chars = frozenset(stop[0] for stop in self._stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that is safe to show now. Call it no more once `matched` is set."""
        if not self._stops:
            return text
        text = self._held + text
        before = self._before_stop(text)
        if before is not None:
            self._held = ""
            return before
        num_held = self._num_undecided(text)
        cut = len(text) - num_held
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back, at the end of a text without a stop string."""
        held, self._held = self._held, ""
        return held

    def _before_stop(self, text: str) -> str | None:
        """The text before the first stop string, which becomes `matched`; None when there is none."""
        found = [(start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if not found:
            return None
        start, self.matched = min(found, key=lambda hit: hit[0])
        return text[:start]

    def _num_undecided(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._first_chars and self._may_become_stop(text[start:]):
                return len(text) - start
        return 0

    def _may_become_stop(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stops)
