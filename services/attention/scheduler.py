"""What runs this step: one token of every decoding sequence, and chunks of prefill beside them.

When KV blocks run out, the youngest sequence gives its own back and waits (preemption); its tokens are computed
again later. Nothing fails that can wait.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from services.attention.block_manager import BlockManager
from services.attention.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """The next num_tokens of a sequence. One token of a sequence that has all others computed is a decode."""

    sequence: Sequence
    num_tokens: int

    @property
    def ends_sequence(self) -> bool:
        """Whether a token is sampled after it."""
        return self.num_tokens == self.sequence.num_uncomputed

    @property
    def prefill_tokens(self) -> int:
        """What counts against the budget of prefill: nothing for a decode."""
        return 0 if self.sequence.num_uncomputed == 1 else self.num_tokens


class Scheduler:
    def __init__(self, blocks: BlockManager, max_sequences: int, prefill_chunk_tokens: int) -> None:
        self.blocks = blocks
        self.max_sequences = max_sequences
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence, wherever it is, and frees its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.blocks.free(sequence)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, oldest sequence first."""
        chunks: list[Chunk] = []
        budget = self.prefill_chunk_tokens
        index = 0
        while index < len(self.running):  # preemption shortens the list from its end
            sequence = self.running[index]
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
        """Preempts the youngest sequences until there are blocks; False if that came down to this one."""
        while not self.blocks.grow(sequence, sequence.num_computed + num_tokens):
            youngest = self.running.pop()
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.blocks.free(sequence)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _admit(self, sequence: Sequence) -> bool:
        """Only with blocks for all it has and its next token: a preempted sequence is not let in to be preempted."""
        needed = min(sequence.num_tokens + 1, sequence.max_context_tokens)
        return len(self.running) < self.max_sequences and self.blocks.num_needed(needed) <= self.blocks.num_free
