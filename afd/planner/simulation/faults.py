"""What happens to units at which moment: failures, drawn in advance, and scaling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from afd.planner.simulation.scenario import Scaling, Scenario


@dataclass(frozen=True)
class AttentionLost:
    at_s: float
    unit: int
    replica: int


@dataclass(frozen=True)
class FfnLost:
    at_s: float
    unit: int
    replica: int


Happening = AttentionLost | FfnLost | Scaling


def happenings(scenario: Scenario, rng: np.random.Generator) -> list[Happening]:
    """The first last."""
    found = [*scenario.conditions.scaling, *_failures(scenario, rng)]
    return sorted(found, key=lambda happening: -happening.at_s)


def _failures(scenario: Scenario, rng: np.random.Generator) -> Iterator[AttentionLost | FfnLost]:
    """Each replica's are a Poisson process, so all of them together are one, too."""
    between = scenario.conditions.mean_time_between_failures_s
    if between is None:
        return
    ffn = 0 if scenario.shared else scenario.ffn_replicas
    replicas = scenario.attention_replicas + ffn
    count = rng.poisson(scenario.most_units * replicas * scenario.seconds / between)
    for at_s in rng.uniform(0, scenario.seconds, count):
        unit, replica = int(rng.integers(scenario.most_units)), int(rng.integers(replicas))
        if replica < scenario.attention_replicas:
            yield AttentionLost(float(at_s), unit, replica)
        else:
            yield FfnLost(float(at_s), unit, replica - scenario.attention_replicas)
