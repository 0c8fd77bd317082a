"""What a simulation has seen: percentiles, time series, and how busy everything was."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_LEAST_S, _STEP, _BINS = 1e-6, 0.005, 6000  # up to 1e7 s, each bin 0.5 % wide


class Durations:
    """Seconds, each so many times: the mean, and percentiles to 0.25 %, in a memory that does not grow."""

    def __init__(self) -> None:
        self._bins: Floats = np.zeros(_BINS)
        self._sum = 0.0

    def add(self, seconds: Floats, times: Floats | None = None) -> None:
        bins = np.log(np.maximum(seconds, _LEAST_S) / _LEAST_S) / _STEP
        self._bins += np.bincount(np.minimum(bins, _BINS - 1).astype(np.int64), times, _BINS)
        self._sum += float(seconds.sum() if times is None else seconds @ times)

    @property
    def count(self) -> float:
        return float(self._bins.sum())

    @property
    def mean(self) -> float | None:
        return self._sum / self.count if self.count else None

    def percentile(self, percent: float) -> float | None:
        if not self.count:
            return None
        reached = int(np.searchsorted(np.cumsum(self._bins), percent / 100 * self.count))
        return float(_LEAST_S * np.exp((min(reached, _BINS - 1) + 0.5) * _STEP))


class Sum:
    """Over time, in bins of a second."""

    def __init__(self, seconds: float) -> None:
        self.bins: Floats = np.zeros(int(np.ceil(seconds)))
        self._seconds = seconds
        self.later = 0.0  # what came after the end

    def add(self, at_s: Floats, amount: ArrayLike) -> None:
        amounts = np.broadcast_to(np.asarray(amount, float), at_s.shape)
        within = at_s < self._seconds
        self.bins += np.bincount(at_s[within].astype(np.int64), amounts[within], len(self.bins))
        self.later += float(amounts[~within].sum())

    @property
    def total(self) -> float:
        return float(self.bins.sum())


class Samples:
    """Of something that is looked at every now and then, at one or many: means over all and over each second, and the
    most."""

    def __init__(self, seconds: float) -> None:
        self._sums: Floats = np.zeros(int(np.ceil(seconds)))
        self._counts: Floats = np.zeros(len(self._sums))
        self.most = 0.0

    def add(self, at_s: float, values: ArrayLike) -> None:
        self._sums[int(at_s)] += np.asarray(values, float).mean()
        self._counts[int(at_s)] += 1
        self.most = max(self.most, float(np.max(values)))

    @property
    def bins(self) -> Floats:
        means: Floats = self._sums / np.maximum(self._counts, 1)
        return means

    @property
    def mean(self) -> float:
        return float(self._sums.sum() / self._counts.sum())
