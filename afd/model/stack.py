"""The attention side of the model: everything but the FFN.

T tokens of a microbatch, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from afd.model.config import ModelConfig
from afd.model.linear import Linear
from afd.model.mfa import AttentionLayer
from afd.model.ops import Ops


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
