"""Where a step's time goes: intervals taken with two clock readings each, always; spans are made of them afterwards."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from afd.handoff.frame import Crossing

Part = Literal["schedule", "attention", "send", "receive", "lm_head", "sample"]
PARTS: tuple[Part, ...] = ("schedule", "attention", "send", "receive", "lm_head", "sample")


class Interval(NamedTuple):
    part: Part
    layer_idx: int  # -1 where it belongs to no layer
    slot: int
    start_ns: int
    end_ns: int


@dataclass
class StepTimeline:
    """One step's intervals on this host's clock. `receive` is waiting, or computing where the FFN is in-process."""

    start_ns: int = field(default_factory=time.perf_counter_ns)
    end_ns: int = 0
    intervals: list[Interval] = field(default_factory=list)
    crossings: list[Crossing] = field(default_factory=list)

    @contextmanager
    def measure(self, part: Part, layer_idx: int = -1, slot: int = -1) -> Iterator[None]:
        """A block whose time is noted, unless it raises."""
        start_ns = time.perf_counter_ns()
        yield
        self.intervals.append(Interval(part, layer_idx, slot, start_ns, time.perf_counter_ns()))


@dataclass
class ShardCounters:
    """Of one FFN shard, as this side saw it; totals over all steps since the start."""

    num_crossings: int = 0
    crossing_ns: int = 0
    queue_ns: int = 0
    compute_ns: int = 0
    bubble_ns: int = 0  # of the steps' time: when it computed nothing of them

    def add(self, crossings: list[Crossing], step_ns: int) -> None:
        batches: dict[tuple[int, int], int] = {}  # frames that were computed together all tell their one batch's time
        self.num_crossings += len(crossings)
        for crossing in crossings:
            timing = crossing.timing
            self.crossing_ns += crossing.arrived_ns - crossing.sent_ns
            self.queue_ns += timing.queue_ns
            self.compute_ns += timing.compute_ns
            batches[crossing.layer_idx, timing.compute_ns] = timing.compute_ns
        self.bubble_ns += max(0, step_ns - sum(batches.values()))


@dataclass
class StepCounters:
    """Totals over all steps since the start."""

    num_steps: int = 0
    num_microbatches: int = 0
    num_tokens: int = 0
    num_generated: int = 0
    step_ns: int = 0
    part_ns: dict[Part, int] = field(default_factory=lambda: defaultdict(int))
    shards: dict[int, ShardCounters] = field(default_factory=lambda: defaultdict(ShardCounters))

    def add(self, timeline: StepTimeline, num_microbatches: int, num_tokens: int, num_generated: int) -> None:
        self.num_steps += 1
        self.num_microbatches += num_microbatches
        self.num_tokens += num_tokens
        self.num_generated += num_generated
        self.step_ns += timeline.end_ns - timeline.start_ns
        for interval in timeline.intervals:
            self.part_ns[interval.part] += interval.end_ns - interval.start_ns
        crossings: dict[int, list[Crossing]] = {shard: [] for shard in self.shards}
        for crossing in timeline.crossings:
            crossings.setdefault(crossing.shard, []).append(crossing)
        for shard, own in crossings.items():
            self.shards[shard].add(own, timeline.end_ns - timeline.start_ns)
