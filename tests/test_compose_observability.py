"""The profile `observability` of the compose file: collector, Jaeger, Prometheus and Grafana that see the services."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from afd import Client
from afd.mesh import Mesh
from tests import promql
from tests.conftest import Model, StartMesh
from tests.test_alerts import alerts
from tests.test_dashboards import expressions
from tests.test_losses import generate

COMPOSE = promql.ROOT / "compose"
SERVICES = ("otel-collector", "jaeger", "prometheus", "grafana")
# Nothing of the kind has happened.
UNSEEN = ("afd_frames_resent_total", "afd_refused_requests_total", "afd_failover_seconds_bucket")


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((promql.ROOT / "compose.yaml").read_text())
    return loaded


def prometheus_config(name: str = "prometheus.yaml") -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((COMPOSE / name).read_text())
    return loaded


def test_the_profile_is_what_observes_and_nothing_else() -> None:
    profiles = {name: service.get("profiles", []) for name, service in compose()["services"].items()}
    assert {name for name, own in profiles.items() if "observability" in own} == set(SERVICES)


@pytest.mark.parametrize("name", SERVICES)
def test_an_observer_has_no_rights_and_is_reached_from_this_machine_only(name: str) -> None:
    service = compose()["services"][name]
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert re.fullmatch(r"[1-9]\d*:\d+", service["user"])
    assert re.fullmatch(r"(\${\w+:-)?[\w/-]+:v?\d+\.\d+\.\d+}?", service["image"])
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


@pytest.mark.parametrize("name", SERVICES)
def test_what_an_observer_mounts_is_there_and_read_only(name: str) -> None:
    for volume in compose()["services"][name].get("volumes", ()):
        source, _, mode = volume.partition(":")
        if source.startswith("./"):
            assert (promql.ROOT / source).exists()
            assert mode.endswith(":ro")
        else:
            assert source in compose()["volumes"]


def test_prometheus_looks_for_every_service_where_its_metrics_are() -> None:
    found = {
        (name, target["port"])
        for job in prometheus_config()["scrape_configs"]
        for target in job["dns_sd_configs"]
        for name in target["names"]
    }
    services = compose()["services"].keys() - SERVICES - {"redis"}
    assert found == {(name, 8000 if name.startswith("gateway") else 9090) for name in services}
    for role in ("attention", "ffn"):
        assert "AFD_METRICS_PORT=9090" in (promql.ROOT / "services" / role / "Dockerfile").read_text()


def test_with_tls_prometheus_asks_the_gateways_by_it_and_all_else_is_the_same() -> None:
    changed = yaml.safe_load((promql.ROOT / "compose.tls.yaml").read_text())["services"]["prometheus"]
    assert changed["volumes"][0] == "./compose/prometheus.tls.yaml:/etc/prometheus/prometheus.yaml:ro"
    encrypted = prometheus_config("prometheus.tls.yaml")
    job = encrypted["scrape_configs"][0]
    assert (job.pop("scheme"), job.pop("tls_config")["ca_file"]) == (
        "https",
        Path(changed["volumes"][1]["target"]).name,
    )
    assert encrypted == prometheus_config()


def test_every_job_names_the_mesh_that_the_services_have_joined() -> None:
    environments = [service.get("environment", {}) for service in compose()["services"].values()]
    (mesh,) = {environment["AFD_MESH"] for environment in environments if "AFD_MESH" in environment}
    for job in prometheus_config()["scrape_configs"]:
        assert job["relabel_configs"] == [{"target_label": "mesh", "replacement": mesh}]


def test_the_observers_find_one_another() -> None:
    collector = yaml.safe_load((COMPOSE / "otel-collector.yaml").read_text())
    datasources = yaml.safe_load((COMPOSE / "grafana" / "datasources.yaml").read_text())["datasources"]
    addresses = [collector["exporters"]["otlp"]["endpoint"], *(each["url"] for each in datasources)]
    hosts = {re.sub(r"^\w+://", "", address).partition(":")[0] for address in addresses}
    assert hosts == {"jaeger", "prometheus"}
    (destination,) = datasources[0]["jsonData"]["exemplarTraceIdDestinations"]
    assert destination == {"name": "trace_id", "datasourceUid": datasources[1]["uid"]}


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """As it lies in the container: the rules beside it."""
    path = folder / "prometheus.yaml"
    path.write_text(yaml.safe_dump(config))
    shutil.copy(promql.ALERTS, folder / "alerts.yaml")
    return path


@promql.needs_promtool
@pytest.mark.parametrize("name", ["prometheus.yaml", "prometheus.tls.yaml"])
def test_prometheus_takes_its_configuration_and_the_rules(tmp_path: Path, name: str) -> None:
    (tmp_path / "ca.crt").touch()
    assert promql.promtool("check", "config", str(write_config(tmp_path, prometheus_config(name)))) == ""


def targets_of(mesh: Mesh, job: str) -> list[str]:
    return [str(each.replica.metrics_address) for each in mesh.services if each.role == job and each.replica]


class Prometheus:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **parameters: object) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=10) as answer:
            return json.load(answer)["data"]

    def values(self, expression: str) -> list[float]:
        """Those that are numbers."""
        found = [float(series["value"][1]) for series in self.get("query", query=expression)["result"]]
        return [value for value in found if not math.isnan(value)]

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                if condition():
                    return
            assert time.monotonic() < deadline
            time.sleep(0.2)


@contextlib.contextmanager
def running_prometheus(mesh: Mesh, folder: Path) -> Iterator[Prometheus]:
    """With compose's configuration, but that it is told where the mesh's services are, and looks more often."""
    config = prometheus_config()
    config["global"]["scrape_interval"] = "1s"
    for job in config["scrape_configs"]:
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": targets_of(mesh, job["job_name"])}]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = [option for option in compose()["services"]["prometheus"]["command"] if option.startswith("--enable")]
    command = [
        "prometheus",
        f"--config.file={write_config(folder, config)}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        *options,
    ]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            yield Prometheus(port)
        finally:
            process.terminate()


async def use(mesh: Mesh) -> None:
    """Requests of every kind, and one that is left."""
    await asyncio.gather(*(generate(mesh, 50, {}) for _ in range(4)))
    async with Client(mesh.gateway.address) as client:
        async for _ in client.generate([3, 4, 5], max_tokens=500, ignore_eos=True):
            break


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus (Debian: prometheus)")
def test_a_real_prometheus_has_data_for_every_panel_and_leads_to_traces(
    make_model: Callable[[int], Model], start_mesh: StartMesh, tmp_path: Path
) -> None:
    settings = {"trace_sample": 1, "trace_file": tmp_path / "spans.jsonl", "step_slo_ms": 1000}
    with start_mesh(make_model(4).path, 2, 2, **settings) as mesh, running_prometheus(mesh, tmp_path) as prometheus:
        prometheus.until(lambda: len(prometheus.get("query", query='up{mesh="compose"} == 1')["result"]) == 5)
        for _ in range(4):
            asyncio.run(use(mesh))
            time.sleep(1.1)  # another scrape
        loaded = {rule["name"] for group in prometheus.get("rules")["groups"] for rule in group["rules"]}
        assert set(alerts()) < loaded
        for path in promql.DASHBOARDS:
            for expression in expressions(json.loads(path.read_text())):
                if not any(name in expression for name in UNSEEN):
                    assert prometheus.values(expression), expression
        exemplars = prometheus.get(
            "query_exemplars",
            query="gen_ai_server_time_to_first_token_seconds_bucket",
            start=time.time() - 600,
            end=time.time() + 1,
        )
    traces = {sample["labels"]["trace_id"] for series in exemplars for sample in series["exemplars"]}
    spans = (tmp_path / "spans.jsonl").read_text()
    assert traces
    assert all(trace in spans for trace in traces)
