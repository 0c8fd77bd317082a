"""The FFN's replicas as an attention replica sees them: which one gets a frame, and when it is late with the answer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from afd.errors import AfdError, PeerUnavailable
from afd.handoff.frame import Frame, FrameOutput
from afd.handoff.negotiate import Rung
from afd.handoff.transport import Transport

_SHORTEST_S, _UNMEASURED_S = 0.1, 1.0
_LATENESS = 3  # times what TCP would wait before it sends again
_MEAN_SHARE, _DEVIATION_SHARE, _NUM_DEVIATIONS = 1 / 8, 1 / 4, 4  # RFC 6298


@dataclass(eq=False)
class Pair:
    """One replica of a shard, and the way to it. A pair that is lost stays so; the replica may come back as another."""

    replica_id: str
    shard: int
    num_shards: int
    transport: Transport
    rung: Rung  # what the probe measured when it came up
    in_flight: set[int] = field(default_factory=set)  # frame_ids
    _late: Frame | None = None
    _is_lost: bool = False

    @property
    def is_lost(self) -> bool:
        return self._is_lost or self.transport.control.is_lost

    @property
    def has_late_answer(self) -> bool:
        return self._late is not None

    def is_suspect(self) -> bool:
        """Whether an answer is overdue, which ends with any sign of life. Called by whoever sends."""
        if self._late is not None and self._says_something_of(self._late):
            self._late = None
        return self._late is not None

    def send(self, frame: Frame) -> None:
        """Raises PeerUnavailable, once and for all."""
        try:
            self.transport.send(frame)
        except PeerUnavailable:
            self._is_lost = True
            raise
        self.in_flight.add(frame.frame_id)

    def answer(self, frame: Frame) -> FrameOutput | None:
        """As the transport's."""
        try:
            output = self.transport.answer(frame)
        except AfdError as error:
            self._is_lost |= isinstance(error, PeerUnavailable)
            self.in_flight.discard(frame.frame_id)
            raise
        if output is not None:
            self.in_flight.discard(frame.frame_id)
            self._late = None
        return output

    def give_up(self, frame: Frame) -> None:
        """The answer is overdue, and another replica's was taken. It is not told to drop the frame: what it says of it
        at last is the sign of life."""
        self.in_flight.discard(frame.frame_id)
        self._late = frame

    def drop(self, frame: Frame) -> None:
        self.in_flight.discard(frame.frame_id)
        self.transport.drop(frame)

    def _says_something_of(self, frame: Frame) -> bool:
        try:
            return self.transport.answer(frame) is not None
        except PeerUnavailable:
            self._is_lost = True
            return False
        except AfdError:
            return True


@dataclass(frozen=True)
class RoutingTable:
    """Who answers for each shard of a layout, and the pairs that stand for another one."""

    epoch: int
    shards: tuple[tuple[Pair, ...], ...]
    others: tuple[Pair, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether every shard has a replica."""
        return bool(self.shards) and all(any(not pair.is_lost for pair in pairs) for pairs in self.shards)

    @property
    def pairs(self) -> list[Pair]:
        return [pair for pairs in self.shards for pair in pairs]

    def choose(self, shard: int, turn: int, but: Collection[Pair] = ()) -> Pair | None:
        """The replica whose turn it is, of those that are not late if there are such."""
        alive = [pair for pair in self.shards[shard] if not pair.is_lost and pair not in but]
        ready = [pair for pair in alive if not pair.is_suspect()] or alive
        return ready[turn % len(ready)] if ready else None


@dataclass
class _Usual:
    mean_s: float
    deviation_s: float


class Patience:
    """How long answers take, by the size of their frames, and so how long to wait before another replica is asked:
    several times what TCP would (RFC 6298), for an answer in vain costs a whole computation."""

    def __init__(self) -> None:
        self._usual: dict[int, _Usual] = {}  # by the bits of the number of tokens

    def observe(self, num_tokens: int, seconds: float) -> None:
        usual = self._usual.get(num_tokens.bit_length())
        if usual is None:
            self._usual[num_tokens.bit_length()] = _Usual(seconds, seconds / 2)
            return
        usual.deviation_s += _DEVIATION_SHARE * (abs(seconds - usual.mean_s) - usual.deviation_s)
        usual.mean_s += _MEAN_SHARE * (seconds - usual.mean_s)

    def limit_s(self, num_tokens: int) -> float:
        """For a size that was never seen, reckoned from the next one that was."""
        if not self._usual:
            return _UNMEASURED_S
        size = num_tokens.bit_length()
        nearest = min(self._usual, key=lambda seen: (abs(seen - size), -seen))
        usual, growth = self._usual[nearest], 2.0 ** max(0, size - nearest)
        return max(_SHORTEST_S, _LATENESS * growth * (usual.mean_s + _NUM_DEVIATIONS * usual.deviation_s))
