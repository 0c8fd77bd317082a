"""Multi-matrix factorisation attention over a paged KV cache (arXiv 2507.19427, section 3).

Queries are low-rank; one key head and one value head serve all query heads.
T tokens of a microbatch, D hidden size, H query heads, d head size, S sequences, L context length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from afd.model.kv_cache import DecodeContext, PrefillChunk
from afd.model.layers import Rotation
from afd.model.linear import Linear
from afd.model.ops import Ops


@dataclass(frozen=True)
class AttentionBatch:
    """What attention must know of a microbatch. Its first S rows are decoding sequences, one token each."""

    rotation: Rotation
    new_slots: Tensor  # [T] where each token's key and value go
    decode: DecodeContext
    prefill_chunks: tuple[PrefillChunk, ...]


@dataclass(frozen=True)
class MFA:
    ops: Ops
    head_dim: int
    eps: float
    qkv_proj: Linear  # D to q_dim + 2d: the low-rank query, key and value projections
    inter_norm: Tensor  # [q_dim]
    wq: Linear  # q_dim to H*d
    o_proj: Linear  # H*d to D

    def __call__(self, h: Tensor, keys: Tensor, values: Tensor, batch: AttentionBatch) -> Tensor:
        """Attention output [T, D] of h [T, D]; writes the new keys and values into the layer's cache [slots, d]."""
        q, k, v = self.qkv_proj(h).split((self.inter_norm.shape[0], self.head_dim, self.head_dim), dim=-1)
        q = self.wq(self.ops.rms_norm(q, self.inter_norm, self.eps)).view(h.shape[0], -1, self.head_dim)  # [T, H, d]
        q = self.ops.rotate_and_cache(q, k, v, batch.rotation, batch.new_slots, keys, values)
        return self.o_proj(self._attend(q, keys, values, batch).flatten(1))

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, batch: AttentionBatch) -> Tensor:
        """Core attention [T, H, d]."""
        num_decoding = batch.decode.num_sequences
        parts = [self.ops.decode_attention(q[:num_decoding], keys, values, batch.decode)] if num_decoding else []
        for chunk in batch.prefill_chunks:
            parts.append(self.ops.prefill_attention(q[chunk.start : chunk.stop], keys, values, chunk))
        return parts[0] if len(parts) == 1 else torch.cat(parts)
