"""Which deployment decodes cheapest within the time a token may take: all that could be, compared."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from afd.errors import ConfigError
from afd.planner.accelerators import Accelerator
from afd.planner.deployment import Collocated, Deployment, Disaggregated, Experts
from afd.planner.estimate import Estimate, estimate, room
from afd.planner.shape import ModelShape
from afd.planner.stages import LOCAL, NIXL, Efficiencies, Precision, Prefill, Transport, Workload

_SAMPLES = 32  # of the batch, from one sequence to a full memory; between them TPOT is nearly a line
_MOST_INSTANCES = 16  # of attention, and of FFN
_KEPT = 5
_CLOSE = 2000  # to the best: those that may be the best under other assumptions


@dataclass(frozen=True)
class Choices:
    """What a deployment may be made of; `most_cards` in all."""

    attention: Sequence[Accelerator]
    ffn: Sequence[Accelerator]
    most_cards: int = 128
    precisions: Sequence[Precision] = (Precision(),)
    transports: Sequence[Transport] = (NIXL,)
    microbatches: Sequence[int] = (2, 3, 4)
    experts: Sequence[Experts] = tuple(Experts)

    def disaggregated(self, shape: ModelShape) -> Iterator[Disaggregated]:
        for attention in self.attention:
            for ffn in self.ffn:
                for cards in _powers(min(attention.cards_per_server, ffn.cards_per_server, self.most_cards // 2)):
                    yield from self._of_instances(shape, attention, ffn, cards)

    def _of_instances(
        self, shape: ModelShape, attention: Accelerator, ffn: Accelerator, cards: int
    ) -> Iterator[Disaggregated]:
        instances = range(1, min(_MOST_INSTANCES, self.most_cards // cards - 1) + 1)
        for num_attention in instances:
            for num_ffn in instances:
                num_cards = (num_attention + num_ffn) * cards
                if num_cards > self.most_cards:
                    break
                one_server = attention == ffn and num_cards <= attention.cards_per_server
                spreads = self.experts if shape.moe and num_ffn * cards > 1 else (Experts.tensor,)
                for transport in (LOCAL,) if one_server else self.transports:
                    for microbatches in self.microbatches:
                        for tp in _powers(cards):
                            for experts in spreads:
                                yield Disaggregated(
                                    attention, ffn, num_attention, num_ffn, cards, microbatches, tp, experts, transport
                                )

    def collocated(self, shape: ModelShape) -> Iterator[Collocated]:
        """On each kind of card that could do both."""
        for card in self.attention:
            if card not in self.ffn:
                continue
            for tp in _powers(min(card.cards_per_server, self.most_cards)):
                yield Collocated(card, tp, tp, 1)
                for num_cards in self._wide(card, tp) if shape.moe else ():
                    one_server = num_cards <= card.cards_per_server
                    for transport in (LOCAL,) if one_server else self.transports:
                        for microbatches in (1, 2):
                            yield Collocated(card, num_cards, tp, microbatches, transport)

    def _wide(self, card: Accelerator, tp: int) -> list[int]:
        """Cards that share experts: any number of groups in a server, or of whole servers."""
        few = range(2 * tp, card.cards_per_server + 1, tp)
        many = range(2 * card.cards_per_server, self.most_cards + 1, card.cards_per_server)
        return [cards for cards in (*few, *many) if cards <= self.most_cards]


def _powers(most: int) -> list[int]:
    """Of two, up to `most`."""
    return [1 << power for power in range(most.bit_length()) if 1 << power <= most]


@dataclass(frozen=True)
class Goal:
    """What is wanted: tokens of a context within a TPOT; perhaps for requests that come at a rate, whose prompts are
    prefilled by the same cards where there is a `ttft_s`. `utilization` is how busy they may be in the mean."""

    shape: ModelShape
    context: float
    tpot_s: float
    ttft_s: float | None = None
    tokens_per_s: float | None = None
    prefill: Prefill = field(default_factory=Prefill)
    output_tokens: float | None = None
    efficiencies: Efficiencies = field(default_factory=Efficiencies)
    utilization: float = 0.8

    def workload(self, precision: Precision) -> Workload:
        return Workload(self.shape, self.context, precision, self.efficiencies, self.prefill)


@dataclass(frozen=True)
class Option:
    """A deployment at its best batch for a goal, as often as is needed."""

    estimate: Estimate
    units: int | None = None

    @property
    def deployment(self) -> Deployment:
        return self.estimate.deployment

    @property
    def num_cards(self) -> int:
        return (self.units or 1) * self.deployment.num_cards

    @property
    def dollars_per_hour(self) -> float:
        return (self.units or 1) * self.deployment.dollars_per_hour

    @property
    def worth(self) -> float:
        """What is compared: dollars per hour of all units, or per million tokens where no rate is asked for."""
        return self.dollars_per_hour if self.units else self.estimate.dollars_per_million_tokens

    @property
    def order(self) -> tuple[float, float]:
        """The cheaper first; of those that cost the same, the one with more to spare."""
        return self.worth, self.estimate.dollars_per_million_tokens


@dataclass
class Front:
    """The most tokens per second and card, and the fewest dollars per million tokens, within each TPOT."""

    tpots_s: NDArray[np.float64]
    tokens_per_s_per_card: NDArray[np.float64] = field(init=False)
    dollars_per_million_tokens: NDArray[np.float64] = field(init=False)
    fastest: list[str] = field(init=False)  # by TPOT

    def __post_init__(self) -> None:
        self.tokens_per_s_per_card = np.zeros_like(self.tpots_s)
        self.dollars_per_million_tokens = np.full_like(self.tpots_s, np.inf)
        self.fastest = [""] * len(self.tpots_s)

    def add(self, deployment: Deployment, tokens_per_s: NDArray[np.float64]) -> None:
        per_card = tokens_per_s / deployment.num_cards
        for index in np.flatnonzero(per_card > self.tokens_per_s_per_card):
            self.fastest[index] = deployment.name
        self.tokens_per_s_per_card = np.maximum(self.tokens_per_s_per_card, per_card)
        with np.errstate(divide="ignore"):
            dollars = deployment.dollars_per_hour / 3600 / tokens_per_s * 1e6
        self.dollars_per_million_tokens = np.minimum(self.dollars_per_million_tokens, dollars)


@dataclass(frozen=True)
class Ranking:
    """The best deployments of one kind, best first; none where none keeps the goal. `least_tpot_s` is the shortest
    that any of them has, infinite where the model fits none."""

    options: Sequence[Option]
    front: Front
    least_tpot_s: float
    considered: int
    close: Sequence[Deployment]

    @property
    def best(self) -> Option | None:
        return self.options[0] if self.options else None


def rank(
    deployments: Sequence[Deployment],
    precisions: Sequence[Precision],
    goal: Goal,
    advance: Callable[[], object] = lambda: None,
) -> Ranking:
    """All deployments with all precisions. `advance` is called after each deployment."""
    front = Front(np.geomspace(min(0.002, goal.tpot_s), max(0.2, goal.tpot_s), 100))
    candidates: list[tuple[tuple[float, float], Deployment, Workload]] = []
    least = math.inf
    for deployment in deployments:
        for precision in precisions:
            workload = goal.workload(precision)
            try:
                sampled = _sample(deployment, workload)
            except ConfigError:  # it does not fit
                continue
            tpots, tokens_per_s = sampled
            least = min(least, float(tpots[0]))
            front.add(deployment, _within(front.tpots_s, tpots, tokens_per_s))
            speed = float(_within(np.array([goal.tpot_s]), tpots, tokens_per_s)[0])
            if speed > 0:
                candidates.append((_order(deployment, speed, goal), deployment, workload))
        advance()
    candidates.sort(key=operator.itemgetter(0))
    close = dict.fromkeys(deployment for _, deployment, _ in candidates[:_CLOSE])
    return Ranking(_best(candidates, goal), front, least, len(deployments) * len(precisions), list(close))


def _sample(deployment: Deployment, workload: Workload) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """TPOT and tokens per second with few sequences to many. Raises ConfigError if not one fits."""
    batches = np.unique(np.geomspace(1, room(deployment, workload), _SAMPLES).astype(np.int64)).astype(float)
    tpots = np.broadcast_to(deployment.stages(workload, batches).tpot_s(deployment.microbatches), batches.shape)
    return tpots, batches * deployment.microbatches * deployment.num_groups / tpots


def _within(
    allowed: NDArray[np.float64], tpots: NDArray[np.float64], tokens_per_s: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The most tokens per second within each TPOT."""
    return np.interp(allowed, tpots, tokens_per_s, left=0.0)


def _units(tokens_per_s: float, goal: Goal) -> int | None:
    return math.ceil(goal.tokens_per_s / goal.utilization / tokens_per_s) if goal.tokens_per_s else None


def _order(deployment: Deployment, tokens_per_s: float, goal: Goal) -> tuple[float, float]:
    """As an option has it, but for the units of money."""
    units, per_token = _units(tokens_per_s, goal), deployment.dollars_per_hour / tokens_per_s
    return deployment.dollars_per_hour * units if units else per_token, per_token


def _best(candidates: Sequence[tuple[tuple[float, float], Deployment, Workload]], goal: Goal) -> list[Option]:
    """Estimated to the last sequence; one of each name, cards and precision."""
    found: dict[object, Option] = {}
    for _, deployment, workload in candidates:
        if len(found) == _KEPT:
            break
        kind = deployment.name, deployment.cards_text, workload.precision
        if kind in found:
            continue
        try:
            reached = estimate(deployment, workload, goal.tpot_s)
        except ConfigError:
            continue
        if goal.ttft_s is not None and goal.output_tokens and reached.ttft_s(goal.output_tokens) > goal.ttft_s:
            continue
        found[kind] = Option(reached, _units(reached.tokens_per_s, goal))
    return sorted(found.values(), key=lambda option: option.order)


@dataclass(frozen=True)
class Plan:
    """Both kinds of deployment, out of so many cards at most; the collocated one as it would be if nothing, or all, of
    its all-to-all were hidden, and the disaggregated one if nothing of what its FFN moves over links were."""

    goal: Goal
    disaggregated: Ranking
    collocated: Ranking
    unhidden: Ranking
    hidden: Ranking
    unhidden_link: Ranking
    most_cards: int

    @property
    def bests(self) -> list[Option]:
        """Of each kind, where there is one."""
        return [ranking.best for ranking in (self.disaggregated, self.collocated) if ranking.best]


def plan(goal: Goal, choices: Choices, advance: Callable[[int, int], object] = lambda done, total: None) -> Plan:
    """`advance` is told how many of how many deployments have been looked at."""
    goal.shape.check_context(goal.context)
    apart, together = list(choices.disaggregated(goal.shape)), list(choices.collocated(goal.shape))
    total, done = len(apart) + min(_CLOSE, len(apart)) + 3 * len(together), 0

    def count() -> None:
        nonlocal done
        done += 1
        advance(done, total)

    def ranked(deployments: Sequence[Deployment], **assumed: float) -> Ranking:
        under = replace(goal, efficiencies=replace(goal.efficiencies, **assumed))
        return rank(deployments, choices.precisions, under, count)

    disaggregated = ranked(apart)
    return Plan(
        goal,
        disaggregated,
        collocated=ranked(together),
        unhidden=ranked(together, overlap=0.0),
        hidden=ranked(together, overlap=1.0),
        unhidden_link=ranked(disaggregated.close, link_overlap=0.0),
        most_cards=choices.most_cards,
    )
