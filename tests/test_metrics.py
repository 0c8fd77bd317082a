"""What the services count for Prometheus: the transport of each pair, and the bubbles of both sides."""

from __future__ import annotations

import asyncio
import re
import socket
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from afd import Client
from afd.bench import counters
from afd.handoff.frame import Crossing, Timing
from afd.handoff.negotiate import LADDER
from afd.mesh import Mesh
from afd.planner.observations import read_observations
from afd.scrape import scrape
from afd.telemetry import serve_metrics
from services.attention.timeline import StepCounters, StepTimeline
from tests.conftest import Model, StartMesh

DOCS = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"


def test_who_says_nothing_to_the_metrics_is_cut_off(capfd: pytest.CaptureFixture[str]) -> None:
    port = serve_metrics("127.0.0.1", 0, patience_s=0.1)
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(b"GET /metr")
        assert connection.recv(100) == b""
    assert "Traceback" not in capfd.readouterr().err


def test_an_accept_header_that_is_none_gets_metrics(capfd: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{serve_metrics('127.0.0.1', 0)}/metrics"
    request = urllib.request.Request(url, headers={"Accept": "application/openmetrics-text; version=x"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
    assert capfd.readouterr().err == ""


def crossing(shard: int, layer_idx: int, slot: int, compute_ns: int) -> Crossing:
    return Crossing(shard, layer_idx, slot, 0, 900, Timing(0, compute_ns, 4))


def counted(*crossings: Crossing, step_ns: int = 1000) -> StepCounters:
    step_counters = StepCounters()
    step_counters.add_step(StepTimeline(0, step_ns, crossings=list(crossings)))
    return step_counters


def test_a_shards_bubble_is_the_part_of_the_step_that_it_computes_nothing_of() -> None:
    step_counters = counted(crossing(0, 0, 0, 300), crossing(0, 1, 0, 200), crossing(1, 0, 0, 100))
    assert [step_counters.shards[shard].bubble_ns for shard in (0, 1)] == [500, 900]


def test_a_batch_of_several_frames_is_busy_once() -> None:
    step_counters = counted(crossing(0, 0, 0, 300), crossing(0, 0, 1, 300), crossing(0, 1, 0, 300))
    assert step_counters.shards[0].bubble_ns == 400
    assert step_counters.shards[0].compute_ns == 900


def test_a_step_without_frames_for_a_shard_is_all_bubble_for_it() -> None:
    step_counters = counted(crossing(0, 0, 0, 300))
    step_counters.add_step(StepTimeline(0, 100))
    assert step_counters.shards[0].bubble_ns == 800


async def ask(address: str) -> None:
    async with Client(address) as client:
        async for _ in client.generate([3, 4, 5], max_tokens=8, ignore_eos=True):
            pass


@pytest.fixture(scope="module")
def mesh(make_model: Callable[[int], Model], start_mesh: StartMesh) -> Iterator[Mesh]:
    with start_mesh(make_model(4).path, 1, 2) as mesh:
        asyncio.run(ask(mesh.gateway.address))
        yield mesh


def test_the_transport_of_every_pair_is_a_metric_with_what_its_probe_measured(mesh: Mesh) -> None:
    values = counters(mesh, "attention-0")
    for shard in ("0", "1"):
        (transport,) = (name for name in LADDER if f"afd_handoff_transport/ffn-{shard}/{shard}/{name}" in values)
        assert values[f"afd_handoff_transport/ffn-{shard}/{shard}/{transport}"] == 1
        assert 0 < values[f"afd_handoff_probe_latency_seconds/ffn-{shard}/{shard}/{transport}"] < 5
        assert values[f"afd_handoff_probe_bytes_per_second/ffn-{shard}/{shard}/{transport}"] > 0
        assert values[f"afd_handoffs/{shard}"] == values["afd_handoffs/0"] > 0


def test_the_planner_reads_what_is_scraped_while_a_mesh_decodes(
    mesh: Mesh, make_model: Callable[[int], Model], tmp_path: Path
) -> None:
    (attention,) = (each.replica for each in mesh.services if each.role == "attention")
    assert attention is not None

    async def scrape_twice() -> None:
        async with Client(mesh.gateway.address) as client:
            stream = client.generate([3, 4, 5], max_tokens=200, ignore_eos=True)
            texts = [await asyncio.to_thread(metrics_text, attention.metrics_address)]
            async for _ in stream:
                pass
            texts.append(await asyncio.to_thread(metrics_text, attention.metrics_address))
        (tmp_path / "metrics.txt").write_text("".join(texts))

    asyncio.run(scrape_twice())
    (observed,) = read_observations([tmp_path / "metrics.txt"])
    assert (observed.setting.name, observed.setting.microbatches, observed.setting.streams) == ("1A2F", 1, 1)
    assert observed.setting.context == pytest.approx(3 + 200 / 2, abs=3)
    assert observed.num_layers == make_model(4).oracle.config.num_layers
    assert 0 < observed.crossing_s < observed.step_s


def metrics_text(address: str | None) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def test_bubbles_of_both_sides_are_metrics_and_parts_of_the_time(mesh: Mesh) -> None:
    attention, ffn = counters(mesh, "attention-0"), counters(mesh, "ffn-0", "ffn-1")
    assert attention["afd_attention_bubble_seconds"] == attention["afd_step_part_seconds/receive"] > 0
    for shard in ("0", "1"):
        assert 0 < attention[f"afd_handoff_ffn_bubble_seconds/{shard}"] < attention["afd_step_seconds"]
    assert ffn["afd_ffn_bubble_seconds"] > 0
    assert ffn["afd_ffn_compute_seconds"] > 0


def test_collocated_attention_has_no_bubble_and_no_transport(
    make_model: Callable[[int], Model], start_mesh: StartMesh
) -> None:
    with start_mesh(make_model(4).path, 1, 0) as mesh:
        asyncio.run(ask(mesh.gateway.address))
        values = counters(mesh)
    assert values["afd_attention_bubble_seconds"] == 0
    assert values["afd_step_part_seconds/receive"] > 0
    assert not [name for name in values if name.startswith(("afd_handoff_transport", "afd_handoff_ffn_bubble"))]


def gateway_metrics(mesh: Mesh) -> dict[str, float]:
    return scrape(str(mesh.gateway.metrics_address))


def test_the_gateway_counts_who_holds_a_lease_and_what_is_open(mesh: Mesh) -> None:
    async def ask_and_look() -> dict[str, float]:
        async with Client(mesh.gateway.address) as client:
            async for _ in client.generate([3, 4, 5], max_tokens=100, ignore_eos=True):
                return await asyncio.to_thread(gateway_metrics, mesh)
        raise AssertionError("no token")

    values = asyncio.run(ask_and_look())
    assert values["afd_requests_open"] == 1
    assert values["afd_requests_max"] == 10_000
    assert (values["afd_replicas/gateway"], values["afd_replicas/attention"]) == (1, 1)
    assert values["afd_attention_replicas_ready"] == 1


def test_what_can_answer_for_each_shard_is_a_metric(make_model: Callable[[int], Model], start_mesh: StartMesh) -> None:
    with start_mesh(make_model(4).path, 1, 2, ffn_replicas=2) as mesh:
        values = counters(mesh, "attention-0")
    assert {name: value for name, value in values.items() if name.startswith("afd_ffn_replicas")} == {
        "afd_ffn_replicas/0": 2,
        "afd_ffn_replicas/1": 2,
    }


def test_the_time_that_sequences_wait_is_a_metric(make_model: Callable[[int], Model], start_mesh: StartMesh) -> None:
    """Two, where one can be decoded at once: the first one is left 0.2 s after the second has come."""

    async def ask_meanwhile(mesh: Mesh) -> None:
        async with Client(mesh.gateway.address) as client:
            async for _ in client.generate([3, 4, 5], max_tokens=1000, ignore_eos=True):
                second = asyncio.create_task(ask(mesh.gateway.address))
                while not (await asyncio.to_thread(counters, mesh))["afd_sequences_waiting"]:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.2)
                break
            await second

    with start_mesh(make_model(4).path, 1, 0, max_sequences=1) as mesh:
        asyncio.run(asyncio.wait_for(ask_meanwhile(mesh), 30))
        values = counters(mesh)
    assert (values["afd_sequences_max"], values["afd_admissions"]) == (1, 2)
    assert 0.2 < values["afd_admission_wait_seconds"] < 30


def served_names(mesh: Mesh) -> set[str]:
    """The metrics of ours that the services serve, named as in the documentation."""
    names: set[str] = set()
    for service in mesh.services:
        assert service.replica is not None
        with urllib.request.urlopen(f"http://{service.replica.metrics_address}/metrics", timeout=10) as answer:
            names |= set(re.findall(r"^# TYPE ((?:afd|gen_ai)_\w+)", answer.read().decode(), re.MULTILINE))
    return {name.removesuffix("_total") for name in names if not name.endswith("_created")}


def test_the_documentation_lists_every_metric_and_no_other(mesh: Mesh) -> None:
    tables = DOCS.read_text().partition("## Bubbles")[0]
    assert set(re.findall(r"`((?:afd|gen_ai)_\w+)", tables)) - {"afd_trace"} == served_names(mesh)
