"""The tables of the Step-3 paper (arXiv 2507.19427), computed, beside what it prints: cost analysis and results."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from afd.planner.accelerators import Accelerator, load_accelerators
from afd.planner.cost import KvFormat, Pair, TokenCost, cheapest_pair, min_sparsity, token_cost
from afd.planner.deployment import Collocated, Disaggregated
from afd.planner.estimate import Estimate, estimate
from afd.planner.shape import ModelShape, load_shape
from afd.planner.stages import Efficiencies, Precision, Roofline, Workload, attention_s

CARDS = ("H800", "H20", "A800", "910B")
CONTEXTS = (8192, 32768)
_STATED = Efficiencies()
AFD = "AFD"  # each part on its cheapest card
DOLLARS = "$/Mtoken"
TPOT_S = 0.05

_EIGHT_BITS = KvFormat()
_WHOLE_IN_BF16 = KvFormat(whole_context_bytes=2)
MODELS = {
    "DeepSeek-V3": ("deepseek-v3", _EIGHT_BITS),
    "Kimi K2": ("kimi-k2", _EIGHT_BITS),
    "Qwen3 MoE 235B-A22B": ("qwen3-235b-a22b", _EIGHT_BITS),
    "Qwen3 32B": ("qwen3-32b", _EIGHT_BITS),
    "Llama 4 Maverick": ("llama-4-maverick", _WHOLE_IN_BF16),
    "MiniMax M1": ("minimax-m1", _WHOLE_IN_BF16),
    "ERNIE 4.5": ("ernie-4.5-300b-a47b", _EIGHT_BITS),
    "Pangu Pro MoE": ("pangu-pro-moe", _EIGHT_BITS),
    "Step-3": ("step-3", _EIGHT_BITS),
}


@dataclass(frozen=True)
class Cell:
    """A number of a table, and what the paper prints for it where that is known."""

    quantity: str
    model: str | None
    context: int | None
    card: str | None
    value: float
    unit: str
    printed: float | None = None


@dataclass(frozen=True)
class Published:
    """A result of Step-3 on H800 at a TPOT of 50 ms, with weights of 8 bits."""

    num_attention: int
    num_ffn: int
    context: int
    kv_element_bytes: int
    tokens_per_s_per_card: float

    def predicted(self, efficiencies: Efficiencies = _STATED) -> Estimate:
        h800 = cards()["H800"]
        deployment = Disaggregated(h800, h800, self.num_attention, self.num_ffn)
        workload = Workload(shape_of("Step-3"), self.context, Precision(kv=self.kv_element_bytes), efficiencies)
        return estimate(deployment, workload, TPOT_S)


PUBLISHED = (
    Published(3, 2, 4096, 2, 3321),
    Published(2, 2, 4096, 1, 4039),
    Published(4, 2, 8192, 1, 2643),
)


@dataclass(frozen=True)
class PublishedExpertParallel:
    """A result of DeepSeek-V3 on H800: weights of 8 bits, a KV cache in BF16, two microbatches."""

    num_cards: int
    context: int
    tpot_s: float
    tokens_per_s_per_card: float

    def predicted(self) -> Estimate:
        workload = Workload(shape_of("DeepSeek-V3"), self.context, Precision(kv=2))
        return estimate(Collocated(cards()["H800"], self.num_cards), workload, self.tpot_s)


PUBLISHED_EXPERT_PARALLEL = (
    PublishedExpertParallel(128, 4096, 128 / 2324, 2324),  # the published profile has 128 sequences per card
    PublishedExpertParallel(144, 4989, TPOT_S, 1850),  # the mean of a day of serving, at 20 to 22 tokens/s each
)


@dataclass(frozen=True)
class MeasuredLayer:
    """One attention layer with its linears, 64 sequences per card, a KV cache in BF16; as the paper has it."""

    model: str
    context: int
    card: str
    measured_us: float

    @property
    def predicted_us(self) -> float:
        shape = shape_of(self.model)
        layer, on = shape.layers[0][0], Roofline(cards()[self.card])
        return 1e6 * float(attention_s(layer, shape.hidden_size, 64, self.context, Precision(kv=2), 1, on))


MEASURED_LAYERS = (
    MeasuredLayer("Step-3", 8192, "H800", 281),
    MeasuredLayer("Step-3", 8192, "H20", 438),
    MeasuredLayer("Step-3", 8192, "A800", 531),
    MeasuredLayer("Step-3", 32768, "H800", 791),
    MeasuredLayer("Step-3", 32768, "H20", 1452),
    MeasuredLayer("Step-3", 32768, "A800", 1484),
    MeasuredLayer("DeepSeek-V3", 8192, "H800", 372),
    MeasuredLayer("DeepSeek-V3", 8192, "H20", 1252),
    MeasuredLayer("DeepSeek-V3", 32768, "H800", 1125),
    MeasuredLayer("DeepSeek-V3", 32768, "H20", 4817),
)


@cache
def cards() -> dict[str, Accelerator]:
    every = load_accelerators()
    return {name: every[name] for name in CARDS}


@cache
def shape_of(model: str) -> ModelShape:
    return load_shape(MODELS[model][0])


def cost_of(model: str, context: float) -> TokenCost:
    return token_cost(shape_of(model), context, MODELS[model][1])


def cells() -> list[Cell]:
    """All of them."""
    printed = tomllib.loads(Path(__file__).with_name("paper.toml").read_text(encoding="utf-8"))
    found = list(_of_cards(printed["roofline"]))
    for model in MODELS:
        for context in CONTEXTS:
            at_8k = context == CONTEXTS[0]
            found += _of_token(model, context, printed["per_token"][model] if at_8k else [None] * 4)
            found += _of_money(model, context, printed["attention_dollars"][model] if at_8k else [None] * 4)
            found += _of_ffn_money(model, context, printed["ffn_dollars"][model])
            found.append(_best_total(model, context, printed["total_dollars"].get(model) if at_8k else None))
            found.append(_intensity(model, context, printed["intensity"].get(model)))
    return found


def _of_cards(rooflines: dict[str, float]) -> Iterator[Cell]:
    step3 = shape_of("Step-3")
    for name, card in cards().items():
        yield Cell("unit_flop", None, None, name, card.unit_flop, "$/FLOP")
        yield Cell("unit_byte", None, None, name, card.unit_byte, "$/byte")
        yield Cell("roofline", None, None, name, card.roofline, "FLOP/byte", rooflines[name])
        yield Cell("min_sparsity", "Step-3", None, name, min_sparsity(step3, card, TPOT_S), "1")


def _of_token(model: str, context: int, printed: Sequence[float | None]) -> Iterator[Cell]:
    cost = cost_of(model, context)
    yield Cell("kv_bytes", model, context, None, cost.kv_bytes, "byte", printed[0])
    yield Cell("attention_flops", model, context, None, cost.attention_flops, "FLOP", printed[1])
    yield Cell("linear_flops", model, context, None, cost.linear_flops, "FLOP", printed[2])
    yield Cell("ffn_flops", model, context, None, cost.ffn_flops, "FLOP", printed[3])


def _of_money(model: str, context: int, printed: Sequence[float | None]) -> Iterator[Cell]:
    """On one kind of card: attention's part, and both together."""
    cost = cost_of(model, context)
    for (name, card), known in zip(cards().items(), printed, strict=True):
        yield Cell("attention_cost", model, context, name, cost.attention_dollars(card), DOLLARS, known)
        yield Cell("total_cost", model, context, name, Pair(card, card).dollars(cost), DOLLARS)


def _of_ffn_money(model: str, context: int, printed: Sequence[float]) -> Iterator[Cell]:
    cost = cost_of(model, context)
    for (name, card), known in zip(cards().items(), printed, strict=True):
        yield Cell("ffn_cost", model, context, name, cost.ffn_dollars(card), DOLLARS, known)


def _best_total(model: str, context: int, printed: float | None) -> Cell:
    cost = cost_of(model, context)
    return Cell(
        "total_cost", model, context, AFD, cheapest_pair(cost, cards().values()).dollars(cost), DOLLARS, printed
    )


def _intensity(model: str, context: int, printed: float | None) -> Cell:
    return Cell("intensity", model, context, None, cost_of(model, context).intensity, "FLOP/byte", printed)
