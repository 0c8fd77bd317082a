"""How long the parts of a layer take, from a roofline: bytes over bandwidth or FLOPs over FLOP/s, whichever is longer,
each peak times an efficiency that is stated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from afd.planner.accelerators import Accelerator
from afd.planner.layers import Amount, Attention, Ffn
from afd.planner.shape import ModelShape


@dataclass(frozen=True)
class Transport:
    """What carries hidden states to another card, one way: over the NIC or, within a server, over the link."""

    name: str
    latency_s: float
    efficiency: float
    most_bytes_per_s: float = float("inf")
    within_server: bool = False

    def crossing_s(self, num_bytes: Amount, card: Accelerator) -> Amount:
        peak = card.link_bytes_per_s if self.within_server else card.nic_bytes_per_s
        return self.latency_s + num_bytes / min(peak * self.efficiency, self.most_bytes_per_s)


NIXL = Transport("nixl", 20e-6, 0.80)
LOCAL = Transport("within the server", 10e-6, 0.75, within_server=True)
INLINE = Transport("inline", 110e-6, 0.80, most_bytes_per_s=7e8)  # docs/performance.md, "The handoff alone"
TRANSPORTS = {transport.name: transport for transport in (NIXL, INLINE)}


@dataclass(frozen=True)
class Efficiencies:
    """The share of each peak that is reached: one set for all models, cards and deployments. docs/planner.md says where
    they come from. `overlap` is the share of what could be hidden that is, where computing and crossing share a card;
    `link_overlap` the same of an FFN instance, whose cards move one microbatch while they multiply another;
    `imbalance` the busiest card's tokens over the mean's, where experts are spread; `step_s` what a step takes beside
    its layers: head, sampling, scheduling."""

    memory: float = 0.80
    flops: float = 0.75
    link: float = 0.75
    overlap: float = 0.3
    link_overlap: float = 1.0
    imbalance: float = 1.3
    step_s: float = 0.5e-3
    usable_memory: float = 0.92


@dataclass(frozen=True)
class Precision:
    """Bytes of an element: of weights, KV cache, and hidden states on their way to the FFN and back."""

    weights: float = 1.0
    kv: float = 1.0
    dispatch: float = 1.0
    combine: float = 2.0


@dataclass(frozen=True)
class Prefill:
    """Prompt tokens that are computed with each decoded one, and the context that they follow in the mean. None of them
    where prompts are prefilled elsewhere."""

    tokens: Amount = 0.0
    context: Amount = 0.0


@dataclass(frozen=True)
class Roofline:
    """A card as it performs. Times in seconds."""

    card: Accelerator
    efficiencies: Efficiencies = Efficiencies()

    def kernel_s(self, num_bytes: Amount, flops: Amount, element_bytes: float) -> Amount:
        reading = num_bytes / (self.card.memory_bytes_per_s * self.efficiencies.memory)
        computing = flops / (self.card.flops_per_s(element_bytes) * self.efficiencies.flops)
        slower: Amount = np.maximum(reading, computing)
        return slower

    def link_s(self, num_bytes: Amount) -> Amount:
        """To the other cards of the server."""
        return num_bytes / (self.card.link_bytes_per_s * self.efficiencies.link)

    def moving_s(self, num_bytes: Amount, multiplying_s: Amount) -> Amount:
        """An FFN instance that moves so many bytes over the link of each card, and multiplies."""
        moving = self.link_s(num_bytes)
        hidden: Amount = self.efficiencies.link_overlap * np.minimum(moving, multiplying_s)
        return multiplying_s + moving - hidden

    def all_reduce_s(self, num_bytes: Amount, cards: int) -> Amount:
        """Of so many bytes that each of `cards` has."""
        return self.link_s(2 * (cards - 1) / cards * num_bytes)

    @property
    def usable_bytes(self) -> float:
        return self.card.memory_bytes * self.efficiencies.usable_memory


def attention_s(
    attention: Attention,
    hidden_size: int,
    batch: Amount,
    context: Amount,
    precision: Precision,
    tp: int,
    on: Roofline,
    prefill: Prefill = Prefill(),
) -> Amount:
    """One layer on `tp` cards that share `batch` sequences: its core, its linears, and the all-reduce after them. The
    KV cache is read for what is decoded; a chunk of a prompt reads its own once for all its tokens."""
    kv_bytes = batch * attention.kv_bytes(context, precision.kv) / min(tp, attention.kv_shards)
    flops = batch * (attention.flops(context) + prefill.tokens * attention.flops(prefill.context))
    core = on.kernel_s(kv_bytes, flops / tp, precision.kv)
    parameters, num_tokens = attention.parameters / tp, batch * (1 + prefill.tokens)
    linears = on.kernel_s(parameters * precision.weights, 2 * parameters * num_tokens, precision.weights)
    return core + linears + on.all_reduce_s(num_tokens * hidden_size * precision.combine, tp)


def tensor_parallel_s(
    ffn: Ffn, num_tokens: Amount, instances: int, cards: int, precision: Precision, on: Roofline
) -> Amount:
    """One layer's FFN on `instances` of `cards` each, every matrix spread over all of them. Within an instance hidden
    states are gathered and partial sums scattered over the link, while another microbatch is multiplied."""
    everywhere = instances * cards
    read = ffn.parameters_read(num_tokens) * precision.weights / everywhere
    multiplying = on.kernel_s(read, ffn.flops * num_tokens / everywhere, precision.weights)
    moved = (cards - 1) / cards * num_tokens * ffn.hidden_size * (precision.dispatch + precision.combine)
    return on.moving_s(moved, multiplying)


def expert_parallel_s(
    ffn: Ffn, num_tokens: Amount, cards: int, group: int, precision: Precision, on: Roofline
) -> Amount:
    """The matrices of one layer's FFN, its experts spread over `cards`. What all tokens have is on every
    `group` of them, for the group's share of the tokens."""
    imbalance = on.efficiencies.imbalance if cards > group else 1.0
    read = ffn.routed_read(num_tokens) * precision.weights / cards
    routed = on.kernel_s(read, imbalance * ffn.routed_flops * num_tokens / cards, precision.weights)
    common = on.kernel_s(
        ffn.common_parameters * precision.weights / group,
        2 * ffn.common_parameters * num_tokens / cards,
        precision.weights,
    )
    return routed + common


@dataclass(frozen=True)
class Workload:
    """What is decoded: a model, with `context` tokens before each new one in the mean."""

    shape: ModelShape
    context: float
    precision: Precision = Precision()
    efficiencies: Efficiencies = Efficiencies()
    prefill: Prefill = Prefill()

    def tokens(self, sequences: Amount) -> Amount:
        """That a step computes for so many sequences."""
        return sequences * (1 + self.prefill.tokens)

    def on(self, card: Accelerator) -> Roofline:
        return Roofline(card, self.efficiencies)

    def attention_s(self, batch: Amount, tp: int, card: Accelerator) -> Amount:
        """All layers."""
        shape, on = self.shape, self.on(card)
        return sum(
            count * attention_s(layer, shape.hidden_size, batch, self.context, self.precision, tp, on, self.prefill)
            for layer, count in shape.attentions.items()
        )

    def kv_bytes(self, tp: int) -> float:
        """Of a sequence, on each of `tp` cards."""
        return sum(
            count * float(layer.kv_bytes(self.context, self.precision.kv)) / min(tp, layer.kv_shards)
            for layer, count in self.shape.attentions.items()
        )

    def attention_weights(self, tp: int, cards: int) -> float:
        """Bytes on each card: linears over `tp`, embedding and head over `cards`."""
        vocabulary = 2 * self.shape.vocab_size * self.shape.hidden_size / cards
        return (self.shape.attention_parameters / tp + vocabulary) * self.precision.weights

    def ffn_weights(self, cards: int, group: int) -> float:
        """Bytes on each card: experts over `cards`, what all tokens have over `group`."""
        return sum(
            count * (layer.routed_parameters / cards + layer.common_parameters / group) * self.precision.weights
            for layer, count in self.shape.ffns.items()
        )


@dataclass(frozen=True)
class Stages:
    """Seconds per step of one microbatch, all layers together, by what it occupies; `beside` is once per step. With an
    `overlap`, attention and FFN share their cards. Numbers, or arrays over batches."""

    attention: Amount
    dispatch: Amount
    ffn: Amount
    combine: Amount
    beside: float
    overlap: float | None = None

    @property
    def through_all(self) -> Amount:
        """Of a microbatch that waits for nobody."""
        return self.attention + self.dispatch + self.ffn + self.combine

    @property
    def occupied(self) -> dict[str, Amount]:
        """By what works at the same time as the others; each direction of the network does."""
        return {"attention": self.attention, "dispatch": self.dispatch, "FFN": self.ffn, "combine": self.combine}

    @property
    def slowest(self) -> str:
        return max(self.occupied, key=lambda name: float(self.occupied[name]))

    def tpot_s(self, microbatches: int) -> Amount:
        """All microbatches through the slowest stage one after the other; or one through all stages, where that takes
        longer and leaves the slowest one with gaps. So equal stages of t need 2 + t_comm / t microbatches.

        On shared cards: all that is computed and all that crosses, but for the part of the shorter that is hidden.
        """
        if self.overlap is not None:
            computing, crossing = (
                microbatches * time for time in (self.attention + self.ffn, self.dispatch + self.combine)
            )
            hidden = self.overlap * np.minimum(computing, crossing) if microbatches > 1 else 0.0
            return computing + crossing - hidden + self.beside
        busiest = np.maximum.reduce([np.asarray(time, float) for time in np.broadcast_arrays(*self.occupied.values())])
        slower: Amount = np.maximum(microbatches * busiest, self.through_all)
        return slower + self.beside
