"""Whether disaggregation pays, said in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from afd.planner.search import Goal, Option, Plan, Ranking

# What the efficiencies are uncertain by, so that a smaller gain is none: docs/planner.md.
_SURE = 0.10
_SAME = 0.005


class Choice(StrEnum):
    disaggregate = "disaggregate"
    collocate = "collocate"
    nothing = "nothing"


@dataclass(frozen=True)
class Verdict:
    choice: Choice
    reasons: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.reasons)


def verdict(plan: Plan) -> Verdict:
    """Collocated unless disaggregated is cheaper by more than the estimates are uncertain: it is simpler to run."""
    apart, together = plan.disaggregated.best, plan.collocated.best
    if apart is None and together is None:
        return Verdict(Choice.nothing, (_why_nothing(plan),))
    if together is None:
        reason = f"Disaggregate: no collocated deployment that was looked at {_why(plan.collocated, plan.goal)}."
        return Verdict(Choice.disaggregate, (reason,))
    if apart is None:
        reason = f"Collocate: no disaggregated deployment that was looked at {_why(plan.disaggregated, plan.goal)}."
        return Verdict(Choice.collocate, (reason,))
    return Verdict(_choice(apart, together), (_compared(apart, together), *_turns(plan, apart, together)))


def _choice(apart: Option, together: Option) -> Choice:
    return Choice.disaggregate if 1 - apart.worth / together.worth > _SURE else Choice.collocate


def _compared(apart: Option, together: Option) -> str:
    if _choice(apart, together) is Choice.disaggregate:
        return f"Disaggregate: {_named(apart)} does it for {_less(apart, together)} less than {_named(together)}."
    if abs(1 - apart.worth / together.worth) < _SAME:
        return f"Collocate: {_named(together)} costs the same as {_named(apart)}, and is simpler to run."
    if apart.worth < together.worth:
        return (
            f"Collocate: {_named(apart)} would be cheaper by {_less(apart, together)} than {_named(together)}, which "
            "is no more than these estimates are uncertain by, and collocated is simpler to run."
        )
    return f"Collocate: {_named(together)} does it for {_less(together, apart)} less than {_named(apart)}."


def _turns(plan: Plan, apart: Option, together: Option) -> Iterator[str]:
    """Where another choice would be made if another share of what crosses were hidden behind computing."""
    per_token = [option.estimate.dollars_per_million_tokens for option in (apart, together)]
    if plan.goal.tokens_per_s and (per_token[0] < per_token[1]) is not (
        _choice(apart, together) is Choice.disaggregate
    ):
        yield (
            "It turns on how many whole units such a rate needs: per million tokens of units that never idle, "
            f"{_named(apart)} costs ${per_token[0]:.3g} and {_named(together)} ${per_token[1]:.3g}."
        )
    stated = plan.goal.efficiencies
    all_to_all = f"how much of the all-to-all is hidden behind computing, assumed to be {stated.overlap:.0%}"
    link = f"how much of what an FFN instance moves over its link is hidden, assumed to be {stated.link_overlap:.0%}"
    cases = (
        (all_to_all, "nothing", apart, plan.unhidden.best),
        (all_to_all, "all", apart, plan.hidden.best),
        (link, "nothing", plan.unhidden_link.best, together),
    )
    for what, share, one, other in cases:
        if one is None or other is None or (then := _choice(one, other)) is _choice(apart, together):
            continue
        yield (
            f"It turns on {what}: with {share} of it hidden, {_named(one)} costs {_dollars(one)} and {_named(other)} "
            f"{_dollars(other)}, and the verdict is to {then}. Measure it."
        )


def _less(cheaper: Option, dearer: Option) -> str:
    return f"{1 - cheaper.worth / dearer.worth:.0%}"


def _named(option: Option) -> str:
    units = f"{option.units} x " if option.units and option.units > 1 else ""
    return f"{units}{describe(option)}"


def _dollars(option: Option) -> str:
    return f"${option.worth:.2f} per hour" if option.units else f"${option.worth:.3g} per million tokens"


def describe(option: Option) -> str:
    """A deployment and its cards."""
    return f"{option.deployment.name} on {option.deployment.cards_text}"


def _why(ranking: Ranking, goal: Goal) -> str:
    """Not one of them does."""
    if not ranking.considered:
        return "is possible: none could be made of these cards"
    if math.isinf(ranking.least_tpot_s):
        return "has room for the model"
    if ranking.least_tpot_s > goal.tpot_s:
        return f"keeps the TPOT; the shortest is {ranking.least_tpot_s * 1e3:.1f} ms"
    return "keeps the TTFT"


def _why_nothing(plan: Plan) -> str:
    goal = plan.goal
    least = min(plan.disaggregated.least_tpot_s, plan.collocated.least_tpot_s)
    if least == float("inf"):
        return (
            f"Neither: {goal.shape.name} with a context of {goal.context:g} fits no deployment that was looked at. "
            "Allow more cards (--max-cards), larger ones, or fewer bytes per weight and KV element."
        )
    if least > goal.tpot_s:
        return (
            f"Neither: no deployment decodes a token within {goal.tpot_s * 1e3:g} ms; the shortest TPOT is "
            f"{least * 1e3:.1f} ms, with one sequence per group."
        )
    return (
        "Neither: a token can be decoded in time, but no deployment keeps the TTFT as well. Allow more, or prefill "
        "elsewhere (leave out --ttft-ms)."
    )
