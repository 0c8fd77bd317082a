"""A shard of the FFN: the same call for dense layers, shared experts and routed experts.

T tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from afd.model.config import ModelConfig
from afd.model.layers import SwiGLU
from afd.model.moe import Experts, Routing


@dataclass(frozen=True)
class DenseFFN:
    """A column slice of a dense FFN."""

    mlp: SwiGLU

    def __call__(self, x: Tensor, routing: Routing | None) -> Tensor:
        return self.mlp(x)


@dataclass(frozen=True)
class MoEFFN:
    """A slice of the routed experts and a column slice of the shared expert."""

    experts: Experts
    shared: SwiGLU

    def __call__(self, x: Tensor, routing: Routing | None) -> Tensor:
        assert routing is not None
        return (self.experts(x, routing) + self.shared(x)).to(x.dtype)


@dataclass(frozen=True)
class FFNShard:
    """Shard i of M. The partial sums of all shards, added, are the FFN's output."""

    config: ModelConfig
    shard: int
    num_shards: int
    layers: list[DenseFFN | MoEFFN]

    @torch.inference_mode()
    def __call__(self, layer_idx: int, ffn_input: Tensor, routing: Routing | None) -> Tensor:
        """The partial sum [T, D] of ffn_input [T, D]; `routing` is None exactly on dense layers."""
        return self.layers[layer_idx](ffn_input, routing)
