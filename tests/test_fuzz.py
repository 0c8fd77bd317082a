"""A short run of benchmarks.fuzz: malformed inputs of all kinds harm nobody."""

from __future__ import annotations

import pytest
from rich.console import Console

from benchmarks.fuzz import Outcome, fuzz, plan_of


def assert_is_good(outcome: Outcome) -> None:
    assert not outcome.num_hangs.total(), outcome.notes
    assert not outcome.num_faults.total(), outcome.notes
    assert not outcome.log, outcome.log[:3]
    assert not outcome.wrong, "the client beside them gets what it would get alone"
    assert outcome.num_right
    assert outcome.is_good, (outcome.crashed, outcome.kept, outcome.held)


def test_a_thousand_malformed_inputs_harm_nobody() -> None:
    outcome = fuzz(plan_of(1000, seed=7), Console(quiet=True))
    assert set(outcome.answers) == {"http", "grpc", "frames", "handshakes"}
    assert_is_good(outcome)


@pytest.mark.slow
def test_many_malformed_inputs_harm_nobody() -> None:
    assert_is_good(fuzz(plan_of(20_000, seed=8), Console(quiet=True)))
