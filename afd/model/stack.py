"""The attention side of the model: everything but the FFN.

T tokens of a microbatch, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from afd.model.config import ModelConfig
from afd.model.linear import Linear
from afd.model.mfa import MFA, AttentionBatch
from afd.model.moe import Router, Routing
from afd.model.ops import Ops


@dataclass(frozen=True)
class AttentionLayer:
    """A layer up to the handoff."""

    ops: Ops
    eps: float
    input_norm: Tensor  # [D]
    post_attention_norm: Tensor  # [D]
    attention: MFA
    router: Router | None

    def attend(
        self, hidden_states: Tensor, keys: Tensor, values: Tensor, batch: AttentionBatch, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Routing | None]:
        """(hidden_states after attention and residual, ffn_input, routing); both tensors are [T, D], the
        second is `out` if that is given."""
        normed = self.ops.rms_norm(hidden_states, self.input_norm, self.eps)
        hidden_states = hidden_states + self.attention(normed, keys, values, batch)
        ffn_input = self.ops.rms_norm(hidden_states, self.post_attention_norm, self.eps, out)
        return hidden_states, ffn_input, self.router(ffn_input) if self.router else None


@dataclass(frozen=True)
class AttentionStack:
    ops: Ops
    config: ModelConfig
    embedding: Tensor  # [V, D]
    layers: list[AttentionLayer]
    final_norm: Tensor  # [D]
    lm_head: Linear  # D to V

    def embed(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.embedding)  # [T, D]

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Logits [T, V] float32."""
        normed = self.ops.rms_norm(hidden_states, self.final_norm, self.config.rms_norm_eps)
        return self.lm_head(normed).float()
