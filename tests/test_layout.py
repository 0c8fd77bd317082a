"""`afd layout`: the FFN of a mesh that Kubernetes runs is split into other shards, while it serves."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from afd.cli import app
from afd.errors import Mismatch, PeerUnavailable
from afd.layout import change, require, show_or_change
from afd.mesh import Mesh, Seat
from afd.state.connection import connect
from afd.state.registry import NO_LAYOUT, Layout, Registry, Replica
from tests.conftest import Model, StartMesh
from tests.redis_servers import Server, one_server
from tests.test_cli import afd, assert_refused
from tests.test_scale import streams

REPLICA = Replica("ffn", "ffn-0", "127.0.0.1:1", "fingerprint", pid=1)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with one_server(tmp_path) as server:
        yield server


async def test_a_layout_begins_when_each_of_its_shards_has_a_replica(server: Server) -> None:
    async with connect(server.url) as redis, contextlib.AsyncExitStack() as shards:
        registry = Registry(redis, lease_s=5.0, mesh="somewhere.afd")

        async def bring_up(shard: int, num_shards: int) -> None:
            there = replace(REPLICA, replica_id=f"ffn-{shard}-of-{num_shards}", shard=(shard, num_shards))
            await shards.enter_async_context(registry.registered(lambda: there))

        await registry.keep_layout(Layout(1, 2))
        await bring_up(1, 3)
        await bring_up(0, 2)
        sentence = "no replica of FFN shard 0/3, 2/3 in mesh somewhere.afd, so it still has 2 FFN shards, in epoch 1"
        with pytest.raises(PeerUnavailable, match=sentence):
            await change(registry, 3)
        await bring_up(0, 3)
        await bring_up(2, 3)
        assert await change(registry, 3) == Layout(2, 3)
        assert await registry.keep_layout(NO_LAYOUT) == Layout(2, 3)
        assert await change(registry, 3) == Layout(2, 3), "it is so already"


def test_the_command_tells_and_refuses_in_a_sentence(server: Server) -> None:
    server.ask("SADD", "afd:replicas:{elsewhere}:ffn", "ffn-0")
    unknown = afd("layout", AFD_REDIS=server.url, AFD_MESH="somewhere")
    assert_refused(unknown, "afd: there is no mesh somewhere; on this Redis there are: elsewhere")
    assert_refused(afd("layout", 2, AFD_REDIS=server.url), "afd: there is no replica of FFN shard 0/2, 1/2")
    assert_refused(afd("layout", 0, AFD_REDIS=server.url), "greater than or equal to 1")
    assert_refused(afd("layout", AFD_REDIS="redis://127.0.0.1:1"), "no Redis answers")


def test_who_would_leave_a_mesh_without_its_shards_is_refused_in_a_sentence(server: Server) -> None:
    async def set_layout() -> None:
        async with connect(server.url) as redis:
            await Registry(redis, lease_s=5.0, mesh="somewhere").keep_layout(Layout(7, 3))

    assert require(server.url, None, "somewhere", [2]) == "mesh somewhere has no layout yet"
    asyncio.run(set_layout())
    assert require(server.url, None, "somewhere", [2, 3]) == "mesh somewhere has 3 FFN shards, in epoch 7"
    with pytest.raises(Mismatch, match="has 3 FFN shards, in epoch 7, and nobody would serve with 2 or 4 alone: keep"):
        require(server.url, None, "somewhere", [2, 4])
    assert "and nothing is refused: no Redis answers" in require("redis://127.0.0.1:1", None, "somewhere", [2], 0)
    both = CliRunner().invoke(app, ["layout", "2", "--require", "3", "--redis", server.url])
    assert (both.exit_code, "give one of them" in both.stderr) == (2, True)


def test_who_asks_for_the_layout_waits_for_redis(tmp_path: Path) -> None:
    late = Server(tmp_path)
    begin = threading.Timer(0.3, late.start)
    begin.start()
    try:
        assert require(late.url, None, "somewhere", [2]) == "mesh somewhere has no layout yet"
    finally:
        begin.join()
        late.kill()


async def test_a_mesh_that_has_no_layout_yet_is_known_by_its_gateway(server: Server) -> None:
    gateway = replace(REPLICA, role="gateway", replica_id="gateway-0")
    async with connect(server.url) as redis, Registry(redis, 5.0, "somewhere").registered(lambda: gateway):
        told = await asyncio.to_thread(show_or_change, server.url, None, "somewhere", None)
    assert told == "mesh somewhere has no layout yet"


def test_requests_go_on_while_the_ffn_is_split_anew(
    make_model: Callable[[int], Model], start_mesh: StartMesh, server: Server
) -> None:
    """As on a cluster: another set comes up, the layout changes, the first set ends."""
    model = make_model(4)

    async def run(mesh: Mesh) -> None:
        before = [service for service in mesh.services if service.role == "ffn"]
        async with streams(mesh, model), mesh.registry() as registry:
            for shard in range(3):
                mesh.services.append(mesh.new_service(Seat("ffn", (shard, 3))))
                mesh.services[-1].settings["threads"] = 1
                mesh.services[-1].start()
            await mesh.until_ready(mesh.services, registry)
            told = await asyncio.to_thread(afd, "layout", 3, AFD_REDIS=server.url, AFD_MESH=mesh.name)
            assert told.stdout == f"mesh {mesh.name} has 3 FFN shards, in epoch 2\n"
            await asyncio.sleep(1)
            for service in before:
                service.terminate()
                await asyncio.to_thread(service.wait, 10)
                mesh.services.remove(service)
            await asyncio.sleep(1)

    with start_mesh(model.path, 1, 2, redis=server.url, drain_timeout_s=0.5) as mesh:
        asyncio.run(run(mesh))
