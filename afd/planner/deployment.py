"""How a model is spread over cards: attention and FFN on cards of their own, or on the same ones."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np

from afd.errors import ConfigError
from afd.planner.accelerators import Accelerator
from afd.planner.layers import Amount, Ffn
from afd.planner.stages import NIXL, Stages, Transport, Workload, expert_parallel_s, tensor_parallel_s


class Deployment(Protocol):
    """A group is what shares the attention of its sequences; it has so many of them in each microbatch."""

    @property
    def name(self) -> str: ...

    @property
    def cards_text(self) -> str:
        """How many of which cards."""

    @property
    def microbatches(self) -> int: ...

    @property
    def num_cards(self) -> int: ...

    @property
    def num_groups(self) -> int: ...

    @property
    def dollars_per_hour(self) -> float: ...

    def stages(self, workload: Workload, batch: Amount) -> Stages:
        """With `batch` sequences per group and microbatch."""

    def weight_bytes(self, workload: Workload) -> tuple[float, float]:
        """On each card of attention, and on each of the FFN; the same cards have both where they are shared."""

    def free_bytes(self, workload: Workload) -> float:
        """For the KV cache, on each attention card. Raises ConfigError if the weights do not fit."""

    def kv_bytes(self, workload: Workload) -> float:
        """Of a sequence, on each card of its group."""


class Experts(StrEnum):
    """How the FFN is spread within its instances: each matrix over all cards, or each expert on a card."""

    tensor = "tensor"
    expert = "expert"


@dataclass(frozen=True)
class Disaggregated:
    """x attention and y FFN instances of `cards` each. Attention is data parallel over groups of `tp` cards; the
    weights of the FFN are spread over all its instances, and every instance sees all tokens."""

    attention: Accelerator
    ffn: Accelerator
    num_attention: int
    num_ffn: int
    cards: int = 8
    microbatches: int = 3
    tp: int = 1
    experts: Experts = Experts.tensor
    transport: Transport = NIXL

    @property
    def name(self) -> str:
        return f"{self.num_attention}A{self.num_ffn}F"

    @property
    def cards_text(self) -> str:
        apart = (self.num_attention, self.attention.name), (self.num_ffn, self.ffn.name)
        if self.attention == self.ffn:
            return f"{self.num_cards} {self.ffn.name}"
        return " + ".join(f"{instances * self.cards} {card}" for instances, card in apart)

    @property
    def num_cards(self) -> int:
        return (self.num_attention + self.num_ffn) * self.cards

    @property
    def num_groups(self) -> int:
        return self.num_attention * self.cards // self.tp

    @property
    def dollars_per_hour(self) -> float:
        per_card = self.num_attention * self.attention.dollars_per_hour + self.num_ffn * self.ffn.dollars_per_hour
        return self.cards * per_card

    def stages(self, workload: Workload, batch: Amount) -> Stages:
        num_tokens = workload.tokens(batch * self.num_groups)
        precision = workload.precision
        return Stages(
            attention=workload.attention_s(batch, self.tp, self.attention),
            dispatch=self._crossing_s(workload, num_tokens, precision.dispatch),
            ffn=sum(count * self._ffn_s(ffn, workload, num_tokens) for ffn, count in workload.shape.ffns.items()),
            combine=self._crossing_s(workload, num_tokens, precision.combine),
            beside=workload.efficiencies.step_s,
        )

    def _ffn_s(self, ffn: Ffn, workload: Workload, num_tokens: Amount) -> Amount:
        on, precision = workload.on(self.ffn), workload.precision
        if self.experts is Experts.tensor:
            return tensor_parallel_s(ffn, num_tokens, self.num_ffn, self.cards, precision, on)
        multiplying = expert_parallel_s(ffn, num_tokens, self.num_ffn * self.cards, 1, precision, on)
        copies = num_tokens * (ffn.top_k if ffn.is_moe else 0) / (self.num_ffn * self.cards)
        moved = (self.cards - 1) / self.cards * copies * ffn.hidden_size * (precision.dispatch + precision.combine)
        return on.moving_s(moved, multiplying)

    def _crossing_s(self, workload: Workload, num_tokens: Amount, element_bytes: float) -> Amount:
        """One way, all layers: an attention card has a copy for each FFN instance, whose cards share out all tokens."""
        hidden_state = workload.shape.hidden_size * element_bytes
        copies = num_tokens / (self.num_attention * self.cards) * self.num_ffn
        slower: Amount = np.maximum(
            self.transport.crossing_s(copies * hidden_state, self.attention),
            self.transport.crossing_s(num_tokens / self.cards * hidden_state, self.ffn),
        )
        return workload.shape.num_layers * slower

    def weight_bytes(self, workload: Workload) -> tuple[float, float]:
        everywhere = self.num_ffn * self.cards
        group = everywhere if self.experts is Experts.tensor else 1
        return workload.attention_weights(self.tp, self.cards), workload.ffn_weights(everywhere, group)

    def free_bytes(self, workload: Workload) -> float:
        attention, ffn = self.weight_bytes(workload)
        _beside(ffn, "FFN's", workload, self.ffn)
        return _beside(attention, "attention's", workload, self.attention)

    def kv_bytes(self, workload: Workload) -> float:
        return workload.kv_bytes(self.tp)


@dataclass(frozen=True)
class Collocated:
    """Attention and FFN on the same cards: data parallel over groups of `tp` cards, within which matrices are spread.
    With more cards than a group the experts are spread over all of them, and a token goes to each of its experts: large
    expert parallelism. With two microbatches one is computed while the other crosses."""

    card: Accelerator
    num_cards: int
    tp: int = 1
    microbatches: int = 2
    transport: Transport = NIXL

    @property
    def name(self) -> str:
        return f"EP{self.num_cards}" if self.num_groups > 1 else f"TP{self.tp}"

    @property
    def cards_text(self) -> str:
        return f"{self.num_cards} {self.card.name}"

    @property
    def num_groups(self) -> int:
        return self.num_cards // self.tp

    @property
    def dollars_per_hour(self) -> float:
        return self.num_cards * self.card.dollars_per_hour

    def stages(self, workload: Workload, batch: Amount) -> Stages:
        tokens_per_card = workload.tokens(batch / self.tp)
        return Stages(
            attention=workload.attention_s(batch, self.tp, self.card),
            dispatch=self._all_to_all_s(workload, tokens_per_card, workload.precision.dispatch),
            ffn=sum(
                count * self._ffn_s(ffn, workload, workload.tokens(batch)) for ffn, count in workload.shape.ffns.items()
            ),
            combine=self._all_to_all_s(workload, tokens_per_card, workload.precision.combine),
            beside=workload.efficiencies.step_s,
            overlap=workload.efficiencies.overlap,
        )

    def _ffn_s(self, ffn: Ffn, workload: Workload, tokens_per_group: Amount) -> Amount:
        on, precision = workload.on(self.card), workload.precision
        multiplying = expert_parallel_s(ffn, tokens_per_group * self.num_groups, self.num_cards, self.tp, precision, on)
        return multiplying + on.all_reduce_s(tokens_per_group * ffn.hidden_size * precision.combine, self.tp)

    def _all_to_all_s(self, workload: Workload, tokens_per_card: Amount, element_bytes: float) -> Amount:
        """One way, all layers: over the link to experts in the server, over the network to the others."""
        if self.num_groups == 1:
            return 0.0 * tokens_per_card
        on, hidden_state = workload.on(self.card), workload.shape.hidden_size * element_bytes
        within = min(1.0, self.card.cards_per_server / self.num_cards)
        moe_layers = [(ffn.top_k, count) for ffn, count in workload.shape.ffns.items() if ffn.is_moe]
        total: Amount = 0.0 * tokens_per_card
        for top_k, count in moe_layers:
            num_bytes = tokens_per_card * top_k * hidden_state
            crossing = self.transport.crossing_s(num_bytes * (1 - within), self.card) if within < 1 else 0.0
            total = total + count * np.maximum(on.link_s(num_bytes * within), crossing)
        return total

    def weight_bytes(self, workload: Workload) -> tuple[float, float]:
        return workload.attention_weights(self.tp, self.tp), workload.ffn_weights(self.num_cards, self.tp)

    def free_bytes(self, workload: Workload) -> float:
        return _beside(sum(self.weight_bytes(workload)), "model's", workload, self.card)

    def kv_bytes(self, workload: Workload) -> float:
        return workload.kv_bytes(self.tp)


def _beside(weights: float, whose: str, workload: Workload, card: Accelerator) -> float:
    """Bytes of a card that are free beside so many of weights."""
    usable = workload.on(card).usable_bytes
    if weights >= usable:
        raise ConfigError(
            f"the {whose} weights are {weights / 1e9:.1f} GB on each {card.name}, of which {usable / 1e9:.1f} GB can "
            "be used: take more cards, or fewer bytes per weight"
        )
    return usable - weights
