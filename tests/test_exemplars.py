"""From a bucket of the gateway's latency histograms to the trace of a request in it."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families as plain_text_families

from afd.mesh import Mesh
from tests.conftest import Model, StartMesh
from tests.test_losses import generate
from tests.test_tracing import named, read_spans

HISTOGRAMS = (
    "gen_ai_server_time_to_first_token_seconds",
    "gen_ai_server_time_per_output_token_seconds",
    "gen_ai_server_request_duration_seconds",
)
# What Prometheus sends.
OPENMETRICS = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,*/*;q=0.1"


def metrics(mesh: Mesh, accept: str | None = None) -> tuple[str, str]:
    """The content type and the text of the gateway's metrics."""
    request = urllib.request.Request(f"{mesh.http_url}/metrics", headers={"Accept": accept} if accept else {})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.headers["content-type"], answer.read().decode()


def exemplars(text: str) -> dict[str, set[str]]:
    """The trace ids of each histogram."""
    return {
        family.name: {sample.exemplar.labels["trace_id"] for sample in family.samples if sample.exemplar}
        for family in openmetrics_families(text)
        if family.name in HISTOGRAMS
    }


def test_each_histogram_leads_to_the_trace_of_a_sampled_request(
    make_model: Callable[[int], Model], start_mesh: StartMesh, tmp_path: Path
) -> None:
    path = tmp_path / "spans.jsonl"
    with start_mesh(make_model(4).path, 1, 0, trace_sample=1, trace_file=path) as mesh:
        asyncio.run(generate(mesh, 3, {}))
        content_type, text = metrics(mesh, OPENMETRICS)
    (request,) = named(read_spans(path), "generate")
    assert content_type.startswith("application/openmetrics-text")
    assert exemplars(text) == {name: {request["traceId"]} for name in HISTOGRAMS}


@pytest.fixture(scope="module")
def unsampled(
    make_model: Callable[[int], Model], start_mesh: StartMesh, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mesh]:
    path = tmp_path_factory.mktemp("traces") / "spans.jsonl"
    with start_mesh(make_model(4).path, 1, 0, trace_sample=0, trace_file=path) as mesh:
        asyncio.run(generate(mesh, 3, {}))
        yield mesh


def test_a_request_that_is_not_sampled_is_no_exemplar(unsampled: Mesh) -> None:
    assert exemplars(metrics(unsampled, OPENMETRICS)[1]) == {name: set() for name in HISTOGRAMS}


def test_who_does_not_ask_for_openmetrics_gets_plain_text(unsampled: Mesh) -> None:
    content_type, text = metrics(unsampled)
    assert content_type.startswith("text/plain; version=")
    assert "# EOF" not in text
    assert set(HISTOGRAMS) < {family.name for family in plain_text_families(text)}


def test_a_malformed_accept_is_no_error(unsampled: Mesh) -> None:
    assert metrics(unsampled, "application/openmetrics-text; version=x")[0].startswith("application/openmetrics-text")
