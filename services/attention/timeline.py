"""Where a step's time goes: intervals taken with two clock readings each, always; spans are made of them afterwards."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from afd.handoff.frame import Crossing
from services.attention.sequence import Sequence

Drop = Literal["cancelled", "expired"]
Part = Literal["schedule", "attention", "send", "receive", "lm_head", "sample"]
PARTS: tuple[Part, ...] = ("schedule", "attention", "send", "receive", "lm_head", "sample")


class Interval(NamedTuple):
    part: Part
    layer_idx: int  # -1 where it belongs to no layer
    slot: int
    start_ns: int
    end_ns: int


class Measurement:
    """A block whose time is noted, unless it raises."""

    __slots__ = ("_intervals", "_layer_idx", "_part", "_slot", "_start_ns")

    def __init__(self, intervals: list[Interval], part: Part, layer_idx: int, slot: int) -> None:
        self._intervals = intervals
        self._part: Part = part
        self._layer_idx = layer_idx
        self._slot = slot

    def __enter__(self) -> None:
        self._start_ns = time.perf_counter_ns()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            end_ns = time.perf_counter_ns()
            self._intervals.append(Interval(self._part, self._layer_idx, self._slot, self._start_ns, end_ns))


@dataclass(frozen=True)
class StepTimeline:
    """One step on this host's clock: its intervals, and the crossings that ended in it. `receive` is waiting, or
    computing where the FFN is in-process."""

    start_ns: int
    end_ns: int
    intervals: list[Interval] = field(default_factory=list)
    crossings: list[Crossing] = field(default_factory=list)

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


class Timeline:
    """What the engine's thread does from when to when, cut into steps."""

    def __init__(self) -> None:
        self.start_ns = 0
        self._intervals: list[Interval] = []

    def measure(self, part: Part, layer_idx: int = -1, slot: int = -1) -> Measurement:
        return Measurement(self._intervals, part, layer_idx, slot)

    def begin(self) -> None:
        """A step begins; what was noted before is forgotten."""
        self._intervals = []
        self.start_ns = time.perf_counter_ns()

    def end(self, crossings: list[Crossing]) -> StepTimeline:
        """The step, with what the handoff noted meanwhile."""
        return StepTimeline(self.start_ns, time.perf_counter_ns(), self._intervals, crossings)


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
    num_context_tokens: int = 0
    num_generated: int = 0
    step_ns: int = 0
    part_ns: dict[Part, int] = field(default_factory=lambda: defaultdict(int))
    shards: dict[int, ShardCounters] = field(default_factory=lambda: defaultdict(ShardCounters))
    num_dropped: Counter[Drop] = field(default_factory=Counter)  # sequences, before their end
    num_prefill_saved: Counter[Drop] = field(default_factory=Counter)  # tokens of theirs that were not computed
    num_decode_saved: Counter[Drop] = field(default_factory=Counter)  # the same, if nothing else had ended them before

    def add_dropped(self, sequence: Sequence, why: Drop) -> None:
        self.num_dropped[why] += 1
        self.num_prefill_saved[why] += sequence.num_uncomputed - 1
        self.num_decode_saved[why] += sequence.num_undecoded

    def add_microbatch(self, num_tokens: int, num_context_tokens: int, num_generated: int) -> None:
        self.num_microbatches += 1
        self.num_tokens += num_tokens
        self.num_context_tokens += num_context_tokens
        self.num_generated += num_generated

    def add_step(self, step: StepTimeline) -> None:
        self.num_steps += 1
        self.step_ns += step.duration_ns
        for interval in step.intervals:
            self.part_ns[interval.part] += interval.end_ns - interval.start_ns
        crossings: dict[int, list[Crossing]] = {shard: [] for shard in self.shards}
        for crossing in step.crossings:
            crossings.setdefault(crossing.shard, []).append(crossing)
        for shard, own in crossings.items():
            self.shards[shard].add(own, step.duration_ns)
