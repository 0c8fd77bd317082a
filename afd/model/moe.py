"""Mixture of experts: the router, which the attention side runs, and a shard's slice of the routed experts.

T tokens, D hidden size, E experts, K experts per token, I width of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from afd.errors import InvalidRequest
from afd.model.layers import SwiGLU, gated
from afd.model.linear import MIN_ROWS, Linear

_GROUPED_ALIGNMENT = 8  # torch's grouped product wants rows of whole 16 bytes


@dataclass(frozen=True)
class Routing:
    """Which experts each token goes to, and how their outputs are weighted."""

    topk_ids: Tensor  # [T, K] int32
    topk_weights: Tensor  # [T, K] float32

    def checked(self, num_experts: int) -> Routing:
        """A copy, which nobody can change any more. Raises InvalidRequest if it names an expert that does not exist."""
        copy = Routing(self.topk_ids.clone(), self.topk_weights.clone())
        low, high = (int(bound) for bound in copy.topk_ids.aminmax())
        if low < 0 or high >= num_experts:
            raise InvalidRequest(f"expert {low if low < 0 else high} does not exist; the model has {num_experts}")
        return copy


@dataclass(frozen=True)
class Router:
    """Softmax over all experts in float32, then the top K; not renormalised unless the model says so."""

    gate: Linear  # D to E
    top_k: int
    renormalise: bool

    def __call__(self, x: Tensor) -> Routing:
        probs = self.gate(x).softmax(dim=-1, dtype=torch.float32)  # [T, E]
        topk_weights, topk_ids = probs.topk(self.top_k, dim=-1)  # [T, K] each
        if self.renormalise:
            topk_weights = topk_weights / topk_weights.sum(dim=-1, keepdim=True)
        return Routing(topk_ids.to(torch.int32), topk_weights)


@dataclass(frozen=True)
class _Groups:
    """A place for each pair of a token and one of its experts, so that an expert's rows lie together.

    An expert that has rows has at least MIN_ROWS, the last of them empty.
    """

    sizes: list[int]  # rows of each expert here
    pairs: Tensor  # [pairs here] index in [T*K]
    places: Tensor  # [pairs here] row in the groups

    @classmethod
    def of(cls, topk_ids: Tensor, first: int, num_experts: int) -> _Groups:
        """Only the pairs of the experts `first` to `first + num_experts - 1`."""
        local = topk_ids.flatten().long() - first  # [T*K]
        pairs = ((local >= 0) & (local < num_experts)).nonzero()[:, 0]
        experts, order = local[pairs].sort(stable=True)
        counts = experts.bincount(minlength=num_experts)  # [experts here]
        sizes = torch.where(counts > 0, counts.clamp(min=MIN_ROWS), 0)
        empty_before = (sizes.cumsum(0) - sizes) - (counts.cumsum(0) - counts)
        places = torch.arange(len(pairs), device=local.device) + empty_before[experts]
        return cls(sizes.tolist(), pairs[order], places)


@dataclass(frozen=True)
class Experts:
    """The routed experts `first`, `first + 1`, ... of a layer."""

    first: int
    experts: list[SwiGLU]

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:
        """The weighted sum [T, D] float32 of the outputs of the experts here; x is [T, D]."""
        groups = _Groups.of(routing.topk_ids, self.first, len(self.experts))
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        if not any(groups.sizes):
            return out
        tokens = groups.pairs // routing.topk_ids.shape[1]
        grouped = x.new_zeros(sum(groups.sizes), x.shape[1]).index_copy_(0, groups.places, x[tokens])
        weights = routing.topk_weights.flatten()[groups.pairs]  # [pairs here]
        y = self._each(grouped, groups.sizes)[groups.places].float() * weights[:, None]
        return out.index_add_(0, tokens, y)

    def _each(self, grouped: Tensor, sizes: list[int]) -> Tensor:
        """Every expert's output for its own rows."""
        active = [(expert, size) for expert, size in zip(self.experts, sizes, strict=True) if size]
        rows = grouped.split([size for _, size in active])
        gate_up = torch.cat([expert.gate_up(x) for (expert, _), x in zip(active, rows, strict=True)])
        hidden = gated(gate_up).split([size for _, size in active])
        return torch.cat([expert.down(x) for (expert, _), x in zip(active, hidden, strict=True)])


@dataclass(frozen=True)
class GroupedExperts:
    """The same, all in one product per projection: for GPUs, where every launch counts, and every wait for a result."""

    first: int
    gate_up: Tensor  # [experts here, 2I, D]
    down: Tensor  # [experts here, D, I]

    @staticmethod
    def can_hold(gate_up: Tensor, down: Tensor) -> bool:
        """Whether torch's grouped product takes such weights."""
        is_aligned = all(size % _GROUPED_ALIGNMENT == 0 for size in (*gate_up.shape[1:], *down.shape[1:]))
        return gate_up.is_cuda and gate_up.dtype == torch.bfloat16 and is_aligned and gate_up.numel() > 0

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:
        """The weighted sum [T, D] float32 of the outputs of the experts here; x is [T, D]."""
        (num_tokens, top_k), num_experts = routing.topk_ids.shape, self.gate_up.shape[0]
        expert = routing.topk_ids.flatten() - self.first  # [T*K]
        is_here = (expert >= 0) & (expert < num_experts)
        experts, order = expert.where(is_here, num_experts).sort(stable=True)  # the pairs of experts elsewhere go last
        numbers = torch.arange(num_experts, dtype=experts.dtype, device=x.device)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)  # of each expert's rows
        hidden = gated(F.grouped_mm(x[order // top_k], self.gate_up.transpose(1, 2), offs=ends))
        y = F.grouped_mm(hidden, self.down.transpose(1, 2), offs=ends)  # [T*K, D]; nobody writes the last rows
        by_pair = torch.empty_like(y).index_copy_(0, order, y).where(is_here[:, None], 0)
        weighted = by_pair.float() * routing.topk_weights.view(-1, 1)
        return weighted.view(num_tokens, top_k, -1).sum(dim=1)
