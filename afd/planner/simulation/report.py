"""What a simulation found, for the terminal, beside what the estimate says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict

from rich.table import Table

from afd.planner.simulation.outcome import Simulated, Times
from afd.planner.simulation.scenario import Replay, Scenario
from afd.planner.titled import titled

_CLOSE = 0.05
_GROWN = 1.5  # a queue that grows all the time is twice as long at the end as half way
_MANY = 0.05  # of the sequences that decode: so many that wait are a queue


def tables(found: Simulated, scenario: Scenario) -> Iterator[Table]:
    name = scenario.deployment.name
    units = f"{scenario.units} x {name}" if scenario.units > 1 else name
    yield _beside_the_estimate(f"{units}: {scenario.seconds:g} s simulated", found, scenario)
    yield _stages(found)


def notes(found: Simulated, scenario: Scenario) -> Iterator[str]:
    """Why it is not the estimate, and what happened."""
    counts = found.counts
    yield _why(found, scenario)
    came, finished = counts.requests_arrived, counts.requests_finished
    yield f"Requests, with those under way at the start: {came}; finished: {finished}."
    if counts.attention_failures:
        yield (
            f"Attention replicas lost: {counts.attention_failures}, whose {counts.sequences_resumed} sequences went on "
            f"elsewhere, {counts.tokens_prefilled_again} tokens prefilled again."
        )
    if counts.ffn_failures:
        stop_s = scenario.conditions.failover_s
        yield f"FFN replicas lost: {counts.ffn_failures}, each a stop of {stop_s:g} s for its unit."


def as_json(found: Simulated) -> dict[str, object]:
    expected = found.expected
    return {**asdict(found), "expected": {**asdict(expected), "tokens_per_s": expected.tokens_per_s}}


def _beside_the_estimate(title: str, found: Simulated, scenario: Scenario) -> Table:
    table = titled(title, "", "simulated", "estimate", "difference")
    for name, form, simulated, estimate in _both(found, scenario):
        off = f"{simulated / estimate - 1:+.1%}" if simulated is not None and estimate else ""
        table.add_row(name, _shown(simulated, form), form.format(estimate), off)
    table.add_row("TPOT p50, p99, ms", _milliseconds(found.tpot_s))
    table.add_row("TTFT p50, p99, ms", _milliseconds(found.ttft_s))
    table.add_row("requests that wait, at most", f"{found.waiting:.0f}, {found.most_waiting}")
    table.add_row("memory for the KV cache in use, at most", f"{found.kv_use:.0%}, {found.most_kv_use:.0%}")
    return table


def _both(found: Simulated, scenario: Scenario) -> list[tuple[str, str, float | None, float]]:
    """What there is of simulation and estimate: its name, how it is written, and the two."""
    expected, tpot_s = found.expected, found.tpot_s.mean
    per_card = expected.tokens_per_s / (scenario.units * scenario.deployment.num_cards)
    return [
        ("tokens/s", "{:.0f}", found.tokens_per_s, expected.tokens_per_s),
        ("tokens/s per card", "{:.0f}", found.tokens_per_s_per_card, per_card),
        ("sequences at once", "{:.0f}", found.sequences, expected.sequences),
        ("TPOT, ms", "{:.1f}", None if tpot_s is None else tpot_s * 1e3, expected.tpot_s * 1e3),
    ]


def _milliseconds(times: Times) -> str:
    return ", ".join(_shown(each and each * 1e3, "{:.1f}") for each in (times.p50, times.p99))


def _shown(value: float | None, form: str) -> str:
    return "none" if value is None else form.format(value)


def _stages(found: Simulated) -> Table:
    table = titled("stages", "", *found.utilisation)
    table.add_row("at work", *(f"{share:.0%}" for share in found.utilisation.values()))
    table.add_row("bubbles, while there are sequences", *(f"{share:.0%}" for share in found.bubbles.values()))
    return table


def _why(found: Simulated, scenario: Scenario) -> str:
    if found.expected.saturated:
        return "Requests come faster than they can be decoded, and wait ever longer; the estimate is of what can be."
    if _falls_behind(found):
        return (
            "Many more requests wait at the end than half way: they come faster than they are prefilled and decoded. "
            f"The estimate knows nothing of {', '.join(_causes(found, scenario))}."
        )
    pairs = [(simulated or 0.0, estimate) for _, _, simulated, estimate in _both(found, scenario)]
    if all(abs(simulated - estimate) <= _CLOSE * estimate for simulated, estimate in pairs):
        return "Simulation and estimate agree within 5 %."
    return f"The estimate knows nothing of {', '.join(_causes(found, scenario))}."


def _falls_behind(found: Simulated) -> bool:
    half_way, end = found.series[len(found.series) // 2].waiting, found.series[-1].waiting
    return end > _GROWN * half_way and end > _MANY * found.sequences


def _causes(found: Simulated, scenario: Scenario) -> list[str]:
    """What may be one."""
    conditions, counts = scenario.conditions, found.counts
    causes = {
        "a start without sequences and an uneven rate": isinstance(scenario.arrivals, Replay),
        "scaling": bool(conditions.scaling),
        "failures": counts.attention_failures + counts.ffn_failures > 0,
        "stragglers": conditions.stragglers > 0,
        "jitter, where everybody waits for the slowest": conditions.jitter > 0,
        "chunks of prompts that some steps have and others not": scenario.prefill_chunk is not None,
        "layers of several kinds, each slow in another stage": _mixed(scenario),
    }
    return [cause for cause, holds in causes.items() if holds] or ["batches that are ragged and partly empty"]


def _mixed(scenario: Scenario) -> bool:
    """A tenth of the layers or more are not of the most common kind."""
    layers = scenario.workload.shape.layers
    return Counter(layers).most_common(1)[0][1] <= 0.9 * len(layers)
