"""When a frame reached its FFN shard, was computed and came back, on attention's clock.

Attention knows when it sent a frame and when it looked at the answer; the shard, how long the frame was queued since
the shard saw it, and computed. The rest is reckoned: a way takes half of what is left of the step's quickest frame of
that shard, and a shard computes one batch after the other. So a frame that took longer lay in its slot while the shard
computed others, or its answer lay there while attention computed; whatever else is left was the way back.
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
    looked_since = {
        (each.layer_idx, each.microbatch): each.start_ns for each in step.intervals if each.part == "waiting"
    }
    ordered = sorted(step.handoffs, key=lambda handoff: (handoff.shard, handoff.sent_ns))
    by_shard = groupby(ordered, key=lambda handoff: handoff.shard)
    return [flight for _, handoffs in by_shard for flight in _of_shard(list(handoffs), looked_since)]


def _of_shard(handoffs: Sequence[Handoff], looked_since: dict[tuple[int, int], int]) -> Iterator[Flight]:
    way_ns = min(handoff.way_ns for handoff in handoffs) // 2
    batch, begun_ns, free_ns = (-1, -1), 0, 0  # the last one: its layer and time, when it was begun, when done
    for handoff in handoffs:
        reached_ns = handoff.sent_ns + way_ns
        latest_ns = max(reached_ns, handoff.arrived_ns - way_ns - handoff.compute_ns)
        joins = batch == (handoff.layer_idx, handoff.compute_ns)  # frames of one batch all tell its time
        earliest_ns = max(reached_ns + handoff.queue_ns, begun_ns if joins else free_ns)
        batch, begun_ns = (handoff.layer_idx, handoff.compute_ns), min(earliest_ns, latest_ns)
        free_ns = min(handoff.arrived_ns, begun_ns + handoff.compute_ns)
        looked_ns = looked_since.get((handoff.layer_idx, handoff.microbatch), handoff.sent_ns)
        lies = looked_ns > free_ns + way_ns
        yield Flight(handoff, reached_ns, begun_ns, free_ns, free_ns + way_ns if lies else handoff.arrived_ns)
