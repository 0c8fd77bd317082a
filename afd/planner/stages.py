"""How long the parts of a layer take, from a roofline: bytes over bandwidth or FLOPs over FLOP/s, whichever is longer,
each peak times an efficiency that is stated."""

from __future__ import annotations

from dataclasses import dataclass

from afd.planner.accelerators import Accelerator
from afd.planner.layers import Attention, Ffn
from afd.planner.shape import ModelShape


@dataclass(frozen=True)
class Efficiencies:
    """The share of each peak that is reached: one set for all models, cards and deployments. docs/planner.md says where
    they come from. `step_s` is what a step takes beside its layers: head, sampling, scheduling."""

    memory: float = 0.80
    flops: float = 0.75
    link: float = 0.75
    network: float = 0.80
    network_latency_s: float = 20e-6
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
class Roofline:
    """A card as it performs. Times in seconds."""

    card: Accelerator
    efficiencies: Efficiencies = Efficiencies()

    def kernel_s(self, num_bytes: float, flops: float, element_bytes: float) -> float:
        reading = num_bytes / (self.card.memory_bytes_per_s * self.efficiencies.memory)
        return max(reading, flops / (self.card.flops_per_s(element_bytes) * self.efficiencies.flops))

    def link_s(self, num_bytes: float) -> float:
        """To the other cards of the server."""
        return num_bytes / (self.card.link_bytes_per_s * self.efficiencies.link)

    def network_s(self, num_bytes: float) -> float:
        """To another server, one way."""
        sending = num_bytes / (self.card.nic_bytes_per_s * self.efficiencies.network)
        return self.efficiencies.network_latency_s + sending

    @property
    def usable_bytes(self) -> float:
        return self.card.memory_bytes * self.efficiencies.usable_memory


def attention_s(
    attention: Attention, hidden_size: int, batch: float, context: float, precision: Precision, tp: int, on: Roofline
) -> float:
    """One layer on `tp` cards that share `batch` sequences: its core, its linears, and the all-reduce after them."""
    kv_bytes = batch * attention.kv_bytes(context, precision.kv) / min(tp, attention.kv_shards)
    core = on.kernel_s(kv_bytes, batch * attention.flops(context) / tp, precision.kv)
    parameters = attention.parameters / tp
    linears = on.kernel_s(parameters * precision.weights, 2 * parameters * batch, precision.weights)
    return core + linears + on.link_s(2 * (tp - 1) / tp * batch * hidden_size * precision.combine)


def ffn_s(ffn: Ffn, num_tokens: float, instances: int, cards: int, precision: Precision, on: Roofline) -> float:
    """One layer on `instances` of `cards` each, among which its weights are spread. Within an instance hidden states
    are gathered and partial sums scattered over the link, while the matrices are multiplied."""
    everywhere = instances * cards
    read = ffn.parameters_read(num_tokens) * precision.weights / everywhere
    multiplying = on.kernel_s(read, ffn.flops * num_tokens / everywhere, precision.weights)
    moved = (cards - 1) / cards * num_tokens * ffn.hidden_size * (precision.dispatch + precision.combine)
    return max(multiplying, on.link_s(moved))


@dataclass(frozen=True)
class Workload:
    """What is decoded: a model, with `context` tokens before each new one in the mean."""

    shape: ModelShape
    context: float
    precision: Precision = Precision()
    efficiencies: Efficiencies = Efficiencies()

    def on(self, card: Accelerator) -> Roofline:
        return Roofline(card, self.efficiencies)

    def attention_s(self, batch: float, tp: int, card: Accelerator) -> float:
        """All layers."""
        shape, on = self.shape, self.on(card)
        return sum(
            count * attention_s(layer, shape.hidden_size, batch, self.context, self.precision, tp, on)
            for layer, count in shape.attentions.items()
        )

    def ffn_s(self, num_tokens: float, instances: int, cards: int, card: Accelerator) -> float:
        """All layers."""
        on = self.on(card)
        return sum(
            count * ffn_s(layer, num_tokens, instances, cards, self.precision, on)
            for layer, count in self.shape.ffns.items()
        )

    def kv_bytes(self, tp: int) -> float:
        """Of a sequence, on each of `tp` cards."""
        return sum(
            count * layer.kv_bytes(self.context, self.precision.kv) / min(tp, layer.kv_shards)
            for layer, count in self.shape.attentions.items()
        )

    def attention_weights(self, tp: int, cards: int) -> float:
        """Bytes on each card: linears over `tp`, embedding and head over `cards`."""
        vocabulary = 2 * self.shape.vocab_size * self.shape.hidden_size / cards
        return (self.shape.attention_parameters / tp + vocabulary) * self.precision.weights


@dataclass(frozen=True)
class Stages:
    """Seconds per step of one microbatch, all layers together, by what it occupies; `beside` is once per step."""

    attention: float
    dispatch: float
    ffn: float
    combine: float
    beside: float

    @property
    def through_all(self) -> float:
        """Of a microbatch that waits for nobody."""
        return self.attention + self.dispatch + self.ffn + self.combine

    @property
    def occupied(self) -> dict[str, float]:
        """By what works at the same time as the others; each direction of the network does."""
        return {"attention": self.attention, "dispatch": self.dispatch, "FFN": self.ffn, "combine": self.combine}

    @property
    def slowest(self) -> str:
        return max(self.occupied, key=lambda name: self.occupied[name])

    def tpot_s(self, microbatches: int) -> float:
        """All microbatches through the slowest stage one after the other; or one through all stages, where that takes
        longer and leaves the slowest one with gaps. So equal stages of t need 2 + t_comm / t microbatches."""
        return max(microbatches * self.occupied[self.slowest], self.through_all) + self.beside
