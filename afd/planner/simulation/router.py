"""Which attention replica a request goes to, and those that wait there."""

from __future__ import annotations

import numpy as np

from afd.planner.simulation.sequences import NONE, Floats, Ints, Mask, Requests, first_of_row, joined


def least_loaded(load: Ints, room: Ints, count: int, rng: np.random.Generator) -> Ints:
    """Rows for so many requests, or as many as there is room for: each to the one with the least `load` then, ties at
    random. Those who come are counted, so the first `count` of all places, ordered by the load they are taken at."""
    rows = rng.permutation(np.flatnonzero(room > 0))
    level = _level(load[rows], room[rows], count)
    places = np.clip(level + 1 - load[rows], 0, room[rows])
    each = np.repeat(rows, places)
    taken_at = np.repeat(load[rows], places) + np.arange(len(each)) - np.repeat(np.cumsum(places) - places, places)
    return each[np.argsort(taken_at, kind="stable")][:count]


def _level(load: Ints, room: Ints, count: int) -> int:
    """The least load that rows reach when so many come, each row up to its room; by halving."""
    if not len(load):
        return 0
    low, high = int(load.min()), int((load + room).max())
    while low < high:
        middle = (low + high) // 2
        if np.clip(middle + 1 - load, 0, room).sum() >= count:
            high = middle
        else:
            low = middle + 1
    return low


class Waiting:
    """Requests that have their replica, and not yet their turn: by rows, and within a row as they came."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self.rows: Ints = np.empty(0, np.int64)
        self.requests = NONE
        self.kv_bytes: Floats = np.empty(0)

    @property
    def count(self) -> Ints:
        return np.bincount(self.rows, minlength=self._num_rows)

    def come(self, by_s: float) -> int:
        return int(np.count_nonzero(self.requests.arrived_s <= by_s))

    def next_s(self, units: int) -> Floats:
        """When the first of each unit comes, or inf; rows of a unit are `units` apart."""
        first = np.full(units, np.inf)
        np.minimum.at(first, self.rows % units, self.requests.arrived_s)
        return first

    def put(self, rows: Ints, requests: Requests, kv_bytes: Floats) -> None:
        rows = np.concatenate([self.rows, rows])
        requests = joined([self.requests, requests])
        order = np.lexsort((requests.arrived_s, rows))
        self.rows, self.requests = rows[order], requests[order]
        self.kv_bytes = np.concatenate([self.kv_bytes, kv_bytes])[order]

    def admit(self, now_s: Floats, most: Ints, free_bytes: Floats) -> tuple[Ints, Requests, Floats]:
        """Of each row those that have come, at most so many, as long as they fit; none that comes later goes first."""
        first = first_of_row(self.rows)
        summed = np.cumsum(self.kv_bytes)
        together = summed - summed[first] + self.kv_bytes[first]
        fits = (np.arange(len(first)) - first < most[self.rows]) & (together <= free_bytes[self.rows])
        return self.take(fits & (self.requests.arrived_s <= now_s[self.rows]))

    def take(self, chosen: Mask) -> tuple[Ints, Requests, Floats]:
        found = self.rows[chosen], self.requests[chosen], self.kv_bytes[chosen]
        self.rows, self.requests, self.kv_bytes = self.rows[~chosen], self.requests[~chosen], self.kv_bytes[~chosen]
        return found
