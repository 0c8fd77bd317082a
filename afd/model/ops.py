"""What a layer is computed with: torch's own operations here, compiled ones for the CPU in `native`.

T tokens, D hidden size, H query heads, d head size, S sequences, L context length, E experts, I width of an FFN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from afd.model.ffn import DenseFFN, FFNLayer, MoEFFN
from afd.model.kv_cache import DecodeContext, PrefillChunk
from afd.model.layers import Rotation, SwiGLU, rms_norm
from afd.model.linear import Linear, make_linear
from afd.model.moe import Experts


@dataclass(frozen=True)
class FFNWeights:
    """Of a dense or shared FFN; or of a layer's experts, and then all have E before their other dimensions."""

    gate: Tensor  # [I, D]
    up: Tensor  # [I, D]
    down: Tensor  # [D, I]


class Ops(Protocol):
    """Weights are handed over once, and come back as something that computes with them."""

    def linear(self, weight: Tensor) -> Linear:
        """x @ weight.T, of a weight [out, in]."""

    def dense_ffn(self, weights: FFNWeights) -> FFNLayer: ...

    def moe_ffn(self, shared: FFNWeights, experts: FFNWeights, first: int, num_experts: int) -> FFNLayer:
        """The shared expert, and of the num_experts routed ones those from number `first` on."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension; into `out` if given."""

    def rotate_and_cache(
        self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, new_slots: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """q [T, H, d] rotated; puts k [T, d], rotated, and v [T, d] into the cache [slots, d]. May overwrite q."""

    def decode_attention(self, q: Tensor, keys: Tensor, values: Tensor, context: DecodeContext) -> Tensor:
        """[S, H, d] of q [S, H, d]: attention of one token of each sequence to its context."""

    def prefill_attention(self, q: Tensor, keys: Tensor, values: Tensor, chunk: PrefillChunk) -> Tensor:
        """[T, H, d] of q [T, H, d]: attention of one chunk's T tokens to what is before them, and themselves."""


class TorchOps:
    """Runs everywhere, in every dtype."""

    def linear(self, weight: Tensor) -> Linear:
        return make_linear(weight)

    def dense_ffn(self, weights: FFNWeights) -> DenseFFN:
        return DenseFFN(_swiglu(weights.gate, weights.up, weights.down))

    def moe_ffn(self, shared: FFNWeights, experts: FFNWeights, first: int, num_experts: int) -> MoEFFN:
        routed = [_swiglu(*weights) for weights in zip(experts.gate, experts.up, experts.down, strict=True)]
        return MoEFFN(num_experts, Experts(first, routed), _swiglu(shared.gate, shared.up, shared.down))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        return rms_norm(x, weight, eps, out)

    def rotate_and_cache(
        self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, new_slots: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        heads = rotation.rotate(torch.cat((q, k[:, None]), dim=1))  # [T, H + 1, d]
        keys.index_copy_(0, new_slots, heads[:, -1])
        values.index_copy_(0, new_slots, v)
        return heads[:, :-1]

    def decode_attention(self, q: Tensor, keys: Tensor, values: Tensor, context: DecodeContext) -> Tensor:
        """All query heads share one key head, so they are the rows of one product per sequence."""
        slots, shape = context.slots.flatten(), (*context.slots.shape, -1)
        k, v = keys.index_select(0, slots).view(shape), values.index_select(0, slots).view(shape)  # [S, L, d]
        scores = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2))  # [S, H, L]
        return torch.bmm(scores.masked_fill_(context.is_padding, float("-inf")).softmax(dim=-1), v)

    def prefill_attention(self, q: Tensor, keys: Tensor, values: Tensor, chunk: PrefillChunk) -> Tensor:
        k, v = keys.index_select(0, chunk.slots), values.index_select(0, chunk.slots)  # [L, d]
        heads = (1, q.shape[1], -1, -1)
        out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k.expand(heads), v.expand(heads), chunk.mask)
        return out[0].transpose(0, 1)


def _swiglu(gate: Tensor, up: Tensor, down: Tensor) -> SwiGLU:
    return SwiGLU(make_linear(torch.cat((gate, up))), make_linear(down))
