"""Into how many microbatches steps are cut (docs/adr/0007)."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

_SETTLING_STEPS = 1  # of a new number, that are not like those to come: sequences are still where they were
_TRIES = 3  # steps measured of each number of microbatches
_KEPT_STEPS = 500  # steps with the number found, before all are tried again
_MARGIN = 0.05  # a gain below this is noise


@dataclass
class _Trial:
    """What each number of microbatches took, of steps of one size: nanoseconds a token."""

    times: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    num_kept_steps: int = 0
    best: int = 0

    def choose(self, candidates: Sequence[int]) -> int:
        """One after the other until all are measured; then the best, or as good as the best."""
        for number in candidates:
            if not self._is_measured(number):
                return number
        medians = {number: statistics.median(self.times[number][_SETTLING_STEPS:]) for number in candidates}
        good = [number for number in candidates if medians[number] <= min(medians.values()) * (1 + _MARGIN)]
        if self.best not in good:
            self.best = good[0]
        return self.best

    def observe(self, number: int, ns_per_token: float) -> None:
        if not self._is_measured(number):
            self.times[number].append(ns_per_token)
        elif self.num_kept_steps < _KEPT_STEPS:
            self.num_kept_steps += 1
        else:
            self.num_kept_steps = 0
            self.times.clear()

    def _is_measured(self, number: int) -> bool:
        return len(self.times[number]) == _SETTLING_STEPS + _TRIES


class Pipeline:
    """The number of microbatches that makes a step shortest, found by trying, for each number of sequences anew."""

    def __init__(self, candidates: range) -> None:
        """candidates: the numbers to choose from; a single one is what there is."""
        self.candidates = candidates
        self._trials: defaultdict[int, _Trial] = defaultdict(_Trial)  # by the bits of the number of sequences
        self._chosen: tuple[_Trial, int] | None = None

    @property
    def most(self) -> int:
        return self.candidates[-1]

    def choose(self, num_sequences: int) -> int:
        """For the next step; what is tried is never more than it has sequences."""
        candidates = [number for number in self.candidates if number <= num_sequences]
        if len(candidates) < 2:
            self._chosen = None
            return self.candidates[0]
        trial = self._trials[num_sequences.bit_length()]
        number = trial.choose(candidates)
        self._chosen = trial, number
        return number

    def observe(self, ns_per_token: float) -> None:
        """What the step took that a number was last chosen for, if nothing but that number and its size made it so."""
        if self._chosen:
            trial, number = self._chosen
            trial.observe(number, ns_per_token)
