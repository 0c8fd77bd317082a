"""A span for every decode step, and, where it is sampled, spans for its layers: made after the step, on another
thread, from the stamps that are taken anyway."""

from __future__ import annotations

import queue
import threading

from opentelemetry import trace

from afd.telemetry import clock_ns, traceparent, tracer
from services.attention.chunk import Chunk
from services.attention.timeline import StepTimeline


class StepTracer:
    def __init__(self) -> None:
        self._start_ns = 0
        self._transport_names: tuple[str, ...] = ()
        self._span: trace.Span | None = None  # begun when it is first asked for
        self._finished: queue.SimpleQueue[tuple[trace.Span, StepTimeline]] = queue.SimpleQueue()
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
        span = self._begun()
        if not span.is_recording():
            return
        sequences = {chunk.sequence.key: chunk.sequence for chunk in chunks}
        span.set_attribute("afd.num_sequences", len(sequences))
        span.set_attribute("afd.num_tokens", sum(chunk.num_tokens for chunk in chunks))
        requests = {key.request_id: sequence.span_context for key, sequence in sequences.items()}
        for context in requests.values():
            if context is not None and context.is_valid:
                span.add_link(context)
        self._finished.put((span, step))

    def fail(self, error: Exception) -> None:
        """The step came to nothing."""
        span = self._begun()
        span.set_status(trace.StatusCode.ERROR, str(error))
        span.end()

    def _begun(self) -> trace.Span:
        if self._span is None:
            self._span = tracer.start_span(
                "decode_step",
                context=trace.set_span_in_context(trace.INVALID_SPAN),
                start_time=clock_ns(self._start_ns),
                attributes={
                    "afd.num_ffn_shards": len(self._transport_names),
                    "afd.handoff.transports": self._transport_names,
                },
            )
        return self._span

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
