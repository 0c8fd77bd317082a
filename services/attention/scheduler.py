"""What the next microbatch computes: one token of each decoding sequence, and chunks of prefill beside them, of
sequences that no other microbatch is computing.

Sequences take turns by priority, then as they came. When KV blocks run out, the last one gives its own back and waits
(preemption), and so it does when a more urgent one finds no room; its tokens are computed again later. Nothing fails
that can wait.
"""

from __future__ import annotations

import itertools
import time
from bisect import insort
from collections.abc import Collection

from services.attention.block_manager import BlockManager
from services.attention.chunk import Chunk, ChunkCost, fair_share
from services.attention.sequence import Sequence


class Scheduler:
    def __init__(self, blocks: BlockManager, max_sequences: int, prefill_chunk_tokens: int, cost: ChunkCost) -> None:
        self.blocks = blocks
        self.max_sequences = max_sequences
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self.cost = cost
        self.waiting: list[Sequence] = []  # in turn
        self.running: list[Sequence] = []  # in turn
        self.num_preemptions = 0
        self.num_admitted = 0  # again after each preemption
        self.waited_s = 0.0  # all of those together, until they were admitted
        self.in_flight: dict[int, list[Chunk]] = {}  # by slot: what its microbatch computes
        self._leaving: set[Sequence] = set()  # removed while in flight
        self._arrivals = itertools.count()

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        sequence.turn = sequence.urgency.priority, next(self._arrivals)
        self._put_off(sequence)

    def remove(self, sequence: Sequence) -> bool:
        """Forgets a sequence, wherever it is, and frees its blocks: once nothing is written to them any more. Whether
        it was there."""
        if sequence.in_flight:
            is_new = sequence not in self._leaving
            self._leaving.add(sequence)
            return is_new
        for place in (self.running, self.waiting):
            if sequence in place:
                place.remove(sequence)
                self.blocks.free(sequence)
                return True
        return False

    def schedule(self, slot: int, num_microbatches: int) -> list[Chunk]:
        """The chunks of this slot's next microbatch, in turn: its fair share of all that is not in flight, if there
        are to be so many. They are in flight until they land.

        What is left for others is for when they begin again, with a token more each. Against what they cost now the one
        that begins would be the dearer by that token whenever they are equal, and leave the same ones each time.
        """
        costs = [sum(self.cost(chunk, num_later=1) for chunk in others) for others in self.in_flight.values()]
        costs += [0.0] * (num_microbatches - 1 - len(costs))
        chunks = fair_share(self._ready(), costs, self.cost) if slot < num_microbatches else []
        for chunk in chunks:
            chunk.sequence.in_flight = True
        if chunks:
            self.in_flight[slot] = chunks
        return chunks

    def land(self, slot: int, computed: bool) -> None:
        """Ends this slot's microbatch: all of its chunks are computed, or nothing of them is kept."""
        for chunk in self.in_flight.pop(slot):
            sequence = chunk.sequence
            sequence.in_flight = False
            if computed:
                sequence.num_computed += chunk.num_tokens
            if sequence in self._leaving:
                self._leaving.remove(sequence)
                self.remove(sequence)

    def _ready(self) -> list[Chunk]:
        """What could be computed now, in turn, with blocks for it."""
        chunks: list[Chunk] = []
        budget = self.prefill_chunk_tokens - sum(
            chunk.prefill_tokens for own in self.in_flight.values() for chunk in own
        )
        if budget > 0:
            self._make_way()
        index, admitting = 0, True
        while True:
            if admitting and self._is_turn_of_waiting(index):
                admitting = budget > 0 and self._has_room(self.waiting[0])
                if admitting:
                    self._admit(index)
            if index == len(self.running):
                return chunks
            sequence = self.running[index]
            if not sequence.in_flight:
                chunk = self._chunk(sequence, budget)
                if chunk.num_tokens and self._make_room(sequence, chunk.num_tokens):
                    chunks.append(chunk)
                    budget -= chunk.prefill_tokens
            index = min(index + 1, len(self.running))  # preemption shortens the list behind what is ready

    def _put_off(self, sequence: Sequence) -> None:
        """It waits from now on."""
        sequence.waits_since = time.monotonic()
        insort(self.waiting, sequence, key=_turn)

    def _admit(self, index: int) -> None:
        """The first that waits is decoded from now on, in turn before the one that is there."""
        sequence = self.waiting.pop(0)
        self.running.insert(index, sequence)
        self.num_admitted += 1
        self.waited_s += time.monotonic() - sequence.waits_since

    def _is_turn_of_waiting(self, index: int) -> bool:
        """Whether the first that waits comes before the running one there."""
        return bool(self.waiting) and (index == len(self.running) or self.waiting[0].turn < self.running[index].turn)

    def _chunk(self, sequence: Sequence, budget: int) -> Chunk:
        num_uncomputed = sequence.num_uncomputed
        return Chunk(sequence, 1 if num_uncomputed == 1 else min(num_uncomputed, budget))

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Preempts the last sequences that are not in flight until there are blocks. False if that came down to this
        one: it is preempted too, or waits where others in flight may soon give theirs."""
        while not self.blocks.grow(sequence, sequence.num_computed + num_tokens):
            last = next(other for other in reversed(self.running) if not other.in_flight)
            if last is not sequence or not self.in_flight:
                self._preempt(last)
            if last is sequence:
                return False
        return True

    def _make_way(self) -> None:
        """Preempts less urgent sequences for the one that is to be admitted next, if that helps."""
        if not self.waiting:
            return
        first = self.waiting[0]
        others = [other for other in self.running if not other.in_flight and other.turn[0] > first.turn[0]]
        if self._has_room(first, others):
            while not self._has_room(first):
                self._preempt(others.pop())

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.free(sequence)
        sequence.num_computed = 0
        self._put_off(sequence)
        self.num_preemptions += 1

    def _has_room(self, sequence: Sequence, without: Collection[Sequence] = ()) -> bool:
        """For all it has and its next token: a preempted sequence is not let in to be preempted."""
        needed = self.blocks.num_needed(min(sequence.num_tokens + 1, sequence.max_context_tokens))
        num_free = self.blocks.num_free + sum(len(other.block_table) for other in without)
        return len(self.running) - len(without) < self.max_sequences and needed <= num_free


def _turn(sequence: Sequence) -> tuple[int, int]:
    return sequence.turn
