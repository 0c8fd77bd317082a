"""A shard of the FFN: the same call for dense layers, shared experts and routed experts.

T tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from afd.model.config import ModelConfig
from afd.model.layers import SwiGLU
from afd.model.moe import Experts, GroupedExperts, Routing


class FFNLayer(Protocol):
    """A shard's part of one layer."""

    def __call__(self, x: Tensor, routing: Routing | None, out: Tensor) -> None:
        """Writes the partial sum of x [T, D] into out [T, D]; `routing` is None just on dense layers. Raises
        InvalidRequest if it names an expert that does not exist."""


@dataclass(frozen=True)
class DenseFFN:
    """A column slice of a dense FFN."""

    mlp: SwiGLU

    def __call__(self, x: Tensor, routing: Routing | None, out: Tensor) -> None:
        out.copy_(self.mlp(x))


@dataclass(frozen=True)
class MoEFFN:
    """A slice of the routed experts and a column slice of the shared expert."""

    num_experts: int  # of all slices
    experts: Experts | GroupedExperts
    shared: SwiGLU

    def __call__(self, x: Tensor, routing: Routing | None, out: Tensor) -> None:
        assert routing is not None
        torch.add(self.experts(x, routing.checked(self.num_experts)), self.shared(x), out=out)


@dataclass(frozen=True)
class FFNShard:
    """Shard i of M. The partial sums of all shards, added, are the FFN's output."""

    config: ModelConfig
    shard: int
    num_shards: int
    layers: list[FFNLayer]

    def __call__(self, layer_idx: int, ffn_input: Tensor, routing: Routing | None, out: Tensor | None = None) -> Tensor:
        """The partial sum [T, D] of ffn_input [T, D], into `out` if given; `routing` is None just on dense layers.
        Raises InvalidRequest if it names an expert that does not exist."""
        out = torch.empty_like(ffn_input) if out is None else out
        self.layers[layer_idx](ffn_input, routing, out)
        return out
