"""Fan-out to the shards of the FFN (M2N dispatch) and combination of their partial sums.

A frame whose replica is lost or late goes to another one of its shard: the FFN keeps nothing, so any of them gives the
same answer.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from afd.errors import Cancelled, PeerUnavailable, StaleEpoch
from afd.handoff.bell import Lookout
from afd.handoff.frame import Crossing, Frame, FrameOutput, InFlight
from afd.handoff.replicas import Pair, Patience, RoutingTable
from afd.handoff.slots import FrameSlots
from afd.model.moe import Routing

_NO_TABLE = RoutingTable(0, ())
_NEW_TABLE_TIMEOUT_S, _NEW_TABLE_POLL_S = 5.0, 2e-3
_HEDGES_PER_ANSWER, _MOST_HEDGES = 0.05, 10.0  # asking twice is not to make overload worse
_MOST_LOOKOUTS = 64


@dataclass
class _Asked:
    """A frame at one of the shards: whom it was sent to, and the answer."""

    shard: int
    pairs: list[Pair]
    output: FrameOutput | None = None


@dataclass
class _Flight:
    """A frame under way, to all shards."""

    frame: Frame
    sent_ns: int
    asked: list[_Asked] = field(default_factory=list)

    @property
    def waited_s(self) -> float:
        return (time.perf_counter_ns() - self.sent_ns) / 1e9


class RemoteFFN:
    """Sends every frame to a replica of every shard and adds up what comes back. Used by the engine's thread; `table`
    and `rank` are replaced by another one at any time, and count for the frames that follow."""

    def __init__(
        self,
        frames: FrameSlots,
        device: torch.device,
        timeout_s: float,
        spin_s: float,
        traceparent: Callable[[], str] = lambda: "",
    ) -> None:
        self.frames = frames
        self.device = device
        self.timeout_s = timeout_s
        self.spin_s = spin_s
        self.traceparent = traceparent
        self.table = _NO_TABLE
        self.rank = 0  # of this attention replica, so that not all begin with the same replica of a shard
        self.num_resent: Counter[tuple[int, str]] = Counter()  # frames, by shard and reason
        self._flights: dict[int, _Flight] = {}  # by slot
        self._patience: dict[int, Patience] = {}  # by shard
        self._num_hedges = _MOST_HEDGES
        self._frame_ids = itertools.count(1)
        self._crossings: list[Crossing] = []
        self._lookouts: dict[tuple[Pair, ...], Lookout] = {}

    @property
    def transport_names(self) -> tuple[str, ...]:
        return tuple(pairs[0].transport.name if pairs else "none" for pairs in self.table.shards)

    @property
    def is_whole(self) -> bool:
        return self.table.is_whole

    @property
    def epoch(self) -> int:
        return self.table.epoch

    def buffer(self, batch: InFlight) -> tuple[Tensor, Routing] | None:
        return self.frames.buffer(batch.slot, batch.num_tokens) if self.device.type == "cpu" else None

    def send(self, batch: InFlight, layer_idx: int, ffn_input: Tensor, routing: Routing | None) -> None:
        self._send(Frame(0, batch.slot, layer_idx, ffn_input, routing, self.traceparent(), urgency=batch.urgency))

    def receive(self, batch: InFlight) -> Tensor:
        flight = self._flights[batch.slot]
        while True:
            try:
                self._await(flight, batch)
                break
            except StaleEpoch as error:
                flight = self._send_by_new_table(flight, error)
        del self._flights[batch.slot]
        return self._combine(flight)

    def drop(self, batch: InFlight) -> None:
        flight = self._flights.pop(batch.slot, None)
        if flight is not None:
            for asked in flight.asked:
                self._drop(flight.frame, asked.pairs)

    def take_crossings(self) -> list[Crossing]:
        taken, self._crossings = self._crossings, []
        return taken

    def close(self) -> None:
        for pair in self.table.pairs:
            pair.transport.close()

    def _send(self, frame: Frame) -> _Flight:
        table = self.table
        frame = frame._replace(frame_id=next(self._frame_ids), epoch=table.epoch)
        flight = self._flights[frame.slot] = _Flight(frame, time.perf_counter_ns())
        self.frames.write(frame)
        if not table.shards:
            raise PeerUnavailable("the shards of the FFN are not known")
        for shard in range(len(table.shards)):
            flight.asked.append(_Asked(shard, [self._ask(table, frame, shard)]))
        return flight

    def _ask(self, table: RoutingTable, frame: Frame, shard: int, but: Sequence[Pair] = ()) -> Pair:
        """Sends a frame to a replica of a shard, the next one if that is lost. Raises PeerUnavailable if there is
        none."""
        while pair := table.choose(shard, self.rank + frame.slot, but):
            try:
                pair.send(frame)
            except PeerUnavailable:
                continue
            return pair
        raise PeerUnavailable(f"FFN shard {shard}/{len(table.shards)} has no replica")

    def _await(self, flight: _Flight, batch: InFlight) -> None:
        """Until all shards have answered."""
        started = time.monotonic()
        while waiting := [asked for asked in flight.asked if not self._look(flight, asked)]:
            if batch.abandoned:
                raise Cancelled("nobody waits for the FFN's answer any more")
            limit_s = min(self._hurry(flight, asked) for asked in waiting)
            waited_s = flight.waited_s
            if waited_s > self.timeout_s:
                address = waiting[0].pairs[-1].transport.control.address
                raise PeerUnavailable(f"the FFN at {address} does not answer in time")
            self._lookout(waiting).pause(time.monotonic() - started, min(limit_s, self.timeout_s) - waited_s)

    def _look(self, flight: _Flight, asked: _Asked) -> bool:
        """Whether the answer is there. Whoever is lost is replaced."""
        if asked.output is not None:
            return True
        frame = flight.frame
        for pair in asked.pairs:
            try:
                output = pair.answer(frame)
            except PeerUnavailable:
                self._replace(frame, asked, pair)
                return False
            if output is not None:
                self._take(flight, asked, pair, output)
                return True
        return False

    def _take(self, flight: _Flight, asked: _Asked, pair: Pair, output: FrameOutput) -> None:
        asked.output = output
        if len(asked.pairs) == 1:
            self._patience_of(asked.shard).observe(flight.frame.num_tokens, (output.arrived_ns - flight.sent_ns) / 1e9)
            self._num_hedges = min(_MOST_HEDGES, self._num_hedges + _HEDGES_PER_ANSWER)
        else:
            place = asked.pairs.index(pair)
            for earlier in asked.pairs[:place]:
                earlier.give_up(flight.frame)
            self._drop(flight.frame, asked.pairs[place + 1 :])
        asked.pairs = []

    def _replace(self, frame: Frame, asked: _Asked, lost: Pair) -> None:
        asked.pairs.remove(lost)
        if not asked.pairs:
            asked.pairs.append(self._ask(self._table_of(frame), frame, asked.shard))
            self.num_resent[asked.shard, "lost"] += 1

    def _table_of(self, frame: Frame) -> RoutingTable:
        """As it is by now. Raises StaleEpoch if the shards were laid out anew since the frame was sent."""
        table = self.table
        if table.epoch != frame.epoch:
            raise StaleEpoch(f"the shards were laid out anew, in epoch {table.epoch}")
        return table

    def _hurry(self, flight: _Flight, asked: _Asked) -> float:
        """Asks one more replica if those asked are late. Returns after how many seconds they will be."""
        frame = flight.frame
        limit_s = self._patience_of(asked.shard).limit_s(frame.num_tokens) * len(asked.pairs)
        if flight.waited_s < limit_s:
            return limit_s
        table = self.table
        if self._num_hedges >= 1 and table.epoch == frame.epoch and table.choose(asked.shard, 0, asked.pairs):
            asked.pairs.append(self._ask(table, frame, asked.shard, asked.pairs))
            self._num_hedges -= 1
            self.num_resent[asked.shard, "late"] += 1
        return flight.waited_s + limit_s

    def _send_by_new_table(self, flight: _Flight, error: StaleEpoch) -> _Flight:
        for asked in flight.asked:
            self._drop(flight.frame, asked.pairs)
            asked.pairs = []
        deadline = time.monotonic() + _NEW_TABLE_TIMEOUT_S
        while self.table.epoch == flight.frame.epoch:
            if time.monotonic() > deadline:
                raise PeerUnavailable(str(error))
            time.sleep(_NEW_TABLE_POLL_S)
        self.num_resent[0, "stale"] += 1
        return self._send(flight.frame)

    def _combine(self, flight: _Flight) -> Tensor:
        """In the order of the shards, so that the sum is the same whoever answers first."""
        frame = flight.frame
        total: Tensor | None = None
        for asked in flight.asked:
            output = asked.output
            assert output is not None
            part = output.ffn_output.to(self.device, non_blocking=True)
            total = part if total is None else total + part
            self._crossings.append(
                Crossing(asked.shard, frame.layer_idx, frame.slot, flight.sent_ns, output.arrived_ns, output.timing)
            )
        assert total is not None
        return total

    def _patience_of(self, shard: int) -> Patience:
        return self._patience.setdefault(shard, Patience())

    def _lookout(self, waiting: list[_Asked]) -> Lookout:
        pairs = tuple(pair for asked in waiting for pair in asked.pairs)
        lookout = self._lookouts.get(pairs)
        if lookout is None:
            if len(self._lookouts) > _MOST_LOOKOUTS:
                self._lookouts.clear()
            bells = [bell for pair in pairs for bell in pair.transport.bells]
            lookout = self._lookouts[pairs] = Lookout(self.spin_s, bells)
        return lookout

    @staticmethod
    def _drop(frame: Frame, pairs: Sequence[Pair]) -> None:
        for pair in pairs:
            if not pair.is_lost:
                pair.drop(frame)
