"""Receives spans by OTLP, gRPC, and prints a line of JSON for each."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    def Export(self, request: pb.ExportTraceServiceRequest, context: Any) -> pb.ExportTraceServiceResponse:
        for of_process in request.resource_spans:
            values = {each.key: each.value.string_value for each in of_process.resource.attributes}
            for span in (span for of_scope in of_process.scope_spans for span in of_scope.spans):
                told = {
                    "service": values["service.name"],
                    "name": span.name,
                    "trace": span.trace_id.hex(),
                    "span": span.span_id.hex(),
                    "parent": span.parent_span_id.hex(),
                    "links": [link.trace_id.hex() for link in span.links],
                }
                print(f"{json.dumps(told)}\n", end="", flush=True)  # at once: there are other threads
        return pb.ExportTraceServiceResponse()


def main() -> None:
    server = grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Receiver(), server)
    server.add_insecure_port("0.0.0.0:4317")
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()
