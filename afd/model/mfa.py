"""Multi-matrix factorisation attention over a paged KV cache (arXiv 2507.19427, section 3).

Queries are low-rank; one key head and one value head serve all query heads.
T tokens of a microbatch, D hidden size, H query heads, d head size, S sequences, L context length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from afd.model.layers import Rotation, rms_norm


@dataclass(frozen=True)
class KVCache:
    """One key and one value vector per layer and slot; a slot is one token's place in a block."""

    keys: Tensor  # [layers, slots, d]
    values: Tensor  # [layers, slots, d]

    @classmethod
    def allocate(
        cls, num_layers: int, num_slots: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        shape = (num_layers, num_slots, head_dim)
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))


@dataclass(frozen=True)
class PrefillChunk:
    """Several new tokens of one sequence: rows [start, stop) of the microbatch, over a context that ends with them."""

    start: int
    stop: int
    context_slots: Tensor  # [L]
    mask: Tensor  # [stop - start, L] bool, True where a token may look


@dataclass(frozen=True)
class AttentionBatch:
    """What attention must know of a microbatch. Its first S rows are decoding sequences, one token each."""

    rotation: Rotation
    new_slots: Tensor  # [T] where each token's key and value go
    decode_slots: Tensor  # [S, longest L], padded with any slot
    decode_mask: Tensor  # [S, 1, longest L] bool, False on the padding
    prefill_chunks: tuple[PrefillChunk, ...]


@dataclass(frozen=True)
class MFA:
    head_dim: int
    eps: float
    qkv_proj: Tensor  # [q_dim + 2d, D]: the low-rank query, key and value projections
    inter_norm: Tensor  # [q_dim]
    wq: Tensor  # [H*d, q_dim]
    o_proj: Tensor  # [D, H*d]

    def __call__(self, h: Tensor, keys: Tensor, values: Tensor, batch: AttentionBatch) -> Tensor:
        """Attention output [T, D] of h [T, D]; writes the new keys and values into the layer's cache [slots, d]."""
        q, k, v = F.linear(h, self.qkv_proj).split((self.inter_norm.shape[0], self.head_dim, self.head_dim), dim=-1)
        q = F.linear(rms_norm(q, self.inter_norm, self.eps), self.wq)
        q = batch.rotation.rotate(q.view(h.shape[0], -1, self.head_dim))  # [T, H, d]
        keys.index_copy_(0, batch.new_slots, batch.rotation.rotate(k[:, None])[:, 0])
        values.index_copy_(0, batch.new_slots, v)
        return F.linear(_attend(q, keys, values, batch).flatten(1), self.o_proj)


def _attend(q: Tensor, keys: Tensor, values: Tensor, batch: AttentionBatch) -> Tensor:
    """Core attention [T, H, d]. All query heads share one key head, so in decode they are its query rows."""
    out = torch.empty_like(q)
    num_decoding = batch.decode_slots.shape[0]
    if num_decoding:
        out[:num_decoding] = F.scaled_dot_product_attention(
            q[:num_decoding], keys[batch.decode_slots], values[batch.decode_slots], attn_mask=batch.decode_mask
        )
    for chunk in batch.prefill_chunks:
        rows, context = slice(chunk.start, chunk.stop), chunk.context_slots
        out[rows] = F.scaled_dot_product_attention(
            q[rows].transpose(0, 1), keys[context], values[context], attn_mask=chunk.mask
        ).transpose(0, 1)
    return out
