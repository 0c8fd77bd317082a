"""What comes out of a simulation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from afd.planner.simulation.analytic import Expected
from afd.planner.simulation.costs import STAGES, Busy
from afd.planner.simulation.scenario import Scenario
from afd.planner.simulation.tally import Durations, Floats, Samples, Sum


@dataclass(frozen=True)
class Times:
    """Seconds; None if there was nothing to measure."""

    mean: float | None
    p50: float | None
    p99: float | None

    @staticmethod
    def of(durations: Durations) -> Times:
        return Times(durations.mean, durations.percentile(50), durations.percentile(99))


@dataclass
class Counts:
    """Requests and their tokens. What arrived is what was there at the start and what came; each token of it was
    decoded once, or is still to come."""

    requests_arrived: int = 0
    requests_finished: int = 0
    tokens_arrived: int = 0
    tokens_decoded: int = 0
    tokens_to_come: int = 0
    attention_failures: int = 0
    ffn_failures: int = 0
    sequences_resumed: int = 0
    tokens_prefilled_again: int = 0


@dataclass(frozen=True)
class Second:
    """Of simulated time; sequences and those that wait in the mean over it."""

    tokens: float
    sequences: float
    waiting: float
    units: float


@dataclass(frozen=True)
class Event:
    """What happened to a unit, or to all of them."""

    at_s: float
    what: str


@dataclass(frozen=True)
class Simulated:
    """TPOT is from one token of a sequence to its next, all tokens alike; TTFT from a request's arrival to its first.

    `utilisation` is the share of time that a stage's replicas are at work, `bubbles` the share that they are not while
    their unit has sequences. `kv_use` is the share of the memory for the KV cache that is written."""

    tokens_per_s: float
    tokens_per_s_per_card: float
    tpot_s: Times
    ttft_s: Times
    sequences: float
    waiting: float
    most_waiting: int
    kv_use: float
    most_kv_use: float
    utilisation: dict[str, float]
    bubbles: dict[str, float]
    counts: Counts
    expected: Expected
    series: tuple[Second, ...]
    events: tuple[Event, ...]
    steps: int


class Tally:
    """What is counted on the way there."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self.counts = Counts()
        self.events: list[Event] = []
        self.steps = 0
        self.tpot, self.ttft = Durations(), Durations()
        self.tokens = Sum(scenario.seconds)
        self.sequences, self.waiting, self.kv_use, self.units = (Samples(scenario.seconds) for _ in range(4))
        self._busy_s = dict.fromkeys(STAGES, 0.0)
        self._working_s = 0.0

    def step(self, before_s: Floats, after_s: Floats, busy: Busy) -> None:
        """Of units with sequences; only what is before the end counts."""
        self.steps += len(before_s)
        took = after_s - before_s
        within = np.clip((self._scenario.seconds - before_s) / took, 0, 1)
        self._working_s += float(took @ within)
        for stage, seconds in busy.items():
            self._busy_s[stage] += float(seconds @ within)

    def outcome(self, expected: Expected, tokens_to_come: int) -> Simulated:
        seconds = self._scenario.seconds
        tokens, units = self.tokens.total, self.units.mean
        self.counts.tokens_decoded = round(tokens)
        self.counts.tokens_to_come = tokens_to_come + round(self.tokens.later)
        return Simulated(
            tokens_per_s=tokens / seconds,
            tokens_per_s_per_card=tokens / seconds / units / self._scenario.deployment.num_cards,
            tpot_s=Times.of(self.tpot),
            ttft_s=Times.of(self.ttft),
            sequences=self.sequences.mean,
            waiting=self.waiting.mean,
            most_waiting=round(self.waiting.most),
            kv_use=self.kv_use.mean,
            most_kv_use=self.kv_use.most,
            utilisation={stage: busy / (units * seconds) for stage, busy in self._busy_s.items()},
            bubbles={stage: 1 - busy / max(self._working_s, busy, 1e-9) for stage, busy in self._busy_s.items()},
            counts=self.counts,
            expected=expected,
            series=tuple(map(Second, self.tokens.bins, self.sequences.bins, self.waiting.bins, self.units.bins)),
            events=tuple(self.events),
            steps=self.steps,
        )
