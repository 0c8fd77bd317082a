"""Attention replicas: what waits, is prefilled and decodes in each, and the memory for it.

A row is a replica. `turn` [rows] is the step that its unit is at, or NO_TURN.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np

from afd.planner.simulation.costs import Costs, Load
from afd.planner.simulation.router import Waiting
from afd.planner.simulation.scenario import Scenario
from afd.planner.simulation.sequences import NO_TURN, NONE, Decoding, Floats, Ints, Prefilling, Requests, joined

_PROMPTS_AHEAD = 2  # per lane, that a replica takes from the router
_ROUNDING = 1 + 1e-9


@dataclass(frozen=True)
class Settled:
    """Of a microbatch after its step: tokens of each row, who has its first one, and rows of those that are through."""

    tokens: Ints
    first_rows: Ints
    first: Requests
    finished_rows: Ints


class AttentionReplicas:
    def __init__(self, scenario: Scenario, costs: Costs, rows: int, slots: int) -> None:
        """`slots` for each microbatch; there are more when they are needed."""
        self._costs, self._rows = costs, rows
        turns, chunk = scenario.turns, scenario.prefill_chunk
        self.decoding = [Decoding(rows, slots) for _ in range(turns)]
        self.prefilling = [Prefilling(rows, scenario.groups, chunk) for _ in range(turns)] if chunk else []
        self.waiting = Waiting(rows)
        self._capacity = scenario.deployment.free_bytes(scenario.workload) * scenario.groups
        self._reserved: Floats = np.zeros(rows)
        self._most = scenario.max_sequences * scenario.groups if scenario.max_sequences else None
        self._lanes = turns * scenario.groups
        self._first: list[tuple[Ints, Requests]] = [(np.empty(0, np.int64), NONE)] * turns

    @property
    def sequences(self) -> Ints:
        """That are prefilled or decode."""
        counts = [part.count for part in self.decoding] + [part.count for part in self.prefilling]
        return reduce(np.add, counts)

    def room(self, request_bytes: float) -> Ints:
        """For so many more requests of this size."""
        waiting = self.waiting.count
        room = ((self._capacity - self._reserved) / request_bytes).astype(np.int64) - waiting
        if self._most is not None:
            room = np.minimum(room, self._most - self.sequences - waiting)
        if self.prefilling:
            room = np.minimum(room, _PROMPTS_AHEAD * self._lanes - waiting)
        return np.asarray(np.maximum(room, 0))

    def kv_use(self) -> Floats:
        """The share of each one's memory that is written."""
        count = np.maximum(self.sequences, 1)
        written = sum(part.context for part in self.decoding) + sum(part.written for part in self.prefilling)
        return count * self._costs.kv_bytes(written / count) / self._capacity

    def begin(self, j: int, rows: Ints, context: Ints, output: Ints) -> None:
        """Sequences that are under way; rows in order."""
        self.decoding[j].put(rows, np.zeros(len(rows), np.int64), context, output)
        self._reserve(rows, self.size(context, output), 1)

    def wait(self, rows: Ints, requests: Requests) -> None:
        self.waiting.put(rows, requests, self.size(requests.context, requests.output))

    def admit(self, j: int, turn: Ints, now_s: Floats) -> None:
        """Requests that have come and fit in their whole length, up to the microbatch's fair share of all sequences."""
        decoding = self.decoding[j]
        share = -(-(self.sequences + self.waiting.count) // len(self.decoding))
        most = share - decoding.count
        if self.prefilling:
            most = np.minimum(most - self.prefilling[j].count, self.prefilling[j].free)
        rows, requests, kv_bytes = self.waiting.admit(now_s, most, self._capacity * _ROUNDING - self._reserved)
        self._reserve(rows, kv_bytes, 1)
        if self.prefilling:
            self.prefilling[j].put(rows, turn[rows], requests)
        else:
            decoding.put(rows, turn[rows], requests.context, requests.output)
            self._first[j] = rows, requests

    def load(self) -> Load:
        """Of all rows, [m, rows]."""
        decoding = np.array([part.count for part in self.decoding], float)
        context = np.array([part.context for part in self.decoding], float)
        if not self.prefilling:
            return Load(decoding, context, none := np.zeros_like(context), none)
        prompt, prompt_context = np.array([part.load() for part in self.prefilling]).swapaxes(0, 1)
        return Load(decoding, context, prompt, prompt_context)

    def settle(self, j: int, turn: Ints) -> Settled:
        decoding = self.decoding[j]
        tokens = np.where(turn != NO_TURN, decoding.count, 0)
        finished, length = decoding.finish(turn)
        self._reserve(finished, self._costs.kv_bytes(length), -1)
        if not self.prefilling:
            return Settled(tokens, *self._first[j], finished)
        rows, first = self.prefilling[j].finish(turn)
        tokens = tokens + np.bincount(rows, minlength=self._rows)
        more = first.output > 1
        decoding.put(rows[more], turn[rows[more]] + 1, first.context[more] + 1, first.output[more] - 1)
        ended = first[~more]
        self._reserve(rows[~more], self.size(ended.context, ended.output), -1)
        return Settled(tokens, rows, first, np.concatenate([finished, rows[~more]]))

    def lose(self, row: int, turn: int, resumed_s: float) -> Requests:
        """All that the replica has: who has shown tokens goes on at that time, the others begin anew."""
        shown = [part.lose(row, turn) for part in self.decoding]
        context, output = (np.concatenate(part) for part in zip(*shown, strict=True))
        resumed = Requests(context, output, np.full(len(context), resumed_s), np.ones(len(context), bool))
        _, waiting, _ = self.waiting.take(self.waiting.rows == row)
        self._reserved[row] = 0.0
        return joined([resumed, *(part.lose(row) for part in self.prefilling), waiting])

    def tokens_to_come(self, turn: Ints) -> int:
        """`turn` is the next."""
        decoding = sum(part.tokens_to_come(turn) for part in self.decoding)
        return decoding + sum(part.tokens_to_come for part in self.prefilling) + int(self.waiting.requests.output.sum())

    def size(self, context: Ints, output: Ints) -> Floats:
        """Bytes on each card of a group, when all tokens are there."""
        return self._costs.kv_bytes(context + output)

    def _reserve(self, rows: Ints, kv_bytes: Floats, sign: int) -> None:
        self._reserved += sign * np.bincount(rows, kv_bytes, self._rows)
