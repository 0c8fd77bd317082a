"""Waking a thread that sleeps, in this process or in another one."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Collection

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
    def given(cls, reading: int, writing: int) -> Bell:
        """Another process's, whose files were handed over; they stay the caller's."""
        return cls(os.dup(reading), os.dup(writing))

    @property
    def files(self) -> tuple[int, int]:
        """To hand over. Whoever has both is not disturbed when the other side ends."""
        return self._reading, self._writing

    def fileno(self) -> int:
        return self._reading

    def ring(self) -> None:
        try:
            os.write(self._writing, b"!")
        except BlockingIOError:
            return  # full of rings that nobody has heard yet: one more says nothing

    def silence(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._reading, 65536)

    def __del__(self) -> None:
        os.close(self._reading)
        os.close(self._writing)


class Lookout:
    """What a thread does between two looks at what it awaits: at first it gives way to others, after spin_s it sleeps
    until a bell rings, or has rung since it last slept (docs/adr/0005). A bell that is None stands for something that
    nobody rings for: then it looks out for longer and only naps, for a share of what it has waited (docs/adr/0006)."""

    def __init__(self, spin_s: float, bells: Collection[Bell | None]) -> None:
        self._by_file = {bell.fileno(): bell for bell in bells if bell is not None}
        self._has_to_look = None in bells
        self._spin_s = spin_s * (_NAP_COST if self._has_to_look else 1)
        self._poll = select.poll()
        for file in self._by_file:
            self._poll.register(file, select.POLLIN)

    def pause(self, waited_s: float, longest_s: float = LONGEST_SLEEP_S) -> None:
        if waited_s < self._spin_s:
            os.sched_yield()
        else:
            self._sleep(min(longest_s, _nap_s(waited_s) if self._has_to_look else LONGEST_SLEEP_S))

    def _sleep(self, timeout_s: float) -> None:
        if timeout_s < _SHORTEST_POLL_S:
            time.sleep(timeout_s)
            return
        for file, _ in self._poll.poll(timeout_s * 1000):
            self._by_file[file].silence()


def _nap_s(waited_s: float) -> float:
    return max(_SHORTEST_NAP_S, min(waited_s / 8, _LONGEST_NAP_S))
