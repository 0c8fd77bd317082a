"""What a step takes, from the deployment's roofline and from what each replica has in it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from afd.planner.accelerators import Accelerator
from afd.planner.deployment import Collocated, Disaggregated
from afd.planner.layers import Amount
from afd.planner.simulation.pipeline import StageTimes
from afd.planner.simulation.scenario import Scenario
from afd.planner.stages import Prefill, Stages, Workload, attention_s

Array = NDArray[np.float64]
Units = NDArray[np.intp]
Busy = dict[str, Array]

STAGES = ("attention", "dispatch", "FFN", "combine")

_HARDLY_ANY = 1e-6  # of sequences that decode, where prompts are counted by each of them


@dataclass(frozen=True)
class Load:
    """Of each microbatch and attention replica, [m, x, units]: sequences that decode, and their contexts summed up;
    tokens of prompts, and the contexts that those follow."""

    decoding: Array
    context: Array
    prompt: Array
    prompt_context: Array

    @property
    def tokens(self) -> Array:
        """That are computed."""
        return self.decoding + self.prompt


class Costs:
    """Some replicas are slower by a factor: attention [x, units], FFN [y, units]."""

    def __init__(self, scenario: Scenario, attention_factor: Array, ffn_factor: Array) -> None:
        shape = scenario.workload.shape
        kinds = list(dict.fromkeys(shape.layers))
        self.kinds = [kinds.index(layer) for layer in shape.layers]
        self._counts = np.bincount(self.kinds)
        self._layers = [replace(scenario.workload, shape=replace(shape, layers=(kind,))) for kind in kinds]
        self._scenario = scenario
        self._attention_factor, self._ffn_factor = attention_factor, ffn_factor

    def of(self, load: Load, units: Units) -> tuple[StageTimes, Busy]:
        """And how long each stage's replicas are at work in the step, in the mean, [units]."""
        present = load.tokens > 0
        beside = self._scenario.workload.efficiencies.step_s / np.maximum(present.any(axis=1).sum(axis=0), 1) * present
        slow_attention, slow_ffn = self._attention_factor[:, units], self._ffn_factor[:, units]
        kinds = [self._stages(layer, load) for layer in self._layers]
        if isinstance(self._scenario.deployment, Collocated):
            return self._shared(kinds, slow_attention, present, beside)
        in_unit = present.any(axis=1, keepdims=True)
        x, y = np.ones_like(slow_attention), np.ones_like(slow_ffn)
        times = StageTimes(
            np.stack([kind.attention * slow_attention * present for kind in kinds]),
            np.stack([_each(kind.dispatch) * x * in_unit for kind in kinds]),
            np.stack([_each(kind.ffn) * slow_ffn * in_unit for kind in kinds]),
            np.stack([_each(kind.combine) * y * in_unit for kind in kinds]),
            beside,
        )
        stages = {"attention": times.attention, "dispatch": times.dispatch, "FFN": times.ffn, "combine": times.combine}
        busy = {name: np.einsum("k,kmrn->n", self._counts, taken) / taken.shape[2] for name, taken in stages.items()}
        busy["attention"] += beside.sum(axis=0).mean(axis=0)
        return times, busy

    def _shared(
        self, kinds: list[Stages], factor: Array, present: NDArray[np.bool_], beside: Array
    ) -> tuple[StageTimes, Busy]:
        """All microbatches in one turn, and all that takes time in its attention, as the stages' formula has it."""
        microbatches = self._scenario.deployment.microbatches
        whole = np.stack([replace(kind, beside=0.0).tpot_s(microbatches) * factor * present for kind in kinds])
        none = np.zeros_like(whole)
        taken = [microbatches * count * factor * present for count in self._counts]
        busy = {
            name: sum(part * kind.occupied[name] for part, kind in zip(taken, kinds, strict=True))[0, 0]
            for name in kinds[0].occupied
        }
        return StageTimes(whole, none, none, none, beside), busy

    def _stages(self, layer: Workload, load: Load) -> Stages:
        """Of one layer: attention [m, x, units] of what each replica has, the others [m, units] of what all have."""
        scenario = self._scenario
        deployment, shape = scenario.deployment, layer.shape
        parts = deployment.microbatches if scenario.shared else 1
        share = 1 / (parts * scenario.groups)
        decoding = np.maximum(load.decoding, _HARDLY_ANY)
        attention = attention_s(
            shape.layers[0][0],
            shape.hidden_size,
            decoding * share,
            load.context / decoding,
            layer.precision,
            deployment.tp,
            layer.on(_attention_card(deployment)),
            Prefill(load.prompt / decoding, load.prompt_context / np.maximum(load.prompt, 1)),
        )
        mean = load.tokens.mean(axis=1) * share
        others = deployment.stages(layer, mean[:, None] if scenario.shared else mean)
        return replace(others, attention=attention)

    def kv_bytes(self, tokens: NDArray[np.int64] | Array) -> Array:
        """Of a sequence of so many tokens, on each card of its group."""
        scenario = self._scenario
        element_bytes = scenario.workload.precision.kv
        total = np.zeros(np.shape(tokens))
        for layer, count in scenario.workload.shape.attentions.items():
            shards = min(scenario.deployment.tp, layer.kv_shards)
            total += count * layer.kv_bytes(np.asarray(tokens, float), element_bytes) / shards
        return total


def _attention_card(deployment: Disaggregated | Collocated) -> Accelerator:
    return deployment.card if isinstance(deployment, Collocated) else deployment.attention


def _each(taken: Amount) -> Array:
    """Of each replica: [m, units] -> [m, 1, units]."""
    return np.asarray(taken, float)[:, None]
