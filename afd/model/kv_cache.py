"""The paged KV cache, and what attention must know of the sequences in it.

T tokens of a microbatch, d head size, S sequences, L context length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class KVCache:
    """One key and one value vector per layer and slot; a slot is one token's place in a block."""

    keys: list[Tensor]  # of each layer [slots, d]
    values: list[Tensor]  # of each layer [slots, d]

    @classmethod
    def allocate(
        cls, num_layers: int, num_slots: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        def layers() -> list[Tensor]:
            return [torch.zeros(num_slots, head_dim, dtype=dtype, device=device) for _ in range(num_layers)]

        return cls(layers(), layers())


@dataclass(frozen=True)
class DecodeContext:
    """The contexts of decoding sequences, which have one new token each."""

    slots: Tensor  # [S, longest L] int64, padded with any slot of the sequence
    lengths: Tensor  # [S] int64

    @property
    def num_sequences(self) -> int:
        return self.slots.shape[0]

    @cached_property
    def is_padding(self) -> Tensor:
        """[S, 1, longest L] bool."""
        positions = torch.arange(self.slots.shape[1], device=self.slots.device)
        return (positions >= self.lengths[:, None])[:, None]


@dataclass(frozen=True)
class PrefillChunk:
    """Several new tokens of one sequence: rows [start, stop) of the microbatch, over a context that ends with them."""

    start: int
    stop: int
    slots: Tensor  # [L] int64
    lengths: Tensor  # [stop - start] int64: how much of it each token may look at, with itself

    @cached_property
    def mask(self) -> Tensor:
        """[stop - start, L] bool, True where a token may look."""
        return torch.arange(len(self.slots), device=self.slots.device) < self.lengths[:, None]
