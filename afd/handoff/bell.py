"""Waking a thread that sleeps, in this process or in another one."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Iterable
from pathlib import Path

LONGEST_SLEEP_S = 1.0


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


def pause(waited_s: float, spin_s: float, bells: Iterable[Bell], longest_s: float = LONGEST_SLEEP_S) -> None:
    """What a thread does between two looks at what it awaits: at first it gives way to others, after spin_s it sleeps
    until a bell rings, or has rung since it last slept (docs/adr/0005)."""
    if waited_s < spin_s:
        os.sched_yield()
    else:
        _sleep_until_rung(bells, min(longest_s, LONGEST_SLEEP_S))


def _sleep_until_rung(bells: Iterable[Bell], timeout_s: float) -> None:
    poll, by_file = select.poll(), {bell.fileno(): bell for bell in bells}
    for file in by_file:
        poll.register(file, select.POLLIN)
    for file, _ in poll.poll(timeout_s * 1000):
        by_file[file].silence()
