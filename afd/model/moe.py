"""Mixture of experts: the router, which the attention side runs, and a shard's slice of the routed experts.

T tokens, D hidden size, E experts, K experts per token, I width of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Which experts each token goes to, and how their outputs are weighted."""

    topk_ids: Tensor  # [T, K] int32
    topk_weights: Tensor  # [T, K] float32


@dataclass(frozen=True)
class Router:
    """Softmax over all experts in float32, then the top K; not renormalised unless the model says so."""

    weight: Tensor  # [E, D]
    top_k: int
    renormalise: bool

    def __call__(self, x: Tensor) -> Routing:
        probs = F.linear(x, self.weight).softmax(dim=-1, dtype=torch.float32)  # [T, E]
        topk_weights, topk_ids = probs.topk(self.top_k, dim=-1)  # [T, K] each
        if self.renormalise:
            topk_weights = topk_weights / topk_weights.sum(dim=-1, keepdim=True)
        return Routing(topk_ids.to(torch.int32), topk_weights)


@dataclass(frozen=True)
class Experts:
    """The routed experts `first`, `first + 1`, ... of a layer."""

    first: int
    gate_up: Tensor  # [experts here, 2I, D]
    down: Tensor  # [experts here, D, I]

    def add_to(self, out: Tensor, x: Tensor, routing: Routing) -> None:
        """Adds the weighted outputs of the experts here to out [T, D] float32; x is [T, D]."""
        num_experts, top_k = self.gate_up.shape[0], routing.topk_ids.shape[1]
        local = routing.topk_ids.flatten().long() - self.first  # [T*K]
        order = local.argsort()
        ids, counts = local[order].unique_consecutive(return_counts=True)
        start = 0
        for expert, count in zip(ids.tolist(), counts.tolist(), strict=True):
            chosen, start = order[start : start + count], start + count
            if 0 <= expert < num_experts:
                rows = chosen // top_k
                gate, up = F.linear(x[rows], self.gate_up[expert]).chunk(2, dim=-1)
                y = F.linear(F.silu(gate) * up, self.down[expert])
                out.index_add_(0, rows, y.float() * routing.topk_weights.flatten()[chosen, None])
