"""The part of a step's batch that crosses the layers on its own: its sequences as tensors."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import torch
from torch import Tensor

from afd.model.kv_cache import DecodeContext, PrefillChunk
from afd.model.layers import Rotation
from afd.model.mfa import AttentionBatch
from afd.urgency import Urgency
from services.attention.chunk import Chunk
from services.attention.sequence import Sequence


@dataclass(eq=False)
class Microbatch:
    """Rows are tokens: first those of decoding sequences, one each, then the prefill chunks."""

    slot: int
    chunks: list[Chunk]
    token_ids: Tensor  # [T]
    attention: AttentionBatch
    sampled: list[Sequence]  # sequences that get a token from this step
    sampled_rows: Tensor  # the row of each one's last token
    urgency: Urgency
    hidden_states: Tensor = field(default_factory=lambda: torch.empty(0))  # [T, D]

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def abandoned(self) -> bool:
        return all(chunk.sequence.is_unwanted for chunk in self.chunks)


@dataclass(frozen=True)
class MicrobatchBuilder:
    block_size: int
    head_dim: int
    rope_theta: float
    dtype: torch.dtype
    device: torch.device

    def build(self, slot: int, chunks: Items[Chunk]) -> Microbatch:
        ordered = sorted(chunks, key=lambda chunk: chunk.num_tokens > 1)
        num_decoding = sum(chunk.num_tokens == 1 for chunk in ordered)
        token_ids: list[int] = []
        positions: list[int] = []
        new_slots: list[int] = []
        prefill_chunks: list[PrefillChunk] = []
        sampled: list[Sequence] = []
        sampled_rows: list[int] = []
        for chunk in ordered:
            sequence, row = chunk.sequence, len(token_ids)
            start, stop = sequence.num_computed, sequence.num_computed + chunk.num_tokens
            token_ids += sequence.token_ids(start, stop)
            positions += range(start, stop)
            new_slots += self._slots(sequence.block_table, start, stop)
            if chunk.num_tokens > 1:
                prefill_chunks.append(self._prefill_chunk(sequence, row, start, stop))
            if chunk.ends_sequence:
                sampled.append(sequence)
                sampled_rows.append(len(token_ids) - 1)
        return Microbatch(
            slot=slot,
            chunks=ordered,
            token_ids=self._tensor(token_ids),
            attention=AttentionBatch(
                rotation=Rotation.at(self._tensor(positions), self.head_dim, self.rope_theta),
                new_slots=self._tensor(new_slots),
                decode=self._decode_context([chunk.sequence for chunk in ordered[:num_decoding]]),
                prefill_chunks=tuple(prefill_chunks),
            ),
            sampled=sampled,
            sampled_rows=self._tensor(sampled_rows),
            urgency=Urgency.of_all(chunk.sequence.urgency for chunk in ordered),
        )

    def _slots(self, block_table: list[int], start: int, stop: int) -> list[int]:
        size = self.block_size
        return [block_table[position // size] * size + position % size for position in range(start, stop)]

    def _decode_context(self, sequences: list[Sequence]) -> DecodeContext:
        """Slots of each sequence's whole context. The padding is a sequence's own last slot: nothing of another one's,
        not even a NaN, can reach it."""
        lengths = self._tensor([sequence.num_computed + 1 for sequence in sequences])
        longest = max((sequence.num_computed + 1 for sequence in sequences), default=0)
        num_blocks = -(-longest // self.block_size)
        tables = [(sequence.block_table + [0] * num_blocks)[:num_blocks] for sequence in sequences]
        firsts = self._tensor(tables).view(len(sequences), num_blocks, 1) * self.block_size
        slots = (firsts + torch.arange(self.block_size, device=self.device)).flatten(1)[:, :longest]
        is_context = torch.arange(longest, device=self.device) < lengths[:, None]
        return DecodeContext(slots.where(is_context, slots.gather(1, lengths[:, None] - 1)), lengths)

    def _prefill_chunk(self, sequence: Sequence, row: int, start: int, stop: int) -> PrefillChunk:
        return PrefillChunk(
            start=row,
            stop=row + stop - start,
            slots=self._tensor(self._slots(sequence.block_table, 0, stop)),
            lengths=torch.arange(start + 1, stop + 1, device=self.device),
        )

    def _tensor(self, values: Items[int] | Items[Items[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)
