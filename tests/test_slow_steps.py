"""A decode step over its SLO says what took so long, and keeps its trace."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from afd.bench import counters
from afd.handoff.frame import Crossing, Timing
from afd.handoff.negotiate import TransportName
from afd.model.ffn import FFNShard
from afd.trace_view import load_steps
from services.attention.slow_steps import CULPRITS, Culprit, explain
from services.attention.step_tracer import StepTracer
from services.attention.timeline import Interval, Part, StepTimeline, Timeline
from tests.conftest import Model, StartMesh
from tests.test_engine import Harness, harness
from tests.test_handoff import MAX_FRAME_TOKENS, StubEndpoint, running_shard
from tests.test_losses import generate, service
from tests.test_tracing import Span, named, read_spans

__all__ = ["harness"]  # a fixture

MS = 1_000_000


def step(
    schedule: int = 1,
    attention: int = 1,
    send: int = 1,
    way: int = 0,
    queue: int = 0,
    compute: int = 1,
    other: int = 0,
    shard: int = 0,
) -> StepTimeline:
    """One layer, in milliseconds: what it says happens one after the other."""
    now, intervals = 0, []
    ends: dict[str, int] = {}
    parts: tuple[tuple[Part, int], ...] = ("schedule", schedule), ("attention", attention), ("send", send)
    for part, duration in (*parts, ("receive", way + queue + compute)):
        intervals.append(Interval(part, 0, 0, now * MS, (now + duration) * MS))
        now += duration
        ends[part] = now * MS
    timing = Timing(queue * MS, compute * MS, 1)
    crossing = Crossing(shard, 0, 0, ends["send"], ends["receive"], timing)
    return StepTimeline(0, (now + other) * MS, intervals, [crossing])


@pytest.mark.parametrize(
    ("slow", "culprit", "words"),
    [
        ({"attention": 90}, "attention", "attention computed for 90.0 ms"),
        ({"send": 90}, "network", "frames were handed over and on their way for 90.0 ms"),
        ({"way": 90}, "network", "frames were handed over and on their way for 91.0 ms; most of it at shard 0"),
        ({"queue": 90}, "queue", "frames were queued at the FFN for 90.0 ms; most of it at shard 0"),
        ({"compute": 90}, "ffn", "the FFN computed, or stood still, for 90.0 ms; most of it at shard 0"),
        ({"schedule": 90}, "scheduler", "the engine scheduled, or was between layers, for 90.0 ms"),
        ({"other": 90}, "scheduler", "the engine scheduled, or was between layers, for 91.0 ms"),
    ],
)
def test_the_culprit_is_what_took_longest(slow: dict[str, int], culprit: str, words: str) -> None:
    explanation = explain(step(**slow), (), ("inline",))
    assert explanation.culprit == culprit
    assert explanation.sentence.endswith(words)


def test_the_culprit_is_what_took_longer_than_usual_not_what_always_takes_long() -> None:
    usual = [step(attention=40, queue=0), step(attention=42, queue=2), step(attention=41, queue=1)]
    explanation = explain(step(attention=43, queue=30), usual, ("inline",))
    assert explanation.culprit == "queue"
    assert "for 30.0 ms, usually 1.0 ms" in explanation.sentence


def test_in_shared_memory_nothing_is_on_its_way_so_the_ffn_stood_still() -> None:
    explanation = explain(step(way=90, shard=1), (), ("inline", "shm"))
    assert explanation.culprit == "ffn"
    assert "shard 1" in explanation.sentence


def test_a_wait_counts_for_the_shard_that_answers_last() -> None:
    slow = step(compute=90, shard=1)
    early = Crossing(0, 0, 0, slow.crossings[0].sent_ns, slow.crossings[0].sent_ns + 2 * MS, Timing(0, MS, 1))
    slow.crossings.append(early)
    assert explain(slow, (), ("shm", "shm")).sentence.endswith("for 90.0 ms; most of it at shard 1")


def test_what_attention_computes_while_the_ffn_does_is_not_waiting() -> None:
    """The other microbatch's attention; the FFN's answer is there when this one is looked at."""
    sent, looked, end = 1 * MS, 60 * MS, 61 * MS
    intervals = [Interval("attention", 0, 1, sent, looked), Interval("receive", 0, 0, looked, end)]
    crossing = Crossing(0, 0, 0, sent, looked, Timing(0, 50 * MS, 1))
    explanation = explain(StepTimeline(0, end, intervals, [crossing]), (), ("shm",))
    assert explanation.culprit == "attention"


class SlowShard:
    """An FFN shard with something that takes long before each batch."""

    def __init__(self, shard: FFNShard, seconds: float) -> None:
        self._shard = shard
        self._seconds = seconds
        self.shard = shard.shard

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        time.sleep(self._seconds)
        return self._shard(*args, **kwargs)


@pytest.mark.parametrize(("num_others", "culprit"), [(0, "ffn"), (6, "queue")])
@pytest.mark.parametrize("kind", ["shm", "inline"])
async def test_a_slow_ffn_and_one_with_a_long_queue_are_told_apart(
    make_model: Callable[[int], Model], kind: TransportName, num_others: int, culprit: str
) -> None:
    """The frames before ours are too large to be computed with it, or with one another."""
    async with running_shard(make_model(4)) as shard:
        batcher = shard.servicer.batcher
        batcher.shard = SlowShard(batcher.shard, 0.03)  # type: ignore[assignment]
        pair, frame, timeline = await shard.connect(kind), shard.frame(frame_id=1), Timeline()
        others = [shard.frame(frame_id=10 + i, num_tokens=MAX_FRAME_TOKENS) for i in range(num_others)]
        batcher.attach(StubEndpoint(*others))
        timeline.begin()
        sent_ns = time.perf_counter_ns()
        await pair.send(frame)
        with timeline.measure("receive", frame.layer_idx, frame.slot):
            answer = await pair.receive(frame)
        crossing = Crossing(0, frame.layer_idx, frame.slot, sent_ns, answer.arrived_ns, answer.timing)
        explanation = explain(timeline.end([crossing]), (), (kind,))
        pair.close()
    assert explanation.culprit == culprit, explanation.sentence


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def slowed(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """Its 7th call takes so much longer."""
    calls = itertools.count(1)

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds if next(calls) == 7 else 0)
        return function(*args, **kwargs)

    return slow


@pytest.mark.parametrize("part", ["attention", "ffn", "scheduler"])
def test_what_was_slow_in_a_step_of_the_engine_is_counted_and_logged(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, part: Culprit
) -> None:
    harness.engine.tracer = tracer = StepTracer(slo_ms=300)
    where: dict[str, tuple[Any, str]] = {
        "attention": (type(harness.engine.decoder.stack.layers[0]), "attend"),
        "ffn": (harness.ffn, "shard"),
        "scheduler": (harness.engine.scheduler, "schedule"),
    }
    monkeypatch.setattr(*where[part], slowed(getattr(*where[part]), 0.4))
    with caplog.at_level(logging.WARNING):
        harness.tokens(harness.submit(harness.model.prompt(5, 1), 12))
        until(lambda: bool(tracer.num_slow and caplog.records))
    assert tracer.num_slow == {part: 1}
    (line,) = (record.getMessage() for record in caplog.records)
    assert re.match(r"over AFD_STEP_SLO_MS=300: the step took 4\d\d.\d ms: .* for 4\d\d.\d ms, usually \d+.\d ms", line)


def test_of_many_slow_steps_one_line_is_logged_and_all_are_counted(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    harness.engine.tracer = tracer = StepTracer(slo_ms=1e-6)
    with caplog.at_level(logging.WARNING):
        harness.tokens(harness.submit(harness.model.prompt(5, 1), 12))
        until(lambda: tracer.num_slow.total() >= 11)  # the first of the 12 steps only prefills
    assert tracer.num_slow.total() == 11
    assert len(caplog.records) == 1


@pytest.fixture(scope="module")
def spans(
    make_model: Callable[[int], Model], start_mesh: StartMesh, tmp_path_factory: pytest.TempPathFactory
) -> list[Span]:
    """Of a mesh where nothing is sampled and every step is slow."""
    path = tmp_path_factory.mktemp("traces") / "spans.jsonl"
    settings = {"trace_sample": 0, "step_slo_ms": 1e-6, "slow_steps_per_s": 0.01}
    with start_mesh(make_model(4).path, 1, 2, trace_file=path, **settings) as mesh:
        asyncio.run(generate(mesh, 8, {}))
    return read_spans(path)


def test_a_slow_step_keeps_all_its_spans_though_it_was_not_sampled(
    spans: list[Span], make_model: Callable[[int], Model]
) -> None:
    (slow,) = named(spans, "decode_step")
    children = [span for span in spans if span.get("parentSpanId") == slow["spanId"]]
    assert len(children) == len(spans) - 1
    num_layers = make_model(4).oracle.config.num_layers
    per_layer = {"attention": 1, "send": 1, "receive": 1, "handoff": 2}
    assert {name: len(named(children, name)) for name in per_layer} == {
        name: number * num_layers for name, number in per_layer.items()
    }


def test_no_more_slow_steps_are_kept_than_allowed(spans: list[Span]) -> None:
    """It decoded seven, one after the other."""
    assert len(named(spans, "decode_step")) == 1


def test_an_ffn_that_stands_still_for_a_moment_is_named(
    make_model: Callable[[int], Model], start_mesh: StartMesh, tmp_path: Path
) -> None:
    path = tmp_path / "spans.jsonl"
    settings = {"trace_sample": 0, "step_slo_ms": 400, "trace_file": path, "handoff": "shm"}
    with start_mesh(make_model(4).path, 1, 2, **settings) as mesh:

        def freeze() -> None:
            process = service(mesh, "ffn-1").process
            assert process is not None
            process.send_signal(signal.SIGSTOP)
            threading.Timer(0.6, process.send_signal, [signal.SIGCONT]).start()

        asyncio.run(generate(mesh, 40, {10: freeze}))
        values = counters(mesh)
    assert {culprit: values[f"afd_slow_steps/{culprit}"] for culprit in CULPRITS} == {
        culprit: culprit == "ffn" for culprit in CULPRITS
    }
    (slow,) = load_steps(path)
    assert slow.attributes["afd.slow"] is True
    assert slow.attributes["afd.culprit"] == "ffn"
    assert slow.attributes["afd.explanation"].endswith("most of it at shard 1")
