"""Every decode step is a trace across the services: in a file, over OTLP, and drawn by `afd trace`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from afd import Client
from afd.handoff.negotiate import LADDER
from afd.planner.observations import read_observations
from tests.conftest import Model, StartMesh

Span = dict[str, Any]
NUM_TOKENS = 6


async def ask(address: str, prompt: str, **options: Any) -> None:
    async with Client(address) as client:
        async for _ in client.generate(prompt, max_tokens=NUM_TOKENS, ignore_eos=True, **options):
            pass


def read_spans(path: Path) -> list[Span]:
    spans = []
    for line in path.read_text().splitlines():
        for resource in json.loads(line)["resourceSpans"]:
            attributes = {a["key"]: next(iter(a["value"].values())) for a in resource["resource"]["attributes"]}
            for scope in resource["scopeSpans"]:
                spans += [{**span, "service": attributes["service.name"]} for span in scope["spans"]]
    return spans


@pytest.fixture(scope="module")
def trace_file(
    make_model: Callable[[int], Model], start_mesh: StartMesh, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("traces") / "spans.jsonl"
    with start_mesh(make_model(4).path, 1, 2, trace_sample=1, trace_file=path) as mesh:
        asyncio.run(ask(mesh.gateway.address, "a secret prompt"))
        urllib.request.urlopen(f"{mesh.http_url}/health", timeout=5).read()
    return path


@pytest.fixture(scope="module")
def spans(trace_file: Path) -> list[Span]:
    return read_spans(trace_file)


def named(spans: list[Span], name: str) -> list[Span]:
    return [span for span in spans if span["name"] == name]


def test_request_is_one_trace_from_gateway_to_attention(spans: list[Span]) -> None:
    (request,) = named(spans, "generate")
    (decode,) = named(spans, "attention.decode")
    assert (request["service"], decode["service"]) == ("afd-gateway", "afd-attention")
    assert (decode["traceId"], decode["parentSpanId"]) == (request["traceId"], request["spanId"])


def test_gateways_trace_requests_and_no_probes(spans: list[Span]) -> None:
    assert {span["name"] for span in spans if span["service"] == "afd-gateway"} == {"generate"}


def test_every_step_is_a_span_linked_to_its_requests(spans: list[Span]) -> None:
    steps = named(spans, "decode_step")
    (decode,) = named(spans, "attention.decode")
    assert len(steps) == NUM_TOKENS
    assert all([link["spanId"] for link in step["links"]] == [decode["spanId"]] for step in steps)


def test_every_step_says_how_its_frames_move_to_each_shard(spans: list[Span]) -> None:
    for step in named(spans, "decode_step"):
        attributes = {attribute["key"]: attribute["value"] for attribute in step["attributes"]}
        transports = [value["stringValue"] for value in attributes["afd.handoff.transports"]["arrayValue"]["values"]]
        assert len(transports) == 2
        assert set(transports) <= set(LADDER)


def test_every_layer_of_a_step_has_its_spans_in_both_services(
    spans: list[Span], make_model: Callable[[int], Model]
) -> None:
    num_layers = make_model(4).oracle.config.num_layers
    step = named(spans, "decode_step")[-1]
    children = [span for span in spans if span.get("parentSpanId") == step["spanId"]]
    per_layer = {"attention": 1, "send": 1, "receive": 1, "handoff": 2, "ffn.queue": 2, "ffn.compute": 2}
    for name, number in per_layer.items():
        assert len(named(children, name)) == number * num_layers
        assert {span["service"] for span in named(children, name)} == {
            "afd-ffn" if name.startswith("ffn") else "afd-attention"
        }
    for child in children:
        if child["service"] == "afd-attention":
            assert int(step["startTimeUnixNano"]) <= int(child["startTimeUnixNano"])
            assert int(child["endTimeUnixNano"]) <= int(step["endTimeUnixNano"])


def test_the_planner_reads_what_the_steps_took(trace_file: Path) -> None:
    (observed,) = read_observations([trace_file])
    setting = observed.setting
    assert (setting.num_attention, setting.num_ffn, setting.microbatches, setting.streams) == (1, 2, 1, 1)
    assert 1 < setting.context <= len("a secret prompt") + 1 + NUM_TOKENS
    parts = (observed.attention_s, observed.beside_s, observed.ffn_s, observed.crossing_s)
    assert all(0 < part < observed.step_s for part in parts)
    assert sum(parts) == pytest.approx(observed.step_s)


def test_prompts_are_not_in_the_trace(trace_file: Path) -> None:
    assert "secret" not in trace_file.read_text()


def test_afd_trace_draws_a_step(trace_file: Path, tmp_path: Path) -> None:
    svg, chrome = tmp_path / "step.svg", tmp_path / "steps.json"
    result = subprocess.run(
        [sys.executable, "-m", "afd", "trace", str(trace_file), "--svg", str(svg), "--chrome", str(chrome)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "attention" in result.stdout
    assert "FFN 1/2" in result.stdout
    assert svg.read_text().startswith("<svg")
    assert json.loads(chrome.read_text())["traceEvents"]


def test_unsampled_steps_leave_no_spans(
    make_model: Callable[[int], Model], start_mesh: StartMesh, tmp_path: Path
) -> None:
    path = tmp_path / "spans.jsonl"
    with start_mesh(make_model(4).path, 1, 0, trace_sample=0, trace_file=path) as mesh:
        asyncio.run(ask(mesh.gateway.address, "x"))
    assert read_spans(path) == []


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP collector that remembers which services sent which spans."""

    def __init__(self) -> None:
        self.names: set[tuple[str, str]] = set()

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            attributes = {a.key: a.value.string_value for a in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.names |= {(attributes["service.name"], span.name) for span in scope.spans}
        return trace_service_pb2.ExportTraceServiceResponse()


@contextlib.contextmanager
def otlp_receiver() -> Iterator[tuple[Receiver, str]]:
    server, receiver = grpc.server(futures.ThreadPoolExecutor(2)), Receiver()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield receiver, f"http://127.0.0.1:{port}"
    server.stop(1).wait()


def test_spans_of_all_services_arrive_over_otlp(
    make_model: Callable[[int], Model], start_mesh: StartMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    with otlp_receiver() as (receiver, endpoint):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        with start_mesh(make_model(4).path, 1, 1, trace_sample=1) as mesh:
            asyncio.run(ask(mesh.gateway.address, "x"))
    expected = {("afd-gateway", "generate"), ("afd-attention", "decode_step"), ("afd-ffn", "ffn.compute")}
    assert expected <= receiver.names
