"""The FFN of a running mesh is split anew: its requests do not notice."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator

import grpc.aio

from afd import Client, Token
from afd.mesh import Mesh, Service
from afd.state.connection import connect
from afd.state.registry import Registry
from afd.v1 import ffn_pb2 as pb
from afd.v1 import ffn_pb2_grpc
from tests.conftest import Model, StartMesh

PROMPT = [5, 6, 7]


@contextlib.contextmanager
def shards(mesh: Mesh, num_shards: int) -> Iterator[list[Service]]:
    """A complete set of further FFN replicas; what is left of it at the end is killed."""
    (first, *_) = [service for service in mesh.services if service.role == "ffn"]
    ports = {"grpc_port": 0, "metrics_port": 0}
    services = [
        Service("ffn", 10 * num_shards + shard, {**first.settings, **ports, "shard": f"{shard}/{num_shards}"})
        for shard in range(num_shards)
    ]
    for service in services:
        service.start()
    try:
        yield services
    finally:
        for service in services:
            assert service.process is not None
            service.process.kill()
            service.process.wait()


async def until_connected(registry: Registry, num_shards: int) -> None:
    """Every replica of these shards has a pair."""
    async with asyncio.timeout(60):
        while True:
            found = [one for one in await registry.replicas("ffn") if one.shard and one.shard[1] == num_shards]
            if len(found) == num_shards and all([await num_streams(one.address) for one in found]):
                return
            await asyncio.sleep(0.1)


async def num_streams(address: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        return int((await ffn_pb2_grpc.FfnServiceStub(channel).GetFfnLoad(pb.GetFfnLoadRequest())).num_streams)


def test_requests_go_on_while_the_ffn_is_split_anew(make_model: Callable[[int], Model], start_mesh: StartMesh) -> None:
    model = make_model(4)

    async def ask(mesh: Mesh, enough: asyncio.Event) -> list[list[Token]]:
        answers = []
        async with Client(mesh.gateway.address) as client:
            while not enough.is_set():
                answers.append([token async for token in client.generate(PROMPT, max_tokens=300, ignore_eos=True)])
        return answers

    async def run(mesh: Mesh) -> list[list[Token]]:
        enough = asyncio.Event()
        asking = asyncio.create_task(ask(mesh, enough))
        async with connect(mesh.redis_url) as redis:
            registry = Registry(redis, 5.0, mesh.name)
            with shards(mesh, 3):
                await until_connected(registry, 3)
                assert (await registry.set_layout(3)).epoch == 2
                await asyncio.sleep(0.5)
                for service in mesh.services:
                    if service.role == "ffn" and service.process:
                        service.process.send_signal(signal.SIGTERM)
                await asyncio.sleep(1.0)
                enough.set()
                return await asking

    with start_mesh(model.path, 1, 2) as mesh:
        answers = asyncio.run(run(mesh))
    for tokens in answers:
        assert len(tokens) == 300
        model.check_greedy(PROMPT, [token.id for token in tokens], [token.logprob for token in tokens])
