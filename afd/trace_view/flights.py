"""When a frame reached its FFN shard, was computed and came back, on attention's clock.

Attention knows when it sent a frame, since when it looked for the answer, and when it saw it; the shard, how long the
frame was queued since the shard saw it, and computed. The rest is reckoned. A way takes half of what is left of the
step's quickest frame of that shard. If attention waited for an answer, it came when attention saw it. If it was there
when attention looked, the shard had begun as soon as it could: it computes one batch after the other, and a frame lies
in its slot meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from afd.trace_view.steps import Handoff, Phase, Step


class Flight(NamedTuple):
    handoff: Handoff
    reached_ns: int  # the shard
    begun_ns: int  # to be computed
    done_ns: int
    landed_ns: int

    @property
    def phases(self) -> Iterator[tuple[Phase, int, int]]:
        """(phase, start, end) in order, never outside the handoff."""
        yield "way", self.handoff.sent_ns, self.reached_ns
        yield "queue", self.reached_ns, self.begun_ns
        yield "compute", self.begun_ns, self.done_ns
        yield "way", self.done_ns, self.landed_ns


def flights(step: Step) -> list[Flight]:
    """One for each handoff, in the order in which they were sent to each shard."""
    looked_ns = {(each.layer_idx, each.microbatch): each.start_ns for each in step.intervals if each.part == "waiting"}
    ordered = sorted(step.handoffs, key=lambda handoff: (handoff.shard, handoff.sent_ns))
    by_shard = groupby(ordered, key=lambda handoff: handoff.shard)
    return [flight for _, handoffs in by_shard for flight in _of_shard(list(handoffs), looked_ns)]


def _of_shard(handoffs: Sequence[Handoff], looked_ns: dict[tuple[int, int], int]) -> Iterator[Flight]:
    way_ns = min(handoff.way_ns for handoff in handoffs) // 2
    last: Flight | None = None
    for handoff in handoffs:
        looked = looked_ns.get((handoff.layer_idx, handoff.microbatch), handoff.sent_ns)
        waited = handoff.arrived_ns - looked > 2 * way_ns
        last = _flight(handoff, way_ns, waited, last)
        yield last


def _flight(handoff: Handoff, way_ns: int, waited: bool, last: Flight | None) -> Flight:
    """last: the shard's flight before this one."""
    reached_ns = handoff.sent_ns + way_ns
    latest_ns = max(reached_ns, handoff.arrived_ns - way_ns - handoff.compute_ns)
    if last and _in_one_batch(handoff, last.handoff):
        begun_ns = max(reached_ns, min(last.begun_ns, latest_ns))
    elif waited:
        begun_ns = latest_ns
    else:
        begun_ns = min(max(reached_ns + handoff.queue_ns, last.done_ns if last else 0), latest_ns)
    if last is None or last.done_ns <= reached_ns:  # the shard was free: the way there took longer
        reached_ns = max(reached_ns, begun_ns - handoff.queue_ns)
    done_ns = min(handoff.arrived_ns, begun_ns + handoff.compute_ns)
    landed_ns = handoff.arrived_ns if waited else min(handoff.arrived_ns, done_ns + way_ns)
    return Flight(handoff, reached_ns, begun_ns, done_ns, landed_ns)


def _in_one_batch(one: Handoff, other: Handoff) -> bool:
    """Frames of one batch all tell the time that it took."""
    return (one.layer_idx, one.compute_ns) == (other.layer_idx, other.compute_ns)
