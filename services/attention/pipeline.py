"""How a step's chunks become microbatches: how many, and which chunk goes into which one (docs/adr/0007)."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from afd.model.config import ModelConfig
from services.attention.scheduler import Chunk

_TRIES = 3  # steps measured of each number of microbatches
_KEPT_STEPS = 500  # steps with the number found, before all are tried again
_MARGIN = 0.05  # a gain below this is noise


@dataclass(frozen=True)
class ChunkCost:
    """What a chunk costs both sides, in tokens: its tokens, and the context that each of them looks at."""

    context_weight: float  # cost of one token's look at one token of context, over all other work for a token

    @classmethod
    def of(cls, config: ModelConfig, num_ffn_shards: int) -> ChunkCost:
        """In FLOPs of a layer, the mean of all; each shard does its part of the FFN at the same time."""
        heads_dim = config.num_heads * config.head_dim
        q_and_kv = config.hidden_size * (config.share_q_dim + 2 * config.head_dim)
        linear = 2 * (q_and_kv + config.share_q_dim * heads_dim + heads_dim * config.hidden_size)
        return cls(4 * heads_dim / (linear + _ffn_flops(config) / max(1, num_ffn_shards)))

    def __call__(self, chunk: Chunk) -> float:
        start = chunk.sequence.num_computed
        mean_context = start + (chunk.num_tokens + 1) / 2
        return chunk.num_tokens * (1 + self.context_weight * mean_context)


def _ffn_flops(config: ModelConfig) -> float:
    """Of one token, the mean of all layers."""
    num_moe = sum(map(config.is_moe, range(config.num_layers)))
    moe_width = config.top_k * config.moe_intermediate_size + config.share_expert_dim
    widths = num_moe * moe_width + (config.num_layers - num_moe) * config.intermediate_size
    return 6 * config.hidden_size * widths / config.num_layers


def balanced(chunks: Sequence[Chunk], num_parts: int, cost: Callable[[Chunk], float]) -> list[list[Chunk]]:
    """At most num_parts parts of about the same cost: each chunk, the dearest first, goes to the cheapest part."""
    parts: list[list[Chunk]] = [[] for _ in range(min(num_parts, len(chunks)))]
    costs = [0.0] * len(parts)
    for chunk_cost, chunk in sorted(((cost(chunk), chunk) for chunk in chunks), key=lambda pair: -pair[0]):
        cheapest = costs.index(min(costs))
        parts[cheapest].append(chunk)
        costs[cheapest] += chunk_cost
    return parts


@dataclass
class _Trial:
    """What each number of microbatches took, of steps of one size: nanoseconds a token."""

    times: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    num_kept_steps: int = 0
    best: int = 0

    def choose(self, candidates: Sequence[int]) -> int:
        """In turns until all are measured; then the best, or as good as the best."""
        least_tried = min(candidates, key=lambda number: len(self.times[number]))
        if len(self.times[least_tried]) < _TRIES:
            return least_tried
        medians = {number: statistics.median(self.times[number]) for number in candidates}
        good = [number for number in candidates if medians[number] <= min(medians.values()) * (1 + _MARGIN)]
        if self.best not in good:
            self.best = good[0]
        return self.best

    def observe(self, number: int, ns_per_token: float) -> None:
        if len(self.times[number]) < _TRIES:
            self.times[number].append(ns_per_token)
        elif self.num_kept_steps < _KEPT_STEPS:
            self.num_kept_steps += 1
        else:
            self.num_kept_steps = 0
            self.times.clear()


class Pipeline:
    """The number of microbatches that makes a step shortest, found by trying, for each size of step anew."""

    def __init__(self, candidates: range) -> None:
        """candidates: the numbers to choose from; a single one is what there is."""
        self.candidates = candidates
        self._trials: defaultdict[int, _Trial] = defaultdict(_Trial)  # by the number of bits of a step's tokens
        self._observed: Callable[[int], None] = _ignore

    def choose(self, num_sequences: int, num_tokens: int) -> int:
        """For the next step; never more than it has sequences."""
        candidates = [number for number in self.candidates if number <= num_sequences]
        if len(candidates) < 2:
            self._observed = _ignore
            return min(self.candidates[0], num_sequences)
        trial = self._trials[num_tokens.bit_length()]
        number = trial.choose(candidates)
        self._observed = lambda step_ns: trial.observe(number, step_ns / num_tokens)
        return number

    def observe(self, step_ns: int) -> None:
        """What the step took that a number was last chosen for."""
        self._observed(step_ns)


def _ignore(step_ns: int) -> None:
    """There was nothing to choose."""
