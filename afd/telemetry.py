"""OpenTelemetry and Prometheus, set up once per process. Off or unsampled, tracing costs next to nothing."""

from __future__ import annotations

import io
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import prometheus_client
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, Sampler, SamplingResult, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes

from afd.address import joined
from afd.config import ServiceSettings
from afd.errors import ConfigError

_OTLP_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROPAGATOR = TraceContextTextMapPropagator()
# Spans are made from perf_counter stamps, which are precise; this turns them into times of day.
_EPOCH_OF_PERF_COUNTER_NS = time.time_ns() - time.perf_counter_ns()

KEPT = "afd.kept"  # a span that begins with this attribute is recorded, whatever was sampled
tracer = trace.get_tracer("afd")


def set_up(role: str, settings: ServiceSettings) -> None:
    """Logging, and spans to where OTEL_EXPORTER_OTLP_* and the `trace_file` setting say."""
    name = settings.replica_id if settings.replica_id.startswith(role) else f"{role} {settings.replica_id}"
    logging.basicConfig(
        level=settings.log_level.upper(), format=f"%(asctime)s %(levelname)s {name}: %(message)s", force=True
    )
    exporters = list(_exporters(settings.trace_file))
    if not exporters:
        return
    sampler = None if "OTEL_TRACES_SAMPLER" in os.environ else ParentBased(TraceIdRatioBased(settings.trace_sample))
    provider = TracerProvider(sampler, Resource.create({"service.name": f"afd-{role}",
                                                        "service.instance.id": settings.replica_id}))  # fmt: skip
    provider.sampler = _Keeping(provider.sampler)
    for exporter in exporters:
        provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=1 << 15))
    trace.set_tracer_provider(provider)


class _Keeping(Sampler):
    """Samples what is to be kept; for the rest another one decides."""

    def __init__(self, other: Sampler) -> None:
        self.other = other

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: trace.SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[trace.Link] | None = None,
        trace_state: trace.TraceState | None = None,
    ) -> SamplingResult:
        sampler = ALWAYS_ON if attributes and KEPT in attributes else self.other
        return sampler.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)

    def get_description(self) -> str:
        return f"Keeping({self.other.get_description()})"


def shut_down() -> None:
    """Sends the spans that are still held."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        provider.shutdown()


def _exporters(trace_file: Path | None) -> list[SpanExporter]:
    exporters: list[SpanExporter] = []
    if any(os.environ.get(name) for name in _OTLP_VARIABLES):
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        exporters.append(OTLPSpanExporter())
    if trace_file is not None:
        from opentelemetry.exporter.otlp.json.file.trace_exporter import FileSpanExporter

        exporters.append(FileSpanExporter(stream=_appending_file(trace_file)))
    return exporters


def _appending_file(path: Path) -> IO[str]:
    """Hands each line to the kernel in one write, so that several processes can append to the same file."""
    try:
        return io.TextIOWrapper(path.open("ab", buffering=0), encoding="utf-8", write_through=True)
    except OSError as error:
        raise ConfigError(f"spans cannot be written to {path}: {error.strerror}") from None


def _forget_it(request: object, client_address: object) -> None:
    """A client that left or said nothing is not worth a traceback."""


def clock_ns(perf_counter_ns: int) -> int:
    """Nanoseconds since the epoch of a perf_counter_ns stamp."""
    return perf_counter_ns + _EPOCH_OF_PERF_COUNTER_NS


def traceparent(span: trace.Span) -> str:
    """The W3C traceparent of a span, to carry to another service; empty unless the span is recorded."""
    if not span.is_recording():
        return ""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
    return carrier["traceparent"]


def exemplar(span: trace.Span) -> dict[str, str] | None:
    """What leads from a histogram's bucket to the span's trace; None unless the span is recorded."""
    return {"trace_id": trace.format_trace_id(span.get_span_context().trace_id)} if span.is_recording() else None


def context_of(carrier: Mapping[str, str]) -> Context:
    """The context that a `traceparent` entry names; empty without one."""
    return _PROPAGATOR.extract(carrier)


class TimedFrame(Protocol):
    """A frame, as far as its spans go."""

    @property
    def layer_idx(self) -> int: ...

    @property
    def traceparent(self) -> str: ...


class FrameTiming(Protocol):
    """How long the FFN had it."""

    @property
    def queue_ns(self) -> int: ...

    @property
    def compute_ns(self) -> int: ...

    @property
    def num_batch_tokens(self) -> int: ...


def record_ffn_spans(frame: TimedFrame, shard: int, timing: FrameTiming) -> None:
    """The FFN's part of a sampled step, under the step's span: how long the frame was queued, and its computation."""
    context = context_of({"traceparent": frame.traceparent})
    end = clock_ns(time.perf_counter_ns())
    attributes = {"afd.layer_idx": frame.layer_idx, "afd.shard": shard, "afd.num_batch_tokens": timing.num_batch_tokens}
    for name, start_ns, end_ns in (
        ("ffn.queue", end - timing.compute_ns - timing.queue_ns, end - timing.compute_ns),
        ("ffn.compute", end - timing.compute_ns, end),
    ):
        tracer.start_span(name, context, start_time=start_ns, attributes=attributes).end(end_ns)


def _forgiving(app: Any) -> Any:
    """Whose Accept header cannot be read gets what those without one get, not an error."""

    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        try:
            return app(environ, start_response)
        except (TypeError, ValueError):
            return app({**environ, "HTTP_ACCEPT": ""}, start_response)

    return answer


def serve_metrics(host: str, port: int, patience_s: float = 10.0) -> int:
    """Prometheus metrics of this process on an own port; returns the port. Who connects and says nothing for patience_s
    is cut off: each has a thread. Raises ConfigError if the port is taken."""
    try:
        server, _ = prometheus_client.start_http_server(port, host)
    except OSError as error:
        raise ConfigError(f"cannot serve metrics on {joined(host, port)}: {error.strerror}") from None
    server.RequestHandlerClass.timeout = patience_s  # type: ignore[attr-defined]
    server.set_app(_forgiving(server.get_app()))
    server.handle_error = _forget_it  # type: ignore[method-assign]
    return int(server.server_port)
