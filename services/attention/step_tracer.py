"""A span for every decode step, and, where it is sampled, spans for its layers: made after the step, on another
thread, from the stamps that are taken anyway.

A step that takes longer than its service level objective (SLO) keeps all its spans, sampled or not, and says why.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

from opentelemetry import trace
from opentelemetry.util.types import AttributeValue

from afd.telemetry import KEPT, clock_ns, traceparent, tracer
from services.attention.chunk import Chunk, context_tokens
from services.attention.slow_steps import Culprit, explain
from services.attention.timeline import StepTimeline

log = logging.getLogger(__name__)

_NUM_USUAL_STEPS = 8  # the last ones within the SLO; a slow one is compared with them
_LOG_PACE_S = 5.0


class _Finished(NamedTuple):
    span: trace.Span
    step: StepTimeline
    chunks: Sequence[Chunk]
    num_context_tokens: int
    transport_names: tuple[str, ...]
    usual: tuple[StepTimeline, ...] | None  # of a slow step: those before it


class _Pace:
    """Lets things happen at most once in interval_s."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._next_s = -math.inf

    def allows(self) -> bool:
        now = time.monotonic()
        if now < self._next_s:
            return False
        self._next_s = now + self._interval_s
        return True


class StepTracer:
    """num_slow: steps over the SLO, by culprit. Of those that are not sampled, slow_steps_per_s keep their spans."""

    def __init__(self, slo_ms: float | None = None, slow_steps_per_s: float = 1.0) -> None:
        self.num_slow: Counter[Culprit] = Counter()
        self._slo_ns = math.inf if slo_ms is None else slo_ms * 1e6
        self._usual: deque[StepTimeline] = deque(maxlen=_NUM_USUAL_STEPS)
        self._keeps = _Pace(1 / slow_steps_per_s)
        self._logs = _Pace(_LOG_PACE_S)
        self._start_ns = 0
        self._transport_names: tuple[str, ...] = ()
        self._span: trace.Span | None = None  # begun when it is first asked for
        self._finished: queue.SimpleQueue[_Finished] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="step-tracer", daemon=True).start()

    def begin(self, start_ns: int, transport_names: tuple[str, ...]) -> None:
        """A step begins, or begins anew where nothing came of it. transport_names: of each FFN shard, if any."""
        self._start_ns = start_ns
        self._transport_names = transport_names
        self._span = None

    @property
    def traceparent(self) -> str:
        """Of the current step; empty unless it is sampled."""
        return traceparent(self._begun())

    def end(self, step: StepTimeline, chunks: list[Chunk]) -> None:
        """Ends the step's span, linked to the requests whose chunks were computed in it."""
        span, usual = self._begun(), None
        if step.duration_ns <= self._slo_ns:
            self._usual.append(step)
        elif any(chunk.num_tokens == 1 for chunk in chunks):  # nobody waits for his next token in one of mere prefill
            usual = tuple(self._usual)
        if usual is not None or span.is_recording():
            self._finished.put(_Finished(span, step, chunks, context_tokens(chunks), self._transport_names, usual))

    def fail(self, error: Exception) -> None:
        """The step came to nothing."""
        span = self._begun()
        span.set_status(trace.StatusCode.ERROR, str(error))
        span.end()

    def _begun(self) -> trace.Span:
        if self._span is None:
            self._span = _begin_span(self._start_ns, self._transport_names)
        return self._span

    def _run(self) -> None:
        while True:
            finished = self._finished.get()
            span = finished.span if finished.usual is None else self._explained(finished, finished.usual)
            if span.is_recording():
                _describe(span, finished.chunks, finished.num_context_tokens)
                _add_children(span, finished.step)
                span.end(clock_ns(finished.step.end_ns))

    def _explained(self, finished: _Finished, usual: tuple[StepTimeline, ...]) -> trace.Span:
        """The slow step's span: one that is kept, if it was not sampled and there is none too many."""
        step, span = finished.step, finished.span
        culprit, sentence = explain(step, usual, finished.transport_names)
        self.num_slow[culprit] += 1
        if not span.is_recording() and self._keeps.allows():
            span = _begin_span(step.start_ns, finished.transport_names, kept=True)
        span.set_attributes({"afd.slow": True, "afd.culprit": culprit, "afd.explanation": sentence})
        if self._logs.allows():
            log.warning("over AFD_STEP_SLO_MS=%g: %s", self._slo_ns / 1e6, sentence)
        return span


def _begin_span(start_ns: int, transport_names: tuple[str, ...], kept: bool = False) -> trace.Span:
    attributes: dict[str, AttributeValue] = {
        "afd.num_ffn_shards": len(transport_names),
        "afd.handoff.transports": transport_names,
    }
    if kept:
        attributes[KEPT] = True
    context = trace.set_span_in_context(trace.INVALID_SPAN)
    return tracer.start_span("decode_step", context, start_time=clock_ns(start_ns), attributes=attributes)


def _describe(span: trace.Span, chunks: Sequence[Chunk], num_context_tokens: int) -> None:
    sequences = {chunk.sequence.key: chunk.sequence for chunk in chunks}
    span.set_attribute("afd.num_sequences", len(sequences))
    span.set_attribute("afd.num_tokens", sum(chunk.num_tokens for chunk in chunks))
    span.set_attribute("afd.num_context_tokens", num_context_tokens)
    requests = {key.request_id: sequence.span_context for key, sequence in sequences.items()}
    for context in requests.values():
        if context is not None and context.is_valid:
            span.add_link(context)


def _add_children(span: trace.Span, timeline: StepTimeline) -> None:
    context = trace.set_span_in_context(span)
    for part, layer_idx, slot, start_ns, end_ns in timeline.intervals:
        attributes = {"afd.layer_idx": layer_idx, "afd.microbatch": slot} if layer_idx >= 0 else {}
        child = tracer.start_span(part, context, start_time=clock_ns(start_ns), attributes=attributes)
        child.end(clock_ns(end_ns))
    for crossing in timeline.crossings:
        child = tracer.start_span(
            "handoff",
            context,
            start_time=clock_ns(crossing.sent_ns),
            attributes={
                "afd.layer_idx": crossing.layer_idx,
                "afd.microbatch": crossing.slot,
                "afd.shard": crossing.shard,
                "afd.ffn.queue_ns": crossing.timing.queue_ns,
                "afd.ffn.compute_ns": crossing.timing.compute_ns,
                "afd.ffn.num_batch_tokens": crossing.timing.num_batch_tokens,
            },
        )
        child.end(clock_ns(crossing.arrived_ns))
