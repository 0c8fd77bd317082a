"""What the next microbatch computes: one token of each decoding sequence, and chunks of prefill beside them, of
sequences that no other microbatch is computing.

When KV blocks run out, the youngest sequence gives its own back and waits (preemption); its tokens are computed
again later. Nothing fails that can wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from services.attention.block_manager import BlockManager
from services.attention.chunk import Chunk, fair_share
from services.attention.sequence import Sequence


class Scheduler:
    def __init__(
        self, blocks: BlockManager, max_sequences: int, prefill_chunk_tokens: int, cost: Callable[[Chunk], float]
    ) -> None:
        self.blocks = blocks
        self.max_sequences = max_sequences
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self.cost = cost
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0
        self.in_flight: dict[int, list[Chunk]] = {}  # by slot: what its microbatch computes
        self._leaving: set[Sequence] = set()  # removed while in flight

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence, wherever it is, and frees its blocks: once nothing is written to them any more."""
        if sequence.in_flight:
            self._leaving.add(sequence)
            return
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.blocks.free(sequence)

    def schedule(self, slot: int, num_microbatches: int) -> list[Chunk]:
        """The chunks of this slot's next microbatch, oldest sequence first: its fair share of all that is not in
        flight, if there are to be so many. They are in flight until they land."""
        costs = [sum(map(self.cost, others)) for others in self.in_flight.values()]
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
        """What could be computed now, oldest sequence first, with blocks for it."""
        chunks: list[Chunk] = []
        budget = self.prefill_chunk_tokens - sum(
            chunk.prefill_tokens for own in self.in_flight.values() for chunk in own
        )
        index = 0
        while index < len(self.running):  # preemption shortens the list behind what is ready
            sequence = self.running[index]
            if not sequence.in_flight:
                chunk = self._chunk(sequence, budget)
                if chunk.num_tokens and self._make_room(sequence, chunk.num_tokens):
                    chunks.append(chunk)
                    budget -= chunk.prefill_tokens
            index += 1
        while self.waiting and budget > 0 and self._admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            chunk = self._chunk(sequence, budget)
            self.blocks.grow(sequence, chunk.num_tokens)
            chunks.append(chunk)
            budget -= chunk.prefill_tokens
        return chunks

    def _chunk(self, sequence: Sequence, budget: int) -> Chunk:
        num_uncomputed = sequence.num_uncomputed
        return Chunk(sequence, 1 if num_uncomputed == 1 else min(num_uncomputed, budget))

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Preempts the youngest sequences that are not in flight until there are blocks. False if that came down to
        this one: it is preempted too, or waits where others in flight may soon give theirs."""
        while not self.blocks.grow(sequence, sequence.num_computed + num_tokens):
            youngest = next(other for other in reversed(self.running) if not other.in_flight)
            if youngest is not sequence or not self.in_flight:
                self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.free(sequence)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _admit(self, sequence: Sequence) -> bool:
        """Only with blocks for all it has and its next token: a preempted sequence is not let in to be preempted."""
        needed = min(sequence.num_tokens + 1, sequence.max_context_tokens)
        return len(self.running) < self.max_sequences and self.blocks.num_needed(needed) <= self.blocks.num_free
