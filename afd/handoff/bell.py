"""Waking a thread that sleeps, in this process or in another one."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

LONGEST_SLEEP_S = 1.0
_SHORTEST_NAP_S, _LONGEST_NAP_S = 20e-6, 5e-3
_NAP_COST = 4  # times that of a bell: a nap lasts twice as long, and a crossing may need two
_SHORTEST_POLL_S = 1e-3  # poll counts milliseconds


class Bell:
    """A pipe: whoever rings writes a byte, and the sleeper sees that there is something to read. A ring that comes
    before the sleep is not lost, so nobody need know whether the other one sleeps."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading = reading
        self._writing = writing
        os.set_blocking(reading, False)
        os.set_blocking(writing, False)

    @classmethod
    def private(cls) -> Bell:
        """For the threads of this process."""
        return cls(*os.pipe())

    @classmethod
    def named(cls, path: Path) -> Bell:
        """The FIFO at path. Raises OSError if there is none that may be opened."""
        file = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        return cls(file, file)

    def fileno(self) -> int:
        return self._reading

    def ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full of rings that nobody has heard yet: one more says nothing
            os.write(self._writing, b"!")

    def silence(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._reading, 65536)

    def __del__(self) -> None:
        for file in {self._reading, self._writing}:
            os.close(file)


def pause(waited_s: float, spin_s: float, bells: Sequence[Bell | None], longest_s: float = LONGEST_SLEEP_S) -> None:
    """What a thread does between two looks at what it awaits: at first it gives way to others, after spin_s it sleeps
    until a bell rings, or has rung since it last slept (docs/adr/0005). A bell that is None stands for something that
    nobody rings for: then it looks out for longer and only naps, for a share of what it has waited (docs/adr/0006)."""
    has_to_look = None in bells
    if waited_s < spin_s * (_NAP_COST if has_to_look else 1):
        os.sched_yield()
    else:
        most_s = _nap_s(waited_s) if has_to_look else LONGEST_SLEEP_S
        _sleep_until_rung((bell for bell in bells if bell is not None), min(longest_s, most_s))


def _nap_s(waited_s: float) -> float:
    return max(_SHORTEST_NAP_S, min(waited_s / 8, _LONGEST_NAP_S))


def _sleep_until_rung(bells: Iterable[Bell], timeout_s: float) -> None:
    if timeout_s < _SHORTEST_POLL_S:
        time.sleep(timeout_s)
        return
    poll, by_file = select.poll(), {bell.fileno(): bell for bell in bells}
    for file in by_file:
        poll.register(file, select.POLLIN)
    for file, _ in poll.poll(timeout_s * 1000):
        by_file[file].silence()
