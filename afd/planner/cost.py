"""The theoretical cost of decoding: bytes, FLOPs and dollars per token (arXiv 2507.19427, section 4).

    cost_attention = max(FLOP_attn * U_flop, KV_bytes * U_byte) + FLOP_linear * U_flop
    cost_ffn       = FLOP_ffn * U_flop

Weights are 8 bits and shared by batches large enough to be compute-bound; embedding, head and router are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from afd.planner.accelerators import Accelerator
from afd.planner.layers import Attention, GroupedQuery
from afd.planner.shape import ModelShape

_MILLION = 1e6


@dataclass(frozen=True)
class KvFormat:
    """Bytes of an element of the KV cache: of all layers, or other ones of those that see the whole context."""

    element_bytes: float = 1.0
    whole_context_bytes: float | None = None

    def of(self, attention: Attention) -> float:
        windowed = isinstance(attention, GroupedQuery) and attention.window is not None
        return self.element_bytes if windowed or self.whole_context_bytes is None else self.whole_context_bytes


@dataclass(frozen=True)
class TokenCost:
    """What one decoded token takes, by part."""

    kv_bytes: float
    attention_flops: float
    linear_flops: float
    ffn_flops: float

    @property
    def intensity(self) -> float:
        """FLOPs of attention per byte of KV cache."""
        return self.attention_flops / self.kv_bytes

    def attention_dollars(self, card: Accelerator) -> float:
        """Per million tokens."""
        core = max(self.attention_flops * card.unit_flop, self.kv_bytes * card.unit_byte)
        return _MILLION * (core + self.linear_flops * card.unit_flop)

    def ffn_dollars(self, card: Accelerator) -> float:
        """Per million tokens."""
        return _MILLION * self.ffn_flops * card.unit_flop


def token_cost(shape: ModelShape, context: float, kv: KvFormat = KvFormat()) -> TokenCost:
    """Of one token after `context` others. Raises ConfigError if the model cannot have so many."""
    shape.check_context(context)
    layers = shape.attentions.items()
    return TokenCost(
        kv_bytes=sum(count * float(attention.kv_bytes(context, kv.of(attention))) for attention, count in layers),
        attention_flops=sum(count * float(attention.flops(context)) for attention, count in layers),
        linear_flops=2 * shape.attention_parameters,
        ffn_flops=sum(count * ffn.flops for ffn, count in shape.ffns.items()),
    )


@dataclass(frozen=True)
class Pair:
    """Attention on one kind of card, FFN on another or the same."""

    attention: Accelerator
    ffn: Accelerator

    def dollars(self, cost: TokenCost) -> float:
        """Per million tokens."""
        return cost.attention_dollars(self.attention) + cost.ffn_dollars(self.ffn)


def cheapest_pair(cost: TokenCost, cards: Iterable[Accelerator]) -> Pair:
    """The parts do not depend on each other, so each has its cheapest card."""
    cards = list(cards)
    return Pair(min(cards, key=cost.attention_dollars), min(cards, key=cost.ffn_dollars))


def min_sparsity(shape: ModelShape, card: Accelerator, tpot_s: float) -> float:
    """The least share of a MoE's weights that a token must have, for the FFN to be compute-bound before the network is
    the limit. One of three stages is the network's.

    Compute-bound is a batch B of FLOP/s / (2 * memory bytes/s * S) tokens and more. They bring one byte per element and
    take two back through the NICs of a server, in each layer: 3 * H * B * L / NICs <= TPOT / 3.
    """
    nics = card.nic_bytes_per_s * card.cards_per_server
    return 3 * shape.hidden_size * shape.num_layers * (card.roofline / 2) / (nics * tpot_s / 3)
