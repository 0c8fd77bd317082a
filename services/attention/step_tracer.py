"""A span for every decode step, and, where it is sampled, spans for its layers: made after the step, on another
thread, from the stamps that are taken anyway."""

from __future__ import annotations

import queue
import threading

from opentelemetry import trace

from afd.telemetry import clock_ns, traceparent, tracer
from services.attention.scheduler import Chunk
from services.attention.timeline import StepTimeline


class StepTracer:
    def __init__(self) -> None:
        self.traceparent = ""  # of the current step; empty unless it is sampled
        self._span: trace.Span = trace.INVALID_SPAN
        self._finished: queue.SimpleQueue[tuple[trace.Span, StepTimeline]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="step-tracer", daemon=True).start()

    def begin(self, chunks: list[Chunk], timeline: StepTimeline, transport_names: tuple[str, ...]) -> None:
        """Starts the step's span, linked to the requests that are in it. transport_names: of each FFN shard, if any."""
        requests = {chunk.sequence.key.request_id: chunk.sequence.span_context for chunk in chunks}
        self._span = tracer.start_span(
            "decode_step",
            context=trace.set_span_in_context(trace.INVALID_SPAN),
            links=[trace.Link(context) for context in requests.values() if context is not None and context.is_valid],
            start_time=clock_ns(timeline.start_ns),
            attributes={
                "afd.num_ffn_shards": len(transport_names),
                "afd.handoff.transports": transport_names,
                "afd.num_sequences": len(chunks),
                "afd.num_tokens": sum(chunk.num_tokens for chunk in chunks),
            },
        )
        self.traceparent = traceparent(self._span)

    def end(self, timeline: StepTimeline) -> None:
        if self._span.is_recording():
            self._finished.put((self._span, timeline))
        else:
            self._span.end()

    def fail(self, error: Exception) -> None:
        """The step came to nothing."""
        self._span.set_status(trace.StatusCode.ERROR, str(error))
        self._span.end()

    def _run(self) -> None:
        while True:
            span, timeline = self._finished.get()
            _add_children(span, timeline)
            span.end(clock_ns(timeline.end_ns))


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
