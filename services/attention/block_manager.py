"""Hands out KV blocks: fixed numbers of token slots, in any order."""

from __future__ import annotations

from services.attention.sequence import Sequence


class BlockManager:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks))[::-1]

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def num_needed(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Gives the sequence blocks for num_tokens in all; False, and nothing changed, where there are not enough."""
        missing = self.num_needed(num_tokens) - len(sequence.block_table)
        if missing > len(self._free):
            return False
        sequence.block_table.extend(self._free.pop() for _ in range(missing))
        return True

    def free(self, sequence: Sequence) -> None:
        self._free.extend(reversed(sequence.block_table))
        sequence.block_table.clear()
