"""xAyF: attention and FFN on cards of their own, and how a model is spread over them."""

from __future__ import annotations

from dataclasses import dataclass

from afd.errors import ConfigError
from afd.planner.accelerators import Accelerator
from afd.planner.stages import Stages, Workload


@dataclass(frozen=True)
class Disaggregated:
    """x attention and y FFN instances of `cards` each. Attention is data parallel over groups of `tp` cards; the
    weights of the FFN are spread over all its instances, and every instance sees all tokens. A group is what shares the
    attention of its sequences."""

    attention: Accelerator
    ffn: Accelerator
    num_attention: int
    num_ffn: int
    cards: int = 8
    microbatches: int = 3
    tp: int = 1

    @property
    def name(self) -> str:
        return f"{self.num_attention}A{self.num_ffn}F"

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

    def stages(self, workload: Workload, batch: float) -> Stages:
        """With `batch` sequences per group and microbatch."""
        num_tokens = batch * self.num_groups
        precision = workload.precision
        return Stages(
            attention=workload.attention_s(batch, self.tp, self.attention),
            dispatch=self._crossing_s(workload, num_tokens, precision.dispatch),
            ffn=workload.ffn_s(num_tokens, self.num_ffn, self.cards, self.ffn),
            combine=self._crossing_s(workload, num_tokens, precision.combine),
            beside=workload.efficiencies.step_s,
        )

    def _crossing_s(self, workload: Workload, num_tokens: float, element_bytes: float) -> float:
        """One way, all layers: an attention card has a copy for each FFN instance, whose cards share out all tokens."""
        hidden_state = workload.shape.hidden_size * element_bytes
        copies = num_tokens / (self.num_attention * self.cards) * self.num_ffn
        return workload.shape.num_layers * max(
            workload.on(self.attention).network_s(copies * hidden_state),
            workload.on(self.ffn).network_s(num_tokens / self.cards * hidden_state),
        )

    def free_bytes(self, workload: Workload) -> float:
        """For the KV cache, on each attention card. Raises ConfigError if the weights do not fit."""
        ffn_weights = workload.shape.ffn_parameters * workload.precision.weights / (self.num_ffn * self.cards)
        _beside(ffn_weights, "FFN", workload, self.ffn)
        return _beside(workload.attention_weights(self.tp, self.cards), "attention", workload, self.attention)

    def kv_bytes(self, workload: Workload) -> float:
        """Of a sequence, on each card of its group."""
        return workload.kv_bytes(self.tp)


def _beside(weights: float, whose: str, workload: Workload, card: Accelerator) -> float:
    """Bytes of a card that are free beside so many of weights."""
    usable = workload.on(card).usable_bytes
    if weights >= usable:
        raise ConfigError(
            f"the {whose}'s weights are {weights / 1e9:.1f} GB on each {card.name}, of which {usable / 1e9:.1f} GB can "
            "be used: take more cards, or fewer bytes per weight"
        )
    return usable - weights
