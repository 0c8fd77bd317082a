"""What the containers tell of themselves: traces over OTLP, metrics in a real Prometheus that finds them by name."""

from __future__ import annotations

import json
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from afd import SyncClient
from tests.e2e.stack import Stack, image
from tests.redis_servers import free_port

pytestmark = pytest.mark.e2e

TIMEOUT_S = 60.0
MESH = ("gateway", "gateway-2", "attention", "ffn-0", "ffn-1")
PROMETHEUS_IMAGE = "prom/prometheus:v2.55.1"


@dataclass(frozen=True)
class Observed:
    stack: Stack
    prometheus_port: int

    def spans(self) -> list[dict[str, Any]]:
        (receiver,) = self.stack.containers("otel-collector")
        return [json.loads(line) for line in receiver.logs().decode().splitlines() if line.startswith("{")]

    def ask(self, path: str, **parameters: str) -> Any:
        """What Prometheus's API answers."""
        url = f"http://localhost:{self.prometheus_port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> dict[str, float]:
        """By job."""
        found = self.ask("query", query=expression)["result"]
        return {each["metric"]["job"]: float(each["value"][1]) for each in found}


@pytest.fixture(scope="module")
def observed(images: dict[str, str]) -> Iterator[Observed]:
    """A mesh of which everything is traced, and which has been asked something."""
    port = free_port()
    variables = {
        **images,
        "AFD_TRACE_SAMPLE": "1",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://otel-collector:4317",
        "PROMETHEUS_PORT": str(port),
    }
    stack = Stack(files=("compose.yaml", "tests/e2e/compose.receiver.yaml"), variables=variables)
    variables["PROMETHEUS_IMAGE"] = image(stack.engine, PROMETHEUS_IMAGE)
    with stack.running(*MESH, "otel-collector", "prometheus"):
        with SyncClient(stack.target) as client:
            for _ in range(3):
                assert len(list(client.generate("The sky is", max_tokens=20, ignore_eos=True))) == 20
        yield Observed(stack, port)


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1)


def test_a_request_is_one_trace_through_gateway_and_attention_and_leads_to_its_steps(observed: Observed) -> None:
    eventually(lambda: sum(span["name"] == "decode_step" for span in observed.spans()) >= 3 * 20)
    spans = observed.spans()
    by_id = {span["span"]: span for span in spans}
    requests = [span for span in spans if span["service"] == "afd-gateway" and not span["parent"]]
    assert {span["name"] for span in requests} == {"generate"}, "no scrapes, no probes"
    decodes = [span for span in spans if span["name"] == "attention.decode"]
    assert len(requests) == len(decodes) == 3
    assert all(by_id[decode["parent"]]["service"] == "afd-gateway" for decode in decodes)
    steps = [span for span in spans if span["name"] == "decode_step"]
    assert {link for step in steps for link in step["links"]} == {request["trace"] for request in requests}


def test_a_steps_trace_has_the_ffns_part_in_it(observed: Observed) -> None:
    eventually(lambda: any(span["name"] == "ffn.compute" for span in observed.spans()))
    spans = observed.spans()
    by_id = {span["span"]: span for span in spans}
    computed = [span for span in spans if span["name"] == "ffn.compute"]
    assert {span["service"] for span in computed} == {"afd-ffn"}
    assert all(by_id[span["parent"]]["name"] == "decode_step" for span in computed if span["parent"] in by_id)


def test_prometheus_finds_every_replica_and_its_numbers(observed: Observed) -> None:
    eventually(lambda: observed.query("count by (job) (up == 1)") == {"gateway": 2, "attention": 2, "ffn": 2})
    eventually(lambda: observed.query("sum by (job) (afd_generated_tokens_total)") == {"attention": 60})
    eventually(lambda: observed.query("sum by (job) (afd_output_tokens_total)") == {"gateway": 60})
    eventually(lambda: observed.query("sum by (job) (afd_ffn_frames_total)")["ffn"] > 60)


def test_prometheus_has_the_alert_rules_and_none_fires(observed: Observed) -> None:
    def healths() -> list[str]:
        return [rule["health"] for group in observed.ask("rules")["groups"] for rule in group["rules"]]

    assert len(healths()) > 10
    eventually(lambda: set(healths()) == {"ok"})
    assert [alert for alert in observed.ask("alerts")["alerts"] if alert["state"] == "firing"] == []


def test_a_latency_leads_to_the_trace_of_its_request(observed: Observed) -> None:
    def exemplars() -> set[str]:
        now = time.time()
        found = observed.ask(
            "query_exemplars",
            query="gen_ai_server_time_to_first_token_seconds_bucket",
            start=str(now - 600),
            end=str(now),
        )
        return {each["labels"]["trace_id"] for series in found for each in series["exemplars"]}

    eventually(exemplars)
    assert exemplars() <= {span["trace"] for span in observed.spans()}
