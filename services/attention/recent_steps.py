"""The last decode step, and the slowest one of late, as they were timed: the console draws them without a trace."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from afd.handoff.frame import Crossing
from services.attention.chunk import Chunk
from services.attention.timeline import Interval, StepTimeline

_OF_LATE_NS = 10_000_000_000


@dataclass(frozen=True)
class RecentStep:
    """A step with what was away at its end, which came back in the next one."""

    timeline: StepTimeline
    num_sequences: int
    num_tokens: int
    following: StepTimeline | None = None

    @property
    def crossings(self) -> list[Crossing]:
        return [*self.timeline.crossings, *self._away]

    @property
    def intervals(self) -> list[Interval]:
        waits: dict[tuple[int, int], Interval] = {}
        frames = {(crossing.layer_idx, crossing.slot) for crossing in self._away}
        for interval in self.following.intervals if self.following else ():
            if interval.part == "receive" and (interval.layer_idx, interval.slot) in frames:
                waits.setdefault((interval.layer_idx, interval.slot), interval)
        return [*self.timeline.intervals, *waits.values()]

    @property
    def _away(self) -> list[Crossing]:
        following = self.following.crossings if self.following else []
        return [crossing for crossing in following if crossing.sent_ns < self.timeline.end_ns]


class RecentSteps:
    """Written by the engine's thread, read by the network's."""

    def __init__(self) -> None:
        self._newest: RecentStep | None = None
        self.last: RecentStep | None = None
        self.slowest: RecentStep | None = None

    def note(self, timeline: StepTimeline, chunks: Sequence[Chunk]) -> None:
        """A step has ended, and all is known of the one before."""
        if self._newest is not None:
            self.last = _followed(self._newest, timeline)
            if self.slowest is None or _is_surpassed(self.slowest.timeline, self.last.timeline):
                self.slowest = self.last
        num_sequences = len({id(chunk.sequence) for chunk in chunks})
        self._newest = RecentStep(timeline, num_sequences, sum(chunk.num_tokens for chunk in chunks))

    def interrupt(self) -> None:
        """A step came to nothing."""
        self._newest = None

    def find(self, slowest: bool) -> RecentStep | None:
        """The step before the newest is the last one that is known whole, if there were two."""
        found = self.slowest if slowest else self.last
        return found or self._newest


def _followed(step: RecentStep, following: StepTimeline) -> RecentStep:
    return RecentStep(step.timeline, step.num_sequences, step.num_tokens, following)


def _is_surpassed(slowest: StepTimeline, by: StepTimeline) -> bool:
    is_old = time.perf_counter_ns() - slowest.end_ns > _OF_LATE_NS
    return is_old or by.duration_ns >= slowest.duration_ns
