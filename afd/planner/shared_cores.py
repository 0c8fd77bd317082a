"""A mesh that decodes, event by event: what `Engine` and `Batcher` do with their time, without the arithmetic.

An attention replica takes its microbatches in turn, and waits for the one whose turn it is. The FFN computes frames as
they come, one at a time: frames of different replicas hardly ever meet in the same layer. What computes at the same
time shares the cores, and slows each other down, since it shares the memory.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

_FFN = -1
_UNCOUNTED = 2  # steps of each microbatch, until the mesh has found its rhythm
_COUNTED = 6
_ROUNDING_S = 1e-12


@dataclass(frozen=True)
class Work:
    """Seconds that one microbatch takes where nothing else computes. `ffn` has each layer, on one shard."""

    attention: float  # of a layer
    beside: float  # between the last layer and the next step's first: logits, sampling, scheduling
    ffn: Sequence[float]
    crossing: float  # of a layer, there and back


@dataclass(frozen=True)
class Machine:
    """What all processes share. `cores`: None where each has its own; `slowdown`: how many times as long everything
    takes while more than one process computes; `crowding`: and once more, while more of them do than there are
    cores."""

    cores: int | None = None
    slowdown: float = 1.0
    crowding: float = 1.0

    def speed(self, num_computing: int) -> float:
        """Of each, as a share of its speed alone."""
        if num_computing < 2:
            return 1.0
        if self.cores is None or num_computing <= self.cores:
            return 1 / self.slowdown
        return self.cores / num_computing / self.slowdown / self.crowding


@dataclass(frozen=True)
class Pace:
    """A step's time, and the share of it in which each side computed, and in which cores were taken."""

    step_s: float
    attention: float
    ffn: float
    cores: float


@dataclass(eq=False)
class _Microbatch:
    replica: int
    layer_idx: int = 0
    is_under_way: bool = False
    is_here: bool = True  # not at the FFN
    ends_s: list[float] = field(default_factory=list)


class Simulation:
    """Of x attention replicas, each with so many microbatches, and y FFN shards, which all do the same at once."""

    def __init__(self, work: Work, num_attention: int, num_ffn: int, microbatches: int, machine: Machine) -> None:
        self.work = work
        self.num_ffn = num_ffn
        self.machine = machine
        self.replicas = [[_Microbatch(each) for _ in range(microbatches)] for each in range(num_attention)]
        self.distance = math.ceil(len(work.ffn) / microbatches)  # layers between those of a replica
        self.now_s = 0.0
        self.computing: dict[int, float] = {}  # seconds left, by replica, or of the FFN
        self.computed_s = dict.fromkeys([_FFN, *range(num_attention)], 0.0)
        self.cores_s = 0.0
        self.turns = [0] * num_attention
        self.at_ffn: list[_Microbatch] = []
        self.on_the_way: list[tuple[float, int, _Microbatch, Callable[[_Microbatch], None]]] = []  # a heap, by arrival
        self.order = itertools.count()

    @property
    def _everyone(self) -> Iterable[_Microbatch]:
        return itertools.chain(*self.replicas)

    def run(self) -> Pace:
        for replica in range(len(self.replicas)):
            self._take_turn(replica)
        while any(len(each.ends_s) <= _UNCOUNTED + _COUNTED for each in self._everyone):
            self._advance()
        ends = [each.ends_s[_UNCOUNTED:] for each in self._everyone]
        attention_s = fmean(self.computed_s[replica] for replica in range(len(self.replicas)))
        return Pace(
            step_s=fmean((own[-1] - own[0]) / (len(own) - 1) for own in ends),
            attention=attention_s / self.now_s,
            ffn=self.computed_s[_FFN] / self.now_s,
            cores=self.cores_s / self.now_s / self.machine.cores if self.machine.cores else 0.0,
        )

    def _advance(self) -> None:
        """To the next event: a computation ends, or a microbatch arrives."""
        num_computing = sum(self.num_ffn if one == _FFN else 1 for one in self.computing)
        speed = self.machine.speed(num_computing)
        arrival_s = self.on_the_way[0][0] - self.now_s if self.on_the_way else math.inf
        elapsed_s = min(arrival_s, *(left_s / speed for left_s in self.computing.values()), math.inf)
        self.now_s += elapsed_s
        self.cores_s += elapsed_s * min(num_computing, self.machine.cores or num_computing)
        for one in self.computing:
            self.computing[one] -= elapsed_s * speed
            self.computed_s[one] += elapsed_s
        for one in [one for one, left_s in self.computing.items() if left_s <= _ROUNDING_S]:
            del self.computing[one]
            self._sent(one) if one != _FFN else self._answered()
        while self.on_the_way and self.on_the_way[0][0] <= self.now_s + _ROUNDING_S:
            _, _, batch, arrive = heapq.heappop(self.on_the_way)
            arrive(batch)

    def _take_turn(self, replica: int) -> None:
        """Begins to compute the microbatch whose turn it is, if that is here."""
        own = self.replicas[replica]
        for _ in own if replica not in self.computing else ():
            batch = own[self.turns[replica]]
            if batch.is_under_way or self._is_apart(batch):
                if batch.is_here:
                    beside = 0.0 if batch.is_under_way else self.work.beside
                    batch.is_under_way = True
                    self.computing[replica] = self.work.attention + beside
                return
            self._next_turn(replica)

    def _is_apart(self, batch: _Microbatch) -> bool:
        """Whether it would keep its distance, if it began now."""
        others = (other for other in self.replicas[batch.replica] if other.is_under_way)
        return all(other.layer_idx + (not other.is_here) >= self.distance for other in others)

    def _next_turn(self, replica: int) -> None:
        self.turns[replica] = (self.turns[replica] + 1) % len(self.replicas[replica])

    def _sent(self, replica: int) -> None:
        batch = self.replicas[replica][self.turns[replica]]
        batch.is_here = False
        self._travel(batch, self._reach_ffn)
        self._next_turn(replica)
        self._take_turn(replica)

    def _reach_ffn(self, batch: _Microbatch) -> None:
        self.at_ffn.append(batch)
        self._compute_ffn()

    def _compute_ffn(self) -> None:
        if self.at_ffn and _FFN not in self.computing:
            self.computing[_FFN] = self.work.ffn[self.at_ffn[0].layer_idx]

    def _answered(self) -> None:
        self._travel(self.at_ffn.pop(0), self._come_back)
        self._compute_ffn()

    def _come_back(self, batch: _Microbatch) -> None:
        batch.is_here = True
        batch.layer_idx += 1
        if batch.layer_idx == len(self.work.ffn):
            batch.layer_idx, batch.is_under_way = 0, False
            batch.ends_s.append(self.now_s)
        self._take_turn(batch.replica)

    def _travel(self, batch: _Microbatch, arrive: Callable[[_Microbatch], None]) -> None:
        arrival_s = self.now_s + self.work.crossing / 2
        heapq.heappush(self.on_the_way, (arrival_s, next(self.order), batch, arrive))
