"""The pipeline of many units at once: attention, dispatch, FFN, combine, layer by layer, of microbatches in turn.

Each replica and each direction of its link serves microbatches as they come, and since all pass the same ring none
overtakes another. So a stage of a microbatch begins when its predecessor is through and the replica is free, which is a
recursion of maxima and sums, and needs no queue of events; an array has its time in every unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]

_DRAWS = 1 << 20


class Jitter:
    """Factors of mean 1: a slice, from a place drawn anew each time, of a pool of lognormal draws."""

    def __init__(self, variation: float, most: int, rng: np.random.Generator) -> None:
        sigma = float(np.sqrt(np.log1p(variation**2)))
        self._pool = rng.lognormal(-(sigma**2) / 2, sigma, _DRAWS + most) if variation else None
        self._rng = rng

    def places(self, count: int) -> list[int]:
        return [] if self._pool is None else self._rng.integers(_DRAWS, size=count).tolist()

    def of(self, durations: Times, places: list[int]) -> Times:
        """At the next of these places."""
        if self._pool is None:
            return durations
        place = places.pop()
        return durations * self._pool[place : place + durations.size].reshape(durations.shape)


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one step's stages in each kind of layer: attention and dispatch [kinds, m, x, units], FFN and combine
    [kinds, m, y, units]; and what a step has beside its layers, [m, x, units]."""

    attention: Times
    dispatch: Times
    ffn: Times
    combine: Times
    beside: Times


class Pipeline:
    """`ready` [m, units] is when a microbatch has its last step behind it, `ffn` [y, units] when an FFN replica has."""

    def __init__(self, microbatches: int, x: int, y: int, units: int, kinds: Sequence[int], jitter: Jitter) -> None:
        """`kinds` says of which kind each layer is."""
        self.ready: Times = np.zeros((microbatches, units))
        self.ffn: Times = np.zeros((y, units))
        self._attention: Times = np.zeros((x, units))
        self._dispatch: Times = np.zeros((x, units))
        self._combine: Times = np.zeros((y, units))
        self._kinds = kinds
        self._jitter = jitter

    def step(self, units: NDArray[np.intp], times: StageTimes) -> Times:
        """All microbatches of these units through all layers; `ready` afterwards."""
        state = (self.ready, self._attention, self._dispatch, self.ffn, self._combine)
        ready, attention, dispatch, ffn, combine = (free[:, units] for free in state)
        of = self._jitter.of
        for layer_idx, kind in enumerate(self._kinds):
            places = self._jitter.places(4 * len(ready))
            for j in range(len(ready)):
                attending = times.attention[kind, j] if layer_idx else times.attention[kind, j] + times.beside[j]
                _serve(attention, ready[j], of(attending, places))
                _serve(dispatch, attention, of(times.dispatch[kind, j], places))
                _serve(ffn, _last(dispatch), of(times.ffn[kind, j], places))
                _serve(combine, ffn, of(times.combine[kind, j], places))
                ready[j] = _last(combine)
        for free, after in zip(state, (ready, attention, dispatch, ffn, combine), strict=True):
            free[:, units] = after
        return ready


def _serve(free: Times, ready: Times, takes: Times) -> None:
    """From when both are, and for so long; `free` [replicas, units] is then when each is free again."""
    np.maximum(free, ready, out=free)
    free += takes


def _last(times: Times) -> Times:
    """Of all replicas, [n, units] -> [units]."""
    return reduce(np.maximum, times)  # much faster than max(axis=0), of few long rows
