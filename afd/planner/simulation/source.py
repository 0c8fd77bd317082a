"""Where requests come from."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from afd.planner.simulation.scenario import Rate, Replay, Scenario
from afd.planner.simulation.sequences import Floats, Ints, Requests


class Sampled(Protocol):
    def sample(self, rng: np.random.Generator, count: int) -> tuple[Ints, Ints]:
        """Prompts and outputs."""


class Within:
    """Lengths, but for what is more than `longest` tokens: outputs end there, and prompts one token before."""

    def __init__(self, lengths: Sampled, longest: int) -> None:
        self._lengths, self._longest = lengths, longest

    def sample(self, rng: np.random.Generator, count: int) -> tuple[Ints, Ints]:
        return self.cut(*self._lengths.sample(rng, count))

    def cut(self, prompts: Ints, outputs: Ints) -> tuple[Ints, Ints]:
        prompts = np.minimum(prompts, self._longest - 1)
        return prompts, np.minimum(outputs, self._longest - prompts)


class Source:
    def __init__(self, scenario: Scenario, lengths: Within, rng: np.random.Generator) -> None:
        self._arrivals, self._lengths, self._rng = scenario.arrivals, lengths, rng

    def between(self, start_s: float, end_s: float) -> Requests:
        """That come then of their own accord."""
        if isinstance(self._arrivals, Rate):
            count = int(self._rng.poisson(self._arrivals.per_s * (end_s - start_s)))
            return self.at(np.sort(self._rng.uniform(start_s, end_s, count)))
        if isinstance(self._arrivals, Replay):
            recorded, at_s = self._arrivals.requests, self._arrivals.at_s
            part = slice(*np.searchsorted(at_s, (start_s, end_s)).tolist())
            lengths = self._lengths.cut(recorded.prompts[part], recorded.outputs[part])
            return requests(*lengths, at_s[part])
        return self.at(np.empty(0))

    def at(self, arrived_s: Floats) -> Requests:
        """One at each of these moments, of lengths that are drawn."""
        return requests(*self._lengths.sample(self._rng, len(arrived_s)), arrived_s)


def requests(context: Ints, output: Ints, arrived_s: Floats) -> Requests:
    return Requests(context, output, arrived_s, np.zeros(len(context), bool))
