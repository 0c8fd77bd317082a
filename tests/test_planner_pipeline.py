"""The simulated pipeline against SimPy, which has an event for whatever begins and ends."""

from __future__ import annotations

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.planner.simulation.pipeline import Jitter, Pipeline, StageTimes
from afd.planner.stages import Stages

KINDS = [0, 1, 1, 0]
NO_JITTER = Jitter(0, 0, np.random.default_rng(0))
ONE = np.arange(1)


def durations(rng: np.random.Generator, m: int, x: int, y: int) -> StageTimes:
    """Of one unit; some are nothing at all, as those of an empty microbatch are."""

    def drawn(replicas: int) -> np.ndarray:
        shape = (2, m, replicas, 1)
        return rng.exponential(1.0, shape) * rng.integers(2, size=(1, m, 1, 1)).clip(rng.random() < 0.8)

    return StageTimes(drawn(x), drawn(x), drawn(y), drawn(y), rng.exponential(0.1, (m, x, 1)))


def event_by_event(times: StageTimes, steps: int) -> list[list[float]]:
    """When each microbatch has each of its steps behind it. Replicas and links take who comes first."""
    env = simpy.Environment()
    m, x, y = times.attention.shape[1], times.attention.shape[2], times.ffn.shape[2]
    attention, dispatch, ffn, combine = ([simpy.Resource(env) for _ in range(n)] for n in (x, x, y, y))
    ends: list[list[float]] = [[] for _ in range(m)]

    def served(*stages: tuple[simpy.Resource, float]):
        for resource, takes_s in stages:
            with resource.request() as request:
                yield request
                yield env.timeout(takes_s)

    def microbatch(j: int):
        for _ in range(steps):
            for layer_idx, kind in enumerate(KINDS):
                beside = times.beside[j, :, 0] * (layer_idx == 0)
                yield env.all_of(
                    [
                        env.process(
                            served(
                                (attention[i], times.attention[kind, j, i, 0] + beside[i]),
                                (dispatch[i], times.dispatch[kind, j, i, 0]),
                            )
                        )
                        for i in range(x)
                    ]
                )
                yield env.all_of(
                    [
                        env.process(
                            served((ffn[i], times.ffn[kind, j, i, 0]), (combine[i], times.combine[kind, j, i, 0]))
                        )
                        for i in range(y)
                    ]
                )
            ends[j].append(env.now)

    for j in range(m):
        env.process(microbatch(j))
    env.run()
    return ends


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_the_recursion_is_what_happens_event_by_event(seed: int, m: int, x: int, y: int) -> None:
    times = durations(np.random.default_rng(seed), m, x, y)
    pipeline = Pipeline(m, x, y, 1, KINDS, NO_JITTER)
    ends = np.array([pipeline.step(ONE, times)[:, 0] for _ in range(3)]).T
    assert ends == pytest.approx(np.array(event_by_event(times, 3)))


@given(st.floats(0.1, 3), st.floats(0, 3), st.floats(0.1, 3), st.floats(0, 3), st.floats(0.01, 0.1), st.integers(1, 5))
def test_equal_layers_take_the_time_of_the_formula(a: float, d: float, f: float, c: float, b: float, m: int) -> None:
    """But for what attention has beside its layers, which may be hidden behind another stage."""
    each = [np.full((1, m, 1, 1), time) for time in (a, d, f, c)]
    times = StageTimes(*each, np.full((m, 1, 1), b / m))
    pipeline = Pipeline(m, 1, 1, 1, [0] * 20, NO_JITTER)
    ends = [pipeline.step(ONE, times)[0, 0] for _ in range(4)]
    formula = Stages(20 * a, 20 * d, 20 * f, 20 * c, b).tpot_s(m)
    assert formula - b - 1e-9 <= ends[3] - ends[2] <= formula + 1e-9


def test_units_do_not_know_one_another() -> None:
    """And of those that are not asked for, nothing changes."""
    rng = np.random.default_rng(0)
    alone = [durations(rng, 3, 2, 2) for _ in range(3)]
    together = StageTimes(
        *(np.concatenate(parts, axis=-1) for parts in zip(*(vars(t).values() for t in alone), strict=True))
    )
    pipeline = Pipeline(3, 2, 2, 5, KINDS, NO_JITTER)
    ends = pipeline.step(np.array([0, 2, 4]), together)
    for unit, times in enumerate(alone):
        assert ends[:, unit] == pytest.approx(Pipeline(3, 2, 2, 1, KINDS, NO_JITTER).step(ONE, times)[:, 0])
    assert (pipeline.ready[:, [1, 3]] == 0).all()


def test_jitter_has_a_mean_of_one_and_the_variation_that_is_asked_for() -> None:
    jitter = Jitter(0.3, 1000, np.random.default_rng(0))
    drawn = np.concatenate([jitter.of(np.ones((1, 1000)), jitter.places(1))[0] for _ in range(500)])
    assert drawn.mean() == pytest.approx(1, rel=0.01)
    assert drawn.std() == pytest.approx(0.3, rel=0.02)
