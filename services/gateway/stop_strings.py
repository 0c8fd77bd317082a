"""Ends a text before the first of its stop strings, and never shows a part of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.hit = False
        self._held = ""

    def push(self, text: str) -> str:
        """The text that may be shown now; what could begin a stop string is held back. Sets `hit` at a match."""
        self._held += text
        matches = [(start + len(stop), start) for stop in self.stops if (start := self._held.find(stop)) >= 0]
        if matches:  # what is complete first counts, however the text came in pieces
            self.hit = True
            return self._take(min(matches)[1])
        return self._take(len(self._held) - self._longest_beginning())

    def rest(self) -> str:
        """What was held back, when no more text will come."""
        return "" if self.hit else self._take(len(self._held))

    def _take(self, length: int) -> str:
        shown, self._held = self._held[:length], self._held[length:]
        return shown

    def _longest_beginning(self) -> int:
        """Length of the longest end of the held text that is the beginning of a stop string."""
        return max(
            (
                length
                for stop in self.stops
                for length in range(1, min(len(stop), len(self._held) + 1))
                if self._held.endswith(stop[:length])
            ),
            default=0,
        )
