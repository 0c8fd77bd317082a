"""What operators see of a mesh: `afd top`, the console's data, a recent step."""

from __future__ import annotations

import asyncio
import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from xml.etree import ElementTree

import pytest
from rich.console import Console
from typer.testing import CliRunner

from afd import Client, SyncClient, cli
from afd.advice import Goal, advise, seen_as
from afd.client import Replica
from afd.errors import PermissionDenied
from afd.handoff.frame import Crossing, Timing
from afd.mesh import Mesh
from afd.rates import Rates
from afd.state.api_keys import ApiKeys, Limits
from afd.state.connection import connect
from afd.top import picture
from services.attention.recent_steps import RecentSteps
from services.attention.timeline import Interval, StepTimeline
from tests.conftest import Model, StartMesh, embedded_redis

LEASE_S = 1.0  # rates are as fresh as that
BUSY = {"gateway": ["output_tokens"], "attention": ["generated_tokens", "handoffs"], "ffn": ["ffn_compute_seconds"]}


@pytest.fixture(scope="module")
def mesh(make_model: Callable[[int], Model], start_mesh: StartMesh) -> Iterator[Mesh]:
    with start_mesh(make_model(4).path, 2, 2, lease_s=LEASE_S, handoff="shm") as mesh:
        yield mesh


def of(replicas: list[Replica], role: str) -> list[Replica]:
    return [replica for replica in replicas if replica.role == role]


async def seen_under_load(mesh: Mesh) -> list[Replica]:
    """The mesh while it decodes two sequences."""
    async with Client(mesh.gateway.address) as client:
        streams = [client.generate([5, 6], max_tokens=1000, ignore_eos=True) for _ in range(2)]
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            for stream in streams:
                await anext(stream)
            replicas = await client.get_mesh()
            busy = [name in each.rates and each.rates[name] > 0 for each in replicas for name in BUSY[each.role]]
            if all(busy):
                return replicas
            await asyncio.sleep(0.1)
    raise AssertionError(replicas)


def test_the_mesh_is_seen_with_its_load_its_rates_and_its_transports(mesh: Mesh) -> None:
    replicas = asyncio.run(seen_under_load(mesh))
    (gateway,), attention, ffn = (of(replicas, role) for role in ("gateway", "attention", "ffn"))
    assert gateway.sequences_at == {"attention-0": 1, "attention-1": 1}
    assert [replica.shard for replica in ffn] == [(0, 2), (1, 2)]
    for replica in attention:
        assert replica.is_ready
        assert replica.load["sequences"] == 1
        assert 0 < replica.load["kv_blocks"] < replica.capacity["kv_blocks"]
        assert replica.links == {"ffn-0": "shm", "ffn-1": "shm"}
        assert replica.rates["handoffs"] > replica.rates["steps"] > 0
    assert gateway.rates["output_tokens"] > 0
    assert all(0 < replica.rates["ffn_compute_seconds"] < 1 for replica in ffn)


def test_advice_on_a_mesh_that_runs_stands_on_its_numbers(mesh: Mesh) -> None:
    seen = seen_as([asyncio.run(seen_under_load(mesh))])
    assert (seen.attention, seen.ffn, seen.missing_shards) == (2, 2, ())
    assert seen.running == 2
    assert 0 < seen.bubble_s < seen.step_s
    assert 0 < seen.compute_s < seen.handoff_s
    assert advise(seen, Goal(tpot_ms=1e-3)).reason.count("instead of 0.001") == 1


def test_advise_prints_a_sentence_or_numbers(mesh: Mesh) -> None:
    ask = ["advise", mesh.gateway.address, "--seconds", "1"]
    shown, numbers = (CliRunner().invoke(cli.app, [*ask, *more]).output for more in ([], ["--json"]))
    assert shown.startswith("nothing")
    assert json.loads(numbers).keys() == {"attention", "ffn", "reason"}


def test_top_shows_every_replica_and_what_it_does(mesh: Mesh) -> None:
    replicas = asyncio.run(seen_under_load(mesh))
    shown = [drawn(replicas, width) for width in (80, 120)]
    assert ["█" in text for text in shown] == [False, True]
    for name in ("gateway-0", "attention-0", "attention-1", "ffn-0", "ffn-1", "shm x2", "0/2", "1/2", "attention-0: 1"):
        assert all(name in text for text in shown)
    assert all("…" not in text for text in shown), "nothing is cut off"


def drawn(replicas: list[Replica], width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(picture(replicas, width))
    return console.export_text()


def get(mesh: Mesh, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(mesh.http_url + path, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_recent_step_is_a_picture(mesh: Mesh) -> None:
    asyncio.run(seen_under_load(mesh))
    for slowest in ("true", "false"):
        status, text = get(mesh, f"/console/step?replica=attention-0&slowest={slowest}")
        assert status == 200
        words = "".join(ElementTree.fromstring(text).itertext())
        assert "Decode step of attention-0" in words
        assert "FFN 1/2" in words
    assert get(mesh, "/console/step?replica=nobody")[0] == 404
    assert get(mesh, "/console/step")[0] == 400


def test_where_keys_are_required_the_mesh_is_shown_to_operators(
    make_model: Callable[[int], Model], start_mesh: StartMesh
) -> None:
    async def keys(url: str) -> list[str]:
        async with connect(url) as redis:
            return [await ApiKeys(redis).create("name", Limits(), is_operator) for is_operator in (True, False)]

    with (
        embedded_redis() as redis,
        start_mesh(make_model(6).path, 1, 0, redis=redis, require_api_key=True) as mesh,
    ):
        operators, other = asyncio.run(keys(redis))
        with SyncClient(mesh.gateway.address, api_key=operators) as client:
            assert {replica.role for replica in client.get_mesh()} == {"gateway", "attention"}
        with (
            SyncClient(mesh.gateway.address, api_key=other) as client,
            pytest.raises(PermissionDenied, match="--operator"),
        ):
            client.get_mesh()
        assert get(mesh, "/console")[0] == 200, "the page says nothing"
        assert get(mesh, "/console/mesh")[0] == 401
        assert get(mesh, "/console/step?replica=attention-0")[0] == 401


def test_rates_are_per_second_and_not_of_moments() -> None:
    now_s, total = 0.0, 100.0
    rates = Rates(lambda: {"tokens": total}, lambda: now_s)
    assert rates.per_second() == {}, "nothing is known yet"
    now_s, total = 2.0, 110.0
    assert rates.per_second() == {"tokens": 5.0}
    now_s, total = 2.1, 200.0
    assert rates.per_second() == {"tokens": 5.0}
    now_s = 4.0
    assert rates.per_second() == {"tokens": 45.0}


def step(start_ns: int, end_ns: int, *crossings: Crossing) -> StepTimeline:
    waits = [Interval("receive", each.layer_idx, each.slot, each.arrived_ns - 1, each.arrived_ns) for each in crossings]
    return StepTimeline(start_ns, end_ns, waits, list(crossings))


def test_a_recent_step_has_what_was_away_at_its_end() -> None:
    recent = RecentSteps()
    assert recent.find(slowest=False) is None
    recent.note(step(0, 100), [])
    own, next_ones = Crossing(0, 3, 1, 90, 120, Timing(0, 5, 1)), Crossing(0, 4, 1, 130, 150, Timing(0, 5, 1))
    recent.note(step(100, 200, own, next_ones), [])
    found = recent.find(slowest=False)
    assert found is not None
    assert found.timeline.end_ns == 100
    assert found.crossings == [own]
    assert [(each.layer_idx, each.slot) for each in found.intervals] == [(3, 1)]


def test_a_step_that_was_abandoned_is_not_shown() -> None:
    recent = RecentSteps()
    recent.note(step(0, 100), [])
    recent.note(step(100, 200), [])
    recent.interrupt()
    recent.note(step(900, 950), [])
    for slowest in (True, False):
        found = recent.find(slowest)
        assert found is not None
        assert found.timeline.end_ns == 100


def test_the_slowest_step_is_kept_until_it_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    now_ns = 0
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now_ns)
    recent = RecentSteps()
    durations_ns = []
    for start_s, duration_ns in ((0, 5), (1, 9), (2, 3), (12, 4), (13, 1), (14, 1)):
        now_ns = start_s * 10**9 + duration_ns
        recent.note(step(now_ns - duration_ns, now_ns), [])
        slowest = recent.find(slowest=True)
        assert slowest is not None
        durations_ns.append(slowest.timeline.duration_ns)
    assert durations_ns == [5, 5, 9, 3, 4, 4]
