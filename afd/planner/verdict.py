"""Whether disaggregation pays, said in sentences."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from afd.planner.search import Option, Plan, Ranking

# What the efficiencies are uncertain by, so that a smaller gain is none: docs/planner.md.
_SURE = 0.10


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
        reason = f"Disaggregate: no collocated deployment that was looked at keeps it{_least(plan.collocated)}."
        return Verdict(Choice.disaggregate, (reason,))
    if apart is None:
        return Verdict(
            Choice.collocate,
            (f"Collocate: no disaggregated deployment that was looked at keeps it{_least(plan.disaggregated)}.",),
        )
    gain = together.worth / apart.worth - 1
    if gain > _SURE:
        choice = Choice.disaggregate
        reason = f"Disaggregate: {_named(apart)} does it for {_less(apart, together)} less than {_named(together)}."
    elif gain > 0:
        choice = Choice.collocate
        reason = (
            f"Collocate: {_named(apart)} would be cheaper by {_less(apart, together)} than {_named(together)}, which "
            "is no more than these estimates are uncertain by, and collocated is simpler to run."
        )
    else:
        choice = Choice.collocate
        reason = f"Collocate: {_named(together)} does it for {_less(together, apart)} less than {_named(apart)}."
    return Verdict(choice, (reason, *_if_hidden(plan, choice)))


def _if_hidden(plan: Plan, choice: Choice) -> list[str]:
    """Where another overlap of the all-to-all would make another choice."""
    apart = plan.disaggregated.best
    assert apart is not None
    found = []
    for overlap, ranking in (("nothing", plan.unhidden), ("all", plan.hidden)):
        if (other := ranking.best) is None:
            continue
        then = Choice.disaggregate if other.worth / apart.worth - 1 > _SURE else Choice.collocate
        if then is not choice:
            found.append(
                f"It turns on how much of the all-to-all is hidden behind computing, assumed to be "
                f"{plan.goal.efficiencies.overlap:.0%}: with {overlap} of it hidden, {_named(other)} costs "
                f"{_dollars(other)} against {_dollars(apart)}, and the verdict is to {then}. Measure it."
            )
    return found


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


def _least(ranking: Ranking) -> str:
    if ranking.least_tpot_s == float("inf"):
        return ": the model fits none of them"
    return f" (the shortest TPOT is {ranking.least_tpot_s * 1e3:.1f} ms)"


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
