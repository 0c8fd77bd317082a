"""Why a decode step took longer than its service level objective (SLO): which part of it took the most more than in the
steps before.

Only the waits need reckoning. While the engine waits for an answer, the frame is on its way, queued or computed, as the
FFN's times in the answer say; what they leave is the way there and back, in halves. Shared memory has no way: a
frame there that is neither queued nor computed lies before an FFN that computes another one, or stands still.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

from afd.handoff.frame import Crossing
from services.attention.timeline import Interval, Part, StepTimeline

Culprit = Literal["attention", "network", "ffn", "queue", "scheduler"]
CULPRITS: tuple[Culprit, ...] = get_args(Culprit)

_NO_SHARD = -1
_OF_PART: dict[Part, Culprit] = {"schedule": "scheduler", "send": "network"}  # any other part is attention's
_WORDS: dict[Culprit, str] = {
    "attention": "attention computed",
    "network": "frames were handed over and on their way",
    "ffn": "the FFN computed, or stood still,",
    "queue": "frames were queued at the FFN",
    "scheduler": "the engine scheduled, or was between layers,",
}

Spent = Counter[tuple[Culprit, int]]  # nanoseconds, by culprit and shard


class Explanation(NamedTuple):
    culprit: Culprit
    sentence: str


def explain(step: StepTimeline, before: Sequence[StepTimeline], transports: tuple[str, ...]) -> Explanation:
    """before: steps within the SLO, which say what is usual; transports: the name of each shard's."""
    spent = _spent(step, transports)
    took = _by_culprit(spent)
    usual = _usual([_by_culprit(_spent(earlier, transports)) for earlier in before])
    culprit = max(CULPRITS, key=lambda each: took[each] - usual[each])
    sentence = f"the step took {step.duration_ns / 1e6:.1f} ms: {_WORDS[culprit]} for {took[culprit] / 1e6:.1f} ms"
    if before:
        sentence += f", usually {usual[culprit] / 1e6:.1f} ms"
    shard = max((shard for each, shard in spent if each == culprit), key=lambda shard: spent[culprit, shard])
    if shard != _NO_SHARD:
        sentence += f"; most of it at shard {shard}"
    return Explanation(culprit, sentence)


def _by_culprit(spent: Spent) -> Counter[Culprit]:
    sums: Counter[Culprit] = Counter()
    for (culprit, _), duration_ns in spent.items():
        sums[culprit] += duration_ns
    return sums


def _usual(before: Sequence[Counter[Culprit]]) -> dict[Culprit, float]:
    return {each: statistics.median(took[each] for took in before) if before else 0.0 for each in CULPRITS}


def _spent(step: StepTimeline, transports: tuple[str, ...]) -> Spent:
    """The whole of the step's time, each nanosecond once: one thread does or awaits one thing after the other."""
    spent: Spent = Counter()
    answers: dict[tuple[int, int], list[Crossing]] = defaultdict(list)
    for crossing in step.crossings:
        answers[crossing.layer_idx, crossing.slot].append(crossing)
    for interval in step.intervals:
        if interval.part == "receive":
            spent.update(_waited(interval, answers[interval.layer_idx, interval.slot], transports))
        else:
            spent[_OF_PART.get(interval.part, "attention"), _NO_SHARD] += interval.end_ns - interval.start_ns
    spent["scheduler", _NO_SHARD] += step.duration_ns - spent.total()
    return spent


def _waited(wait: Interval, answers: list[Crossing], transports: tuple[str, ...]) -> Spent:
    """What the shard that answered last was doing; behind its answer attention adds the partial sums up."""
    spent: Spent = Counter()
    arrived = [each for each in answers if each.arrived_ns <= wait.end_ns]
    if arrived:
        last = max(arrived, key=lambda each: each.arrived_ns)
        for culprit, start_ns, end_ns in _phases(last, transports):
            spent[culprit, last.shard] += _overlap_ns(wait, start_ns, end_ns)
    spent["attention", _NO_SHARD] += wait.end_ns - wait.start_ns - spent.total()
    return spent


def _phases(crossing: Crossing, transports: tuple[str, ...]) -> Iterator[tuple[Culprit, int, int]]:
    """(culprit, start, end) up to the answer. The first one has begun before where a frame had to be sent again."""
    sent_ns, arrived_ns, timing = crossing.sent_ns, crossing.arrived_ns, crossing.timing
    way: Culprit = "ffn" if transports[crossing.shard : crossing.shard + 1] == ("shm",) else "network"
    reached_ns = sent_ns + max(0, arrived_ns - sent_ns - timing.queue_ns - timing.compute_ns) // 2
    begun_ns = reached_ns + timing.queue_ns
    done_ns = begun_ns + timing.compute_ns
    yield way, 0, reached_ns
    yield "queue", reached_ns, begun_ns
    yield "ffn", begun_ns, done_ns
    yield way, done_ns, arrived_ns


def _overlap_ns(interval: Interval, start_ns: int, end_ns: int) -> int:
    return max(0, min(interval.end_ns, end_ns) - max(interval.start_ns, start_ns))
