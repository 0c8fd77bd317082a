"""More than there is room for is refused at the door, with when to come again; what is inside does not notice."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from afd import Client
from afd.client import Stream
from afd.errors import Overloaded
from afd.mesh import Mesh
from tests.conftest import Model, StartMesh

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def model(make_model: Callable[[int], Model]) -> Model:
    return make_model(4)


@pytest.fixture(scope="module")
def mesh(model: Model, start_mesh: StartMesh) -> Iterator[Mesh]:
    """Two attention replicas, each with room for one sequence and one that waits."""
    with start_mesh(model.path, 2, 1, max_sequences=1, max_waiting=1) as mesh:
        yield mesh


def begin(client: Client) -> Stream:
    return client.generate(PROMPT, max_tokens=300, ignore_eos=True)


async def test_sequences_beyond_those_that_may_wait_are_refused(mesh: Mesh, model: Model) -> None:
    async with Client(mesh.gateway.address) as client:
        asking = [asyncio.create_task(collect(begin(client))) for _ in range(4)]
        await asyncio.sleep(0.3)
        with pytest.raises(Overloaded, match="2 sequences are decoded or wait already") as raised:
            await anext(begin(client))
        assert raised.value.retry_after_s == 1
        for tokens in await asyncio.gather(*asking):
            model.check_greedy(PROMPT, [token.id for token in tokens], [token.logprob for token in tokens])
        assert len(await collect(begin(client))) == 300


def test_requests_beyond_those_that_a_gateway_holds_are_refused(model: Model, start_mesh: StartMesh) -> None:
    body = {"model": model.path.name, "prompt": PROMPT, "max_tokens": 5}

    def post(mesh: Mesh) -> int:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{mesh.http_url}/v1/completions", json.dumps(body).encode(), headers)
        return int(urllib.request.urlopen(request, timeout=30).status)

    async def run(mesh: Mesh) -> None:
        async with Client(mesh.gateway.address) as client:
            stream = begin(client)
            await anext(stream)
            with pytest.raises(urllib.error.HTTPError) as raised:
                await asyncio.to_thread(post, mesh)
            assert raised.value.code == 429
            assert raised.value.headers["Retry-After"] == "2"
            assert len(await collect(stream)) == 299
            assert await asyncio.to_thread(post, mesh) == 200

    with start_mesh(model.path, 1, 1, max_requests=1) as mesh:
        asyncio.run(run(mesh))


async def collect(stream: Stream) -> list[Any]:
    return [token async for token in stream]
