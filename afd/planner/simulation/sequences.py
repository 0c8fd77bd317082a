"""Sequences: those that wait, those whose prompt is computed, those that decode. All of one kind in arrays.

A row is an attention replica; `turn` is how many steps its unit has done.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

_FREE, NO_TURN = -1, -2  # turns that never are


@dataclass(frozen=True)
class Requests:
    """`context` tokens are to be there before the first of `output` others; `resumed` ones had shown some before they
    were lost. Arrays of the same length."""

    context: Ints
    output: Ints
    arrived_s: Floats
    resumed: Mask

    def __len__(self) -> int:
        return len(self.context)

    def __getitem__(self, chosen: slice | Ints | Mask) -> Requests:
        return Requests(self.context[chosen], self.output[chosen], self.arrived_s[chosen], self.resumed[chosen])


def joined(parts: list[Requests]) -> Requests:
    return Requests(
        np.concatenate([part.context for part in parts]),
        np.concatenate([part.output for part in parts]),
        np.concatenate([part.arrived_s for part in parts]),
        np.concatenate([part.resumed for part in parts]),
    )


NONE = Requests(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0, bool))


class Backlog:
    """First come, first served; but those that are resumed go first."""

    def __init__(self) -> None:
        self._parts: deque[Requests] = deque()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def tokens_to_come(self) -> int:
        return int(sum(part.output.sum() for part in self._parts))

    def append(self, requests: Requests) -> None:
        self._parts.append(requests)
        self._count += len(requests)

    def put_first(self, requests: Requests) -> None:
        self._parts.appendleft(requests)
        self._count += len(requests)

    def take(self, count: int) -> Requests:
        """So many, or all that there are."""
        taken = [NONE]
        while count > 0 and self._parts:
            part = self._parts.popleft()
            taken.append(part[:count])
            if len(part) > count:
                self._parts.appendleft(part[count:])
            count -= len(taken[-1])
        found = joined(taken)
        self._count -= len(found)
        return found


class Decoding:
    """Of one microbatch: a table of slots [rows, slots], in int32 since there may be many millions. A slot holds the
    turn that is a sequence's last one, and how long it is then."""

    def __init__(self, rows: int, slots: int) -> None:
        self.count: Ints = np.zeros(rows, np.int64)
        self.context: Ints = np.zeros(rows, np.int64)
        self._last = np.full((rows, slots), _FREE, np.int32)
        self._length = np.zeros((rows, slots), np.int32)
        self._free = np.tile(np.arange(slots, dtype=np.int32), (rows, 1))

    def put(self, rows: Ints, turn: Ints, context: Ints, output: Ints) -> None:
        """Into these rows, which are in order; `turn` is the first that each decodes in."""
        free = self._last.shape[1] - self.count[rows] - 1 - place_in_row(rows)
        if len(rows) and free.min() < 0:
            free += self._grow(-int(free.min()))
        slots = self._free[rows, free]
        self._last[rows, slots] = turn + output - 1
        self._length[rows, slots] = context + output
        self._add(rows, context, 1)

    def finish(self, turn: Ints) -> tuple[Ints, Ints]:
        """After `turn` [rows], or NO_TURN: rows of those whose last it was, in order, and how long they are."""
        took = np.flatnonzero(turn != NO_TURN)
        self.context[took] += self.count[took]
        table = self._last if len(took) == len(turn) else self._last[took]
        found, slots = _where(table == turn[took, None].astype(np.int32))
        return self._take(took[found], slots)

    def lose(self, row: int, turn: int) -> tuple[Ints, Ints]:
        """All of a row whose next turn that is: contexts, and tokens to come."""
        slots = np.flatnonzero(self._last[row] != _FREE)
        output = self._last[row, slots].astype(np.int64) - turn + 1
        context = self._length[row, slots] - output
        self.context[row] += int(output.sum())  # as if they had been decoded, for they are taken out in full length
        self._take(np.full(len(slots), row), slots)
        return context, output

    def tokens_to_come(self, turn: Ints) -> int:
        """`turn` [rows] is the next of each."""
        rows, slots = _where(self._last != _FREE)
        return int((self._last[rows, slots] - turn[rows] + 1).sum())

    def _take(self, rows: Ints, slots: Ints) -> tuple[Ints, Ints]:
        length = self._length[rows, slots].astype(np.int64)
        self._last[rows, slots] = _FREE
        self._free[rows, self._last.shape[1] - self.count[rows] + place_in_row(rows)] = slots
        self._add(rows, length, -1)
        return rows, length

    def _add(self, rows: Ints, context: Ints, sign: int) -> None:
        num_rows = len(self.count)
        self.count += sign * np.bincount(rows, minlength=num_rows)
        self.context += sign * np.bincount(rows, context, num_rows).astype(np.int64)

    def _grow(self, missing: int) -> int:
        """By so many slots or more; how many."""
        rows, slots = self._last.shape
        more = max(missing, slots // 4)
        self._last = np.hstack([self._last, np.full((rows, more), _FREE, np.int32)])
        self._length = np.hstack([self._length, np.zeros((rows, more), np.int32)])
        new = np.tile(np.arange(slots, slots + more, dtype=np.int32), (rows, 1))
        self._free = np.hstack([new, self._free])
        return more


class Prefilling:
    """Of one microbatch: `lanes` [rows, lanes], each with one prompt at a time, of which a turn computes a chunk."""

    def __init__(self, rows: int, lanes: int, chunk: int) -> None:
        self._chunk = chunk
        self._last = np.full((rows, lanes), _FREE)
        self._tokens = np.zeros((rows, lanes))  # of a turn
        self._requests = Requests(*(np.zeros((rows, lanes), kind) for kind in (np.int64, np.int64, float, bool)))

    @property
    def count(self) -> Ints:
        return np.asarray((self._last != _FREE).sum(axis=1))

    @property
    def free(self) -> Ints:
        return np.asarray((self._last == _FREE).sum(axis=1))

    def put(self, rows: Ints, turn: Ints, requests: Requests) -> None:
        """Into these rows, which are in order and have room; `turn` is the first that computes a chunk of each."""
        lanes = np.argsort(self._last[rows] != _FREE, axis=1, kind="stable")[np.arange(len(rows)), place_in_row(rows)]
        chunks = -(-requests.context // self._chunk)
        self._last[rows, lanes] = turn + chunks - 1
        self._tokens[rows, lanes] = requests.context / chunks
        for name, field in vars(requests).items():
            getattr(self._requests, name)[rows, lanes] = field

    @property
    def tokens_to_come(self) -> int:
        return int(self._requests.output[self._last != _FREE].sum())

    def load(self) -> tuple[Floats, Floats]:
        """Of a turn, by rows: tokens, and the contexts that they follow, half their prompts in the mean, summed up."""
        tokens = np.where(self._last != _FREE, self._tokens, 0.0)
        return tokens.sum(axis=1), (tokens * self._requests.context / 2).sum(axis=1)

    @property
    def written(self) -> Floats:
        """Contexts by rows: half their prompts in the mean."""
        return np.asarray(np.where(self._last != _FREE, self._requests.context / 2, 0.0).sum(axis=1))

    def finish(self, turn: Ints) -> tuple[Ints, Requests]:
        """After `turn` [rows], or NO_TURN: rows of those whose prompt is through, in order, and their requests."""
        rows, lanes = _where(self._last == turn[:, None])
        return rows, self._take(rows, lanes)

    def lose(self, row: int) -> Requests:
        lanes = np.flatnonzero(self._last[row] != _FREE)
        return self._take(np.full(len(lanes), row), lanes)

    def _take(self, rows: Ints, lanes: Ints) -> Requests:
        self._last[rows, lanes] = _FREE
        return Requests(*(field[rows, lanes] for field in vars(self._requests).values()))


def _where(mask: Mask) -> tuple[Ints, Ints]:
    """Rows, in order, and columns. Much faster than `nonzero` of two axes."""
    rows, columns = np.divmod(np.flatnonzero(mask), mask.shape[1])
    return rows, columns


def place_in_row(rows: Ints) -> Ints:
    """Of each, among those of the same row before it; rows in order."""
    return np.arange(len(rows)) - first_of_row(rows)


def first_of_row(rows: Ints) -> Ints:
    """The index of the first of each one's row; rows in order."""
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    return np.repeat(starts, np.diff(starts, append=len(rows)))
