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
from afd.model.linear import Linear


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
    decode_bias: Tensor  # [S, 1, longest L], 0 on the context and -inf on the padding
    prefill_chunks: tuple[PrefillChunk, ...]


@dataclass(frozen=True)
class MFA:
    head_dim: int
    eps: float
    qkv_proj: Linear  # D to q_dim + 2d: the low-rank query, key and value projections
    inter_norm: Tensor  # [q_dim]
    wq: Linear  # q_dim to H*d
    o_proj: Linear  # H*d to D

    def __call__(self, h: Tensor, keys: Tensor, values: Tensor, batch: AttentionBatch) -> Tensor:
        """Attention output [T, D] of h [T, D]; writes the new keys and values into the layer's cache [slots, d]."""
        q, k, v = self.qkv_proj(h).split((self.inter_norm.shape[0], self.head_dim, self.head_dim), dim=-1)
        q = self.wq(rms_norm(q, self.inter_norm, self.eps)).view(h.shape[0], -1, self.head_dim)  # [T, H, d]
        heads = batch.rotation.rotate(torch.cat((q, k[:, None]), dim=1))  # [T, H + 1, d]
        keys.index_copy_(0, batch.new_slots, heads[:, -1])
        values.index_copy_(0, batch.new_slots, v)
        return self.o_proj(_attend(heads[:, :-1], keys, values, batch).flatten(1))


def _attend(q: Tensor, keys: Tensor, values: Tensor, batch: AttentionBatch) -> Tensor:
    """Core attention [T, H, d]."""
    num_decoding = batch.decode_slots.shape[0]
    parts = [_decode(q[:num_decoding], keys, values, batch)] if num_decoding else []
    parts += [_prefill(q[chunk.start : chunk.stop], keys, values, chunk) for chunk in batch.prefill_chunks]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _decode(q: Tensor, keys: Tensor, values: Tensor, batch: AttentionBatch) -> Tensor:
    """[S, H, d]. All query heads share one key head, so they are the rows of one product per sequence."""
    slots, context = batch.decode_slots.flatten(), (*batch.decode_slots.shape, -1)
    k, v = keys.index_select(0, slots).view(context), values.index_select(0, slots).view(context)  # [S, L, d]
    scores = torch.baddbmm(batch.decode_bias, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)  # [S, H, L]
    return torch.bmm(scores.softmax(dim=-1), v)


def _prefill(q: Tensor, keys: Tensor, values: Tensor, chunk: PrefillChunk) -> Tensor:
    """[T, H, d] of one chunk's T tokens."""
    k, v = keys.index_select(0, chunk.context_slots), values.index_select(0, chunk.context_slots)  # [L, d]
    heads = (1, q.shape[1], -1, -1)
    out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k.expand(heads), v.expand(heads), chunk.mask)
    return out[0].transpose(0, 1)
