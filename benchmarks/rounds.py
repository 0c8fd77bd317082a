"""Contenders that take turns in one run: on a machine whose speed changes within minutes only ratios within a round
say anything."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from afd.bench import Load

Contender = Callable[[Load], float]  # output tokens/s under a load


@dataclass(frozen=True)
class Row:
    contender: str
    load: Load
    rounds: list[float]  # output tokens/s
    ratio: float  # to the first contender: the median of the rounds' ratios

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def as_json(self) -> dict[str, Any]:
        return {"contender": self.contender, **asdict(self.load), "output_throughput": self.rounds, "ratio": self.ratio}


def alternate(contenders: Mapping[str, Contender], loads: Sequence[Load], num_rounds: int, notes: Console) -> list[Row]:
    """One row for each load and contender, all warmed up first."""
    rows: list[Row] = []
    with Progress(console=notes, transient=True) as progress:
        task = progress.add_task("measuring", total=len(loads) * (num_rounds + 1) * len(contenders))
        for load in loads:
            rounds: dict[str, list[float]] = {name: [] for name in contenders}
            for number in range(num_rounds + 1):
                for name, contender in contenders.items():
                    speed = contender(load if number else _warm_up(load))
                    rounds[name] += [speed] if number else []
                    progress.advance(task)
            first = next(iter(rounds.values()))
            rows += [Row(name, load, own, _ratio(own, first)) for name, own in rounds.items()]
    return rows


def pooled(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """The rounds of several runs, for each of which the contenders were started anew; ratios are to the first run's
    first contender."""
    rounds: dict[Load, dict[str, list[float]]] = {}
    for row in itertools.chain(*runs):
        rounds.setdefault(row.load, {}).setdefault(row.contender, []).extend(row.rounds)
    return [
        Row(name, load, own, _ratio(own, next(iter(contenders.values()))))
        for load, contenders in rounds.items()
        for name, own in contenders.items()
    ]


def _warm_up(load: Load) -> Load:
    return Load(load.streams, min(load.prompt_tokens, 64), min(load.output_tokens, 128))


def _ratio(own: Sequence[float], first: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(own, first, strict=True))


def report(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=title)
    for heading in ("prompt", "streams", "contender", "tokens/s", "lowest", "highest", "ratio"):
        table.add_column(heading, justify="left" if heading == "contender" else "right")
    for row in rows:
        speeds = (f"{speed:.1f}" for speed in (row.median, min(row.rounds), max(row.rounds)))
        numbers = str(row.load.prompt_tokens), str(row.load.streams)
        table.add_row(*numbers, row.contender, *speeds, f"{row.ratio:.2f}")
    return table
