"""What a layer is computed with: torch's own operations here, compiled ones for the CPU in `native`.

D hidden size, H query heads, d head size, E experts, I width of an FFN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from afd.model.ffn import DenseFFN, FFNLayer, MoEFFN
from afd.model.layers import SwiGLU, rms_norm
from afd.model.linear import Linear, make_linear
from afd.model.mfa import MFA, AttentionLayer, PlainAttentionLayer
from afd.model.moe import Experts, GroupedExperts, Router


@dataclass(frozen=True)
class AttentionWeights:
    """Of a layer up to the handoff, and how it computes."""

    input_norm: Tensor  # [D]
    qkv_proj: Tensor  # [q_dim + 2d, D]: the low-rank query, key and value projections
    inter_norm: Tensor  # [q_dim]
    wq: Tensor  # [H*d, q_dim]
    o_proj: Tensor  # [D, H*d]
    post_attention_norm: Tensor  # [D]
    gate: Tensor | None  # [E, D], of the router; None on dense layers
    head_dim: int
    eps: float
    top_k: int
    renormalise: bool


@dataclass(frozen=True)
class FFNWeights:
    """Of a dense or shared FFN; or of a layer's experts, and then all have E before their other dimensions."""

    gate: Tensor  # [I, D]
    up: Tensor  # [I, D]
    down: Tensor  # [D, I]


class Ops(Protocol):
    """Weights are handed over once, and come back as something that computes with them."""

    def attention_layer(self, weights: AttentionWeights) -> AttentionLayer: ...

    def dense_ffn(self, weights: FFNWeights) -> FFNLayer: ...

    def moe_ffn(self, shared: FFNWeights, experts: FFNWeights, first: int, num_experts: int) -> FFNLayer:
        """The shared expert, and of the num_experts routed ones those from number `first` on."""

    def linear(self, weight: Tensor) -> Linear:
        """x @ weight.T, of a weight [out, in]."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""


class TorchOps:
    """Runs everywhere, in every dtype."""

    def attention_layer(self, weights: AttentionWeights) -> PlainAttentionLayer:
        return PlainAttentionLayer(
            eps=weights.eps,
            input_norm=weights.input_norm,
            post_attention_norm=weights.post_attention_norm,
            attention=MFA(
                head_dim=weights.head_dim,
                eps=weights.eps,
                qkv_proj=make_linear(weights.qkv_proj),
                inter_norm=weights.inter_norm,
                wq=make_linear(weights.wq),
                o_proj=make_linear(weights.o_proj),
            ),
            router=None
            if weights.gate is None
            else Router(make_linear(weights.gate), weights.top_k, weights.renormalise),
        )

    def dense_ffn(self, weights: FFNWeights) -> DenseFFN:
        return DenseFFN(_swiglu(weights.gate, weights.up, weights.down))

    def moe_ffn(self, shared: FFNWeights, experts: FFNWeights, first: int, num_experts: int) -> MoEFFN:
        return MoEFFN(num_experts, _experts(experts, first), _swiglu(shared.gate, shared.up, shared.down))

    def linear(self, weight: Tensor) -> Linear:
        return make_linear(weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)


def _experts(weights: FFNWeights, first: int) -> Experts | GroupedExperts:
    gate_up = torch.cat((weights.gate, weights.up), dim=1)
    if GroupedExperts.can_hold(gate_up, weights.down):
        return GroupedExperts(first, gate_up, weights.down.contiguous())
    return Experts(first, [SwiGLU(make_linear(a), make_linear(b)) for a, b in zip(gate_up, weights.down, strict=True)])


def _swiglu(gate: Tensor, up: Tensor, down: Tensor) -> SwiGLU:
    return SwiGLU(make_linear(torch.cat((gate, up))), make_linear(down))
