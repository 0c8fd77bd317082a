"""A layer up to the handoff: multi-matrix factorisation attention over a paged KV cache (arXiv 2507.19427, section 3),
and the router. Here with torch's own operations; `native` has it as one call.

Queries are low-rank; one key head and one value head serve all query heads.
T tokens of a microbatch, D hidden size, H query heads, d head size, S sequences, L context length, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from afd.model.kv_cache import DecodeContext, PrefillChunk
from afd.model.layers import Rotation, rms_norm
from afd.model.linear import Linear
from afd.model.moe import Router, Routing


class RowContexts(NamedTuple):
    """Every token's context on its own: `lengths[t]` slots from `starts[t]` on."""

    slots: Tensor  # int64
    starts: Tensor  # [T] int64
    lengths: Tensor  # [T] int64


@dataclass(frozen=True, eq=False)
class AttentionBatch:
    """What attention must know of a microbatch. Its first S rows are decoding sequences, one token each."""

    rotation: Rotation
    new_slots: Tensor  # [T] where each token's key and value go
    decode: DecodeContext
    prefill_chunks: tuple[PrefillChunk, ...]

    @cached_property
    def row_contexts(self) -> RowContexts:
        decode, longest = self.decode, self.decode.slots.shape[1]
        slots, lengths = [decode.slots.flatten()], [decode.lengths]
        starts = [torch.arange(decode.num_sequences) * longest]
        num_slots = slots[0].shape[0]
        for chunk in self.prefill_chunks:
            slots.append(chunk.slots)
            lengths.append(chunk.lengths)
            starts.append(torch.full_like(chunk.lengths, num_slots))
            num_slots += len(chunk.slots)
        return RowContexts(torch.cat(slots), torch.cat(starts), torch.cat(lengths))


class AttentionLayer(Protocol):
    """A layer up to the handoff."""

    def attend(
        self,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        batch: AttentionBatch,
        out: tuple[Tensor, Routing] | None = None,
    ) -> tuple[Tensor, Tensor, Routing | None]:
        """(hidden_states after attention and residual, ffn_input, routing); both tensors are [T, D], and the routing
        is None on dense layers. ffn_input and routing may be written into `out`, if that is given, and are then its.
        Writes the new keys and values into the layer's cache [slots, d]."""


@dataclass(frozen=True)
class PlainAttentionLayer:
    """With torch's own operations."""

    eps: float
    input_norm: Tensor  # [D]
    post_attention_norm: Tensor  # [D]
    attention: MFA
    router: Router | None

    def attend(
        self,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        batch: AttentionBatch,
        out: tuple[Tensor, Routing] | None = None,
    ) -> tuple[Tensor, Tensor, Routing | None]:
        normed = rms_norm(hidden_states, self.input_norm, self.eps)
        hidden_states = hidden_states + self.attention(normed, keys, values, batch)
        ffn_input = rms_norm(hidden_states, self.post_attention_norm, self.eps)
        if out:
            ffn_input = out[0].copy_(ffn_input)
        return hidden_states, ffn_input, self.router(ffn_input) if self.router else None


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
        return self.o_proj(self._attend(heads[:, :-1], keys, values, batch).flatten(1))

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, batch: AttentionBatch) -> Tensor:
        """Core attention [T, H, d]."""
        num_decoding = batch.decode.num_sequences
        parts = [decode_attention(q[:num_decoding], keys, values, batch.decode)] if num_decoding else []
        for chunk in batch.prefill_chunks:
            parts.append(prefill_attention(q[chunk.start : chunk.stop], keys, values, chunk))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, context: DecodeContext) -> Tensor:
    """[S, H, d] of q [S, H, d]: attention of one token of each sequence to its context. All query heads share one key
    head, so they are the rows of one product per sequence."""
    slots, shape = context.slots.flatten(), (*context.slots.shape, -1)
    k, v = keys.index_select(0, slots).view(shape), values.index_select(0, slots).view(shape)  # [S, L, d]
    scores = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2))  # [S, H, L]
    return torch.bmm(scores.masked_fill_(context.is_padding, float("-inf")).softmax(dim=-1), v)


def prefill_attention(q: Tensor, keys: Tensor, values: Tensor, chunk: PrefillChunk) -> Tensor:
    """[T, H, d] of q [T, H, d]: attention of one chunk's T tokens to what is before them, and themselves."""
    k, v = keys.index_select(0, chunk.slots), values.index_select(0, chunk.slots)  # [L, d]
    heads = (1, q.shape[1], -1, -1)
    out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k.expand(heads), v.expand(heads), chunk.mask)
    return out[0].transpose(0, 1)
