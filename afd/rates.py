"""How fast a replica's counters grow, for its lease: `afd top` and the console show it, and ask no replica for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

_SHORTEST_S = 0.5  # of two readings that are closer the earlier one's rates still hold


class Rates:
    """Of counters, per second, between the last two readings."""

    def __init__(self, read: Callable[[], Mapping[str, float]], now: Callable[[], float] = time.monotonic) -> None:
        self._read = read
        self._now = now
        self._totals = read()
        self._read_at_s = now()
        self._rates: dict[str, float] = {}

    def per_second(self) -> Mapping[str, float]:
        elapsed_s = self._now() - self._read_at_s
        if elapsed_s >= _SHORTEST_S:
            totals = self._read()
            self._rates = {name: (total - self._totals.get(name, 0.0)) / elapsed_s for name, total in totals.items()}
            self._totals, self._read_at_s = totals, self._read_at_s + elapsed_s
        return self._rates
