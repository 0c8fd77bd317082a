"""What is simulated: a deployment many times over, what comes to it, and what goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from afd.errors import ConfigError
from afd.planner.deployment import Collocated, Disaggregated
from afd.planner.stages import Workload
from afd.planner.traffic import Lengths, Recorded

MOST_REPLICAS = 100_000  # in all, of attention and FFN
MOST_UNITS = 100_000
LONGEST_S = 86_400.0


def _check(holds: bool, sentence: str) -> None:
    if not holds:
        raise ConfigError(sentence)


@dataclass(frozen=True)
class Rate:
    """Requests per second, at random moments. It begins with as many sequences under way as the estimate says."""

    per_s: float

    def __post_init__(self) -> None:
        _check(0 < self.per_s <= 1e9, f"a rate of {self.per_s:g} requests per second is not within 0..1e9")


@dataclass(frozen=True)
class Streams:
    """Always so many sequences: each that ends is followed by another. It begins in their midst."""

    count: int

    def __post_init__(self) -> None:
        _check(self.count > 0, f"{self.count} streams are none: give one or more")


@dataclass(frozen=True)
class Replay:
    """Requests at the moments, and of the lengths, that were recorded. It begins empty."""

    requests: Recorded

    def __post_init__(self) -> None:
        _check(self.requests.at_s is not None, 'requests without "at_s" cannot be replayed: give a rate or streams')

    @property
    def at_s(self) -> NDArray[np.float64]:
        assert self.requests.at_s is not None
        return self.requests.at_s


@dataclass(frozen=True)
class Scaling:
    """From then on there are so many units. Those that go finish what they have."""

    at_s: float
    units: int


@dataclass(frozen=True)
class Conditions:
    """What keeps a deployment from its roofline. `jitter` is the coefficient of variation of each stage of each layer,
    lognormal; of all replicas a share of `stragglers` is slower by `straggler_factor`, always.

    Each replica fails once in `mean_time_between_failures_s`. Another takes over from one of the FFN, and its unit
    stands still for `failover_s`. What an attention replica had is prefilled elsewhere after `failover_s`, and the
    replica is back after `repair_s`.
    """

    jitter: float = 0.0
    stragglers: float = 0.0
    straggler_factor: float = 1.5
    mean_time_between_failures_s: float | None = None
    failover_s: float = 0.35
    repair_s: float = 60.0
    scaling: tuple[Scaling, ...] = ()

    def __post_init__(self) -> None:
        _check(
            0 <= self.jitter <= 3, f"a jitter of {self.jitter:g} is not within 0..3, the standard deviation in means"
        )
        _check(0 <= self.stragglers <= 1, f"a share of {self.stragglers:g} stragglers is not within 0..1")
        _check(
            1 <= self.straggler_factor <= 1000, f"a straggler's factor of {self.straggler_factor:g} is not in 1..1000"
        )
        failing = self.mean_time_between_failures_s
        _check(failing is None or failing >= 1, f"{failing} s between failures of a replica are not one or more")
        _check(0 <= self.failover_s <= LONGEST_S, f"a failover of {self.failover_s:g} s is not within 0..{LONGEST_S:g}")
        _check(0 <= self.repair_s <= LONGEST_S, f"a repair of {self.repair_s:g} s is not within 0..{LONGEST_S:g}")


@dataclass(frozen=True)
class Scenario:
    """`units` deployments behind one router. Prompts are prefilled elsewhere; or with a `prefill_chunk`, on the same
    cards, at most so many tokens of one prompt in each microbatch of a group of cards. `max_sequences` is the most that
    a group has at once, if its memory holds as many. Raises ConfigError on what cannot be."""

    deployment: Disaggregated | Collocated
    workload: Workload
    lengths: Lengths
    arrivals: Rate | Streams | Replay
    units: int = 1
    prefill_chunk: int | None = None
    max_sequences: int | None = None
    conditions: Conditions = Conditions()
    seconds: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check(1 <= self.units <= MOST_UNITS, f"{self.units} replicas of the deployment are not within 1..{MOST_UNITS}")
        replicas = self.most_units * (self.attention_replicas + self.ffn_replicas)
        _check(
            replicas <= MOST_REPLICAS,
            f"{replicas} attention and FFN replicas in all are more than can be simulated, {MOST_REPLICAS}",
        )
        _check(0 < self.seconds <= LONGEST_S, f"{self.seconds:g} seconds are not within 0..{LONGEST_S:g}")
        chunk = self.prefill_chunk
        _check(chunk is None or chunk > 0, f"a prefill chunk of {chunk} tokens gets no prompt done: give one or more")
        most = self.max_sequences
        _check(most is None or most >= self.deployment.microbatches, f"{most} sequences leave a microbatch without any")
        _check(self.seed >= 0, f"a seed of {self.seed} is not 0 or more")
        for event in self.conditions.scaling:
            _check(
                0 < event.at_s < self.seconds,
                f"replicas are scaled at {event.at_s:g} s, but {self.seconds:g} s are simulated",
            )
            _check(
                1 <= event.units <= MOST_UNITS,
                f"{event.units} replicas of the deployment, at {event.at_s:g} s, are not within 1..{MOST_UNITS}",
            )

    @property
    def most_units(self) -> int:
        return max(self.units, *(event.units for event in self.conditions.scaling), 1)

    @property
    def shared(self) -> bool:
        """Attention and FFN on the same cards, of which all are needed for every token: one replica, and none else."""
        return not isinstance(self.deployment, Disaggregated)

    @property
    def attention_replicas(self) -> int:
        """Of a unit."""
        return self.deployment.num_attention if isinstance(self.deployment, Disaggregated) else 1

    @property
    def ffn_replicas(self) -> int:
        return self.deployment.num_ffn if isinstance(self.deployment, Disaggregated) else 1

    @property
    def groups(self) -> int:
        """Of cards that share sequences, in an attention replica."""
        return self.deployment.num_groups // self.attention_replicas

    @property
    def turns(self) -> int:
        """Microbatches that take turns. On shared cards the stages' formula has them all in one."""
        return 1 if self.shared else self.deployment.microbatches


def scaling(text: str) -> Iterator[Scaling]:
    """`30s:12,45s:8`: twelve units after 30 seconds, eight after 45. Raises ConfigError."""
    for part in text.split(","):
        at, _, units = part.strip().partition(":")
        try:
            event = Scaling(float(at.removesuffix("s")), int(units))
        except ValueError:
            event = Scaling(float("nan"), 0)
        _check(isfinite(event.at_s), f"{part!r} is no scaling: give 30s:12, which is 12 replicas after 30 seconds")
        yield event
