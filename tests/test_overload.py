"""More than there is room for is refused at the door, with when to come again; what is inside does not notice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc.aio import Metadata

from afd import Client
from afd.client import Stream
from afd.errors import DeadlineExceeded, InvalidRequest, Overloaded, PeerUnavailable
from afd.mesh import Mesh
from afd.model.sampling_params import SamplingParams
from afd.scrape import scrape
from afd.urgency import NOT_URGENT
from services.gateway.generation import Generator, Request
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


def begin(client: Client, priority: int = 0) -> Stream:
    return client.generate(PROMPT, max_tokens=300, ignore_eos=True, priority=priority)


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


def num_sequences(mesh: Mesh) -> int:
    """What all attention replicas decode or let wait."""
    totals = counted(mesh)
    return totals["afd_sequences_running"] + totals["afd_sequences_waiting"]


async def test_a_call_is_taken_with_all_its_sequences_or_refused_with_all(mesh: Mesh, model: Model) -> None:
    body = {"model": model.path.name, "prompt": [PROMPT] * 4, "max_tokens": 5, "stream": True}

    def post() -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{mesh.http_url}/v1/completions", json.dumps(body).encode(), headers)
        return urllib.request.urlopen(request, timeout=30)

    async with Client(mesh.gateway.address) as client:
        asked = asyncio.create_task(collect(client.generate(PROMPT, max_tokens=200, ignore_eos=True, n=16)))
        async with asyncio.timeout(10):
            while await asyncio.to_thread(num_sequences, mesh) < 16:
                await asyncio.sleep(0.01)
        assert Counter(token.choice for token in await asked) == dict.fromkeys(range(16), 200)
        assert Counter((await asyncio.to_thread(post)).read().split(b"\n"))[b"data: [DONE]"] == 1
        asking = [asyncio.create_task(collect(begin(client))) for _ in range(4)]
        await asyncio.sleep(0.3)
        with pytest.raises(Overloaded):
            await anext(client.generate(PROMPT, n=3))
        with pytest.raises(urllib.error.HTTPError) as raised:
            await asyncio.to_thread(post)
        assert (raised.value.code, raised.value.headers["Retry-After"]) == (429, "1")
        await asyncio.gather(*asking)


class FullReplica:
    """An attention replica, as a gateway sees it, that has no room; and the balancer, which has no other one."""

    def __init__(self) -> None:
        self.asked: list[int] = []  # for which choices
        self.stub, self.replica, self.replica_id, self.fingerprint = self, self, "attention-0", ""

    def Decode(self, request: Any, **options: Any) -> FullReplica:
        self.asked.append(request.choice)
        return self

    async def initial_metadata(self) -> Metadata:
        return Metadata()

    async def read(self) -> None:
        await asyncio.sleep(0.05)
        raise grpc.aio.AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, Metadata(), Metadata(), "no room")

    def cancel(self) -> None:
        pass

    def choose(self, lost: set[Any]) -> FullReplica | None:
        return None if lost else self

    @contextlib.asynccontextmanager
    async def counted(self, entry: FullReplica) -> AsyncIterator[None]:
        yield


def test_what_is_wrong_is_said_also_while_nobody_is_ready() -> None:
    config: Any = SimpleNamespace(vocab_size=100)
    balancer: Any = SimpleNamespace(num_ready=0, max_context_tokens=0)
    nobody: Any = None
    generator = Generator(config, nobody, balancer, nobody, timeout_s=10, failover_timeout_s=10, max_requests=10)
    wrong = [
        ("x y", PROMPT, {}),
        ("", [], {}),
        ("", [100], {}),
        ("", PROMPT, {"n": 0}),
        ("", PROMPT, {"max_tokens": 0}),
    ]
    for request_id, prompt, params in wrong:
        with pytest.raises(InvalidRequest):
            generator.admit(request_id, prompt, SamplingParams(**params), NOT_URGENT)
    with pytest.raises(PeerUnavailable, match="no attention replica is ready"):
        generator.admit("", PROMPT, SamplingParams(), NOT_URGENT)


async def test_where_there_is_no_room_for_the_first_sequence_of_a_call_the_others_are_not_begun() -> None:
    async def written(*arguments: Any) -> int:
        return 1

    replica: Any = FullReplica()
    tokenizer: Any = SimpleNamespace(stream=lambda: None)
    store: Any = SimpleNamespace(create=written, finish=written)
    config: Any = None
    generator = Generator(config, tokenizer, replica, store, timeout_s=10, failover_timeout_s=10, max_requests=10)
    request = Request("r1", PROMPT, SamplingParams(n=3, max_tokens=5, seed=1), NOT_URGENT)
    async with generator.opened(request) as arriving:
        with pytest.raises(Overloaded, match="no room"):
            await anext(arriving)
    assert replica.asked == [0]


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


def test_the_more_urgent_request_takes_the_place_of_another_whose_tokens_are_the_same_for_it(
    model: Model, start_mesh: StartMesh
) -> None:
    async def run(mesh: Mesh) -> None:
        async with Client(mesh.gateway.address) as client:
            running = asyncio.create_task(collect(begin(client, priority=1)))
            waiting = asyncio.create_task(collect(begin(client, priority=1)))
            await asyncio.sleep(0.3)
            urgent = await collect(client.generate([8, 9], max_tokens=10, ignore_eos=True))
            assert not any(asked.done() for asked in (running, waiting))
            model.check_greedy([8, 9], [token.id for token in urgent], [token.logprob for token in urgent])
            for tokens in await asyncio.gather(running, waiting):
                model.check_greedy(PROMPT, [token.id for token in tokens], [token.logprob for token in tokens])

    with start_mesh(model.path, 1, 1, max_sequences=1, max_waiting=8) as mesh:
        asyncio.run(run(mesh))
        assert counted(mesh)["afd_preemptions"] >= 1


async def test_a_request_ends_with_its_deadline_and_what_was_left_of_it_is_not_computed(mesh: Mesh) -> None:
    before = counted(mesh)
    async with Client(mesh.gateway.address) as client:
        stream = client.generate(PROMPT, max_tokens=900, ignore_eos=True, timeout_s=0.4)
        await anext(stream)
        with pytest.raises(DeadlineExceeded):
            await collect(stream)
        with pytest.raises(DeadlineExceeded):
            await collect(client.generate(PROMPT, max_tokens=900, timeout_s=0))
        await asyncio.sleep(0.2)
        assert len(await collect(begin(client))) == 300
    after = counted(mesh)
    assert after["afd_sequences_dropped"] == before["afd_sequences_dropped"] + 1
    assert after["afd_tokens_saved"] >= before["afd_tokens_saved"] + 300


def test_the_deadline_of_http_is_a_status_or_the_streams_last_event(mesh: Mesh, model: Model) -> None:
    body = {"model": model.path.name, "prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "timeout_s": 0.3}

    def post(**changes: Any) -> bytes:
        content = json.dumps(body | changes).encode()
        request = urllib.request.Request(
            f"{mesh.http_url}/v1/completions", content, {"Content-Type": "application/json"}
        )
        return bytes(urllib.request.urlopen(request, timeout=30).read())

    with pytest.raises(urllib.error.HTTPError) as raised:
        post()
    assert raised.value.code == 504
    assert "took longer than its deadline allows" in json.loads(raised.value.read())["error"]["message"]
    *events, last = post(stream=True).decode().strip().split("\n\n")
    assert len(events) > 1
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"


def counted(mesh: Mesh) -> Counter[str]:
    """What all attention replicas have counted, whatever the labels."""
    totals: Counter[str] = Counter()
    for service in mesh.services:
        if service.role == "attention":
            assert service.replica is not None
            for name, value in scrape(service.replica.metrics_address).items():
                totals[name.partition("/")[0]] += int(value)
    return totals


async def collect(stream: Stream) -> list[Any]:
    return [token async for token in stream]
