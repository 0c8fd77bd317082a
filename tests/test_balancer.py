"""Which attention replica a sequence goes to, and what of that is in the leases."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from afd.client import Client, Token
from afd.forkserver import ForkServer
from afd.mesh import Mesh, MeshOptions, running_mesh
from afd.model.random_checkpoint import ModelSizes, make_checkpoint
from afd.state.connection import connect
from afd.state.registry import Registry, Replica, Role
from services.gateway.balancer import Balancer
from tests.conftest import StartMesh
from tests.redis_servers import one_server

LEASE_S = 1.0
NEVER_ENDS = 16_000
SMALL = Replica("attention", "small", "127.0.0.1:1", "config-weights", pid=1, capacity={"sequences": 4})
LARGE = replace(SMALL, replica_id="large", incarnation="large", capacity={"sequences": 8})
GATEWAY = Replica("gateway", "gateway-1", "127.0.0.1:1", "config-weights", pid=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose contexts are too long for a stream to end while it is looked at."""
    path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(path, ModelSizes(max_seq_len=NEVER_ENDS + 10))
    return path


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[Registry]:
    with one_server(tmp_path) as server:
        async with connect(server.url) as redis:
            yield Registry(redis, LEASE_S)


@contextlib.asynccontextmanager
async def balancing(registry: Registry, replica_id: str) -> AsyncIterator[Balancer]:
    balancer = Balancer(registry, "config", replica_id)
    following = [asyncio.create_task(balancer.follow()), asyncio.create_task(balancer.follow_gateways())]
    try:
        yield balancer
    finally:
        for task in following:
            task.cancel()
        await asyncio.wait(following)


async def until_ready(balancer: Balancer, number: int) -> None:
    async with asyncio.timeout(5):
        while balancer.num_ready < number:
            await asyncio.sleep(0.01)


async def test_the_replica_with_the_most_room_for_what_it_can_decode_is_chosen(registry: Registry) -> None:
    async with (
        registry.registered(lambda: SMALL),
        registry.registered(lambda: LARGE),
        balancing(registry, "gateway-0") as balancer,
        contextlib.AsyncExitStack() as sequences,
    ):
        await until_ready(balancer, 2)
        chosen = []
        for _ in range(12):
            entry = balancer.choose()
            assert entry is not None
            await sequences.enter_async_context(balancer.counted(entry))
            chosen.append(entry.replica.replica_id)
        assert (chosen.count("small"), chosen.count("large")) == (4, 8)
        assert chosen[:6].count("small") == 2, "from the start on"


async def test_what_other_gateways_have_counts_and_the_own_lease_does_not(registry: Registry) -> None:
    elsewhere = {LARGE.incarnation: 6}
    other = replace(GATEWAY, sequences_at=elsewhere)
    own = replace(GATEWAY, replica_id="gateway-0", incarnation="own", sequences_at={SMALL.incarnation: 4})
    async with (
        registry.registered(lambda: SMALL),
        registry.registered(lambda: LARGE),
        registry.registered(lambda: own),
        registry.registered(lambda: other),
        balancing(registry, "gateway-0") as balancer,
    ):
        await until_ready(balancer, 2)
        async with asyncio.timeout(5):
            while (entry := balancer.choose()) and entry.replica.replica_id != "small":
                await asyncio.sleep(0.01)
        assert entry is not None
        async with balancer.counted(entry):
            assert balancer.sequences_at == {SMALL.incarnation: 1}


async def test_who_is_not_ready_is_asked_only_if_nobody_else_is_there(registry: Registry) -> None:
    alone = replace(SMALL, is_ready=False)
    async with registry.registered(lambda: alone), balancing(registry, "gateway-0") as balancer:
        async with asyncio.timeout(5):
            while (entry := balancer.choose()) is None:
                await asyncio.sleep(0.01)
        assert entry.replica.replica_id == "small"
        async with registry.registered(lambda: LARGE):
            await until_ready(balancer, 1)
            ready = balancer.choose()
            assert ready is not None
            assert ready.replica.replica_id == "large"


def test_a_lease_of_a_later_version_can_be_read() -> None:
    text = json.dumps({**json.loads(SMALL.encode()), "colour": "green"})
    assert Replica.decode(text.encode()) == SMALL


def begin(client: Client) -> AsyncGenerator[Token, None]:
    return client.generate([3, 1, 4], max_tokens=NEVER_ENDS, ignore_eos=True)


async def replicas(mesh: Mesh, role: Role) -> list[Replica]:
    async with mesh.registry() as registry:
        return await registry.replicas(role)


def test_leases_tell_what_each_replica_can_take_and_has(model: Path, start_mesh: StartMesh) -> None:
    async def look(mesh: Mesh) -> list[list[Replica]]:
        async with Client(mesh.target) as client, contextlib.aclosing(begin(client)) as stream:
            await anext(stream)
            await asyncio.sleep(LEASE_S)
            return [await replicas(mesh, role) for role in ("gateway", "attention", "ffn")]

    with start_mesh(model, 1, 2, lease_s=LEASE_S, max_sequences=7, num_kv_blocks=1500, handoff="inline") as mesh:
        (gateway,), (attention,), ffn = asyncio.run(look(mesh))
    assert attention.capacity == {"sequences": 7, "kv_blocks": 1500}
    assert attention.load["sequences"] == 1
    assert 1 <= attention.load["kv_blocks"] <= 1001
    assert (attention.transports, attention.epoch) == (("inline",), 1)
    assert (gateway.capacity, gateway.load) == ({"requests": 10_000}, {"requests": 1})
    assert gateway.sequences_at == {attention.incarnation: 1}
    for shard in ffn:
        assert (shard.capacity, shard.load["pairs"], shard.epoch) == ({"frame_tokens": 16384}, 1, 1)
        assert {"shm", "inline"} <= set(shard.transports)


def test_two_gateways_share_out_their_sequences(model: Path, fork_server: ForkServer) -> None:
    async def loads(mesh: Mesh) -> list[int]:
        async with contextlib.AsyncExitStack() as stack:
            for address in mesh.target.split(","):
                client = await stack.enter_async_context(Client(address))
                stream = await stack.enter_async_context(contextlib.aclosing(begin(client)))
                await anext(stream)
                await asyncio.sleep(LEASE_S + 1.5)  # until it is in a lease, and that was seen
            return [replica.load["sequences"] for replica in await replicas(mesh, "attention")]

    options = MeshOptions(
        model=model,
        attention=2,
        ffn=0,
        gateways=2,
        dtype="float32",
        threads=1,
        settings={"lease_s": str(LEASE_S), "num_kv_blocks": "1500"},
    )
    with running_mesh(options, fork_server) as mesh:
        assert asyncio.run(loads(mesh)) == [1, 1]
