"""What a simulation found, for the terminal, beside what the estimate says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict

from rich.table import Table

from afd.planner.paper_tables import titled
from afd.planner.simulation.outcome import Simulated
from afd.planner.simulation.scenario import Replay, Scenario

_CLOSE = 0.05


def tables(found: Simulated, scenario: Scenario) -> Iterator[Table]:
    name = scenario.deployment.name
    units = f"{scenario.units} x {name}" if scenario.units > 1 else name
    yield _beside_the_estimate(f"{units}: {scenario.seconds:g} s simulated", found, scenario)
    yield _stages(found)


def notes(found: Simulated, scenario: Scenario) -> Iterator[str]:
    """Why it is not the estimate, and what happened."""
    counts = found.counts
    yield _why(found, scenario)
    yield (
        f"{counts.requests_arrived} requests, with those under way at the start; {counts.requests_finished} of them "
        "are finished."
    )
    if counts.attention_failures or counts.ffn_failures:
        yield (
            f"Attention replicas lost: {counts.attention_failures}, whose {counts.sequences_resumed} sequences went on "
            f"elsewhere, {counts.tokens_prefilled_again} tokens prefilled again. FFN replicas lost: "
            f"{counts.ffn_failures}, each a stop of {scenario.conditions.failover_s:g} s for its unit."
        )


def as_json(found: Simulated) -> dict[str, object]:
    expected = found.expected
    return {**asdict(found), "expected": {**asdict(expected), "tokens_per_s": expected.tokens_per_s}}


def _beside_the_estimate(title: str, found: Simulated, scenario: Scenario) -> Table:
    table, expected = titled(title, "", "simulated", "estimate", "difference"), found.expected

    def both(name: str, form: str, simulated: float, estimate: float) -> None:
        off = f"{simulated / estimate - 1:+.1%}" if estimate else ""
        table.add_row(name, form.format(simulated), form.format(estimate), off)

    both("tokens/s", "{:.0f}", found.tokens_per_s, expected.tokens_per_s)
    both("tokens/s per card", "{:.0f}", found.tokens_per_s_per_card, _estimate_per_card(found, scenario))
    both("sequences at once", "{:.0f}", found.sequences, expected.sequences)
    both("TPOT, ms", "{:.1f}", found.tpot_s.mean * 1e3, expected.tpot_s * 1e3)
    table.add_row("TPOT p50, p99, ms", _milliseconds(found.tpot_s.p50, found.tpot_s.p99))
    table.add_row("TTFT p50, p99, ms", _milliseconds(found.ttft_s.p50, found.ttft_s.p99))
    table.add_row("requests that wait, at most", f"{found.waiting:.0f}, {found.most_waiting}")
    table.add_row("memory for the KV cache in use, at most", f"{found.kv_use:.0%}, {found.most_kv_use:.0%}")
    return table


def _estimate_per_card(found: Simulated, scenario: Scenario) -> float:
    return found.expected.tokens_per_s / (scenario.units * scenario.deployment.num_cards)


def _milliseconds(*seconds: float) -> str:
    return ", ".join(f"{each * 1e3:.1f}" for each in seconds)


def _stages(found: Simulated) -> Table:
    table = titled("stages", "", *found.utilisation)
    table.add_row("at work", *(f"{share:.0%}" for share in found.utilisation.values()))
    table.add_row("bubbles, while there are sequences", *(f"{share:.0%}" for share in found.bubbles.values()))
    return table


def _why(found: Simulated, scenario: Scenario) -> str:
    expected = found.expected
    pairs = (
        (found.tpot_s.mean, expected.tpot_s),
        (found.tokens_per_s, expected.tokens_per_s),
        (found.tokens_per_s_per_card, _estimate_per_card(found, scenario)),
    )
    if all(abs(simulated - estimate) <= _CLOSE * estimate for simulated, estimate in pairs):
        return "Simulation and estimate agree within 5 %."
    causes = [cause for holds, cause in _CAUSES if holds(found, scenario)]
    return f"The estimate knows nothing of {', '.join(causes) or 'batches that are ragged and partly empty'}."


_CAUSES: tuple[tuple[Callable[[Simulated, Scenario], bool], str], ...] = (
    (lambda found, scenario: bool(found.expected.saturated), "requests that come faster than they are decoded"),
    (lambda found, scenario: isinstance(scenario.arrivals, Replay), "a start without sequences and an uneven rate"),
    (lambda found, scenario: bool(scenario.conditions.scaling), "scaling"),
    (lambda found, scenario: found.counts.attention_failures + found.counts.ffn_failures > 0, "failures"),
    (lambda found, scenario: scenario.conditions.stragglers > 0, "stragglers"),
    (lambda found, scenario: scenario.conditions.jitter > 0, "jitter, where everybody waits for the slowest"),
    (
        lambda found, scenario: scenario.prefill_chunk is not None,
        "chunks of prompts that some steps have and others not",
    ),
)
