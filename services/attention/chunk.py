"""What a microbatch computes of a sequence, what that costs, and which microbatch it falls to (docs/adr/0007)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from afd.model.config import ModelConfig
from services.attention.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """The next num_tokens of a sequence. One token of a sequence that has all others computed is a decode."""

    sequence: Sequence
    num_tokens: int

    @property
    def ends_sequence(self) -> bool:
        """Whether a token is sampled after it."""
        return self.num_tokens == self.sequence.num_uncomputed

    @property
    def prefill_tokens(self) -> int:
        """What counts against the budget of prefill: nothing for a decode."""
        return 0 if self.sequence.num_uncomputed == 1 else self.num_tokens


def context_tokens(computed: Iterable[Chunk]) -> int:
    """What they looked at: the tokens of each sequence, those of the chunk included."""
    return sum(chunk.sequence.num_computed for chunk in computed)


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

    def __call__(self, chunk: Chunk, num_later: int = 0) -> float:
        """Now, or so many tokens later."""
        start = chunk.sequence.num_computed + num_later
        mean_context = start + (chunk.num_tokens + 1) / 2
        return chunk.num_tokens * (1 + self.context_weight * mean_context)


def _ffn_flops(config: ModelConfig) -> float:
    """Of one token, the mean of all layers."""
    num_moe = sum(map(config.is_moe, range(config.num_layers)))
    moe_width = config.top_k * config.moe_intermediate_size + config.share_expert_dim
    widths = num_moe * moe_width + (config.num_layers - num_moe) * config.intermediate_size
    return 6 * config.hidden_size * widths / config.num_layers


def fair_share(chunks: list[Chunk], other_costs: Iterable[float], cost: Callable[[Chunk], float]) -> list[Chunk]:
    """Which of the chunks, in turn, one more microbatch computes beside others that cost so much already.

    The first is among them. Then each chunk, the dearest first, falls to the microbatch that is the cheapest so far,
    and to this one where they are equal. What falls to others is left for them.
    """
    costs = [cost(chunk) for chunk in chunks]
    own, sums = {0}, [costs[0] if chunks else 0.0, *other_costs]
    for index in sorted(range(1, len(chunks)), key=lambda index: -costs[index]):
        cheapest = sums.index(min(sums))
        sums[cheapest] += costs[index]
        if cheapest == 0:
            own.add(index)
    return [chunk for index, chunk in enumerate(chunks) if index in own]
