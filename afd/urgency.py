"""Who goes first, and until when anybody waits."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import NamedTuple

MOST_SECONDS = 86400  # that a request may ask for; gRPC takes a deadline beyond all numbers for one that is over


class Urgency(NamedTuple):
    """Of a request, and of all that is done for it."""

    priority: int = 0  # lower goes first; 32 bits with a sign
    deadline: float = math.inf  # by this host's time.monotonic()

    @classmethod
    def within(cls, timeout_s: float | None, priority: int = 0) -> Urgency:
        """From now on; None: without a deadline."""
        return cls(priority, math.inf if timeout_s is None else time.monotonic() + timeout_s)

    @classmethod
    def of_all(cls, parts: Iterable[Urgency]) -> Urgency:
        """Of what is done for several at once: that of the first, until the last one is out of time."""
        priorities, deadlines = zip(*parts, strict=True)
        return cls(min(priorities), max(deadlines))

    @property
    def time_left_s(self) -> float | None:
        """Never negative; None without a deadline."""
        return None if self.deadline == math.inf else max(0.0, self.deadline - time.monotonic())

    @property
    def is_over(self) -> bool:
        return self.deadline <= time.monotonic()


NOT_URGENT = Urgency()
