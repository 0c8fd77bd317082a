"""The simulation: steps of all units, a little while at a time, and between them who comes, fails and is scaled.

Within a while (50 ms) units know nothing of one another, as if the router looked at them no more often. So their steps
are computed together, in arrays, and a unit that is faster has more of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from afd.planner.simulation.analytic import expected, longest_tokens, most_sequences, under_way
from afd.planner.simulation.costs import Costs, Load, Units
from afd.planner.simulation.faults import AttentionLost, FfnLost, Happening, happenings
from afd.planner.simulation.outcome import Event, Simulated, Tally
from afd.planner.simulation.pipeline import Jitter, Pipeline
from afd.planner.simulation.replicas import AttentionReplicas, Settled
from afd.planner.simulation.router import least_loaded
from afd.planner.simulation.scenario import Replay, Scaling, Scenario, Streams
from afd.planner.simulation.sequences import NO_TURN, Backlog, Floats, Ints
from afd.planner.simulation.source import Source, Within

_WHILE_S = 0.05
_AT_ONCE = 1 << 20  # sequences put in at the start, so that very many of them take little memory beside
_SLACK = 1.1

Progress = Callable[[float, int], None]  # simulated seconds, and steps of all units


def simulate(scenario: Scenario, progress: Progress = lambda seconds, steps: None) -> Simulated:
    """Raises ConfigError if there cannot be such sequences, or not so many."""
    run = Run(scenario)
    run.begin()
    while run.now_s < scenario.seconds:
        run.go_on()
        progress(run.now_s, run.tally.steps)
    return run.outcome()


class Run:
    """Units are columns. A row is an attention replica, of unit `row % units`."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.rng = rng = np.random.default_rng(scenario.seed)
        self.now_s = 0.0
        self.units, self.x = scenario.most_units, scenario.attention_replicas
        self.rows = self.units * self.x
        self.costs = Costs(scenario, self._factors(self.x), self._factors(scenario.ffn_replicas))
        self.lengths = Within(scenario.lengths, longest_tokens(scenario, self.costs))
        self.expected = expected(scenario, most_sequences(scenario, self.costs))
        self.source, self.tally = Source(scenario, self.lengths, rng), Tally(scenario)
        self.happenings = happenings(scenario, rng)
        jitter = Jitter(scenario.conditions.jitter, self.units * max(self.x, scenario.ffn_replicas), rng)
        self.pipeline = Pipeline(scenario.turns, self.x, scenario.ffn_replicas, self.units, self.costs.kinds, jitter)
        slots = _SLACK * self.expected.sequences / (scenario.units * self.x * scenario.turns)
        self.replicas = AttentionReplicas(scenario, self.costs, self.rows, int(slots) + 8)
        self.backlog = Backlog()
        self.turn: Ints = np.zeros(self.units, np.int64)
        self.request_bytes = float(self.replicas.size(*self.lengths.sample(rng, 1000)).mean())
        self.open = np.arange(self.units) < scenario.units
        self.back_s: Floats = np.zeros(self.rows)

    def _factors(self, replicas: int) -> Floats:
        conditions = self.scenario.conditions
        slow = self.rng.random((replicas, self.units)) < conditions.stragglers
        return np.where(slow, conditions.straggler_factor, 1.0)

    def begin(self) -> None:
        """With as many sequences as are expected, in the midst of their outputs."""
        if isinstance(self.scenario.arrivals, Replay):
            return
        rows, turns = np.flatnonzero(self._there()), self.scenario.turns
        for j, count in enumerate(_shares(round(self.expected.sequences), len(rows) * turns).reshape(turns, -1)):
            each = np.repeat(rows, count)
            for start in range(0, len(each), _AT_ONCE):
                part = each[start : start + _AT_ONCE]
                context, output = under_way(self.lengths, len(part), self.rng)
                self.replicas.begin(j, part, context, output)
                self._arrived(len(part), output)

    def go_on(self) -> None:
        """For a while."""
        end_s = min(self.now_s + _WHILE_S, self.scenario.seconds)
        while self.happenings and self.happenings[-1].at_s <= self.now_s:
            self._happen(self.happenings.pop())
        came = self.source.between(self.now_s, end_s)
        self._arrived(len(came), came.output)
        self.backlog.append(came)
        self._route()
        self._look()
        while len(units := self._behind(end_s)):
            self._step(units)
        self.now_s = end_s

    def outcome(self) -> Simulated:
        to_come = self.replicas.tokens_to_come(np.tile(self.turn, self.x)) + self.backlog.tokens_to_come
        return self.tally.outcome(self.expected, to_come)

    def _arrived(self, count: int, output: Ints) -> None:
        self.tally.counts.requests_arrived += count
        self.tally.counts.tokens_arrived += int(output.sum())

    # Steps

    def _behind(self, end_s: float) -> Units:
        """Units with something to do before the end; the others pass the time until then, or until a request comes."""
        ready = self.pipeline.ready
        next_s = np.minimum(self.replicas.waiting.next_s(self.units), end_s)
        idle = ~self._occupied() & (ready[0] < next_s)
        ready[:, idle] = next_s[idle]
        return np.flatnonzero(ready[0] < end_s)

    def _step(self, units: Units) -> None:
        """Of all their microbatches."""
        ready, replicas = self.pipeline.ready, self.replicas
        turn = np.full(self.units, NO_TURN)
        turn[units] = self.turn[units]
        turn = np.tile(turn, self.x)
        here = turn != NO_TURN
        before = ready.copy()
        decoding = []
        for j in range(len(ready)):
            decoding.append(np.where(here, replicas.decoding[j].count, 0))
            replicas.admit(j, turn, np.where(here, np.tile(ready[j], self.x), -np.inf))
        times, busy = self.costs.of(self._load(units), units)
        self.pipeline.step(units, times)
        self.tally.step(before[-1, units], ready[-1, units], busy)
        for j, continued in enumerate(decoding):
            self._settle(replicas.settle(j, turn), continued, before[j], ready[j])
        self.turn[units] += 1

    def _load(self, units: Units) -> Load:
        load = self.replicas.load()
        shape = (self.scenario.turns, self.x, self.units)
        return Load(*(part.reshape(shape)[:, :, units] for part in vars(load).values()))

    def _settle(self, settled: Settled, continued: Ints, before: Floats, after: Floats) -> None:
        """Of a microbatch, whose steps went from `before` to `after` [units]; `continued` [rows] had tokens before."""
        tally, by_unit = self.tally, settled.tokens.reshape(self.x, -1).sum(axis=0)
        tally.tokens.add(after, by_unit)
        tally.tpot.add(after - before, continued.reshape(self.x, -1).sum(axis=0).astype(float))
        took = after[settled.first_rows % self.units] - settled.first.arrived_s
        resumed = settled.first.resumed
        tally.ttft.add(took[~resumed])
        tally.tpot.add(took[resumed] + self.scenario.conditions.failover_s)
        self._finished(settled.finished_rows, after)

    def _finished(self, rows: Ints, after: Floats) -> None:
        """Each stream begins anew: with the same replica, unless that has more than its share."""
        self.tally.counts.requests_finished += len(rows)
        if not isinstance(streams := self.scenario.arrivals, Streams):
            return
        new = self.source.at(after[rows % self.units])
        self._arrived(len(new), new.output)
        there = self._there()
        share = np.where(there, -(-streams.count // max(1, int(there.sum()))), 0)
        stays = (self.replicas.sequences + self.replicas.waiting.count < share)[rows]
        self.replicas.wait(rows[stays], new[stays])
        self.backlog.append(new[~stays])

    # Between steps

    def _there(self) -> NDArray[np.bool_]:
        """Rows that the router sends to."""
        return np.tile(self.open, self.x) & (self.back_s <= self.now_s)

    def _occupied(self) -> NDArray[np.bool_]:
        """Units that have sequences."""
        return np.asarray(self.replicas.sequences.reshape(self.x, -1).any(axis=0))

    def _route(self) -> None:
        """From the backlog to those who have least to do, as far as there is room."""
        if not len(self.backlog):
            return
        load = self.replicas.sequences + self.replicas.waiting.count
        room = np.where(self._there(), self.replicas.room(self.request_bytes), 0)
        rows = least_loaded(load, room, min(len(self.backlog), int(room.sum())), self.rng)
        self.replicas.wait(rows, self.backlog.take(len(rows)))

    def _look(self) -> None:
        tally, at_s = self.tally, self.now_s
        on = self.open | self._occupied()
        tally.units.add(at_s, np.count_nonzero(on))
        tally.sequences.add(at_s, float(self.replicas.sequences.sum()))
        tally.waiting.add(at_s, self.replicas.waiting.come(at_s) + len(self.backlog))
        tally.kv_use.add(at_s, self.replicas.kv_use()[np.tile(on, self.x)])

    def _happen(self, happening: Happening) -> None:
        match happening:
            case Scaling(at_s, units):
                self.open = np.arange(self.units) < units
                self.tally.events.append(Event(at_s, f"{units} replicas"))
            case AttentionLost(at_s, unit, replica):
                self._lose_attention(at_s, unit, replica * self.units + unit)
            case FfnLost(at_s, unit, replica):
                self._lose_ffn(at_s, unit, replica)

    def _lose_attention(self, at_s: float, unit: int, row: int) -> None:
        conditions, counts = self.scenario.conditions, self.tally.counts
        if self.back_s[row] > at_s or not (self.open | self._occupied())[unit]:
            return
        lost = self.replicas.lose(row, int(self.turn[unit]), at_s + conditions.failover_s)
        self.backlog.put_first(lost)
        self.back_s[row] = at_s + conditions.repair_s
        counts.attention_failures += 1
        counts.sequences_resumed += int(lost.resumed.sum())
        counts.tokens_prefilled_again += int(lost.context[lost.resumed].sum())
        self.tally.events.append(Event(at_s, "attention lost"))

    def _lose_ffn(self, at_s: float, unit: int, replica: int) -> None:
        if not (self.open | self._occupied())[unit]:
            return
        free = self.pipeline.ffn[replica]
        free[unit] = max(free[unit], at_s) + self.scenario.conditions.failover_s
        self.tally.counts.ffn_failures += 1
        self.tally.events.append(Event(at_s, "FFN lost"))


def _shares(count: int, parts: int) -> Ints:
    """As equal as can be."""
    return count // parts + (np.arange(parts) < count % parts)
